"""The mesh, and the sharding of everything that crosses a jit boundary."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flax_encoder.config import ConfigError, MeshConfig
from flax_encoder.data.rows.targets import HOST_FIELDS
from flax_encoder.nn.partition import abstract_model, partition_spec

BATCH_SPEC = PartitionSpec(("data", "fsdp"))


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A (data, fsdp, tensor, context) mesh over all devices.

    Devices of one slice are neighbours. If a slower network joins several slices, only axes that split rows cross it.

    Raises:
      ConfigError: the axes' product is not the number of devices, or slices would share rows.

    Example:
      >>> make_mesh(MeshConfig(), devices=jax.devices()[:1]).shape["data"]
      1
    """
    devices = devices or jax.devices()
    sizes = config.sizes(len(devices))
    if (product := math.prod(sizes.values())) != len(devices):
        axes = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(
            f"the mesh must use every device: {axes} is {product}, and there are {len(devices)}. On a CPU, "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={product} gives {product} virtual devices."
        )
    # Auto: the compiler propagates shardings from the jit boundary and `constrain`; the default would be Explicit.
    kinds = (AxisType.Auto,) * len(sizes)
    across = slices_along(sizes, len({getattr(device, "slice_index", 0) for device in devices}))
    if math.prod(across.values()) == 1:
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), kinds, devices=devices)
    within = [size // across[name] for name, size in sizes.items()]
    arranged = mesh_utils.create_hybrid_device_mesh(within, list(across.values()), devices)
    return Mesh(arranged, tuple(sizes), axis_types=kinds)


def slices_along(sizes: Mapping[str, int], num_slices: int) -> dict[str, int]:
    """The number of slices that each axis of the mesh spans: `data` spans as many as it can, `fsdp` the rest.

    Raises:
      ConfigError: the two cannot span all slices, so devices of several slices would share rows.
    """
    across = dict.fromkeys(sizes, 1)
    left = num_slices
    for name in ("data", "fsdp"):
        across[name] = math.gcd(sizes[name], left)
        left //= across[name]
    if left > 1:
        raise ConfigError(
            f"a slow network joins slices, so only axes that split rows may cross it: mesh.data x mesh.fsdp must be a "
            f"multiple of the slices; got data {sizes['data']} x fsdp {sizes['fsdp']} for {num_slices} slices. Give "
            f"--mesh.data {num_slices}, and divide the devices of a slice among the other axes."
        )
    return across


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
    """Every microbatch must divide over the devices that split rows."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = parts * num_microbatches
    if batch_size % unit:
        below = batch_size // unit * unit
        ways = f"{below} and {below + unit} do" if below else f"{unit} does"
        raise ConfigError(
            f"batch_size must divide over data x fsdp devices and microbatches: got {batch_size} for {parts} x "
            f"{num_microbatches}; {ways}."
        )


def rows_left_whole(batch: Mapping[str, np.ndarray], mesh: Mesh) -> str | None:
    """A line about rows of a batch whose tokens `mesh.context` does not divide; None if it divides all.

    Those of the encoder are checked before (`config.mesh.check_context`); a decoder's may be as long as its data asks.

    Example:
      >>> rows_left_whole({"segment_ids": np.zeros((2, 8))}, make_mesh(MeshConfig(), devices=jax.devices()[:1])) is None
      True
    """
    parts = mesh.shape["context"]
    lengths = {x.shape[1] for name, x in batch.items() if name.endswith("segment_ids") and x.shape[1] % parts}
    if not lengths:
        return None
    length = max(lengths)
    return (
        f"the decoder's rows of {length} tokens stay whole on every device, since mesh.context {parts} does not divide "
        f"them: --data.target-length {-(-length // parts) * parts} would have them split."
    )


def rows_of_process(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which of so many equal runs of a batch's rows this process has.

    Processes have the same rows where an axis that does not split rows lies across them.

    Raises:
      ConfigError: a process would have rows from several places of a batch, or more than others.
    """
    num_rows = mesh.shape["data"] * mesh.shape["fsdp"]
    row_of = np.arange(num_rows).repeat(mesh.size // num_rows)
    process_of = np.array([device.process_index for device in mesh.devices.flat])
    mine = np.unique(row_of[process_of == jax.process_index()])
    if num_rows % len(mine) or mine[0] % len(mine) or mine[-1] - mine[0] + 1 != len(mine):
        raise ConfigError(
            f"a process has one run of a batch's rows: got parts {', '.join(map(str, mine))} of {num_rows} for process "
            f"{jax.process_index()}. Give mesh axes that are powers of two, or that divide {jax.local_device_count()}, "
            f"the devices of a process."
        )
    return int(mine[0]) // len(mine), num_rows // len(mine)


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
