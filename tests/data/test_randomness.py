"""Randomness with an address."""

import numpy as np
import pytest

from flax_encoder.data.rows.randomness import permute, random_bits


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 64, 65, 1000])
def test_permute_is_a_bijection(size):
    for seed in range(7):
        assert sorted(permute(np.arange(size), size, seed, 3)) == list(range(size))


def test_permutations_in_one_call_equal_permutations_one_by_one():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 101, size=(7, 11))
    index, epoch = rng.integers(sizes), rng.integers(5, size=(7, 1))
    together = permute(index, sizes, 13, epoch, 2)
    for i, j in np.ndindex(sizes.shape):
        assert together[i, j] == permute(index[i, j : j + 1], int(sizes[i, j]), 13, int(epoch[i, 0]), 2)[0]


def test_every_part_of_an_address_counts_and_so_does_its_order():
    addresses = [(0,), (0, 0), (1,), (1, 2), (2, 1), (1, 2, 0), (1, 2, 3), (-1,), (2**63 - 1,)]
    assert len({int(random_bits(*address)[0]) for address in addresses}) == len(addresses)
    grid = random_bits(5, np.arange(31)[:, None], np.arange(37)[None, :])
    assert len(np.unique(grid)) == 31 * 37
    assert grid[29, 23] == random_bits(5, 29, 23)[0]


def test_every_bit_is_fair():
    n = 40_009
    bits = (random_bits(7, np.arange(n))[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.all(np.abs(bits.sum(0) - n / 2) < 5 * np.sqrt(n / 4))


@pytest.mark.parametrize("size", [3, 5, 17])
def test_every_index_goes_everywhere_equally_often(size):
    n = 20_011
    for index in range(size):
        counts = np.bincount(permute(np.full(n, index), size, np.arange(n), 1), minlength=size)
        assert np.all(np.abs(counts - n / size) < 4.5 * np.sqrt(n / size * (1 - 1 / size)))
