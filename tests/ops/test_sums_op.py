"""Sums made fast are sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_encoder.ops.platform import platform_for_tracing
from flax_encoder.ops.sums import mean_of_features, sum_over

SHAPES = [
    ((), ()),
    ((7,), (0,)),
    ((3, 4096), (1,)),
    ((3, 64, 512), (1, 2)),
    ((64, 96), (0, 1)),
    ((8, 32, 5), (0, 1)),
    ((5, 64, 3), (1,)),
    ((5, 8, 3), (0, 2)),
]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(("shape", "axes"), SHAPES)
def test_sums_by_eighths_are_sums(shape, axes, platform):
    x = np.random.default_rng(0).uniform(0.5, 1.5, shape).astype(np.float32)
    with platform_for_tracing(platform):
        got = jax.jit(lambda x: sum_over(x, axes))(x)
    np.testing.assert_allclose(got, x.astype(np.float64).sum(axes, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("is_scaled", [True, False])
def test_means_of_features_are_means(is_scaled, platform):
    generator = np.random.default_rng(0)
    x, scale = (generator.uniform(0.5, 1.5, shape).astype(np.float32) for shape in ((3, 5, 96), (96,)))
    with platform_for_tracing(platform):
        got = mean_of_features(jnp.asarray(x), jnp.asarray(scale) if is_scaled else None)
    want = (x.astype(np.float64) * (scale if is_scaled else 1)).mean(-1, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=1e-6)
