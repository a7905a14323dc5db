"""Each device attends for its own rows, heads and queries: what a compiler cannot split, a loop or a kernel, is split
here.

Along the mesh's `context` axis rows are cut into parts of as many tokens. A device has the queries of its part, and is
sent the keys and values that they may see: those of all parts, or within a window those beside its own. Gradients go
back the same way, added up where several devices read the same keys. (Queries stay where they are, as in Llama 3's
context parallelism, Dubey et al., arXiv 2407.21783, section 3.3.2.)
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flax_encoder.ops.attention.problem import Problem
from flax_encoder.ops.mesh import BATCH_AXES, HEAD_AXES, LENGTH_AXES, part_index, parts, splitting

_HALO_UNIT = 64  # tokens: what is beside a part on both sides together fills a TPU's lanes


def over_mesh(attend):
    """`attend` on a device's part of the problem, under `jax.set_mesh`; without a mesh, `attend`."""

    @functools.wraps(attend)
    def wrapped(problem: Problem):
        mesh = jax.sharding.get_abstract_mesh()
        # Within a shard_map the problem is a device's part already.
        if mesh.empty or mesh.manual_axes or mesh.size == 1:
            return attend(problem)
        return _on_each_device(mesh, problem, attend, None)

    return wrapped


def splits_tokens(problem: Problem) -> bool:
    """Whether the mesh at hand cuts the problem's queries and keys into parts."""
    num_parts = parts(LENGTH_AXES)
    return num_parts > 1 and not problem.query.shape[1] % num_parts and not problem.key.shape[1] % num_parts


def over_tokens(problem: Problem, attend: Callable[[Problem], jax.Array]) -> jax.Array:
    """`attend` on a device's own queries and the keys that they may see, of a problem that `splits_tokens`."""
    num_parts, problem = parts(LENGTH_AXES), problem.turned()._replace(lengths=None)
    halo = _halo(problem, num_parts)

    def own_queries(part: Problem) -> jax.Array:
        return _among_neighbours(part, attend, num_parts, halo) if halo else _among_all(part, attend, num_parts)

    return _on_each_device(jax.sharding.get_abstract_mesh(), problem, own_queries, LENGTH_AXES)


def _on_each_device(mesh, problem: Problem, attend, length: tuple[str, ...] | None):
    (B, _, N, _), K = problem.query.shape, problem.key.shape[2]
    batch, heads = splitting(mesh, BATCH_AXES, B), splitting(mesh, HEAD_AXES, K)
    rows, segments = PartitionSpec(batch, length, heads), PartitionSpec(batch, length)
    own = {"query": rows, "key": rows, "value": rows, "dropout_words": PartitionSpec()}
    own |= {"key_segments": PartitionSpec(batch), "lengths": PartitionSpec(batch)}  # not split: every device has them
    if problem.bias is not None:
        rows_of, heads_of, *_ = problem.bias.shape
        own["bias"] = PartitionSpec(batch if rows_of == B > 1 else None, heads if heads_of == N else None, length)
    own["offset_bias"] = PartitionSpec(heads)
    names = (
        "query", "key", "value", "query_segments", "key_segments", "bias", "dropout_words", "rope", "offset_bias",
        "lengths",
    )  # fmt: skip
    names = [name for name in names if getattr(problem, name) is not None]
    specs = [own.get(name, segments) for name in names]
    window = problem.window if problem.has_traced_window else ()

    def own_part(arrays, window):
        part = problem._replace(**dict(zip(names, arrays, strict=True)))
        if window:
            part = part._replace(window=window)
        part = part._replace(first_row=part_index(mesh, batch) * part.query.shape[0])
        return attend(part._replace(first_head=part_index(mesh, heads) * part.query.shape[2]))

    arrays = tuple(getattr(problem, name) for name in names)
    in_specs = tuple(specs), jax.tree.map(lambda _: PartitionSpec(), tuple(window))
    return jax.shard_map(own_part, mesh=mesh, in_specs=in_specs, out_specs=rows, check_vma=False)(
        arrays, tuple(window)
    )


def _among_all(part: Problem, attend, num_parts: int):
    """Own queries among the keys of all parts."""
    T = part.query.shape[1]
    start = jax.lax.axis_index(LENGTH_AXES[0]) * T
    key, value = (jax.lax.all_gather(x, LENGTH_AXES[0], axis=1, tiled=True) for x in (part.key, part.value))
    window = part.window
    if window is not None:  # from a query's index among its own, which is so much less than in the row
        window = tuple(jnp.asarray(w, jnp.int32) for w in (window[0] - start, window[1] + start))
    part = part._replace(first_query=start, num_queries=num_parts * T)
    return attend(part._replace(key=key, value=value, window=window).with_pairs())


def _among_neighbours(part: Problem, attend, num_parts: int, halo: int):
    """Own queries among the keys of their own part and `halo` on either side, as a problem of as many queries as keys,
    which every backend with windows serves; the queries beside the own ones are zeros."""
    axis, T = LENGTH_AXES[0], part.query.shape[1]
    start, length = jax.lax.axis_index(axis) * T, T + 2 * halo

    def with_neighbours(x):
        onward = [(i, i + 1) for i in range(num_parts - 1)]
        before = jax.lax.ppermute(x[:, -halo:], axis, onward)
        after = jax.lax.ppermute(x[:, :halo], axis, [(j, i) for i, j in onward])
        return jnp.concatenate([before, x, after], axis=1)

    def around(x, dim, size):
        return jax.lax.dynamic_slice_in_dim(_padded(x, dim, halo), start, size, axis=dim)

    part = part._replace(first_query=start, num_queries=num_parts * T).with_pairs()
    segments = part.key_segments
    if segments is None:  # beyond a row's ends there is nothing to see
        segments = jnp.ones((part.query.shape[0], num_parts * T), jnp.int32)
    segments = around(segments, 1, length)
    bias = None if part.bias is None else _padded(around(part.bias, 3, length), 2, halo)
    whole = part._replace(
        query=_padded(part.query, 1, halo), key=with_neighbours(part.key), value=with_neighbours(part.value),
        query_segments=segments, key_segments=segments, bias=bias, first_query=0, num_queries=None,
    )  # fmt: skip
    return attend(whole)[:, halo : halo + T]


def _halo(problem: Problem, num_parts: int) -> int:
    """Tokens beside a part that its queries may see; 0 where they are to be given the keys of all parts.

    Those that dropout keeps are told by their key's place in the row, which backends take to be that in the problem.
    """
    T, window = problem.query.shape[1], problem.static_window
    own = T // num_parts
    if window is None or problem.key.shape[1] != T or problem.dropout_words is not None:
        return 0
    halo = -(-max(*window, 1) // _HALO_UNIT) * _HALO_UNIT
    halo = halo if halo <= own else max(*window, 1)
    return halo if halo <= own and own + 2 * halo < T else 0


def _padded(x, dim: int, width: int):
    widths = [(0, 0)] * x.ndim
    widths[dim] = (width, width)
    return jnp.pad(x, widths)


def heads_here(num_heads: int) -> int:
    """How many of `num_heads` heads a device's part of a problem has."""
    return num_heads // num_parts if num_heads % (num_parts := parts(HEAD_AXES)) == 0 else num_heads
