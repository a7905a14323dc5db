"""The kernels of `flash`: FlashAttention (Dao, arXiv 2307.08691) in Triton, with our segments, windows and dropout.

A program has a tile of a row's queries, of one head, and takes the tiles of keys that they may meet one after the
other, with a softmax that is corrected as it goes. The backward pass is two kernels, one by tiles of queries and one by
tiles of keys, each of which makes the logits again: seven products instead of five, but every sum is made in one place,
in the same order each time. Which tiles meet is found beforehand, from the segments and the window.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int, UInt32

from flax_encoder.ops.attention.problem import MASKED, Window, visible
from flax_encoder.ops.dropout import keep_in_row

_LOG2_E = math.log2(math.e)  # the hardware's exponential is of base 2


class Known(NamedTuple):
    """What programs are told beside the arrays that they multiply, each None where there is none."""

    query_segments: Int[Array, "B T"] | None
    key_segments: Int[Array, "B S"] | None
    window: Int[Array, "2"] | None
    starts: UInt32[Array, "B N T"] | None
    """Of dropout, `dropout_starts`."""


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
_OWN_NUMBERS, _MET_NUMBERS = 128 * 64, 64 * 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_flash(query, key, value, known, plan):
    """Of queries [B T N H], keys and values [B S K H]."""
    return _forward(query, key, value, known, plan)[0]


def _forward(query, key, value, known, plan):
    B, T, N, _ = query.shape
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
    return d_query, d_key, d_value, None


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
        own = math.gcd(min(tiles.own, _OWN_NUMBERS // H), own_length)
        met = math.gcd(min(tiles.met, _MET_NUMBERS // H), other_length)
        self.tiles, self.plan = tiles._replace(own=own, met=met), plan
        self.grid = own_length // own, B, K if is_by_keys else N
        # Which plan/schedules.py reads.
        within = "".join(f"_{n}" for n in (plan.static_window or ())[:: -1 if is_by_keys else 1])
        self.cut = f"_of_{own}_by_{met}_tiles" + f"_within{within}" * bool(within)
        segments, window = known[:2], None if known.window is None else tuple(known.window)
        if is_by_keys:
            segments, window = segments[::-1], window and window[::-1]
        self.known = tiles_met(*segments, window, own, met, (B, own_length, other_length)), known

        of_own, of_others = (None, own), (None, other_length)
        at_own, at_others = lambda i, b, n: (b, i), lambda i, b, n: (b, 0)
        if is_by_keys:  # which meet all query heads that share a key's
            self.specs = {
                "q": pl.BlockSpec((None, T, G, H), lambda i, b, n: (b, 0, n, 0)),
                "k": pl.BlockSpec((None, own, None, H), lambda i, b, n: (b, i, n, 0)),
                "s": pl.BlockSpec((None, G, T), lambda i, b, n: (b, n, 0)),
            }
            of_segments = pl.BlockSpec(of_others, at_others), pl.BlockSpec(of_own, at_own)
        else:
            self.specs = {
                "q": pl.BlockSpec((None, own, None, H), lambda i, b, n: (b, i, n, 0)),
                "k": pl.BlockSpec((None, S, None, H), lambda i, b, n: (b, 0, n // G, 0)),
                "s": pl.BlockSpec((None, None, own), lambda i, b, n: (b, n, i)),
            }
            of_segments = pl.BlockSpec(of_own, at_own), pl.BlockSpec(of_others, at_others)
        known_specs = Known(*of_segments, pl.BlockSpec((2,), lambda i, b, n: (0,)), self.specs["s"])
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


class _Program:
    """A tile and what it may meet."""

    def __init__(self, plan: Plan, tiles: Tiles, met_ref, known: Known, is_by_keys: bool = False):
        self.plan, self.tiles, self.met_ref, self.known, self.is_by_keys = plan, tiles, met_ref, known, is_by_keys
        self.start = pl.program_id(0) * tiles.own  # not known within a loop, if interpreted

    def each(self, do, carry):
        """carry after do(places, carry) for each tile of the others that may be met, in order."""
        size = self.tiles.met
        return jax.lax.fori_loop(self.met_ref[0], self.met_ref[1], lambda i, c: do(pl.ds(i * size, size), c), carry)

    def logits(self, own, others, places):
        """In base 2, [own others]; what is not seen is MASKED."""
        logits = (self.plan.scale * _LOG2_E) * _dot(own, others, (1, 1))
        known, segments = self.known, (None, None)
        if known.query_segments is not None:
            if self.is_by_keys:
                segments = known.query_segments[places][None, :], known.key_segments[...][:, None]
            else:
                segments = known.query_segments[...][:, None], known.key_segments[places][None, :]
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
            weights = jnp.exp2(program.logits(key, query, places) - log_total)
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


def _dot(a, b, contract: tuple[int, int]):
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
