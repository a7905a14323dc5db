"""The kernels of `rows`: all logits of a block of queries at once, in fast memory, of the keys that its window reaches.

One program has a row's queries, keys and values of a few heads. Heads stay where they are in memory, side by side:
where a head is narrower than the 128 lanes of a matrix unit, the others' lanes are zeroed in one operand, which
costs nothing, as the unit would be padded to its width. Logits are made transposed, [S Q], so that the softmax's
statistics lie along lanes and no large matrix is transposed, and again in the backward pass, which makes the three
gradients in one kernel of five products. Queries and keys are turned by RoPE as they come, and their gradients turned
back as they go: outside, that would be four more passes over them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flax_encoder.ops.attention.problem import MASKED, kept, visible
from flax_encoder.ops.platform import kernels_are_interpreted

LANES = 128
QUERY_BLOCK, WINDOW_QUERY_BLOCK = 256, 128  # fewer where a window is, as a block sees what any of its queries sees
KEY_TILE = 16  # rows that lie together in memory in bfloat16
_WIDEST = LANES * 768  # numbers of a row a program takes: 12 heads of 64 at length 128


class Plan(NamedTuple):
    scale: float
    dropout_rate: float
    window: tuple[int, int] | None
    num_heads: int
    head_dim: int
    is_interpreted: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def attend_rows(query, key, value, segments, tables, scalars, plan):
    return _forward(query, key, value, segments, tables, scalars, plan)[0]


def _forward(query, key, value, segments, tables, scalars, plan):
    B, T, _ = query.shape
    out = jax.ShapeDtypeStruct(query.shape, query.dtype)
    log_totals = jax.ShapeDtypeStruct((B, query.shape[2] // plan.head_dim, 1, T), jnp.float32)
    arrays = query, key, value
    out, log_total = _call(_forward_kernel, plan, scalars, segments, tables, arrays, (), (out, log_totals))
    return out, (*arrays, segments, tables, scalars, out, log_total)


def _backward(plan, residuals, d_out):
    query, key, value, segments, tables, scalars, out, log_total = residuals
    likes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value))
    arrays = query, key, value, out, d_out
    gradients = _call(_backward_kernel, plan, scalars, segments, tables, arrays, (log_total,), likes, sums=2)
    return (*gradients, None, None, None)


attend_rows.defvjp(_forward, _backward)


def _blocks(plan: Plan, T: int) -> list[tuple[slice, slice]]:
    """Blocks of queries, and the keys that each sees, in whole tiles."""
    size = QUERY_BLOCK if plan.window is None else WINDOW_QUERY_BLOCK
    size = size if T % size == 0 else LANES
    left, right = plan.window or (T, T)
    blocks = []
    for start in range(0, T, size):
        first, last = start - left, start + size + right
        keys = slice(max(0, first // KEY_TILE * KEY_TILE), min(T, -(-last // KEY_TILE) * KEY_TILE))
        blocks.append((slice(start, start + size), keys))
    return blocks


def _call(kernel, plan: Plan, scalars, segments, tables, arrays, statistics, out_shape, sums=0):
    """Run `kernel` over rows and groups of heads; tables are [B T unit], arrays [B T D], statistics [B N 1 T].

    `sums` is how many arrays [T unit] a program adds up in.
    """
    B, T, D = arrays[0].shape
    unit = max(LANES, plan.head_dim)
    width = max(w for w in range(unit, D + 1, unit) if D % w == 0 and (w == unit or w * T <= _WIDEST))
    row = pl.BlockSpec((1, T, width), lambda b, n, *_: (b, 0, n))
    statistic = pl.BlockSpec((1, width // plan.head_dim, 1, T), lambda b, n, *_: (b, n, 0, 0))
    specs = [pl.BlockSpec((1, 2, T), lambda b, n, *_: (b, 0, 0))]
    specs += [pl.BlockSpec((1, T, unit), lambda b, n, *_: (b, 0, 0))] * len(tables)
    specs += [row] * len(arrays) + [statistic] * len(statistics)
    pairs = sum((queries.stop - queries.start) * (keys.stop - keys.start) for queries, keys in _blocks(plan, T))
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, D // width),
            in_specs=specs,
            out_specs=tuple(row if len(x.shape) == 3 else statistic for x in out_shape),
            scratch_shapes=[pltpu.VMEM((T, unit), jnp.float32)] * sums,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=plan.is_interpreted,
        name=f"{kernel.__name__.strip('_')}_of_{pairs}_pairs",  # which benchmarks/estimate.py reads
    )(scalars, segments, *tables, *arrays, *statistics)


def _dot(a, b, contract: tuple[int, int] = (1, 0)):
    if kernels_are_interpreted():  # on CPUs, where XLA lacks some bfloat16 products; float32 holds theirs exactly
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    dims = ((contract[0],), (contract[1],)), ((), ())
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _transposed(x):
    """Through float32, whose tiles can be transposed whatever the dtype."""
    return x.astype(jnp.float32).T.astype(x.dtype)


class _Heads:
    """The heads of one program: their lanes, and their logits' places."""

    def __init__(self, plan: Plan, scalars_ref, segments_ref, table_refs, width: int):
        self.plan, self.scalars_ref, self.T = plan, scalars_ref, segments_ref.shape[2]
        self.query_segments = segments_ref[0, 0:1, :]
        # One column of the transpose of equal rows, since a vector cannot be turned by itself.
        self.key_segments = jnp.broadcast_to(segments_ref[0, 1:2, :], (LANES, self.T)).T[:, :1]
        self.table_refs = table_refs
        self.row = scalars_ref[2] + pl.program_id(0)
        self.head = scalars_ref[3] + pl.program_id(1) * (width // plan.head_dim)
        self.blocks = _blocks(plan, self.T)
        self.unit = max(LANES, plan.head_dim)
        self.per_unit = self.unit // plan.head_dim

    def own(self, x, j: int, axis: int = 1):
        """x with the lanes of the unit's other heads zeroed."""
        if self.per_unit == 1:
            return x
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
        return jnp.where((lane >= j * self.plan.head_dim) & (lane < (j + 1) * self.plan.head_dim), x, jnp.zeros_like(x))

    def turned(self, x, block: slice, way: int = 1):
        """x of those places turned by RoPE, or back; as `apply_rope` does it."""
        if not self.table_refs:
            return x
        cos, sin = (ref[0, block, :] for ref in self.table_refs)
        x32, half = x.astype(jnp.float32), self.plan.head_dim // 2
        swapped = pltpu.roll(x32, half, 1)
        if self.per_unit > 1:
            lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
            swapped = jnp.where(lane % self.plan.head_dim < half, pltpu.roll(x32, self.unit - half, 1), swapped)
        return (x32 * cos + way * swapped * sin).astype(x.dtype)

    def logits(self, key, query, queries: slice, keys: slice):
        """Transposed, [keys, queries]."""
        segments = self.query_segments[:, queries], self.key_segments[keys]
        mask = visible(*segments, self.plan.window, *_indices(queries, keys))
        return jnp.where(mask, self.plan.scale * _dot(key, query, (1, 1)), MASKED)

    def dropped(self, head: int, queries: slice, keys: slice):
        """A function that zeroes what dropout drops, the same each time."""
        plan, words = self.plan, self.scalars_ref
        if plan.dropout_rate == 0.0:
            return lambda x: x
        words = tuple(jax.lax.bitcast_convert_type(words[i], jnp.uint32) for i in range(2))
        places = self.row, self.head + head, *_indices(queries, keys)
        keep = kept(words, plan.dropout_rate, (plan.num_heads, self.T), *places)
        return lambda x: jnp.where(keep, x, 0.0)


def _indices(queries: slice, keys: slice):
    query = queries.start + jax.lax.broadcasted_iota(jnp.int32, (1, queries.stop - queries.start), 1)
    return query, keys.start + jax.lax.broadcasted_iota(jnp.int32, (keys.stop - keys.start, 1), 0)


def _forward_kernel(plan, scalars_ref, segments_ref, *refs):
    *table_refs, query_ref, key_ref, value_ref, out_ref, log_total_ref = refs
    width = query_ref.shape[2]
    heads = _Heads(plan, scalars_ref, segments_ref, table_refs, width)
    for u in range(width // heads.unit):
        lanes = slice(u * heads.unit, (u + 1) * heads.unit)
        key = heads.turned(key_ref[0, :, lanes], slice(None))
        for queries, keys in heads.blocks:
            query, out = heads.turned(query_ref[0, queries, lanes], queries), 0.0
            value_transposed = _transposed(value_ref[0, keys, lanes])
            for j in range(heads.per_unit):
                logits = heads.logits(key[keys], heads.own(query, j), queries, keys)
                # A query that sees nothing stays below this, and its weights vanish.
                top = jnp.maximum(logits.max(0, keepdims=True), MASKED / 2)
                weights = jnp.exp(logits - top)
                total = jnp.maximum(weights.sum(0, keepdims=True), 1e-30)
                n = u * heads.per_unit + j
                log_total_ref[0, n, :, queries] = top + jnp.log(total)
                weights = heads.dropped(n, queries, keys)(weights).astype(key.dtype)
                out += _dot(heads.own(value_transposed, j, 0), weights) / (total * (1.0 - plan.dropout_rate))
            out_ref[0, queries, lanes] = out.T.astype(out_ref.dtype)


def _backward_kernel(plan, scalars_ref, segments_ref, *refs):
    *table_refs, query_ref, key_ref, value_ref, out_ref, d_out_ref, log_total_ref, dq_ref, dk_ref, dv_ref = refs[:-2]
    sum_refs = refs[-2:]
    width = query_ref.shape[2]
    heads = _Heads(plan, scalars_ref, segments_ref, table_refs, width)
    for u in range(width // heads.unit):
        lanes = slice(u * heads.unit, (u + 1) * heads.unit)
        key, value = heads.turned(key_ref[0, :, lanes], slice(None)), value_ref[0, :, lanes]
        for ref in sum_refs:
            ref[...] = jnp.zeros_like(ref)
        for queries, keys in heads.blocks:
            query, out, d_out = (ref[0, queries, lanes] for ref in (query_ref, out_ref, d_out_ref))
            query = heads.turned(query, queries)
            products = out.astype(jnp.float32) * d_out.astype(jnp.float32)
            d_out = (d_out.astype(jnp.float32) / (1.0 - plan.dropout_rate)).astype(query.dtype)
            own_key, own_value = key[keys], value[keys]
            key_transposed = _transposed(own_key)
            d_query = d_key = d_value = 0.0
            for j in range(heads.per_unit):
                n = u * heads.per_unit + j
                own_query, own_d_out = heads.own(query, j), heads.own(d_out, j)
                # Summed over lanes by a transpose, so that it lies along them as the statistics do.
                delta = heads.own(products, j).T.sum(0, keepdims=True)
                dropped = heads.dropped(n, queries, keys)
                logits = heads.logits(own_key, own_query, queries, keys)
                weights = jnp.exp(logits - log_total_ref[0, n, :, queries])
                d_logits = weights * (dropped(_dot(own_value, own_d_out, (1, 1))) - delta)
                d_logits = d_logits.astype(query.dtype)
                d_key += _dot(d_logits, own_query)
                d_value += _dot(dropped(weights).astype(query.dtype), own_d_out)
                d_query += _dot(heads.own(key_transposed, j, 0), d_logits)
            for ref, x in zip(sum_refs, (d_key, d_value), strict=True):
                ref[keys, :] += x
            dq_ref[0, queries, lanes] = heads.turned((plan.scale * d_query).T, queries, -1).astype(dq_ref.dtype)
        d_key, d_value = (ref[...] for ref in sum_refs)
        dk_ref[0, :, lanes] = heads.turned(plan.scale * d_key, slice(None), -1).astype(dk_ref.dtype)
        dv_ref[0, :, lanes] = d_value.astype(dv_ref.dtype)
