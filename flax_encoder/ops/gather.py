"""Gathers: the vectors of tokens from a table, and of a few tokens from rows.

A compiler splits a gather over a mesh by guesses, some of which move whole batches. Here each device reads its own.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from flax_encoder.ops.mesh import BATCH_AXES, LENGTH_AXES, is_spread, part_index, parts, splitting


def take_vectors(
    table: Float[Array, "V E"],
    numbers: Int[Array, "B T"],
    table_axes: tuple[str | None, str | None] = (None, None),
    token_axes: tuple[str, ...] | str = LENGTH_AXES,
) -> Float[Array, "B T E"]:
    """The table's rows of these numbers; of one beyond it, NaN.

    Args:
      table_axes: those of the mesh that split the table's rows and its vectors. The vectors are brought together, as
        any parameter's are for its layer; of the rows each device reads its own, and the sum has every one.
      token_axes: those that split T in the result.
    """
    if not is_spread():
        return jnp.take(table, numbers, axis=0)
    mesh = jax.sharding.get_abstract_mesh()
    rows, width = (splitting(mesh, (a,) if a else (), n) for a, n in zip(table_axes, table.shape, strict=True))
    token_axes = (token_axes,) if isinstance(token_axes, str) else token_axes
    batch, length = splitting(mesh, BATCH_AXES, numbers.shape[0]), splitting(mesh, token_axes, numbers.shape[1]) or ()
    # Devices that have the table's rows between them read all tokens that they have between them.
    is_scattered = rows is not None and length[-len(rows) :] == rows
    read = length[: -len(rows)] if rows and is_scattered else length
    is_beyond = (numbers < 0) | (numbers >= table.shape[0])

    def own(table, numbers, is_beyond):
        table = jax.lax.all_gather(table, width, axis=1, tiled=True) if width else table
        at = numbers - part_index(mesh, rows) * table.shape[0]
        is_own = (at >= 0) & (at < table.shape[0])
        found = jnp.where(is_own[..., None], jnp.take(table, jnp.where(is_own, at, 0), axis=0), 0.0)
        if rows:
            add = functools.partial(jax.lax.psum_scatter, scatter_dimension=1, tiled=True)
            found = (add if is_scattered else jax.lax.psum)(found, rows)
        return jnp.where(is_beyond[..., None], jnp.nan, found)

    tokens = PartitionSpec(batch, length)
    in_specs = PartitionSpec(rows, width), PartitionSpec(batch, read), tokens
    return jax.shard_map(own, mesh=mesh, in_specs=in_specs, out_specs=tokens, check_vma=False)(
        table, numbers, is_beyond
    )


def take_tokens(hidden: Float[Array, "B T D"], positions: Int[Array, "B M"]) -> Float[Array, "B M D"]:
    """The vectors at each row's positions.

    Where the mesh cuts rows into parts, each device gives those of its own part, and the sum of all has every one: the
    compiler would bring whole rows together first. If the parts divide M, the result is cut likewise.
    """
    if parts(LENGTH_AXES) == 1 or hidden.shape[1] % parts(LENGTH_AXES):
        return jnp.take_along_axis(hidden, positions[..., None], axis=1)
    return _take_from_parts(hidden, positions, hidden.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take_from_parts(hidden, positions, length: int):
    mesh, specs, targets = _specs_of_parts(hidden, positions)

    def own(hidden, positions):
        at, is_own = _own_places(mesh, positions, hidden.shape[1])
        found = jnp.take_along_axis(hidden, at[..., None], axis=1)
        found = jnp.where(is_own[..., None], found, jnp.zeros_like(found))
        if targets is None:
            return jax.lax.psum(found, LENGTH_AXES)
        return jax.lax.psum_scatter(found, LENGTH_AXES, scatter_dimension=1, tiled=True)

    return jax.shard_map(own, mesh=mesh, in_specs=specs[:2], out_specs=specs[2], check_vma=False)(hidden, positions)


def _put_into_parts(length: int, positions, g):
    """Each device adds up what comes to its own part. (A `shard_map`'s own derivative would add up over devices what
    each has whole.)"""
    mesh, specs, targets = _specs_of_parts(g, positions)

    def own(g, positions):
        g = g if targets is None else jax.lax.all_gather(g, LENGTH_AXES, axis=1, tiled=True)
        size = length // parts_of_rows
        at, is_own = _own_places(mesh, positions, size)
        rows = jnp.arange(len(g))[:, None]
        return jnp.zeros((len(g), size, g.shape[-1]), g.dtype).at[rows, at].add(jnp.where(is_own[..., None], g, 0))

    parts_of_rows = parts(LENGTH_AXES)
    run = jax.shard_map(own, mesh=mesh, in_specs=(specs[2], specs[1]), out_specs=specs[0], check_vma=False)
    return run(g, positions), None


_take_from_parts.defvjp(
    lambda hidden, positions, length: (_take_from_parts(hidden, positions, length), positions), _put_into_parts
)


def _specs_of_parts(vectors, positions):
    """(mesh, specs of hidden, positions and targets' vectors, the axes that split targets)."""
    mesh = jax.sharding.get_abstract_mesh()
    batch, targets = splitting(mesh, BATCH_AXES, len(vectors)), splitting(mesh, LENGTH_AXES, positions.shape[1])
    return mesh, (PartitionSpec(batch, LENGTH_AXES), PartitionSpec(batch), PartitionSpec(batch, targets)), targets


def _own_places(mesh, positions, size: int):
    """Where in this device's part of so many tokens each position is, and whether it is there."""
    at = positions - part_index(mesh, LENGTH_AXES) * size
    is_own = (at >= 0) & (at < size)
    return jnp.where(is_own, at, 0), is_own
