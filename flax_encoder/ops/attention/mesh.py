"""Each device attends for its own rows and heads: what a compiler cannot split, a loop or a kernel, is split here."""

import functools
import math

import jax
from jax.sharding import PartitionSpec

from flax_encoder.ops.attention.problem import Problem

BATCH_AXES, HEAD_AXES = ("data", "fsdp"), ("tensor",)


def over_mesh(attend):
    """`attend` on a device's part of the problem, under `jax.set_mesh`; without a mesh, `attend`."""

    @functools.wraps(attend)
    def wrapped(problem: Problem):
        mesh = jax.sharding.get_abstract_mesh()
        # Within a shard_map the problem is a device's part already.
        if mesh.empty or mesh.manual_axes or mesh.size == 1:
            return attend(problem)
        (B, _, N, _), K = problem.query.shape, problem.key.shape[2]
        batch, heads = _splitting(mesh, BATCH_AXES, B), _splitting(mesh, HEAD_AXES, K)
        rows, segments = PartitionSpec(batch, None, heads), PartitionSpec(batch)
        own = {"query": rows, "key": rows, "value": rows, "dropout_words": PartitionSpec()}
        if problem.bias is not None:
            rows_of, heads_of, *_ = problem.bias.shape
            own["bias"] = PartitionSpec(batch if rows_of == B > 1 else None, heads if heads_of == N else None)
        names = ("query", "key", "value", "query_segments", "key_segments", "bias", "dropout_words", "rope", "lengths")
        names = [name for name in names if getattr(problem, name) is not None]
        specs = [own.get(name, segments) for name in names]
        window = problem.window if problem.has_traced_window else ()

        def own_part(arrays, window):
            part = problem._replace(**dict(zip(names, arrays, strict=True)))
            if window:
                part = part._replace(window=window)
            part = part._replace(first_row=_index(mesh, batch) * part.query.shape[0])
            return attend(part._replace(first_head=_index(mesh, heads) * part.query.shape[2]))

        arrays = tuple(getattr(problem, name) for name in names)
        in_specs = tuple(specs), jax.tree.map(lambda _: PartitionSpec(), tuple(window))
        return jax.shard_map(own_part, mesh=mesh, in_specs=in_specs, out_specs=rows, check_vma=False)(
            arrays, tuple(window)
        )

    return wrapped


def heads_here(num_heads: int) -> int:
    """How many of `num_heads` heads a device's part of a problem has."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = None if mesh.empty or mesh.manual_axes else _splitting(mesh, HEAD_AXES, num_heads)
    return num_heads // math.prod(mesh.shape[a] for a in axes or ())


def _splitting(mesh, axes: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    """Those of the mesh's axes that split a dimension, if they divide it; otherwise each device has it whole."""
    axes = tuple(a for a in axes if mesh.shape.get(a, 1) > 1)
    return axes if axes and size % math.prod(mesh.shape[a] for a in axes) == 0 else None


def _index(mesh, axes: tuple[str, ...] | None):
    """Which of the parts along `axes` is this device's."""
    index = 0
    for axis in axes or ():
        index = index * mesh.shape[axis] + jax.lax.axis_index(axis)
    return index
