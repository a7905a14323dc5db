"""Operands of matrix products in eight bits, with one scale a tensor (Micikevicius et al., arXiv 2209.05433)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

FORWARD = jnp.float8_e4m3fn
"""Of inputs and kernels: 3 bits of mantissa, numbers up to 448."""
GRADIENT = jnp.float8_e5m2
"""Of a result's gradient, whose numbers spread wider: 2 bits of mantissa, up to 57,344."""


class Float8(NamedTuple):
    """A tensor rounded to float8, of which `values` x `scale` is exact in bfloat16."""

    values: Float[Array, "..."]
    scale: Float[Array, ""]
    """A power of two, float32."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def T(self) -> "Float8":
        return self._replace(values=self.values.T)


def quantised(x: Float[Array, "..."], dtype) -> Float8:
    """x rounded to float8, scaled so that its largest number is at most the dtype's. What is not finite stays so.

    Args:
      dtype: `FORWARD` or `GRADIENT`.

    Example:
      >>> small = quantised(jnp.array([1.0, -0.3, 0.0]), FORWARD)
      >>> dequantised(small, "bfloat16").astype(float).tolist()
      [1.0, -0.3125, 0.0]
    """
    largest = jnp.abs(x).max().astype(jnp.float32)
    # The next power of two: to divide by it rounds nothing.
    _, exponent = jnp.frexp(largest / float(jnp.finfo(dtype).max))
    scale = jnp.ldexp(jnp.float32(1.0), jnp.clip(exponent, -100, 120))
    return Float8((x.astype(jnp.float32) / scale).astype(dtype), scale)


def dequantised(x: Float8, dtype: str) -> Float[Array, "..."]:
    """The numbers that x stands for, as bfloat16 or float32, both exactly."""
    return x.values.astype(dtype) * x.scale.astype(dtype)
