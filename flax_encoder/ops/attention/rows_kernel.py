"""The kernels of `rows`: all logits of a block of queries at once, in fast memory, of the keys that its window reaches.

One program has a row's queries, keys and values of a few heads. Heads stay where they are in memory, side by side:
where a head is narrower than the 128 lanes of a matrix unit, the others' lanes are zeroed in one operand, which
costs nothing, as the unit would be padded to its width. Logits are made transposed, [S Q], so that the softmax's
statistics lie along lanes and no large matrix is transposed, and again in the backward pass, which makes the three
gradients in one kernel of five products.
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
QUERY_BLOCK = 256
_WIDEST = LANES * 768  # numbers of a row a program takes: 12 heads of 64 at length 128


class Plan(NamedTuple):
    scale: float
    dropout_rate: float
    window: tuple[int, int] | None
    num_heads: int
    head_dim: int
    is_interpreted: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend_rows(query, key, value, segments, scalars, plan):
    return _forward(query, key, value, segments, scalars, plan)[0]


def _forward(query, key, value, segments, scalars, plan):
    B, T, _ = query.shape
    out = jax.ShapeDtypeStruct(query.shape, query.dtype)
    log_totals = jax.ShapeDtypeStruct((B, query.shape[2] // plan.head_dim, 1, T), jnp.float32)
    out, log_total = _call(_forward_kernel, plan, scalars, segments, (query, key, value), (), (out, log_totals))
    return out, (query, key, value, segments, scalars, out, log_total)


def _backward(plan, residuals, d_out):
    query, key, value, segments, scalars, out, log_total = residuals
    likes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value))
    arrays = query, key, value, out, d_out
    return (*_call(_backward_kernel, plan, scalars, segments, arrays, (log_total,), likes), None, None)


attend_rows.defvjp(_forward, _backward)


def _block(T: int) -> int:
    return min(QUERY_BLOCK, T) if T % QUERY_BLOCK == 0 else LANES


def _reach(plan: Plan, start: int, block: int, T: int) -> slice:
    if plan.window is None:
        return slice(0, T)
    left, right = plan.window
    return slice(max(0, (start - left) // LANES * LANES), min(T, -(-(start + block + right) // LANES) * LANES))


def _call(kernel, plan: Plan, scalars, segments, arrays, statistics, out_shape):
    """Run `kernel` over rows and groups of heads; arrays are [B T D], statistics [B N 1 T]."""
    B, T, D = arrays[0].shape
    unit = max(LANES, plan.head_dim)
    width = max(w for w in range(unit, D + 1, unit) if D % w == 0 and (w == unit or w * T <= _WIDEST))
    row = pl.BlockSpec((1, T, width), lambda b, n, *_: (b, 0, n))
    statistic = pl.BlockSpec((1, width // plan.head_dim, 1, T), lambda b, n, *_: (b, n, 0, 0))
    specs = [pl.BlockSpec((1, 2, T), lambda b, n, *_: (b, 0, 0))]
    specs += [row] * len(arrays) + [statistic] * len(statistics)
    block = _block(T)
    reaches = [_reach(plan, start, block, T) for start in range(0, T, block)]
    pairs = block * sum(keys.stop - keys.start for keys in reaches)
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, D // width),
            in_specs=specs,
            out_specs=tuple(row if len(x.shape) == 3 else statistic for x in out_shape),
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=plan.is_interpreted,
        name=f"{kernel.__name__.strip('_')}_of_{pairs}_pairs",  # which benchmarks/estimate.py reads
    )(scalars, segments, *arrays, *statistics)


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

    def __init__(self, plan: Plan, scalars_ref, segments_ref, width: int):
        self.plan, self.scalars_ref, self.T = plan, scalars_ref, segments_ref.shape[2]
        self.query_segments = segments_ref[0, 0:1, :]
        # One column of the transpose of equal rows, since a vector cannot be turned by itself.
        self.key_segments = jnp.broadcast_to(segments_ref[0, 1:2, :], (LANES, self.T)).T[:, :1]
        self.row = scalars_ref[2] + pl.program_id(0)
        self.head = scalars_ref[3] + pl.program_id(1) * (width // plan.head_dim)
        self.block = _block(self.T)
        self.unit = max(LANES, plan.head_dim)
        self.per_unit = self.unit // plan.head_dim

    def keys(self, start: int) -> slice:
        """Those that a block of queries can see, in whole lanes."""
        return _reach(self.plan, start, self.block, self.T)

    def own(self, x, j: int, axis: int = 1):
        """x with the lanes of the unit's other heads zeroed."""
        if self.per_unit == 1:
            return x
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
        return jnp.where((lane >= j * self.plan.head_dim) & (lane < (j + 1) * self.plan.head_dim), x, jnp.zeros_like(x))

    def indices(self, start: int):
        keys = self.keys(start)
        query = start + jax.lax.broadcasted_iota(jnp.int32, (1, self.block), 1)
        return query, keys.start + jax.lax.broadcasted_iota(jnp.int32, (keys.stop - keys.start, 1), 0)

    def logits(self, key, query, start: int):
        """Transposed, [keys, queries of a block]."""
        segments = self.query_segments[:, start : start + self.block], self.key_segments[self.keys(start)]
        mask = visible(*segments, self.plan.window, *self.indices(start))
        return jnp.where(mask, self.plan.scale * _dot(key, query, (1, 1)), MASKED)

    def dropped(self, head: int, start: int):
        """A function that zeroes what dropout drops, the same each time."""
        plan, words = self.plan, self.scalars_ref
        if plan.dropout_rate == 0.0:
            return lambda x: x
        words = tuple(jax.lax.bitcast_convert_type(words[i], jnp.uint32) for i in range(2))
        places = self.row, self.head + head, *self.indices(start)
        keep = kept(words, plan.dropout_rate, (plan.num_heads, self.T), *places)
        return lambda x: jnp.where(keep, x, 0.0)


def _forward_kernel(plan, scalars_ref, segments_ref, query_ref, key_ref, value_ref, out_ref, log_total_ref):
    width = query_ref.shape[2]
    heads = _Heads(plan, scalars_ref, segments_ref, width)
    for u in range(width // heads.unit):
        lanes = slice(u * heads.unit, (u + 1) * heads.unit)
        key, value_transposed = key_ref[0, :, lanes], _transposed(value_ref[0, :, lanes])
        for start in range(0, heads.T, heads.block):
            block, keys = slice(start, start + heads.block), heads.keys(start)
            query, out = query_ref[0, block, lanes], 0.0
            for j in range(heads.per_unit):
                logits = heads.logits(key[keys], heads.own(query, j), start)
                # A query that sees nothing stays below this, and its weights vanish.
                top = jnp.maximum(logits.max(0, keepdims=True), MASKED / 2)
                weights = jnp.exp(logits - top)
                total = jnp.maximum(weights.sum(0, keepdims=True), 1e-30)
                n = u * heads.per_unit + j
                log_total_ref[0, n, :, block] = top + jnp.log(total)
                weights = heads.dropped(n, start)(weights).astype(key.dtype)
                own_value = heads.own(value_transposed[:, keys], j, 0)
                out += _dot(own_value, weights) / (total * (1.0 - plan.dropout_rate))
            out_ref[0, block, lanes] = out.T.astype(out_ref.dtype)


def _backward_kernel(
    plan, scalars_ref, segments_ref, query_ref, key_ref, value_ref, out_ref, d_out_ref, log_total_ref, dq_ref, dk_ref,
    dv_ref,
):  # fmt: skip
    width = query_ref.shape[2]
    heads = _Heads(plan, scalars_ref, segments_ref, width)
    for u in range(width // heads.unit):
        lanes = slice(u * heads.unit, (u + 1) * heads.unit)
        key, value = key_ref[0, :, lanes], value_ref[0, :, lanes]
        key_transposed = _transposed(key)
        d_key, d_value = [0.0] * (heads.T // LANES), [0.0] * (heads.T // LANES)
        for start in range(0, heads.T, heads.block):
            block, keys = slice(start, start + heads.block), heads.keys(start)
            query, out, d_out = (ref[0, block, lanes] for ref in (query_ref, out_ref, d_out_ref))
            products = out.astype(jnp.float32) * d_out.astype(jnp.float32)
            d_out = (d_out.astype(jnp.float32) / (1.0 - plan.dropout_rate)).astype(query.dtype)
            d_query = 0.0
            for j in range(heads.per_unit):
                n = u * heads.per_unit + j
                own_query, own_d_out = heads.own(query, j), heads.own(d_out, j)
                # Summed over lanes by a transpose, so that it lies along them as the statistics do.
                delta = heads.own(products, j).T.sum(0, keepdims=True)
                dropped = heads.dropped(n, start)
                weights = jnp.exp(heads.logits(key[keys], own_query, start) - log_total_ref[0, n, :, block])
                d_logits = weights * (dropped(_dot(value[keys], own_d_out, (1, 1))) - delta)
                d_logits = d_logits.astype(query.dtype)
                _add_to(d_key, _dot(d_logits, own_query), keys)
                _add_to(d_value, _dot(dropped(weights).astype(query.dtype), own_d_out), keys)
                d_query += _dot(heads.own(key_transposed[:, keys], j, 0), d_logits)
            dq_ref[0, block, lanes] = (plan.scale * d_query).T.astype(dq_ref.dtype)
        for i, (d_k, d_v) in enumerate(zip(d_key, d_value, strict=True)):
            block = slice(i * LANES, (i + 1) * LANES)
            dk_ref[0, block, lanes] = (plan.scale * d_k).astype(dk_ref.dtype)
            dv_ref[0, block, lanes] = d_v.astype(dv_ref.dtype)


def _add_to(blocks: list, x, keys: slice) -> None:
    """Add the rows of `keys` to blocks of LANES rows each."""
    for i in range(keys.start, keys.stop, LANES):
        blocks[i // LANES] += x[i - keys.start : i - keys.start + LANES]
