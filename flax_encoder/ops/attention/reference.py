"""The definition: every logit at once, memory quadratic in length. Any platform, any feature."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from flax_encoder.ops.attention.problem import MASKED, Problem, kept, visible
from flax_encoder.ops.platform import platform, precision


def refusal(problem: Problem) -> None:
    """Serves everything."""


def attend(problem: Problem) -> Float[Array, "B T N H"]:
    (B, T, N, _), (S, K) = problem.query.shape, problem.key.shape[1:3]
    weights = _weights(problem)
    if problem.dropout_words is not None:
        batch = problem.first_row + jnp.arange(B)[:, None, None, None, None]
        head = problem.first_head + jnp.arange(N).reshape(K, N // K, 1, 1)
        places = batch, head, problem.first_query + jnp.arange(T)[:, None], jnp.arange(S)
        keep = kept(problem.dropout_words, problem.dropout_rate, problem.row_places, *places)
        weights = jnp.where(keep, weights / (1.0 - problem.dropout_rate), 0.0)
    value = _operand(rearrange(problem.value, "B S K H -> B K S H"))
    out = _einsum(value)("BKGTS,BKSH->BKGTH", weights.astype(value.dtype), value)
    return rearrange(out, "B K G T H -> B T (K G) H").astype(problem.query.dtype)


def attention_weights(problem: Problem) -> Float[Array, "B N T S"]:
    """What `attend` weighs the values by, without dropout: float32, and all 0 where a query sees no key."""
    return rearrange(_weights(problem), "B K G T S -> B (K G) T S")


def _operand(x: Array) -> Array:
    """XLA has no fast batched bfloat16 product on CPUs."""
    return x.astype(jnp.float32) if platform() == "cpu" else x


def _einsum(operand: Array):
    return functools.partial(jnp.einsum, precision=precision(operand), preferred_element_type=jnp.float32)


def _weights(problem: Problem) -> Float[Array, "B K G T S"]:
    (T, N), (S, K) = problem.query.shape[1:3], problem.key.shape[1:3]
    query = _operand(rearrange(problem.query, "B T (K G) H -> B K G T H", K=K))
    key = _operand(rearrange(problem.key, "B S K H -> B K S H"))
    logits = problem.scale * _einsum(query)("BKGTH,BKSH->BKGTS", query, key)
    if (bias := problem.bias) is not None:
        bias = rearrange(bias, "B (K G) T S -> B K G T S", K=K if bias.shape[1] == N else 1)
        logits = logits + bias.astype(jnp.float32)
    segments = None, None
    if problem.query_segments is not None:
        segments = problem.query_segments[:, None, None, :, None], problem.key_segments[:, None, None, None, :]
    mask = visible(*segments, problem.window, jnp.arange(T)[:, None], jnp.arange(S))
    if mask is not None:
        logits = jnp.where(mask, logits, MASKED)
    # A query that sees nothing has no logit above this, and its weights vanish.
    top = jnp.maximum(jax.lax.stop_gradient(logits.max(-1, keepdims=True)), MASKED / 2)
    weights = jnp.exp(logits - top)
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
