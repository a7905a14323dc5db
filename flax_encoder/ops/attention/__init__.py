"""Bidirectional attention over packed rows: one contract, several backends.

Axes: B batch, T query length, S key length, N query heads, K key/value heads, G = N / K query heads that share one,
H head dim. A token sees the keys of its own segment that lie within its window, on every backend, forward and
backward; segment 0 is padding, which sees nothing, is seen by nothing, and comes out as zeros.
"""

import functools
import logging
import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_encoder.ops.attention import chunked, cudnn, flash, reference, rows, splash
from flax_encoder.ops.attention.mesh import over_mesh, over_tokens, splits_tokens
from flax_encoder.ops.attention.problem import Problem, Refusal, Window
from flax_encoder.ops.dropout import dropout_words
from flax_encoder.ops.platform import platform
from flax_encoder.ops.position import RopeTables

__all__ = ["CHOICES", "IMPLEMENTATIONS", "Window", "attention", "attention_weights"]

logger = logging.getLogger(__name__)


class Implementation(NamedTuple):
    attend: Callable[[Problem], Float[Array, "B T N H"]]
    refusal: Callable[[Problem], Refusal | None]
    """Why it cannot serve a problem, or None."""
    applies_rope: bool
    """Whether it turns queries and keys itself, or is given them turned."""


IMPLEMENTATIONS = {
    module.__name__.rsplit(".", 1)[1]: Implementation(module.attend, module.refusal, module is rows)
    for module in (reference, chunked, rows, splash, flash, cudnn)
}

# By platform, in order of preference: a name, and the longest row of keys for which it is worth it. LOG.md has the
# measurements: on CPUs `chunked` is the fastest at every length; on TPUs `rows` needs no copies around it, which cost
# `splash` more than its products; on GPUs `flash` is faster than `cudnn` on every shape that it serves, many times so
# on packed rows, and alone gives the same bits each time; elsewhere a short row's logits cost less to keep than to make
# again.
CHOICES = {
    "cpu": (("chunked", math.inf),),
    "tpu": (("rows", math.inf), ("splash", math.inf), ("reference", 1024), ("chunked", math.inf)),
    "gpu": (("flash", math.inf), ("cudnn", math.inf), ("reference", 1024), ("chunked", math.inf)),
}


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    window: Window | None = None,
    rope: RopeTables | None = None,
    bias: Float[Array, "#B #N T S"] | None = None,
    offset_bias: Float[Array, "N P"] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(scale Q K^T + bias) V within segments and window (Vaswani et al., arXiv 1706.03762, equation 1).

    Args:
      segment_ids: the number of each query's document in its row, 0 for padding. None: each row is one document.
      key_segment_ids: the same for keys; None is segment_ids, for self-attention, where T = S.
      lengths: in place of segment_ids, if each row is one document of so many tokens, followed by padding, T = S. Some
        backends compute this faster than rows of several documents.
      window: how many tokens to the (left, right) a query sees, in row indices. Python ints let a backend skip what
        lies outside; traced values cost as much as no window, if a backend takes them at all.
      rope: `rope_tables` of the positions, by which queries and keys are rotated first, T = S; None does not rotate.
      bias: added to the scaled logits, for example T5's and ALiBi's positions.
      offset_bias: in place of bias, a bias that depends only on the offset j - i of key j from query i, which goes from
        -(T - 1) to S - 1, P = T + S - 1. On a mesh each device makes the bias of its own queries from it, and devices
        exchange a gradient that is as short.
      scale: factor of the logits; None is H ** -0.5.
      dropout_rate: share of the attention probabilities to drop, if there is a dropout_key (Srivastava et al. 2014,
        inverted). A hash of the key and the place decides, the same on every backend.
      implementation: a name in `IMPLEMENTATIONS`, or None for the first of `CHOICES` that can serve.

    Logits, softmax and accumulation are float32; the result has query's dtype. Matrix products take their operands in
    the dtype in which they come, such as bfloat16.

    Raises:
      ValueError: heads do not divide, a window is below 0, or the implementation is unknown or cannot serve; the
        message gives the reason.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))
      >>> row = jnp.array([[1, 1, 1, 2, 2, 0]])  # two documents and padding
      >>> attention(x, x, x, segment_ids=row).shape
      (1, 6, 2, 8)
    """
    (B, T, N, H), (S, K) = query.shape, key.shape[1:3]
    if N % K:
        raise ValueError(f"key/value heads must divide query heads: got {K} for {N}.")
    if segment_ids is not None and key_segment_ids is None and T != S:
        raise ValueError(f"keys of their own need key_segment_ids beside segment_ids: got T {T}, S {S}.")
    if offset_bias is not None and (bias is not None or offset_bias.shape != (N, T + S - 1)):
        raise ValueError(
            f"offset_bias stands for bias, with T + S - 1 values a head: got shape {offset_bias.shape} for {N} heads, "
            f"T {T} and S {S}" + (", and bias too." if bias is not None else ".")
        )
    if rope is not None and T != S:
        raise ValueError(f"rope turns queries and keys by the same positions: got T {T}, S {S}; turn them before.")
    if lengths is not None:
        if segment_ids is not None or key_segment_ids is not None or T != S:
            raise ValueError(f"lengths stand for the segments of self-attention: got segments too, or T {T}, S {S}.")
        segment_ids = (jnp.arange(T) < lengths[:, None]).astype(jnp.int32)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown attention implementation {implementation!r}; known are {', '.join(IMPLEMENTATIONS)}."
        )
    if key_segment_ids is None:
        key_segment_ids = segment_ids
    elif segment_ids is None:
        segment_ids = jnp.ones((B, T), jnp.int32)
    is_dropped = dropout_key is not None and dropout_rate > 0.0
    if (is_dropped and dropout_rate == 1.0) or query.size == 0 or key.size == 0:
        return jnp.zeros_like(query)
    problem = Problem(
        query,
        key,
        value,
        segment_ids,
        key_segment_ids,
        _narrowest(window, T, S),
        bias,
        H**-0.5 if scale is None else scale,
        dropout_rate if is_dropped else 0.0,
        dropout_words(dropout_key) if is_dropped else None,
        N,
        rope=rope,
        offset_bias=offset_bias,
        lengths=lengths,
    )
    attend = functools.partial(_attend, implementation)
    if splits_tokens(problem):
        return over_tokens(problem, attend)
    if offset_bias is not None:
        return over_mesh(lambda part: attend(part.with_pairs()))(problem)
    return attend(problem)


def _attend(implementation: str | None, problem: Problem) -> Float[Array, "B T N H"]:
    """By the implementation named, or the one chosen."""
    name = implementation or _choose(problem)
    if refusal := IMPLEMENTATIONS[name].refusal(problem):
        raise ValueError(f"attention implementation {name!r} cannot serve: {refusal}")
    return IMPLEMENTATIONS[name].attend(problem if IMPLEMENTATIONS[name].applies_rope else problem.turned())


def attention_weights(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: Window | None = None,
    rope: RopeTables | None = None,
    bias: Float[Array, "#B #N T T"] | None = None,
    offset_bias: Float[Array, "N P"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B N T T"]:
    """softmax(scale Q K^T + bias) of self-attention: the weights that `attention` gives to values. Arguments as there.

    The plain `reference` computes them, whichever implementation a model runs: float32, memory quadratic in length.
    The weights of a query add up to 1 over the keys that it sees, and are 0 elsewhere; a query of padding has none.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
      >>> weights = attention_weights(x, x, segment_ids=jnp.array([[1, 1, 2, 2]]))
      >>> weights.shape, float(weights[0, 0, 0, 2])  # the third token is another document's
      ((1, 2, 4, 4), 0.0)
    """
    T, N, H = query.shape[1:]
    problem = Problem(
        query, key, key, segment_ids, segment_ids, _narrowest(window, T, T), bias, H**-0.5 if scale is None else scale,
        0.0, None, N, rope=rope, offset_bias=offset_bias,
    )  # fmt: skip
    return reference.attention_weights(problem.with_pairs().turned())


def _narrowest(window: Window | None, T: int, S: int) -> Window | None:
    """Python ints where they can be had, no wider than the row; None where everything is seen."""
    if window is None:
        return None
    try:
        left, right = (operator.index(w) for w in window)
    except TypeError:
        return tuple(jnp.asarray(w, jnp.int32) for w in window)
    if left < 0 or right < 0:
        raise ValueError(f"a window reaches at least 0 tokens to the left and right: got {left} and {right}.")
    if not isinstance(T, int):  # a symbol, where a program is exported for rows of any length
        return left, right
    left, right = min(left, T - 1), min(right, S - 1)
    return None if left == T - 1 and right == S - 1 else (left, right)


def _choose(problem: Problem) -> str:
    length = problem.key.shape[1]
    names = (name for name, longest in CHOICES[platform()] if length <= longest)
    name = next(name for name in names if not IMPLEMENTATIONS[name].refusal(problem))
    _log_choice(name, length)
    return name


@functools.cache
def _log_choice(name: str, key_length: int) -> None:
    logger.info("attention over rows of %d uses the %r implementation", key_length, name)
