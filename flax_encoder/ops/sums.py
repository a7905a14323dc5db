"""Sums at the speed of memory.

XLA:CPU sums at 5 GB/s, along features less, and writes out first what is to be summed (LOG.md).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_encoder.ops.mesh import TOKEN_AXES, parts
from flax_encoder.ops.platform import platform

_SLICES = 8  # more streams a power of two apart share cache lines
_SHORT, _LONG = 64, 4096


def sum_over(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """jnp.sum(x, axes, keepdims=True), for an x that is made only to be summed, as a square or another product is.

    On a CPU, where arrays are added at 20 to 30 GB/s and made meanwhile, eighths of x are added, and again until little
    is left; if axes lie side by side and there is one device. (An x that is there anyway is best summed as it is:
    XLA would make it again for the eighths.)
    """
    first, last = min(axes, default=0), max(axes, default=-1) + 1
    mesh = jax.sharding.get_abstract_mesh()
    if platform() != "cpu" or (not mesh.empty and mesh.size > 1) or sorted(axes) != list(range(first, last)):
        return jnp.sum(x, axes, keepdims=True)
    before, count, after = x.shape[:first], math.prod(x.shape[first:last]), x.shape[last:]
    y, least = x.reshape(*before, count, *after), _SHORT
    while y.shape[first] % _SLICES == 0 and y.shape[first] >= least:
        y, least = functools.reduce(jnp.add, jnp.split(y, _SLICES, axis=first)), _LONG
    return jnp.sum(y, first).reshape(*before, *[1] * (last - first), *after)


def mean_of_features(x: Float[Array, "*B D"], scale: Float[Array, "D"] | None = None) -> Float[Array, "*B 1"]:
    """jnp.mean(x * scale, -1, keepdims=True), on a CPU by a product, for an x that is there anyway.

    Not where the mesh splits tokens: rows and tokens in one axis would have to be brought together.
    """
    if platform() != "cpu" or parts(TOKEN_AXES) > 1:
        return (x if scale is None else x * scale).mean(-1, keepdims=True)
    D = x.shape[-1]
    column = jnp.full(D, 1 / D, x.dtype) if scale is None else scale / D
    return jnp.matmul(x.reshape(-1, D), column[:, None], precision="highest").reshape(*x.shape[:-1], 1)
