"""Randomness with an address: numbers that are functions of where they are used, so that there is no state to carry.

Everything is counter-based on the finaliser of SplitMix64 (Steele, Lea and Flood 2014), vectorised over NumPy arrays.
"""

import numpy as np

# Three rounds of `permute` favour some places of five by a tenth and leave half of the orders of seven out; after six,
# 40,000 draws show no favour.
_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(*address: int | np.ndarray) -> np.ndarray:
    """Uniform uint64 for an address of integers or integer arrays, which broadcast."""
    bits = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):  # wrapping is meant
        for part in address:
            bits = _mix(bits + (np.asarray(part).astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return bits


def uniform(bits: np.ndarray) -> np.ndarray:
    """Random bits as float64 in [0, 1)."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(index: np.ndarray, size: int | np.ndarray, *address: int | np.ndarray) -> np.ndarray:
    """Where `index` goes in a random permutation of range(size) that the address picks; no array of `size` is made.

    Rounds of x -> x * odd + key and x -> x ^ (x >> half), both one-to-one on the next power of two, walked until they
    land inside (cycle walking, Black and Rogaway 2002). `size` and the address broadcast against `index`, so one call
    serves many permutations.
    """
    index, size = np.broadcast_arrays(np.asarray(index, np.uint64), np.asarray(size, np.uint64))
    width = np.frexp(np.maximum(size, np.uint64(2)) - 1.0)[1].astype(np.uint64)  # bits of size - 1
    mask = (np.uint64(1) << width) - np.uint64(1)
    half = (width + np.uint64(1)) >> np.uint64(1)
    base = np.broadcast_to(random_bits(*address), index.shape)
    with np.errstate(over="ignore"):
        keys = [_mix(base + np.uint64(r) * _GOLDEN) for r in range(_ROUNDS)]
        out = index.copy()
        todo = np.ones(index.shape, bool)
        while todo.any():
            x, m, h = out[todo], mask[todo], half[todo]
            for key in keys:
                k = key[todo]
                x = (x * (k | np.uint64(1)) + (k >> np.uint64(32))) & m
                x ^= x >> h
            out[todo] = x
            todo[todo] = x >= size[todo]
    return out.astype(np.int64)
