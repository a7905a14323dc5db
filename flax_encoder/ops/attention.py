"""Bidirectional attention over packed rows: one contract, several backends.

Axes: B batch, T query length, S key length, N query heads, K key/value heads, G = N / K query heads that share one,
H head dim. A token sees the keys of its own segment that lie within its window, on every backend, forward and
backward; segment 0 is padding, which sees nothing, is seen by nothing, and comes out as zeros.
"""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from flax_encoder.ops.dropout import dropout
from flax_encoder.ops.linear import on_cpu

Window = tuple[int | Int[Array, ""], int | Int[Array, ""]]

_MASKED = -1e30  # finite, so that no inf - inf arises where a query sees no key
_KEY_BLOCK = 512
logger = logging.getLogger(__name__)


class Visibility(NamedTuple):
    """Which keys a query sees, as vectors; `mask` is the matrix, made only where it is needed."""

    query_segments: Int[Array, "B T"]
    key_segments: Int[Array, "B S"]
    window: Int[Array, "2"]

    def mask(self, key_start: int | Int[Array, ""] = 0) -> Bool[Array, "B 1 1 T S"]:
        query_index = jnp.arange(self.query_segments.shape[1])[:, None]
        key_index = key_start + jnp.arange(self.key_segments.shape[1])[None, :]
        near = (query_index - key_index <= self.window[0]) & (key_index - query_index <= self.window[1])
        same = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        return (same & (self.query_segments > 0)[:, :, None] & near)[:, None, None]


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    window: Window | None = None,
    bias: Float[Array, "#B #N T S"] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(scale Q K^T + bias) V within segments and window (Vaswani et al., arXiv 1706.03762, equation 1).

    Args:
      segment_ids: each query's document in its row, 0 for padding. None is one document a row.
      key_segment_ids: each key's; None is segment_ids, for self-attention, where T = S.
      window: how many tokens to the (left, right) a query sees, in row indices; may be traced.
      bias: added to the scaled logits; T5's and ALiBi's positions go here.
      scale: None is H ** -0.5.
      dropout_rate: of the attention probabilities, where dropout_key is given.
      implementation: a name in `IMPLEMENTATIONS`, or None for the fastest that can serve.

    Logits, softmax and accumulation are float32, and the result has query's dtype. Products take bfloat16 operands as
    they come, but in float32 on CPUs, where XLA has no fast batched bfloat16 product.

    Raises:
      ValueError: heads that do not divide, an unknown implementation, or one that cannot serve, with the reason.
    """
    (B, T, N, H), (S, K) = query.shape, key.shape[1:3]
    if N % K:
        raise ValueError(f"key/value heads must divide query heads: got {K} for {N}.")
    if segment_ids is not None and key_segment_ids is None and T != S:
        raise ValueError(f"keys of their own need key_segment_ids beside segment_ids: got T {T}, S {S}.")
    if key_segment_ids is None:
        key_segment_ids = jnp.ones((B, S), jnp.int32) if segment_ids is None else segment_ids
    segments = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids, key_segment_ids
    rate = dropout_rate if dropout_key is not None else 0.0
    if implementation is None:
        implementation = _choose(S, rate)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown attention implementation {implementation!r}; known are {', '.join(IMPLEMENTATIONS)}."
        )
    visibility = Visibility(*segments, jnp.asarray((T + S, T + S) if window is None else window, jnp.int32))
    grouped = rearrange(query, "B T (K G) H -> B K G T H", K=K)
    key, value = rearrange(key, "B S K H -> B K S H"), rearrange(value, "B S K H -> B K S H")
    if bias is not None:
        bias = rearrange(bias, "B (K G) T S -> B K G T S", K=K if bias.shape[1] == N else 1)
    if on_cpu():
        grouped, key, value = (x.astype(jnp.float32) for x in (grouped, key, value))
    scale = H**-0.5 if scale is None else scale
    out = IMPLEMENTATIONS[implementation](grouped, key, value, bias, visibility, scale, rate, dropout_key)
    return rearrange(out, "B K G T H -> B T (K G) H").astype(query.dtype)


def _choose(key_length: int, dropout_rate: float) -> str:
    """A short row's logits cost less to keep than to make again; only `chunked` stays linear in a long one's."""
    choice = "reference" if dropout_rate or key_length <= 2 * _KEY_BLOCK else "chunked"
    _log_choice(choice, key_length)
    return choice


@functools.cache
def _log_choice(choice: str, key_length: int) -> None:
    logger.info("attention over rows of %d uses the %r implementation", key_length, choice)


def _product(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b.astype(a.dtype), preferred_element_type=jnp.float32)


def _logits(query, key, bias, mask, scale) -> Float[Array, "B K G T S"]:
    logits = scale * _product("BKGTH,BKSH->BKGTS", query, key)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    return jnp.where(mask, logits, _MASKED)


def reference_attention(query, key, value, bias, visibility: Visibility, scale, dropout_rate, dropout_key):
    """The definition: every logit at once, memory quadratic in length. Any platform, any feature."""
    mask = visibility.mask()
    logits = _logits(query, key, bias, mask, scale)
    unnormalized = jnp.where(mask, jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))), 0.0)
    probabilities = unnormalized / jnp.maximum(unnormalized.sum(-1, keepdims=True), 1e-30)
    probabilities = dropout(probabilities, dropout_rate, dropout_key)
    return _product("BKGTS,BKSH->BKGTH", probabilities.astype(value.dtype), value)


def chunked_attention(query, key, value, bias, visibility: Visibility, scale, dropout_rate, dropout_key):
    """Online softmax over blocks of keys, and again in its own backward pass: memory linear in length.

    (Rabe and Staats, arXiv 2112.05682; the backward pass is Dao et al., arXiv 2205.14135, algorithm 4.)
    """
    if dropout_rate:
        raise ValueError("attention implementation 'chunked' has no dropout: use 'reference', or attention dropout 0.")
    return _chunked(query, key, value, bias, visibility, scale)


def _key_blocks(key, value, bias, visibility: Visibility):
    """Pad S to whole blocks with keys of segment 0, which nothing sees; the leading axis is the block."""
    length = key.shape[2]
    size = min(_KEY_BLOCK, length)
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
    start = jnp.zeros(query.shape, jnp.float32), jnp.full(column, _MASKED), jnp.zeros(column)
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


IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {"reference": reference_attention, "chunked": chunked_attention}
