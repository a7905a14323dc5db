"""Online softmax over blocks of keys, and again in its own backward pass: memory linear in length.

(Rabe and Staats, arXiv 2112.05682; the backward pass is Dao et al., arXiv 2205.14135, algorithm 4.)
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from flax_encoder.ops.attention.problem import MASKED, Problem, Refusal, visible
from flax_encoder.ops.platform import platform

KEY_BLOCK = 512


def refusal(problem: Problem) -> Refusal | None:
    if problem.dropout_words is not None:
        return Refusal("it has no dropout", problem.dropout_rate, "use 'reference', or attention dropout 0")
    return None


def attend(problem: Problem) -> Float[Array, "B T N H"]:
    (B, T, N, _), (S, K) = problem.query.shape, problem.key.shape[1:3]
    query = rearrange(problem.query, "B T (K G) H -> B K G T H", K=K)
    key, value = (rearrange(x, "B S K H -> B K S H") for x in (problem.key, problem.value))
    if platform() == "cpu":  # XLA has no fast batched bfloat16 product there
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    if (bias := problem.bias) is not None:
        bias = rearrange(bias, "B (K G) T S -> B K G T S", K=K if bias.shape[1] == N else 1)
    segments = problem.query_segments, problem.key_segments
    if problem.query_segments is None:
        segments = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
    window = jnp.asarray((T, S) if problem.window is None else problem.window, jnp.int32)
    out = _chunked(query, key, value, bias, Visibility(*segments, window), problem.scale)
    return rearrange(out, "B K G T H -> B T (K G) H").astype(problem.query.dtype)


class Visibility(NamedTuple):
    """Which keys a query sees, as vectors; `mask` is the matrix of one block."""

    query_segments: Int[Array, "B T"]
    key_segments: Int[Array, "B S"]
    window: Int[Array, "2"]

    def mask(self, key_start: Int[Array, ""]) -> Bool[Array, "B 1 1 T S"]:
        T, S = self.query_segments.shape[1], self.key_segments.shape[1]
        window = self.window[0], self.window[1]
        return visible(*self[:2], window, jnp.arange(T), key_start + jnp.arange(S))[:, None, None]


def _product(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b.astype(a.dtype), preferred_element_type=jnp.float32)


def _logits(query, key, bias, mask, scale) -> Float[Array, "B K G T S"]:
    logits = scale * _product("BKGTH,BKSH->BKGTS", query, key)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    return jnp.where(mask, logits, MASKED)


def _key_blocks(key, value, bias, visibility: Visibility):
    """Pad S to whole blocks with keys of segment 0, which nothing sees; the leading axis is the block."""
    length = key.shape[2]
    size = min(KEY_BLOCK, length)
    pad = -length % size

    def blocks(x, axis):
        x = jnp.pad(x, [(0, pad if a == axis else 0) for a in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)

    starts = jnp.arange(0, length + pad, size)
    bias_blocks = None if bias is None else blocks(bias, 4)
    return starts, blocks(key, 2), blocks(value, 2), bias_blocks, blocks(visibility.key_segments, 1)


def _unblock(x, axis: int, length: int):
    """Inverse of `_key_blocks` for one gradient."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _chunked(query, key, value, bias, visibility, scale):
    return _chunked_forward(query, key, value, bias, visibility, scale)[0]


def _chunked_forward(query, key, value, bias, visibility, scale):
    def block(carry, xs):
        out, top, total = carry
        start, k, v, b, segments = xs
        mask = visibility._replace(key_segments=segments).mask(start)
        logits = _logits(query, k, b, mask, scale)
        new_top = jnp.maximum(top, logits.max(-1, keepdims=True))
        weights = jnp.where(mask, jnp.exp(logits - new_top), 0.0)
        shrink = jnp.exp(top - new_top)
        out = out * shrink + _product("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v)
        return (out, new_top, total * shrink + weights.sum(-1, keepdims=True)), None

    column = (*query.shape[:-1], 1)
    start = jnp.zeros(query.shape, jnp.float32), jnp.full(column, MASKED), jnp.zeros(column)
    (out, top, total), _ = jax.lax.scan(block, start, _key_blocks(key, value, bias, visibility))
    total = jnp.maximum(total, 1e-30)
    out = out / total
    return out, (query, key, value, bias, visibility, out, top + jnp.log(total))


def _chunked_backward(scale, residuals, d_out):
    query, key, value, bias, visibility, out, log_total = residuals
    d_out = d_out.astype(jnp.float32)
    delta = (d_out * out).sum(-1, keepdims=True)

    def block(d_query, xs):
        start, k, v, b, segments = xs
        mask = visibility._replace(key_segments=segments).mask(start)
        probabilities = jnp.where(mask, jnp.exp(_logits(query, k, b, mask, scale) - log_total), 0.0)
        d_value = _product("BKGTS,BKGTH->BKSH", probabilities.astype(v.dtype), d_out)
        d_logits = probabilities * (_product("BKGTH,BKSH->BKGTS", d_out.astype(v.dtype), v) - delta)
        d_bias = None if b is None else _sum_to(d_logits, b.shape)
        d_logits = (scale * d_logits).astype(k.dtype)
        d_key = _product("BKGTS,BKGTH->BKSH", d_logits, query)
        return d_query + _product("BKGTS,BKSH->BKGTH", d_logits, k), (d_key, d_value, d_bias)

    blocks = _key_blocks(key, value, bias, visibility)
    d_query, (d_key, d_value, d_bias) = jax.lax.scan(block, jnp.zeros(query.shape, jnp.float32), blocks)
    length = key.shape[2]
    d_key, d_value = (_unblock(d, 2, length).astype(key.dtype) for d in (d_key, d_value))
    d_bias = None if bias is None else _unblock(d_bias, 4, length).astype(bias.dtype)
    return d_query.astype(query.dtype), d_key, d_value, d_bias, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the axes along which an array of `shape` was broadcast to x's."""
    axes = tuple(a for a, (got, want) in enumerate(zip(x.shape, shape, strict=True)) if got != want)
    return x.sum(axes, keepdims=True)
