"""Positions as fixed functions: rotary turns and sinusoids."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

RopeTables = tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]]


def rope_tables(positions: Int[Array, "B T"], head_dim: int, theta: float = 10_000.0) -> RopeTables:
    """cos and signed sin of position * theta^(-2h/H) radians for the feature pairs (h, h + H/2), float32.

    Made once for all layers.

    Raises:
      ValueError: an odd head_dim, whose features do not pair.
    """
    if head_dim % 2:
        raise ValueError(f"rope turns pairs of features, so head_dim must be even: got {head_dim}.")
    # Rounded as torch rounds them: at position 8192 one last bit of a rate is 1e-3 radians, and published weights were
    # trained with torch's.
    power = np.float64(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    rates = np.float32(1) / power.astype(np.float32)
    angle = positions[:, :, None, None].astype(jnp.float32) * rates
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    tables = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    # The barrier keeps XLA from making sines again in every fusion that reads them: 8% of a small model's step.
    return jax.lax.optimization_barrier(tables)


def apply_rope(x: Float[Array, "B T N H"], tables: RopeTables) -> Float[Array, "B T N H"]:
    """Turn the feature pairs (h, h + H/2) of each head by the tables' angles; x's dtype.

    (Su et al., arXiv 2104.09864, equation 34, with pairs split by halves as in GPT-NeoX and ModernBERT.)
    """
    cos, sin = tables
    # Halves are swapped by reversing an axis of two: a concatenation would make slower loops, backward above all.
    swapped = rearrange(
        jnp.flip(rearrange(x, "B T N (two H) -> B T N two H", two=2), axis=3), "B T N two H -> B T N (two H)"
    )
    return (x.astype(jnp.float32) * cos + swapped.astype(jnp.float32) * sin).astype(x.dtype)


def sinusoidal(positions: Int[Array, "B T"], embed_dim: int) -> Float[Array, "B T D"]:
    """sin and cos of position / 10000^(2i/D), interleaved (Vaswani et al., arXiv 1706.03762, section 3.5); D even."""
    rates = 10_000.0 ** (-jnp.arange(0, embed_dim, 2, dtype=jnp.float32) / embed_dim)
    angle = positions[..., None].astype(jnp.float32) * rates
    return rearrange(jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1), "B T D two -> B T (D two)")
