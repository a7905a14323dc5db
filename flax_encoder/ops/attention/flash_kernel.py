"""The kernels of `flash`: FlashAttention (Dao, arXiv 2307.08691) in Triton, with our segments, windows, dropout and
biases.

A program has a tile of a row's queries, of one head, and takes the tiles of keys that they may meet one after the
other, with a softmax that is corrected as it goes. The backward pass is two kernels, one by tiles of queries and one by
tiles of keys, each of which makes the logits again: seven products instead of five, but every sum is made in one place,
in the same order each time. A bias that is learned has a third, which makes the logits once more. Which tiles meet is
found beforehand, from the segments and the window.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, UInt32

from flax_encoder.ops.attention.problem import MASKED, Window, visible
from flax_encoder.ops.dropout import keep_in_row
from flax_encoder.ops.platform import precision

_LOG2_E = math.log2(math.e)  # the hardware's exponential is of base 2
BIAS_SAID = "_with_bias"  # at the end of a kernel's name


class Known(NamedTuple):
    """What programs are told beside the arrays that they multiply, each None where there is none."""

    query_segments: Int[Array, "B T"] | None
    key_segments: Int[Array, "B S"] | None
    window: Int[Array, "2"] | None
    starts: UInt32[Array, "B N T"] | None
    """Of dropout, `dropout_starts`."""
    bias: Float[Array, "#B #N T S"] | None = None
    """Added to the scaled logits."""


class Plan(NamedTuple):
    scale: float
    dropout_rate: float
    static_window: tuple[int, int] | None
    """The window again, where it is known now: for kernels' names."""
    is_interpreted: bool


class Tiles(NamedTuple):
    """How a kernel cuts rows: a program's own tile, the tiles that it meets, and what the compiler is told."""

    own: int
    met: int
    warps: int
    stages: int


# Measured on an H100 (LOG.md), for heads of 64; of wider ones fewer fit the registers.
FORWARD, BY_QUERIES, BY_KEYS = Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3)
_OWN_BYTES, _MET_BYTES = 2 * 128 * 64, 2 * 64 * 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend_flash(query, key, value, bias, known, plan):
    """Of queries [B T N H], keys and values [B S K H], and a bias [#B #N T S] or None."""
    return _forward(query, key, value, bias, known, plan)[0]


def _forward(query, key, value, bias, known, plan):
    B, T, N, _ = query.shape
    known = known._replace(bias=bias)
    call = _Call(FORWARD, plan, query, key, known)
    log_total = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    out, log_total = call(_forward_kernel, (query, key, value), "qkk", (query, log_total), "qs")
    return out, (query, key, value, known, out, log_total)


def _backward(plan, residuals, d_out):
    query, key, value, known, out, log_total = residuals
    call = _Call(BY_QUERIES, plan, query, key, known)
    arrays = query, key, value, out, d_out, log_total
    d_query, delta = call(_query_gradient_kernel, arrays, "qkkqqs", (query, log_total), "qs")
    call = _Call(BY_KEYS, plan, query, key, known, is_by_keys=True)
    arrays = query, key, value, d_out, log_total, delta
    d_key, d_value = call(_key_gradient_kernel, arrays, "qkkqss", (key, value), "kk")
    d_bias = None if known.bias is None else _bias_gradient(plan, arrays, known)
    return d_query, d_key, d_value, d_bias, None


attend_flash.defvjp(_forward, _backward)


def tiles_met(own, others, window: Window | None, own_tile: int, other_tile: int, shape: tuple[int, int, int]):
    """The first of the others' tiles that a tile of own tokens may meet, and the one past the last: [B T/own_tile 2].

    Args:
      own, others: segments [B T] and [B S], or None where every token may meet every other.
      window: how far own tokens see to the (left, right), or None.
      shape: (B, T, S).
    """
    B, T, S = shape
    first, stop = jnp.zeros((B, T // own_tile), jnp.int32), jnp.full((B, T // own_tile), S, jnp.int32)
    if own is not None:
        parts = own.reshape(B, -1, own_tile)
        least, most = jnp.where(parts > 0, parts, 2**30).min(2), parts.max(2)
        is_met = (others[:, None] >= least[..., None]) & (others[:, None] <= most[..., None])
        place = jnp.arange(S, dtype=jnp.int32)
        first, stop = jnp.where(is_met, place, S).min(2), jnp.where(is_met, place + 1, 0).max(2)
    if window is not None:
        starts = jnp.arange(0, T, own_tile, dtype=jnp.int32)
        first, stop = jnp.maximum(first, starts - window[0]), jnp.minimum(stop, starts + own_tile + window[1])
    return jnp.stack([first // other_tile, -(-stop // other_tile)], 2)


class _Call:
    """A kernel over tiles of queries or of keys, rows and heads."""

    def __init__(self, tiles: Tiles, plan: Plan, query, key, known: Known, is_by_keys: bool = False):
        (B, T, N, H), (S, K) = query.shape, key.shape[1:3]
        G = N // K
        own_length, other_length = (S, T) if is_by_keys else (T, S)
        own, met = _tile_sizes(tiles, query, own_length, other_length)
        self.tiles, self.plan = tiles._replace(own=own, met=met), plan
        self.grid = own_length // own, B, K if is_by_keys else N
        self.cut = _cut_said(plan, own, met, known, is_by_keys)
        segments, window = known[:2], None if known.window is None else tuple(known.window)
        if is_by_keys:
            segments, window = segments[::-1], window and window[::-1]
        self.known = tiles_met(*segments, window, own, met, (B, own_length, other_length)), known

        of_own, of_others = (None, own), (None, other_length)
        at_own, at_others = lambda i, b, n: (b, i), lambda i, b, n: (b, 0)
        rows, heads = (1, 1) if known.bias is None else known.bias.shape[:2]
        if is_by_keys:  # which meet all query heads that share a key's
            self.specs = {
                "q": pl.BlockSpec((None, T, G, H), lambda i, b, n: (b, 0, n, 0)),
                "k": pl.BlockSpec((None, own, None, H), lambda i, b, n: (b, i, n, 0)),
                "s": pl.BlockSpec((None, G, T), lambda i, b, n: (b, n, 0)),
            }
            of_segments = pl.BlockSpec(of_others, at_others), pl.BlockSpec(of_own, at_own)
            of_bias = pl.BlockSpec(
                (None, min(heads, G), T, own), lambda i, b, n: (b if rows > 1 else 0, n if heads > 1 else 0, 0, i)
            )
        else:
            self.specs = {
                "q": pl.BlockSpec((None, own, None, H), lambda i, b, n: (b, i, n, 0)),
                "k": pl.BlockSpec((None, S, None, H), lambda i, b, n: (b, 0, n // G, 0)),
                "s": pl.BlockSpec((None, None, own), lambda i, b, n: (b, n, i)),
            }
            of_segments = pl.BlockSpec(of_own, at_own), pl.BlockSpec(of_others, at_others)
            of_bias = pl.BlockSpec(
                (None, None, own, S), lambda i, b, n: (b if rows > 1 else 0, n if heads > 1 else 0, i, 0)
            )
        known_specs = Known(*of_segments, pl.BlockSpec((2,), lambda i, b, n: (0,)), self.specs["s"], of_bias)
        known_specs = Known(*(None if x is None else spec for x, spec in zip(known, known_specs, strict=True)))
        self.known_specs = pl.BlockSpec((None, None, 2), lambda i, b, n: (b, i, 0)), known_specs

    def __call__(self, kernel, arrays, lying: str, likes, made_lying: str):
        """What `kernel` makes of arrays, shaped as `likes` are; each lies as queries, keys, or a query's statistic."""
        return pl.pallas_call(
            functools.partial(kernel, self.plan, self.tiles),
            grid=self.grid,
            in_specs=[*self.known_specs, *(self.specs[letter] for letter in lying)],
            out_specs=[self.specs[letter] for letter in made_lying],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in likes],
            compiler_params=plgpu.CompilerParams(num_warps=self.tiles.warps, num_stages=self.tiles.stages),
            interpret=self.plan.is_interpreted,
            name=kernel.__name__.strip("_") + self.cut,
        )(*self.known, *arrays)


def _tile_sizes(tiles: Tiles, query, own_length: int, other_length: int) -> tuple[int, int]:
    """As large as `tiles` says for narrow heads of two bytes a number, in parts of as many bytes for others."""
    wide = query.shape[3] * query.dtype.itemsize
    sizes = min(tiles.own, _OWN_BYTES // wide), min(tiles.met, _MET_BYTES // wide)
    return math.gcd(sizes[0], own_length), math.gcd(sizes[1], other_length)


def _cut_said(plan: Plan, own: int, met: int, known: Known, is_by_keys: bool = False) -> str:
    """Part of a kernel's name, which plan/schedules.py reads."""
    within = "".join(f"_{n}" for n in (plan.static_window or ())[:: -1 if is_by_keys else 1])
    return f"_of_{own}_by_{met}_tiles" + f"_within{within}" * bool(within) + BIAS_SAID * (known.bias is not None)


def _bias_gradient(plan: Plan, arrays, known: Known):
    """Of `arrays`, those of the keys' gradient: like the bias, the sum over rows and heads that share it."""
    query, key = arrays[:2]
    (B, T, N, H), (S, K) = query.shape, key.shape[1:3]
    bias, G = known.bias, N // K
    own, met = _tile_sizes(BY_QUERIES, query, T, S)
    tiles = BY_QUERIES._replace(own=own, met=met)
    # A program has all the rows that share a bias: their sum is made in one place.
    rows = B if len(bias) == 1 else 1
    window = None if known.window is None else tuple(known.window)
    tiles_of = tiles_met(known.query_segments, known.key_segments, window, own, met, (B, T, S))
    of_queries = pl.BlockSpec((rows, own, None, H), lambda i, b, n: (b, i, n, 0))
    of_keys = pl.BlockSpec((rows, S, None, H), lambda i, b, n: (b, 0, n // G, 0))
    of_each = pl.BlockSpec((rows, None, own), lambda i, b, n: (b, n, i))
    at_head = (lambda n: n) if bias.shape[1] > 1 else (lambda n: 0)
    known_specs = Known(
        pl.BlockSpec((rows, own), lambda i, b, n: (b, i)), pl.BlockSpec((rows, S), lambda i, b, n: (b, 0)),
        pl.BlockSpec((2,), lambda i, b, n: (0,)), of_each,
        pl.BlockSpec((None, None, own, S), lambda i, b, n: (b, at_head(n), i, 0)),
    )  # fmt: skip
    known_specs = Known(*(None if x is None else spec for x, spec in zip(known, known_specs, strict=True)))
    d_bias = pl.pallas_call(
        functools.partial(_bias_gradient_kernel, plan, tiles),
        grid=(T // own, B // rows, N),
        in_specs=[
            pl.BlockSpec((rows, None, 2), lambda i, b, n: (b, i, 0)), known_specs,
            of_queries, of_keys, of_keys, of_queries, of_each, of_each,
        ],
        out_specs=pl.BlockSpec((None, None, own, S), lambda i, b, n: (b, n, i, 0)),
        out_shape=jax.ShapeDtypeStruct((B // rows, N, T, S), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=plan.is_interpreted,
        name="bias_gradient_kernel" + _cut_said(plan, own, met, known),
    )(tiles_of, known, *arrays)  # fmt: skip
    d_bias = d_bias if bias.shape[1] == N else d_bias.sum(1, keepdims=True)
    return d_bias.astype(bias.dtype)


class _Program:
    """A tile and what it may meet.

    Args:
      row: where a program has several rows, which of them, and else ().
      start: the tile's first token, where it was found already: it is not known within a loop, if interpreted.
    """

    def __init__(self, plan: Plan, tiles: Tiles, met_ref, known: Known, is_by_keys: bool = False, row=(), start=None):
        self.plan, self.tiles, self.met_ref, self.known, self.is_by_keys = plan, tiles, met_ref, known, is_by_keys
        self.row, self.start = row, pl.program_id(0) * tiles.own if start is None else start

    def each(self, do, carry):
        """carry after do(places, carry) for each tile of the others that may be met, in order."""
        size = self.tiles.met
        return jax.lax.fori_loop(self.met_ref[0], self.met_ref[1], lambda i, c: do(pl.ds(i * size, size), c), carry)

    def logits(self, own, others, places, head=0):
        """In base 2, [own others]; what is not seen is MASKED.

        Args:
          head: by keys, which of the query heads that share them.
        """
        logits = (self.plan.scale * _LOG2_E) * _dot(own, others, (1, 1))
        known, segments, own_places = self.known, (None, None), (*self.row, slice(None))
        if known.bias is not None:
            if self.is_by_keys:
                bias = known.bias[head if known.bias.shape[0] > 1 else 0, places, :].T
            else:
                bias = known.bias[:, places]
            logits = logits + _LOG2_E * bias.astype(jnp.float32)
        if known.query_segments is not None:
            if self.is_by_keys:
                segments = known.query_segments[places][None, :], known.key_segments[...][:, None]
            else:
                own_segments, others = known.query_segments[own_places], known.key_segments[(*self.row, places)]
                segments = own_segments[:, None], others[None, :]
        window = None if known.window is None else (known.window[0], known.window[1])
        query, key = self._indices(places)
        mask = visible(*segments, window, query, key)
        return logits if mask is None else jnp.where(mask, logits, MASKED)

    def dropped(self, places, starts):
        """A function that zeroes what dropout drops; starts are of the queries, along their axis."""
        if self.plan.dropout_rate == 0.0:
            return lambda x: x
        _, key = self._indices(places)
        keep = keep_in_row(starts, self.plan.dropout_rate, key.astype(jnp.uint32))
        return lambda x: jnp.where(keep, x, 0.0)

    def _indices(self, places):
        own = self.start + jnp.arange(self.tiles.own, dtype=jnp.int32)[:, None]
        others = places.start + jnp.arange(places.size, dtype=jnp.int32)[None, :]
        return (others, own) if self.is_by_keys else (own, others)


def _forward_kernel(plan, tiles, met_ref, known, *refs):
    query_ref, key_ref, value_ref, out_ref, log_total_ref = refs
    program, query = _Program(plan, tiles, met_ref, known), query_ref[...]
    starts = None if known.starts is None else known.starts[...][:, None]

    def meet(places, carry):
        out, top, total = carry
        key, value = key_ref[places, :], value_ref[places, :]
        logits = program.logits(query, key, places)
        new_top = jnp.maximum(top, logits.max(1))
        weights = jnp.exp2(logits - new_top[:, None])
        shrunk = jnp.exp2(top - new_top)
        total = shrunk * total + weights.sum(1)
        weights = program.dropped(places, starts)(weights).astype(value.dtype)
        return shrunk[:, None] * out + _dot(weights, value, (1, 0)), new_top, total

    # A query that sees nothing stays below this top, and its weights vanish.
    statistic = jnp.zeros(tiles.own, jnp.float32)
    start = jnp.zeros(query.shape, jnp.float32), statistic + MASKED / 2, statistic
    out, top, total = program.each(meet, start)
    total = jnp.maximum(total, 1e-30)
    out_ref[...] = (out / ((1.0 - plan.dropout_rate) * total)[:, None]).astype(out_ref.dtype)
    log_total_ref[...] = top + jnp.log2(total)


def _query_gradient_kernel(plan, tiles, met_ref, known, *refs):
    """Also makes delta, each query's sum over its result times the gradient of that, for the other kernel."""
    query_ref, key_ref, value_ref, out_ref, d_out_ref, log_total_ref, d_query_ref, delta_ref = refs
    program = _Program(plan, tiles, met_ref, known)
    query, d_out, log_total = query_ref[...], d_out_ref[...], log_total_ref[...][:, None]
    starts = None if known.starts is None else known.starts[...][:, None]
    delta = (out_ref[...].astype(jnp.float32) * d_out.astype(jnp.float32)).sum(1)
    delta_ref[...] = delta

    def meet(places, d_query):
        key, value = key_ref[places, :], value_ref[places, :]
        weights = jnp.exp2(program.logits(query, key, places) - log_total)
        d_weights = program.dropped(places, starts)(_dot(d_out, value, (1, 1))) / (1.0 - plan.dropout_rate)
        d_logits = weights * (d_weights - delta[:, None])
        return d_query + _dot(d_logits.astype(key.dtype), key, (1, 0))

    d_query = program.each(meet, jnp.zeros(query.shape, jnp.float32))
    d_query_ref[...] = (plan.scale * d_query).astype(d_query_ref.dtype)


def _key_gradient_kernel(plan, tiles, met_ref, known, *refs):
    """Logits are made transposed, [keys queries], as the products take them."""
    query_ref, key_ref, value_ref, d_out_ref, log_total_ref, delta_ref, d_key_ref, d_value_ref = refs
    program = _Program(plan, tiles, met_ref, known, is_by_keys=True)
    key, value, G = key_ref[...], value_ref[...], query_ref.shape[1]

    def head(g, carry):
        def meet(places, carry):
            d_key, d_value = carry
            query, d_out = query_ref[places, g, :], d_out_ref[places, g, :]
            log_total, delta = log_total_ref[g, places][None, :], delta_ref[g, places][None, :]
            dropped = program.dropped(places, None if known.starts is None else known.starts[g, places][None, :])
            weights = jnp.exp2(program.logits(key, query, places, g) - log_total)
            d_value += _dot(dropped(weights).astype(d_out.dtype), d_out, (1, 0))
            d_weights = dropped(_dot(value, d_out, (1, 1))) / (1.0 - plan.dropout_rate)
            d_logits = weights * (d_weights - delta)
            d_key += _dot(d_logits.astype(query.dtype), query, (1, 0))
            return d_key, d_value

        return program.each(meet, carry)

    start = jnp.zeros(key.shape, jnp.float32), jnp.zeros(key.shape, jnp.float32)
    d_key, d_value = head(0, start) if G == 1 else jax.lax.fori_loop(0, G, head, start)
    d_key_ref[...] = (plan.scale * d_key).astype(d_key_ref.dtype)
    d_value_ref[...] = (d_value / (1.0 - plan.dropout_rate)).astype(d_value_ref.dtype)


def _bias_gradient_kernel(plan, tiles, met_ref, known, *refs):
    query_ref, key_ref, value_ref, d_out_ref, log_total_ref, delta_ref, d_bias_ref = refs
    rows, size, start = query_ref.shape[0], tiles.met, pl.program_id(0) * tiles.own

    def meet(j, _):
        places = pl.ds(j * size, size)

        def add(r, total):
            program = _Program(plan, tiles, met_ref, known, row=(r,), start=start)
            starts = None if known.starts is None else known.starts[r, :][:, None]
            own, key, value = (r, slice(None), slice(None)), key_ref[r, places, :], value_ref[r, places, :]
            weights = jnp.exp2(program.logits(query_ref[own], key, places) - log_total_ref[r, :][:, None])
            d_weights = program.dropped(places, starts)(_dot(d_out_ref[own], value, (1, 1))) / (1.0 - plan.dropout_rate)
            return total + weights * (d_weights - delta_ref[r, :][:, None])

        def add_if_met(r, total):
            is_met = (met_ref[r, 0] <= j) & (j < met_ref[r, 1])
            return jax.lax.cond(is_met, add, lambda r, total: total, r, total)

        d_bias_ref[:, places] = jax.lax.fori_loop(0, rows, add_if_met, jnp.zeros((tiles.own, size), jnp.float32))
        return _

    jax.lax.fori_loop(0, key_ref.shape[1] // size, meet, 0)


def _dot(a, b, contract: tuple[int, int]):
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision(a, b), preferred_element_type=jnp.float32)
