"""Rotary and sinusoidal positions against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_encoder.ops.platform import platform_for_tracing
from flax_encoder.ops.position import apply_rope, rope_tables, sinusoidal

B, T, N, H, THETA = 2, 7, 3, 10, 10_000.0
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2], [5, 0, 11, 500, 13, 17, 8191]], np.int32)


def draw(seed=0):
    return np.random.default_rng(seed).standard_normal((B, T, N, H)).astype(np.float32)


def test_rope_multiplies_complex_pairs_by_a_phase():
    """Features (h, h + H/2) are one complex number, turned by position * theta^(-2h/H)."""
    x = draw()
    turn = np.exp(1j * POSITIONS[..., None, None] * THETA ** (-2 * np.arange(H // 2) / H))
    turned = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * turn
    got = apply_rope(jnp.asarray(x), rope_tables(jnp.asarray(POSITIONS), H, THETA))
    # The angle, rounded to float32, is off by a share of itself.
    atol = 4 * np.finfo(np.float32).eps * POSITIONS.max()
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), rtol=0, atol=atol)


def test_rope_depends_on_differences_of_positions_only():
    query, key = jnp.asarray(draw(0)), jnp.asarray(draw(1))
    positions = jnp.asarray(POSITIONS[:1].repeat(B, 0))

    def logits(shift):
        tables = rope_tables(positions + shift, H)
        return jnp.einsum("BTNH,BSNH->BNTS", apply_rope(query, tables), apply_rope(key, tables))

    np.testing.assert_allclose(logits(100), logits(0), rtol=0, atol=1e-4)
    assert np.abs(logits(0) - jnp.einsum("BTNH,BSNH->BNTS", query, key)).max() > 0.1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rope_keeps_norms_and_dtype(dtype):
    x = jnp.asarray(draw(), dtype)
    turned = apply_rope(x, rope_tables(jnp.asarray(POSITIONS), H))
    assert turned.dtype == dtype
    norms = [np.linalg.norm(np.asarray(a, np.float64), axis=-1) for a in (x, turned)]
    np.testing.assert_allclose(*norms, rtol=float(jnp.finfo(dtype).eps))


def test_position_zero_is_left_alone():
    x = jnp.asarray(draw())
    turned = apply_rope(x, rope_tables(jnp.asarray(POSITIONS), H))
    np.testing.assert_array_equal(turned[POSITIONS == 0], x[POSITIONS == 0])


def test_rope_refuses_an_odd_head_dim():
    with pytest.raises(ValueError, match="head_dim must be even: got 7"):
        rope_tables(jnp.asarray(POSITIONS), 7)


def test_sinusoidal_equals_the_formula():
    want = np.zeros((B, T, H))
    for b, t, i in np.ndindex(B, T, H // 2):
        angle = POSITIONS[b, t] / 10_000 ** (2 * i / H)
        want[b, t, 2 * i], want[b, t, 2 * i + 1] = np.sin(angle), np.cos(angle)
    atol = 4 * np.finfo(np.float32).eps * POSITIONS.max()
    np.testing.assert_allclose(sinusoidal(jnp.asarray(POSITIONS), H), want, rtol=0, atol=atol)


def test_rope_by_a_product_is_rope_to_the_bit():
    """As TPUs have it, forward and backward; the gradient is the turn back."""
    generator = np.random.default_rng(0)
    x, g = (jnp.asarray(generator.standard_normal((2, 5, 3, 8)), jnp.bfloat16) for _ in range(2))
    tables = rope_tables(jnp.asarray(generator.integers(0, 100, (2, 5)), jnp.int32), 8)
    plain, turn_back = jax.vjp(lambda x: apply_rope(x, tables), x)
    with platform_for_tracing("tpu"):
        turned, vjp = jax.vjp(lambda x: apply_rope(x, tables), x)
        backward = vjp(g)[0]
    np.testing.assert_array_equal(turned, plain)
    np.testing.assert_array_equal(backward, turn_back(g)[0])
    want = jax.vjp(lambda x: _by_definition(x, tables), x.astype(jnp.float32))[1](g.astype(jnp.float32))[0]
    atol = 4 * float(jnp.finfo(jnp.bfloat16).eps)
    np.testing.assert_allclose(np.asarray(backward, np.float32), want, rtol=0, atol=atol)


def _by_definition(x, tables):
    cos, sin = tables
    left, right = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([right, left], axis=-1) * sin
