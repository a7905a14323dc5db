"""The mesh, and the sharding of everything that crosses a jit boundary."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flax_encoder.config import ConfigError, MeshConfig
from flax_encoder.data.rows.targets import HOST_FIELDS
from flax_encoder.nn.partition import abstract_model, partition_spec

BATCH_SPEC = PartitionSpec(("data", "fsdp"))


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices.

    Raises:
      ConfigError: the axes' product is not the number of devices.

    Example:
      >>> make_mesh(MeshConfig(), devices=jax.devices()[:1]).shape["data"]
      1
    """
    devices = devices or jax.devices()
    data = config.data if config.data > 0 else max(1, len(devices) // (config.fsdp * config.tensor))
    if (product := data * config.fsdp * config.tensor) != len(devices):
        raise ConfigError(
            f"the mesh must use every device: data {data} x fsdp {config.fsdp} x tensor {config.tensor} is {product}, "
            f"and there are {len(devices)}. On a CPU, XLA_FLAGS=--xla_force_host_platform_device_count={product} "
            f"gives {product} virtual devices."
        )
    # Auto: the compiler propagates shardings from the jit boundary and `constrain`; the default would be Explicit.
    return jax.make_mesh(
        (data, config.fsdp, config.tensor), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=devices
    )


def logical_axes(make_model: Callable[[], nnx.Module]) -> dict[str, Any]:
    """The names of every parameter's axes, shaped like the parameters; one without names is an error.

    Example:
      >>> config = EncoderConfig(vocab_size=128, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32)
      >>> logical_axes(lambda: MaskedLM(config, rngs=nnx.Rngs(0)))["encoder"]["embedding"]["token"]
      ('vocab', 'embed')
    """
    names: dict[tuple, Any] = {}
    for path, leaf in nnx.to_flat_state(abstract_model(make_model)[1]):
        axes = leaf.get_metadata().get("out_sharding")
        if axes is None or len(axes) != len(leaf.shape):
            raise ValueError(
                f"every parameter axis needs a logical name: {'.'.join(map(str, path))} has shape {leaf.shape} and "
                f"names {axes}. Make it with flax_encoder.nn.partition.param."
            )
        names[path] = tuple(axes)
    return nnx.to_pure_dict(nnx.from_flat_state({path: nnx.Param(axes) for path, axes in names.items()}))


def sharding_tree(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """A NamedSharding a parameter, from its logical axes.

    Raises:
      ConfigError: a mesh axis that does not divide the dimension it splits, with the parameter's name.
    """

    def one(path, names, shape):
        spec = partition_spec(*names)
        for size, mesh_axis, name in zip(shape.shape, spec, names, strict=True):
            parts = mesh.shape[mesh_axis] if mesh_axis else 1
            if size % parts:
                raise ConfigError(
                    f"mesh.{mesh_axis} must divide the {name} axis of {jax.tree_util.keystr(path)}: got {parts} for "
                    f"{size}; divisors of {size} do."
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))


def spread(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Split an array that has no logical axes: each mesh axis that splits parameters takes the first dimension that it
    divides and no other has. Vectors, and what no mesh axis divides, are copied."""
    spec: list[str | None] = [None] * len(shape)
    for mesh_axis in ("fsdp", "tensor") if len(shape) > 1 else ():
        free = (i for i, size in enumerate(shape) if spec[i] is None and size % mesh.shape[mesh_axis] == 0)
        if (i := next(free, None)) is not None:
            spec[i] = mesh_axis
    return NamedSharding(mesh, PartitionSpec(*spec))


def check_batch(batch_size: int, num_microbatches: int, mesh: Mesh) -> None:
    """Every microbatch must divide over the devices that split rows, and each process must have rows of its own."""
    if jax.local_device_count() % mesh.shape["tensor"] and jax.process_count() > 1:
        raise ConfigError(
            f"the tensor axis must lie within a process, which has rows of its own: got mesh.tensor "
            f"{mesh.shape['tensor']} for {jax.local_device_count()} devices a process."
        )
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = parts * num_microbatches
    if batch_size % unit:
        below = batch_size // unit * unit
        ways = f"{below} and {below + unit} do" if below else f"{unit} does"
        raise ConfigError(
            f"batch_size must divide over data x fsdp devices and microbatches: got {batch_size} for {parts} x "
            f"{num_microbatches}; {ways}."
        )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch, onto its devices; fields that the host alone reads stay there.

    Example:
      >>> mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
      >>> put_batch({"tokens": np.zeros((2, 8), np.int32)}, mesh)["tokens"].shape
      (2, 8)
    """
    sharding = NamedSharding(mesh, BATCH_SPEC)
    batch = {name: rows for name, rows in batch.items() if name not in HOST_FIELDS}
    if jax.process_count() == 1:  # all arrays in one call, which takes half the time
        return jax.device_put(batch, sharding)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
