"""Randomness with an address: numbers that are functions of where they are used, so that there is no state to carry.

Everything is counter-based on the finaliser of SplitMix64 (Steele, Lea and Flood 2014), vectorised over NumPy arrays.
"""

import numpy as np

# Four rounds would do for large sizes; on five places they favour some by a third, eight by less than one can see.
_ROUNDS = 8
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


def permute(index: np.ndarray, size: int | np.ndarray, *address: int | np.ndarray) -> np.ndarray:
    """Where `index` goes in a random permutation of range(size) that the address picks; no array of `size` is made.

    A Feistel network on the next even power of two, walked until it lands inside (Black and Rogaway 2002). `size` and
    the address broadcast against `index`, so one call serves many permutations.
    """
    index, size = np.broadcast_arrays(np.asarray(index, np.int64), np.asarray(size, np.int64))
    half = np.ceil(np.log2(np.maximum(size, 2)) / 2).astype(np.uint64)
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [np.broadcast_to(random_bits(*address, r), index.shape) for r in range(_ROUNDS)]
    out = index.astype(np.uint64)
    todo = np.ones(index.shape, bool)
    while todo.any():
        h, m = half[todo], mask[todo]
        left, right = out[todo] >> h, out[todo] & m
        with np.errstate(over="ignore"):
            for key in keys:
                left, right = right, left ^ (_mix(right * _GOLDEN + key[todo]) & m)
        out[todo] = (left << h) | right
        todo = out >= size.astype(np.uint64)
    return out.astype(np.int64)
