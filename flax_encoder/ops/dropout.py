"""Inverted dropout by explicit key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dropout(x: Float[Array, "..."], rate: float, key: Array | None) -> Float[Array, "..."]:
    """Zero each element with probability `rate` and divide the rest by 1 - rate (Srivastava et al. 2014).

    No key, or a rate of 0, returns x: that is what deterministic means here.
    """
    if key is None or rate == 0.0:
        return x
    if rate == 1.0:
        return jnp.zeros_like(x)
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
