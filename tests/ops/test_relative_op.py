"""Relative positions: each bias against its definition, written pair by pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_encoder.ops.relative import (
    alibi_bias,
    alibi_slopes,
    alibi_values,
    disentangled_bias,
    disentangled_buckets,
    offsets,
    pairs_of_offsets,
    t5_bias,
    t5_bias_rows,
    t5_buckets,
    t5_values,
    to_pairs,
)

B, T, N, H, R = 2, 7, 3, 5, 8


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_to_pairs_takes_the_offset_of_each_pair():
    table = draw(B, T, 2 * T - 1)
    want = [[[table[b, i, j - i + T - 1] for j in range(T)] for i in range(T)] for b in range(B)]
    np.testing.assert_array_equal(to_pairs(table), np.array(want))


@pytest.mark.parametrize(("first", "count"), [(0, T), (2, 3), (6, 1)])
def test_pairs_of_offsets_are_those_of_some_queries(first, count):
    values, S = draw(N, T + 4), 5
    want = [[[values[n, j - i + T - 1] for j in range(S)] for i in range(first, first + count)] for n in range(N)]
    got = jax.jit(pairs_of_offsets, static_argnums=(2, 3))(values, first, count, S)
    np.testing.assert_array_equal(got[0], np.array(want))


def test_biases_by_offset_are_the_biases():
    table = draw(R, N)
    np.testing.assert_array_equal(pairs_of_offsets(t5_values(table, T, 16), 0, T, T), t5_bias(table, T, 16))
    np.testing.assert_array_equal(pairs_of_offsets(alibi_values(N, T), 0, T, T), alibi_bias(N, T))


def test_to_pairs_refuses_a_table_of_another_length():
    with pytest.raises(ValueError, match=r"T \+ S - 1 offsets of T queries and S keys: got 7 for 7 and 7"):
        to_pairs(draw(T, T))


@pytest.mark.parametrize(
    ("num_heads", "want"),
    [(8, [2.0**-n for n in range(1, 9)]), (3, [2.0**-4, 2.0**-8, 2.0**-2]), (1, [2.0**-8])],
)
def test_alibi_slopes_are_those_written_here(num_heads, want):
    assert alibi_slopes(num_heads) == want


def test_alibi_is_a_slope_times_the_distance():
    want = [[[-slope * abs(i - j) for j in range(T)] for i in range(T)] for slope in alibi_slopes(N)]
    np.testing.assert_allclose(alibi_bias(N, T)[0], want, rtol=1e-6)


def test_t5_buckets_are_those_written_here():
    """8 buckets: 4 a side, of them 2 for distances 0 and 1 and 2 in log steps to 16."""
    got = t5_buckets(np.array([-40, -16, -6, -5, -2, -1, 0, 1, 2, 5, 6, 16, 40]), 8, 16)
    np.testing.assert_array_equal(got, [3, 3, 3, 2, 2, 1, 0, 5, 6, 6, 7, 7, 7])


def test_t5_bias_is_the_scalar_of_each_pairs_bucket():
    table = draw(8, N)
    want = [[[table[t5_buckets(np.array([j - i]), 8, 16)[0], n] for j in range(T)] for i in range(T)] for n in range(N)]
    np.testing.assert_array_equal(t5_bias(table, T, 16)[0], np.array(want))


def test_disentangled_buckets_are_those_written_here():
    """8 buckets a sign: 4 single distances, then log steps to 15; rows 0 to 15, distance 0 in row 8."""
    got = disentangled_buckets(np.array([-99, -15, -7, -5, -4, -1, 0, 1, 4, 5, 7, 15, 99]), 8, 16)
    np.testing.assert_array_equal(got, [0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 14, 15, 15])
    np.testing.assert_array_equal(disentangled_buckets(np.array([-9, -3, 0, 2, 9]), 0, 3), [0, 0, 3, 5, 5])


@pytest.mark.parametrize("terms", ["c2p", "p2c", "c2p+p2c"])
def test_disentangled_bias_is_the_products_of_each_pair(terms):
    query, key = draw(B, T, N, H), draw(B, T, N, H, seed=1)
    position_key = draw(2 * R, N, H, seed=2) if "c2p" in terms else None
    position_query = draw(2 * R, N, H, seed=3) if "p2c" in terms else None
    rows = disentangled_buckets(-offsets(T), R, 16)

    def by_pairs(query, key, position_key, position_query):
        want = np.zeros((B, N, T, T))
        for b, n, i, j in np.ndindex(want.shape):
            row = disentangled_buckets(np.array([i - j]), R, 16)[0]
            if position_key is not None:
                want[b, n, i, j] += query[b, i, n] @ position_key[row, n]
            if position_query is not None:
                want[b, n, i, j] += key[b, j, n] @ position_query[row, n]
        return 0.3 * want

    got = disentangled_bias(query, key, position_key, position_query, rows, 0.3)
    np.testing.assert_allclose(got, by_pairs(*map(as_array, (query, key, position_key, position_query))), atol=1e-5)


def as_array(x):
    return None if x is None else np.asarray(x, np.float64)


def test_disentangled_bias_needs_a_term():
    with pytest.raises(ValueError, match="position_key, position_query or both"):
        disentangled_bias(draw(B, T, N, H), draw(B, T, N, H), None, None, offsets(T), 1.0)


def test_gradients_flow_to_the_tables():
    gradient = jax.grad(lambda table: (t5_bias(table, T, 16) * draw(1, N, T, T)).sum())(draw(8, N))
    counts = np.bincount(t5_buckets(offsets(T), 8, 16), minlength=8)
    assert ((np.abs(gradient).sum(1) > 0) == (counts > 0)).all()


def test_a_causal_t5_decoder_has_all_buckets_for_the_past():
    """8 buckets: 4 for distances 0 to 3 and 4 in log steps to 16; what comes after is in the first."""
    got = t5_buckets(np.array([-40, -16, -11, -8, -5, -4, -3, -2, -1, 0, 1, 9]), 8, 16, is_causal=True)
    np.testing.assert_array_equal(got, [7, 7, 6, 6, 4, 4, 3, 2, 1, 0, 0, 0])


def test_a_row_of_the_causal_bias_is_that_of_the_whole():
    table = draw(R, N)
    whole = t5_bias(table, T, 16, is_causal=True)
    rows = jax.jit(lambda queries: t5_bias_rows(table, T, 16, queries))(jnp.arange(T))
    np.testing.assert_array_equal(rows, whole[0].swapaxes(0, 1))
