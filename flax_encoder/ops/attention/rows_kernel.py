"""The kernels of `rows`: all logits of a block of queries at once, in fast memory, of the keys that its window reaches.

One program has a block of a row's queries, and all its keys and values, of a few heads; those stay from block to block,
and their gradients are added up there. Heads stay where they are in memory, side by side:
where a head is narrower than the 128 lanes of a matrix unit, the others' lanes are zeroed in one operand, which
costs nothing, as the unit would be padded to its width. Of long packed rows queries meet the shortest of a few
stretches of keys that has all of their documents. Logits are made transposed, [S Q], so that the softmax's
statistics lie along lanes and no large matrix is transposed, and again in the backward pass, which makes the three
gradients in one kernel of five products. Queries and keys are turned by RoPE as they come, and their gradients turned
back as they go: outside, that would be four more passes over them.
"""

import functools
import itertools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flax_encoder.ops.attention.problem import MASKED, kept, visible
from flax_encoder.ops.platform import kernels_are_interpreted, precision

LANES = 128
KEY_TILE = 16  # rows that lie together in memory in bfloat16
_MOST_LOGITS = 2**20  # of a head in one program with more than one part, which are code: its loops are unrolled
_QUERIES = 2 * LANES  # that meet their keys at once, without a window
_SHORTEST = 512  # keys that queries of a long row meet at least
_WIDEST = LANES * 768  # numbers of a row a program takes: 12 heads of 64 at length 128
_SMALL_BYTES, _VMEM_BYTES = 2**18, 110 * 2**20  # larger rows need more fast memory than kernels have unless they ask


class Plan(NamedTuple):
    scale: float
    dropout_rate: float
    window: tuple[int, int] | None
    num_heads: int
    head_dim: int
    is_packed: bool
    """Whether rows may have several documents."""
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
    gradients = _call(_backward_kernel, plan, scalars, segments, tables, arrays, (log_total,), likes)
    return (*gradients, None, None, None)


attend_rows.defvjp(_forward, _backward)


class _Cut(NamedTuple):
    """How rows are cut."""

    span: int
    """Queries of a program, which meets a part of them at a time:"""
    queries: int
    keys: int
    before: int
    """so many keys, of which the first lies as far before the first of the queries, or begins or ends the row;"""
    stretches: tuple[int, ...]
    """or one of these numbers of keys, from where `reach` says."""


def _cut(plan: Plan, T: int) -> _Cut:
    queries, keys, before = LANES, T, 0
    if plan.window is not None:  # few queries at a time, as they meet what any of them sees
        before, after = (-(-w // KEY_TILE) * KEY_TILE for w in plan.window)
        keys = min(T, before + queries + after)
    elif T % _QUERIES == 0 and (plan.is_packed or _QUERIES * T <= _MOST_LOGITS):
        queries = _QUERIES
    span = max(n for n in range(queries, T + 1, queries) if T % n == 0 and (n == queries or n * keys <= _MOST_LOGITS))
    stretches: tuple[int, ...] = ()
    if plan.is_packed and keys == T and span < T:
        sizes = (_SHORTEST * 2**i * n // 2 for i in itertools.count() for n in (2, 3))
        stretches = (*itertools.takewhile(lambda n: n < T, sizes), T)
    return _Cut(span, queries, keys, before, stretches)


def reach(query_segments, key_segments, queries: int, stretches: tuple[int, ...]):
    """Of segments [B T]: where the keys begin that parts of so many queries meet, and which stretch it is, [B parts 2].

    It has every document from the first to the last of a part's, in the order of their numbers.
    """
    B, T = query_segments.shape
    parts = query_segments.reshape(B, -1, queries)
    least = jnp.where(parts > 0, parts, 2**30).min(2, keepdims=True)
    keys = key_segments[:, None]
    is_met = (keys >= least) & (keys <= parts.max(2, keepdims=True))
    place = jnp.arange(T, dtype=jnp.int32)
    last = jnp.where(is_met, place, 0).max(2)
    first = jnp.minimum(jnp.where(is_met, place, T).min(2), last) // LANES * LANES
    sizes = jnp.asarray(stretches, jnp.int32)
    which = (last[..., None] + 1 - first[..., None] > sizes).sum(2)
    return jnp.stack([jnp.minimum(first, T - sizes[which]), which], 2).astype(jnp.int32)


def _groups_in_turn(rows: int) -> bool:
    """Whether a row's groups of heads run one after another and can share what the first has made.

    Chips with two cores share out the rows if there are several, and otherwise the groups.
    """
    return rows > 1


def _call(kernel, plan: Plan, scalars, segments, tables, arrays, statistics, out_shape):
    """Run `kernel` over rows, groups of heads, and blocks of queries.

    Segments are [B 1 T] of queries and of keys, tables [B T unit], arrays [B T D], the second and third of keys as
    their gradients are; statistics [B N 1 T].
    """
    B, T, D = arrays[0].shape
    unit = max(LANES, plan.head_dim)
    width = max(w for w in range(unit, D + 1, unit) if D % w == 0 and (w == unit or w * T <= _WIDEST))
    cut = _cut(plan, T)
    of_queries = pl.BlockSpec((1, cut.span, width), lambda b, n, i, *_: (b, i, n))
    of_keys = pl.BlockSpec((1, T, width), lambda b, n, i, *_: (b, 0, n))
    statistic = pl.BlockSpec((1, width // plan.head_dim, 1, cut.span), lambda b, n, i, *_: (b, n, 0, i))
    table = pl.BlockSpec((1, T, unit), lambda b, n, i, *_: (b, 0, 0))
    is_backward, in_turn = kernel is _backward_kernel, _groups_in_turn(B)
    reaches, met = (), f"{T * cut.keys}_pairs"
    if cut.stretches:
        reaches = (reach(segments[0][:, 0], segments[1][:, 0], cut.queries, cut.stretches).reshape(-1),)
        met = f"{cut.queries}_by_{'_'.join(map(str, cut.stretches))}_pairs"
    # Which plan/schedules.py reads.
    cuts = f"of_{met}_in_{T // cut.span}_blocks_of_{D // width if in_turn else 1}_groups"
    scratch = [pltpu.VMEM((T, LANES), jnp.int32)]
    scratch += [pltpu.VMEM((T, width), arrays[1].dtype)] * bool(tables)
    scratch += [pltpu.VMEM((T, width), jnp.float32)] * (2 * is_backward)
    return pl.pallas_call(
        functools.partial(kernel, plan, len(reaches)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(reaches),
            grid=(B, D // width, T // cut.span),
            in_specs=[
                pl.BlockSpec((1, 1, cut.span), lambda b, n, i, *_: (b, 0, i)),
                pl.BlockSpec((1, 1, T), lambda b, n, i, *_: (b, 0, 0)),
                *[table] * len(tables),
                *(of_keys if j in (1, 2) else of_queries for j in range(len(arrays))),
                *[statistic] * len(statistics),
            ],
            out_specs=(of_queries, of_keys, of_keys) if is_backward else (of_queries, statistic),
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary" if in_turn else "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES if T * unit * arrays[0].dtype.itemsize > _SMALL_BYTES else None,
        ),
        interpret=plan.is_interpreted,
        name=f"{kernel.__name__.strip('_')}_{cuts}",
    )(scalars, *reaches, *segments, *tables, *arrays, *statistics)


def _dot(a, b, contract: tuple[int, int] = (1, 0)):
    if kernels_are_interpreted():  # on CPUs, where XLA lacks some bfloat16 products; float32 holds theirs exactly
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    dims = ((contract[0],), (contract[1],)), ((), ())
    return jax.lax.dot_general(a, b, dims, precision=precision(a, b), preferred_element_type=jnp.float32)


def _transposed(x):
    """Through float32, whose tiles can be transposed whatever the dtype."""
    return x.astype(jnp.float32).T.astype(x.dtype)


class _Part(NamedTuple):
    """Of a program's queries some at a time."""

    queries: Any
    """Their places in the program's block,"""
    places: Any
    """and in the row,"""
    keys: Any
    """and those of the keys that they meet,"""
    is_met: Any
    """if this holds."""

    def indices(self):
        query = self.places.start + jax.lax.broadcasted_iota(jnp.int32, (1, self.places.size), 1)
        return query, self.keys.start + jax.lax.broadcasted_iota(jnp.int32, (self.keys.size, 1), 0)


class _Program:
    """A block of a row's queries, cut into parts, and its heads' lanes."""

    def __init__(
        self, plan: Plan, scalars_ref, reach_ref, query_segments_ref, table_refs, key_ref, column_ref, turned_ref
    ):
        self.plan, self.scalars_ref, self.query_segments_ref = plan, scalars_ref, query_segments_ref
        self.table_refs, self.column_ref = table_refs, column_ref
        self.key_ref = key_ref if turned_ref is None else turned_ref
        self.T, width = key_ref.shape[1:]
        self.unit = max(LANES, plan.head_dim)
        self.per_unit = self.unit // plan.head_dim
        self.units = [pl.ds(u, self.unit) for u in range(0, width, self.unit)]
        self.row = scalars_ref[2] + pl.program_id(0)
        self.head = scalars_ref[3] + pl.program_id(1) * (width // plan.head_dim)
        # Of a row, one after the other: what is in hand at once goes from the registers to memory and back.
        self.pieces = [pl.ds(i, LANES) for i in range(0, self.T, LANES)]
        cut = _cut(plan, self.T)
        self.is_whole_row = cut.span == self.T
        self.parts = []
        for q in range(0, cut.span, cut.queries):
            place = q if self.is_whole_row else pl.multiple_of(pl.program_id(2) * cut.span + q, LANES)
            part = functools.partial(_Part, pl.ds(q, cut.queries), pl.ds(place, cut.queries))
            if cut.stretches:
                block = pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)
                at = 2 * (block * (cut.span // cut.queries) + q // cut.queries)
                start, which = pl.multiple_of(reach_ref[at], LANES), reach_ref[at + 1]
                self.parts += [part(pl.ds(start, n), which == i) for i, n in enumerate(cut.stretches)]
                continue
            start, last = place - cut.before, self.T - cut.keys
            if last == 0 or self.is_whole_row:  # known now
                start = 0 if last == 0 else min(max(start, 0), last)
            else:
                start = pl.multiple_of(jnp.clip(start, 0, last), KEY_TILE)
            self.parts.append(part(pl.ds(start, cut.keys), None))

    def at(self, block: int, group: int | None = None):
        """A decorator for what is done in the row's first or last (-1) block, of one group of heads or of each."""
        of_one = group is not None and _groups_in_turn(pl.num_programs(0))
        places = [(2, block % pl.num_programs(2))] + [(1, group)] * of_one
        conditions = [pl.program_id(axis) == at for axis, at in places if pl.num_programs(axis) > 1]
        return pl.when(functools.reduce(operator.and_, conditions)) if conditions else lambda do: do()

    def begin(self, key_segments_ref, key_ref):
        """What all programs of a row share, and then those of a group of heads."""

        @self.at(0, group=0)
        def _segments():
            # One column of the transpose of equal rows, since a vector cannot be turned by itself.
            self.column_ref[...] = jnp.broadcast_to(key_segments_ref[0], (LANES, self.T)).T

        if self.table_refs:

            @self.at(0)
            def _keys():
                for lanes, places in itertools.product(self.units, self.pieces):
                    self.key_ref[places, lanes] = self.turned(key_ref[0, places, lanes], places)

    def keys(self, part: _Part, lanes):
        return self.key_ref[part.keys, lanes] if self.table_refs else self.key_ref[0, part.keys, lanes]

    def own(self, x, j: int, axis: int = 1):
        """x with the lanes of the unit's other heads zeroed."""
        if self.per_unit == 1:
            return x
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
        return jnp.where((lane >= j * self.plan.head_dim) & (lane < (j + 1) * self.plan.head_dim), x, jnp.zeros_like(x))

    def turned(self, x, places, way: int = 1):
        """x of those places turned by RoPE, or back; as `apply_rope` does it."""
        if not self.table_refs:
            return x
        cos, sin = (ref[0, places, :] for ref in self.table_refs)
        x32, half = x.astype(jnp.float32), self.plan.head_dim // 2
        swapped = pltpu.roll(x32, half, 1)
        if self.per_unit > 1:
            lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
            swapped = jnp.where(lane % self.plan.head_dim < half, pltpu.roll(x32, self.unit - half, 1), swapped)
        return (x32 * cos + way * swapped * sin).astype(x.dtype)

    def each(self, do):
        """Call do(part, what its queries see [keys, queries], unit, lanes) for all that is met."""

        def parts(chosen):
            # Masks are the same for all heads.
            seen = [(part, self.seen(part)) for part in chosen]
            for (part, mask), (u, lanes) in itertools.product(seen, enumerate(self.units)):
                do(part, mask, u, lanes)

        parts([part for part in self.parts if part.is_met is None])
        for part in self.parts:
            if part.is_met is not None:
                pl.when(part.is_met)(functools.partial(parts, [part]))

    def seen(self, part: _Part):
        segments = self.query_segments_ref[0, :, part.queries], self.column_ref[part.keys, :1]
        return visible(*segments, self.plan.window, *part.indices())

    def logits(self, key, query, mask):
        """Transposed, [keys, queries]."""
        return jnp.where(mask, self.plan.scale * _dot(key, query, (1, 1)), MASKED)

    def dropped(self, head: int, part: _Part):
        """A function that zeroes what dropout drops, the same each time."""
        plan, words = self.plan, self.scalars_ref
        if plan.dropout_rate == 0.0:
            return lambda x: x
        words = tuple(jax.lax.bitcast_convert_type(words[i], jnp.uint32) for i in range(2))
        places = self.row, self.head + head, *part.indices()
        keep = kept(words, plan.dropout_rate, (plan.num_heads, self.T), *places)
        return lambda x: jnp.where(keep, x, 0.0)


def _forward_kernel(plan, num_reaches, scalars_ref, *refs):
    reach_ref, query_segments_ref, key_segments_ref, *refs = refs if num_reaches else (None, *refs)
    table_refs, refs = (refs[:2], refs[2:]) if len(refs) > 6 else ((), (*refs, None))
    query_ref, key_ref, value_ref, out_ref, log_total_ref, column_ref, turned_ref = refs
    program = _Program(plan, scalars_ref, reach_ref, query_segments_ref, table_refs, key_ref, column_ref, turned_ref)
    program.begin(key_segments_ref, key_ref)

    @program.each
    def _visit(part, mask, u, lanes):
        key, value_transposed = program.keys(part, lanes), _transposed(value_ref[0, part.keys, lanes])
        query, out = program.turned(query_ref[0, part.queries, lanes], part.places), 0.0
        for j in range(program.per_unit):
            logits = program.logits(key, program.own(query, j), mask)
            # A query that sees nothing stays below this, and its weights vanish.
            top = jnp.maximum(logits.max(0, keepdims=True), MASKED / 2)
            weights = jnp.exp(logits - top)
            total = jnp.maximum(weights.sum(0, keepdims=True), 1e-30)
            n = u * program.per_unit + j
            log_total_ref[0, n, :, part.queries] = top + jnp.log(total)
            weights = program.dropped(n, part)(weights).astype(key.dtype)
            out += _dot(program.own(value_transposed, j, 0), weights) / (total * (1.0 - plan.dropout_rate))
        out_ref[0, part.queries, lanes] = out.T.astype(out_ref.dtype)


def _backward_kernel(plan, num_reaches, scalars_ref, *refs):
    reach_ref, query_segments_ref, key_segments_ref, *refs = refs if num_reaches else (None, *refs)
    table_refs, refs = (refs[:2], refs[2:]) if len(refs) > 12 else ((), (*refs[:-2], None, *refs[-2:]))
    query_ref, key_ref, value_ref, out_ref, d_out_ref, log_total_ref, dq_ref, dk_ref, dv_ref = refs[:9]
    column_ref, turned_ref, d_key_ref, d_value_ref = refs[9:]
    program = _Program(plan, scalars_ref, reach_ref, query_segments_ref, table_refs, key_ref, column_ref, turned_ref)

    program.begin(key_segments_ref, key_ref)

    @program.at(0)
    def _zeros():
        for ref in (d_key_ref, d_value_ref):
            ref[...] = jnp.zeros_like(ref)

    @program.each
    def _visit(part, mask, u, lanes):
        key, value = program.keys(part, lanes), value_ref[0, part.keys, lanes]
        key_transposed = _transposed(key)
        query, out, d_out = (ref[0, part.queries, lanes] for ref in (query_ref, out_ref, d_out_ref))
        query = program.turned(query, part.places)
        products = out.astype(jnp.float32) * d_out.astype(jnp.float32)
        d_out = (d_out.astype(jnp.float32) / (1.0 - plan.dropout_rate)).astype(query.dtype)
        d_query = d_key = d_value = 0.0
        for j in range(program.per_unit):
            n = u * program.per_unit + j
            own_query, own_d_out = program.own(query, j), program.own(d_out, j)
            # Summed over lanes by a transpose, so that it lies along them as the statistics do.
            delta = program.own(products, j).T.sum(0, keepdims=True)
            dropped = program.dropped(n, part)
            weights = jnp.exp(program.logits(key, own_query, mask) - log_total_ref[0, n, :, part.queries])
            d_logits = weights * (dropped(_dot(value, own_d_out, (1, 1))) - delta)
            d_logits = d_logits.astype(query.dtype)
            d_key += _dot(d_logits, own_query)
            d_value += _dot(dropped(weights).astype(query.dtype), own_d_out)
            d_query += _dot(program.own(key_transposed, j, 0), d_logits)
        d_key_ref[part.keys, lanes] += d_key
        d_value_ref[part.keys, lanes] += d_value
        d_query = (plan.scale * d_query).T
        dq_ref[0, part.queries, lanes] = program.turned(d_query, part.places, -1).astype(dq_ref.dtype)

    @program.at(-1)
    def _end():
        for lanes, places in itertools.product(program.units, program.pieces):
            d_key = program.turned(plan.scale * d_key_ref[places, lanes], places, -1)
            dk_ref[0, places, lanes] = d_key.astype(dk_ref.dtype)
            dv_ref[0, places, lanes] = d_value_ref[places, lanes].astype(dv_ref.dtype)
