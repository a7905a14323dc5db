"""Vectors by number: of tokens out of a table, and of a few tokens out of rows.

A compiler splits a gather over a mesh by guesses, some of which move whole batches. Here each device reads its own.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from flax_encoder.ops.mesh import BATCH_AXES, LENGTH_AXES, is_spread, part_index, parts, splitting


def take_vectors(
    table: Float[Array, "V E"], numbers: Int[Array, "B T"], table_axes: tuple[str | None, str | None] = (None, None)
) -> Float[Array, "B T E"]:
    """The table's rows of these numbers; of one beyond it, NaN.

    Args:
      table_axes: those of the mesh that split the table's rows and its vectors. The vectors are brought together, as
        any parameter's are for its layer; of the rows each device reads its own, and the sum has every one.
    """
    if not is_spread():
        return jnp.take(table, numbers, axis=0)
    mesh = jax.sharding.get_abstract_mesh()
    rows, width = (splitting(mesh, (a,) if a else (), n) for a, n in zip(table_axes, table.shape, strict=True))
    batch, length = splitting(mesh, BATCH_AXES, numbers.shape[0]), splitting(mesh, LENGTH_AXES, numbers.shape[1])
    is_beyond = (numbers < 0) | (numbers >= table.shape[0])

    def own(table, numbers, is_beyond):
        table = jax.lax.all_gather(table, width, axis=1, tiled=True) if width else table
        at = numbers - part_index(mesh, rows) * table.shape[0]
        is_own = (at >= 0) & (at < table.shape[0])
        found = jnp.where(is_own[..., None], jnp.take(table, jnp.where(is_own, at, 0), axis=0), 0.0)
        return jnp.where(is_beyond[..., None], jnp.nan, jax.lax.psum(found, rows) if rows else found)

    tokens = PartitionSpec(batch, length)
    in_specs = PartitionSpec(rows, width), tokens, tokens
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
    mesh = jax.sharding.get_abstract_mesh()
    batch = splitting(mesh, BATCH_AXES, hidden.shape[0])

    def own(hidden, positions):
        at = positions - part_index(mesh, LENGTH_AXES) * hidden.shape[1]
        is_own = (at >= 0) & (at < hidden.shape[1])
        found = jnp.take_along_axis(hidden, jnp.where(is_own, at, 0)[..., None], axis=1)
        found = jnp.where(is_own[..., None], found, jnp.zeros_like(found))
        if targets is None:
            return jax.lax.psum(found, LENGTH_AXES)
        return jax.lax.psum_scatter(found, LENGTH_AXES, scatter_dimension=1, tiled=True)

    targets = splitting(mesh, LENGTH_AXES, positions.shape[1])
    in_specs, out = (PartitionSpec(batch, LENGTH_AXES), PartitionSpec(batch)), PartitionSpec(batch, targets)
    return jax.shard_map(own, mesh=mesh, in_specs=in_specs, out_specs=out, check_vma=False)(hidden, positions)
