"""Normalisation over the last axis, in float32 whatever comes in, with gradients by their formula.

Kept for the backward pass are x, rounded to `dtype`, and two numbers a token: differentiation would keep two or three
float32 arrays as large as x, and take twice as many sums over features.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_encoder.ops.platform import platform
from flax_encoder.ops.sums import mean_of_features, sum_over


def layer_norm(
    x: Float[Array, "*B D"],
    scale: Float[Array, "D"],
    bias: Float[Array, "D"] | None,
    epsilon: float,
    dtype: str = "float32",
) -> Float[Array, "*B D"]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias (Ba et al., arXiv 1607.06450); x's dtype out."""
    return _norm(x, scale, bias, True, epsilon, dtype)


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, "D"], epsilon: float, dtype: str = "float32"
) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x^2) + epsilon) * scale (Zhang and Sennrich, arXiv 1910.07467). float32 inside, x's dtype out."""
    return _norm(x, scale, None, False, epsilon, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _norm(x, scale, bias, is_centred, epsilon, dtype):
    return _forward(x, scale, bias, is_centred, epsilon, dtype)[0]


def _forward(x, scale, bias, is_centred, epsilon, dtype):
    x32 = x.astype(jnp.float32)
    mean = mean_of_features(x32) if is_centred else None
    centred = x32 - mean if is_centred else x32
    if is_centred and dtype == "bfloat16" and platform() == "tpu":
        # Both sums in one pass, that of the product which made x. With a mean of r standard deviations the rate is off
        # by r^2 float32 roundings, which bfloat16's hide below an r of a hundred; features of a layer have r below 1.
        variance = jnp.maximum((x32 * x32).mean(-1, keepdims=True) - mean * mean, 0.0)
    else:
        variance = sum_over(centred * centred, (x.ndim - 1,)) / x.shape[-1]
    rate = jax.lax.rsqrt(variance + epsilon)
    y = centred * rate * scale
    y = (y if bias is None else y + bias).astype(x.dtype)
    like = jnp.zeros((), x.dtype)
    return y, (x.astype(dtype), like, mean, rate, scale, bias)


def _backward(is_centred, epsilon, dtype, residuals, g):
    x, like, mean, rate, scale, bias = residuals
    # The barrier keeps XLA from finding the forward pass's arrays again and keeping those.
    x = jax.lax.optimization_barrier(x).astype(jnp.float32)
    normed = (x - mean if is_centred else x) * rate
    g = g.astype(jnp.float32)
    d_normed = g * scale
    *batch, features = range(x.ndim)
    d_x = d_normed - normed * (sum_over(d_normed * normed, (features,)) / x.shape[-1])
    d_x = rate * (d_x - mean_of_features(g, scale) if is_centred else d_x)
    d_scale = sum_over(g * normed, tuple(batch)).reshape(scale.shape).astype(scale.dtype)
    d_bias = None if bias is None else g.sum(tuple(batch)).astype(bias.dtype)
    return d_x.astype(like.dtype), d_scale, d_bias


_norm.defvjp(_forward, _backward)
