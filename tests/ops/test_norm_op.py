"""layer_norm and rms_norm against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_encoder.ops.norm import layer_norm, rms_norm
from flax_encoder.ops.platform import platform_for_tracing

B, T, D = 2, 3, 31
EPSILON = 1e-5


def arrays(dtype=np.float32):
    generator = np.random.default_rng(0)
    x = (3 * generator.standard_normal((B, T, D)) + 2).astype(dtype)
    return x, *(generator.standard_normal(D).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norms_equal_their_definitions(dtype):
    x, scale, bias = arrays(dtype)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    layer = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON) * scale
    rms = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPSILON) * scale
    x, scale, bias = map(jnp.asarray, (x, scale, bias))
    for got, want in (
        (layer_norm(x, scale, bias, EPSILON), layer + np.asarray(bias)),
        (layer_norm(x, scale, None, EPSILON), layer),
        (rms_norm(x, scale, EPSILON), rms),
    ):
        assert got.dtype == dtype
        atol = 8 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=atol)


def test_layer_norm_forgets_shift_and_size_and_rms_norm_size():
    x, scale, bias = map(jnp.asarray, arrays())
    np.testing.assert_allclose(
        layer_norm(5 * x + 7, scale, bias, 1e-12), layer_norm(x, scale, bias, 1e-12), rtol=0, atol=1e-5
    )
    np.testing.assert_allclose(rms_norm(5 * x, scale, 1e-12), rms_norm(x, scale, 1e-12), rtol=0, atol=1e-5)


@pytest.mark.parametrize("ratio", [0, 1, 30])
def test_a_tpu_sums_a_row_once_which_is_exact_enough_for_bfloat16(ratio):
    """With a mean of `ratio` standard deviations, forward and backward."""
    x, scale, bias = map(jnp.asarray, arrays())
    x = jnp.tile(x, (1, 1, 32)) - 2
    x = x + ratio * x.std(-1, keepdims=True)

    def out_and_gradient(platform):
        with platform_for_tracing(platform):
            norm = jax.jit(lambda x: layer_norm(x, jnp.tile(scale, 32), jnp.tile(bias, 32), EPSILON, "bfloat16"))
            y, vjp = jax.vjp(norm, x)
            return y, vjp(jnp.cos(y))[0]

    for got, want in zip(out_and_gradient("tpu"), out_and_gradient("cpu"), strict=True):
        atol = float(jnp.finfo(jnp.bfloat16).eps) / 8 * float(jnp.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def test_constant_rows_come_out_as_the_bias_with_finite_gradients():
    _, scale, bias = map(jnp.asarray, arrays())
    x = jnp.zeros((B, T, D))
    np.testing.assert_array_equal(layer_norm(x, scale, bias, 1e-12), jnp.broadcast_to(bias, x.shape))
    assert jnp.isfinite(jax.grad(lambda x: (layer_norm(x, scale, bias, 1e-12) ** 2).sum())(x)).all()
    assert jnp.isfinite(jax.grad(lambda x: (rms_norm(x, scale, 1e-12) ** 2).sum())(x)).all()


@pytest.mark.parametrize("kind", ["layer", "layer without bias", "rms"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_equal_those_of_the_definition(kind, dtype):
    """Of x as it is kept: rounded to `dtype`."""
    x, scale, bias = arrays()
    x = x.astype(jnp.dtype(dtype)).astype(np.float32)
    d_y = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)

    def definition(x, scale, bias):
        if kind != "rms":
            x = x - x.mean(-1, keepdims=True)
        y = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * scale
        return y + bias if kind == "layer" else y

    def norm(x, scale, bias):
        if kind == "rms":
            return rms_norm(x, scale, EPSILON, dtype)
        return layer_norm(x, scale, bias if kind == "layer" else None, EPSILON, dtype)

    got, want = (jax.vjp(f, *map(jnp.asarray, (x, scale, bias)))[1](jnp.asarray(d_y)) for f in (norm, definition))
    for g, w in zip(got, want, strict=True):
        assert g.dtype == jnp.float32
        atol = 8 * float(jnp.finfo(jnp.float32).eps) * max(1.0, float(jnp.abs(w).max()))
        np.testing.assert_allclose(g, w, rtol=0, atol=atol)
