"""Attention in generation: one query per text, and cached keys and values.

Axes: B sources, W texts that are written of each, N query heads, K key/value heads, S keys, H head dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flax_encoder.ops.platform import platform, precision


def kept(x: Float[Array, "*B"], dtype: str) -> Float[Array, "*B"]:
    """x rounded to `dtype`, as a cache keeps it: on a CPU in float32, which its batched products take as they come."""
    x = x.astype(dtype)
    return x.astype(jnp.float32) if platform() == "cpu" else x


def attend_to_cache(
    query: Float[Array, "B W N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    is_visible: Bool[Array, "B #W S"],
    bias: Float[Array, "B N S"] | None = None,
    *,
    scale: float,
) -> Float[Array, "B W N H"]:
    """softmax(scale Q K^T + bias) V over the keys that each text sees, float32; zeros for one that sees none.

    Keys lie with the heads before them, so that each head's are one matrix, and the texts of a source share them:
    what they are made of, the source, is read once for all.

    Example:
      >>> cache = jnp.ones((1, 2, 4, 8))  # four keys of two heads
      >>> attend_to_cache(jnp.ones((1, 3, 2, 8)), cache, cache, jnp.ones((1, 1, 4), bool), scale=1.0).shape
      (1, 3, 2, 8)
    """
    (B, W, N, H), K = query.shape, key.shape[1]
    G, of = N // K, {"preferred_element_type": jnp.float32, "precision": precision(key, value)}
    query = query.astype(key.dtype).reshape(B, W, K, G, H)
    logits = scale * jnp.einsum("BWKGH,BKSH->BKWGS", query, key, **of)
    if bias is not None:
        logits = logits + bias.reshape(B, K, 1, G, -1)
    sees = is_visible[:, None, :, None]
    weights = jax.nn.softmax(jnp.where(sees, logits, jnp.finfo(jnp.float32).min), axis=-1)
    weights = jnp.where(sees, weights, 0.0).astype(value.dtype)
    out = jnp.einsum("BKWGS,BKSH->BKWGH", weights, value, **of)  # heads first: a CPU has no quick product otherwise
    return out.swapaxes(1, 2).reshape(B, W, N, H)
