"""dropout: deterministic without a key, and the mean kept with one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_encoder.ops.dropout import dropout

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
