"""The installed jaxlib computes what it is asked to."""

import jax
import jax.numpy as jnp


def test_installed_jax_is_none_of_the_broken_releases():
    assert jax.__version__ not in ("0.10.2", "0.11.0")


def test_jitted_dot_then_reduce_is_exact():
    """jax issue 39103: jaxlib 0.10.2 on CPUs gives 1065369600 or 1071645696 here, depending on the machine."""
    index = jnp.arange(32_769, dtype=jnp.float32)
    rows = jnp.stack([index, jnp.zeros_like(index), jnp.zeros_like(index)], axis=1)
    squares = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
    assert float(squares[-1]) == 1073741824.0 == 32_768.0**2
    assert (squares == index**2).all()
