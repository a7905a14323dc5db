"""Inverted dropout whose mask is a hash of the key and the place.

`jax.random.bernoulli` costs as much as a matrix product on some hardware, and what it draws must be kept for the
backward pass. Here an element is kept or not by a hash of (key, row, column): ten integer operations, fused into
whatever reads it, made again in the backward pass, and the same on every backend, block size and mesh.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

Words = UInt32[Array, "2"] | tuple[UInt32[Array, ""], UInt32[Array, ""]]
"""A key as the hash takes it, 64 bits: a kernel has them as two scalars."""


def dropout_words(key: Array) -> UInt32[Array, "2"]:
    """What the hash takes of a key, 64 bits."""
    return jax.random.bits(key, (2,), jnp.uint32)


def keep_mask(words: Words, rate: float, row: UInt32[Array, "..."], column: UInt32[Array, "..."]) -> Bool[Array, "..."]:
    """Which elements stay, each with probability 1 - rate, by `words` and place; row and column broadcast.

    The hash is Wellons' lowbias32 of a Weyl sequence along the columns whose start is hashed from the row likewise.
    (Hash prospector, 2018: its outputs' bits each flip with probability one half, within 0.2%.)
    """
    return keep_in_row(row_start(words, row), rate, column)


def row_start(words: Words, row: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """What `keep_mask` takes of a row: the half of it that need not be made for each element."""
    return _mix(row * (words[0] | jnp.uint32(1)) + words[1])


def keep_in_row(start: UInt32[Array, "..."], rate: float, column: UInt32[Array, "..."]) -> Bool[Array, "..."]:
    """The other half."""
    bits = _mix(start + column * jnp.uint32(0x9E3779B9))  # 2^32 over the golden ratio: columns lie far apart
    return bits >= jnp.uint32(round(rate * 2**32))


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
    return x ^ (x >> jnp.uint32(16))


def dropout(x: Float[Array, "..."], rate: float, key: Array | None) -> Float[Array, "..."]:
    """Zero each element with probability `rate` and divide the rest by 1 - rate (Srivastava et al. 2014).

    No key, or a rate of 0, returns x: that is what deterministic means here.
    """
    if key is None or rate == 0.0:
        return x
    if rate == 1.0:
        return jnp.zeros_like(x)
    return _drop(x, dropout_words(key), rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _drop(x, words, rate):
    shape = (1, *x.shape) if x.ndim < 2 else x.shape
    strides = [1]
    for size in reversed(shape[1:-1]):
        strides.insert(0, size * strides[0])
    # Summed rather than reshaped, so that every device of a mesh makes its own part.
    axes = range(len(strides))
    row = sum(jax.lax.broadcasted_iota(jnp.uint32, (*shape[:-1], 1), a) * jnp.uint32(strides[a]) for a in axes)
    column = jax.lax.broadcasted_iota(jnp.uint32, (*(1,) * len(strides), shape[-1]), len(strides))
    keep = keep_mask(words, rate, row, column).reshape(x.shape)
    return jnp.where(keep, x * jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros_like(x))


# The mask is linear and made again, so the backward pass needs the words alone.
_drop.defvjp(
    lambda x, words, rate: (_drop(x, words, rate), words),
    lambda rate, words, g: (_drop(g, words, rate), None),
)
