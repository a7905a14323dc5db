"""Normalisation over the last axis, in float32 whatever comes in.

The backward pass keeps x alone, rounded to `dtype`, and makes the rest again: differentiation would keep two or three
float32 arrays as large.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def layer_norm(
    x: Float[Array, "*B D"],
    scale: Float[Array, "D"],
    bias: Float[Array, "D"] | None,
    epsilon: float,
    dtype: str = "float32",
) -> Float[Array, "*B D"]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias (Ba et al., arXiv 1607.06450); x's dtype out."""
    return _remembering_x(_layer_norm, x, scale, bias, epsilon, dtype)


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, "D"], epsilon: float, dtype: str = "float32"
) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x^2) + epsilon) * scale (Zhang and Sennrich, arXiv 1910.07467). float32 inside, x's dtype out."""
    return _remembering_x(_rms_norm, x, scale, None, epsilon, dtype)


def _layer_norm(x, scale, bias, epsilon):
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + epsilon) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


def _rms_norm(x, scale, bias, epsilon):
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + epsilon) * scale).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5))
def _remembering_x(norm, x, scale, bias, epsilon, dtype):
    return norm(x, scale, bias, epsilon)


def _forward(norm, x, scale, bias, epsilon, dtype):
    return norm(x, scale, bias, epsilon), (x.astype(dtype), jnp.zeros((), x.dtype), scale, bias)


def _backward(norm, epsilon, dtype, residuals, g):
    x, like, scale, bias = residuals
    # The barrier keeps XLA from finding the forward pass's arrays again and keeping those.
    x = jax.lax.optimization_barrier(x).astype(like.dtype)
    return jax.vjp(functools.partial(norm, epsilon=epsilon), x, scale, bias)[1](g)


_remembering_x.defvjp(_forward, _backward)
