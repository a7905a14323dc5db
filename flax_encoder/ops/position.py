"""Positions as fixed functions: rotary turns and sinusoids."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from flax_encoder.ops.mesh import HEAD_AXES, parts
from flax_encoder.ops.platform import platform

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


@jax.custom_vjp
def apply_rope(x: Float[Array, "B T N H"], tables: RopeTables) -> Float[Array, "B T N H"]:
    """Turn the feature pairs (h, h + H/2) of each head by the tables' angles; x's dtype. The tables get no gradient.

    (Su et al., arXiv 2104.09864, equation 34, with pairs split by halves as in GPT-NeoX and ModernBERT.)
    """
    # Where devices split the heads, a product over all of them would gather them.
    splits_heads = parts(HEAD_AXES) > 1
    by_product = platform() == "tpu" and x.dtype == jnp.bfloat16 and not splits_heads
    return (_turn_by_product if by_product else _turn)(x, *tables)


def _turn(x, cos, sin):
    # Halves are swapped by reversing an axis of two: a concatenation would make slower loops, backward above all.
    swapped = rearrange(
        jnp.flip(rearrange(x, "B T N (two H) -> B T N two H", two=2), axis=3), "B T N two H -> B T N (two H)"
    )
    return (x.astype(jnp.float32) * cos + swapped.astype(jnp.float32) * sin).astype(x.dtype)


def _turn_by_product(x, cos, sin):
    """The same for a TPU, which moves lanes slowly: its matrix unit swaps the halves of heads that stay side by side.

    A sum of one number and zeros is exact.
    """
    B, T, N, H = x.shape
    feature = np.arange(N * H)
    swap = np.zeros((N * H, N * H), np.float32)
    swap[feature, feature // H * H + (feature + H // 2) % H] = 1
    wide = x.reshape(B, T, N * H)
    swapped = jnp.dot(wide, jnp.asarray(swap, x.dtype), preferred_element_type=jnp.float32)
    cos, sin = (jnp.broadcast_to(a, (B, T, N, H)).reshape(B, T, N * H) for a in (cos, sin))
    return (wide.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype).reshape(x.shape)


def _turn_back(tables, g):
    cos, sin = tables
    return apply_rope(g, (cos, -sin)), None


apply_rope.defvjp(lambda x, tables: (apply_rope(x, tables), tables), _turn_back)


def sinusoidal(positions: Int[Array, "B T"], embed_dim: int) -> Float[Array, "B T D"]:
    """sin and cos of position / 10000^(2i/D), interleaved (Vaswani et al., arXiv 1706.03762, section 3.5); D even."""
    rates = 10_000.0 ** (-jnp.arange(0, embed_dim, 2, dtype=jnp.float32) / embed_dim)
    angle = positions[..., None].astype(jnp.float32) * rates
    return rearrange(jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1), "B T D two -> B T (D two)")
