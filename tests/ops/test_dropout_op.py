"""dropout: deterministic without a key, and the mean kept with one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_encoder.ops.dropout import dropout, dropout_words, keep_mask

KEY = jax.random.key(0)


def test_no_key_or_no_rate_returns_x_itself():
    x = jnp.ones((3, 5))
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, KEY) is x


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_kept_is_scaled_so_that_the_mean_is_too(rate, dtype):
    x = jnp.full((997, 101), 2.0, dtype)
    y = dropout(x, rate, KEY)
    assert y.dtype == dtype
    values = np.unique(np.asarray(y, np.float64))
    np.testing.assert_allclose(values, [0, 2 / (1 - rate)], rtol=float(jnp.finfo(dtype).eps))
    share_kept = float((y != 0).mean())
    assert abs(share_kept - (1 - rate)) < 5 * (rate * (1 - rate) / x.size) ** 0.5


def test_rate_one_zeros_everything_with_finite_gradients():
    x = jnp.ones((3, 5))
    assert (dropout(x, 1.0, KEY) == 0).all()
    assert (jax.grad(lambda x: dropout(x, 1.0, KEY).sum())(x) == 0).all()


def test_the_gradient_passes_where_the_value_did():
    x = jnp.arange(1.0, 102.0)
    y, vjp = jax.vjp(lambda x: dropout(x, 0.3, KEY), x)
    np.testing.assert_allclose(vjp(jnp.ones_like(y))[0], y / x, rtol=1e-6)


def test_what_is_kept_is_independent_of_row_column_and_key():
    """Correlations of masks between any two columns, rows or keys are those of fair draws."""
    shape, rate = (2039, 211), 0.1
    masks = [np.asarray(dropout(jnp.ones(shape), rate, jax.random.key(k)) != 0, np.float64) for k in range(3)]
    for mask in (masks[0], masks[0].T):
        pairs = np.corrcoef(mask[:, :211].T) * len(mask) ** 0.5
        off_diagonal = pairs[np.triu_indices(len(pairs), 1)]
        assert abs(off_diagonal.std() - 1) < 0.05
        assert np.abs(off_diagonal).max() < 6.5
        shares = (mask.mean(0) - (1 - rate)) / (rate * (1 - rate) / len(mask)) ** 0.5
        assert np.abs(shares).max() < 5 and abs(shares.std() - 1) < 0.25
    between_keys = np.corrcoef([mask.ravel() for mask in masks])
    assert np.abs(between_keys - np.eye(3)).max() < 5 / masks[0].size ** 0.5
    runs = masks[0][:, 1:] + masks[0][:, :-1]  # neighbours that fall together
    assert abs((runs == 0).mean() - rate**2) < 5 * (rate**2 / runs.size) ** 0.5


def test_an_element_has_the_same_fate_in_every_shape_with_its_row_and_column():
    """So a mask does not depend on how a batch lies over devices or blocks."""
    x = jnp.ones((6, 5, 7))
    whole = dropout(x, 0.5, KEY)
    np.testing.assert_array_equal(dropout(x.reshape(30, 7), 0.5, KEY).reshape(x.shape), whole)
    np.testing.assert_array_equal(dropout(x[:2], 0.5, KEY), whole[:2])
    mask = keep_mask(dropout_words(KEY), 0.5, jnp.uint32(9), jnp.arange(7, dtype=jnp.uint32))
    np.testing.assert_array_equal(mask, whole.reshape(30, 7)[9] != 0)


def test_nothing_of_the_mask_is_kept_for_the_backward_pass():
    _, vjp = jax.vjp(lambda x: dropout(x, 0.5, KEY), jnp.ones((64, 32)))
    assert sum(leaf.size for leaf in jax.tree.leaves(vjp)) <= 2
