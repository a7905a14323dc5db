"""Schedules at their corners, and what all of them have in common."""

import jax.numpy as jnp
import numpy as np
import pytest

from flax_encoder.config import ConfigError, OptimizerConfig
from flax_encoder.training.schedule import share_of_peak

SCHEDULES = [("linear", "linear"), ("cosine", "linear"), ("wsd", "linear"), ("wsd", "one_minus_sqrt")]


@pytest.mark.parametrize(
    ("schedule", "decay_shape", "values"),
    [
        # Up to 0.1; the middle of what is left is 0.55; with wsd the fall begins at 0.8.
        ("linear", "linear", {0: 0.0, 0.05: 0.5, 0.1: 1.0, 0.55: 0.55, 1: 0.1}),
        ("cosine", "linear", {0: 0.0, 0.05: 0.5, 0.1: 1.0, 0.55: 0.55, 0.325: 0.1 + 0.9 * (1 + 0.5**0.5) / 2, 1: 0.1}),
        ("wsd", "linear", {0: 0.0, 0.05: 0.5, 0.1: 1.0, 0.55: 1.0, 0.8: 1.0, 0.9: 0.55, 1: 0.1}),
        ("wsd", "one_minus_sqrt", {0.05: 0.5, 0.1: 1.0, 0.8: 1.0, 0.85: 0.55, 0.9: 1 - 0.9 * 0.5**0.5, 1: 0.1}),
    ],
)
def test_schedules_pass_through_the_points_written_here(schedule, decay_shape, values):
    config = OptimizerConfig(
        schedule=schedule, warmup_rate=0.1, decay_rate=0.2, decay_shape=decay_shape, final_rate=0.1
    )
    got = share_of_peak(config, jnp.array(list(values)))
    # A rounding of progress just after 0.8 comes out as its root.
    np.testing.assert_allclose(got, list(values.values()), atol=1e-3 if decay_shape == "one_minus_sqrt" else 1e-6)


@pytest.mark.parametrize(("schedule", "decay_shape"), SCHEDULES)
@pytest.mark.parametrize("warmup_rate", [0.0, 0.06, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("decay_rate", [0.0, 0.2])
def test_schedules_rise_to_the_peak_then_fall_to_the_final_rate(schedule, decay_shape, warmup_rate, decay_rate):
    if schedule == "wsd" and warmup_rate + decay_rate > 1:
        return
    config = OptimizerConfig(
        schedule=schedule, warmup_rate=warmup_rate, decay_rate=decay_rate, decay_shape=decay_shape, final_rate=0.1
    )
    rising, falling = np.linspace(0, warmup_rate, 51)[:-1], np.linspace(warmup_rate, 1, 51)
    if warmup_rate:
        np.testing.assert_allclose(share_of_peak(config, jnp.array(rising)), rising / warmup_rate, atol=1e-6)
    values = np.asarray(share_of_peak(config, jnp.array(falling)))
    assert values[0] == pytest.approx(1.0) and (np.diff(values) <= 1e-6).all()
    never_falls = warmup_rate == 1 or (schedule == "wsd" and decay_rate == 0)
    assert values[-1] == pytest.approx(1.0 if never_falls else 0.1)


def test_a_warm_up_of_half_the_run_makes_a_triangle():
    config = OptimizerConfig(warmup_rate=0.5)
    progress = np.linspace(0, 1, 21)
    np.testing.assert_allclose(share_of_peak(config, jnp.array(progress)), 1 - np.abs(2 * progress - 1), atol=1e-6)


def test_inverse_sqrt_falls_as_one_over_the_root_of_the_step():
    """Vaswani et al.'s rate, arXiv 1706.03762, equation 3, as a share of its peak."""
    steps, warmup = 400, 40
    step = np.arange(1, steps + 1)
    wanted = np.minimum(step**-0.5, step * warmup**-1.5) * warmup**0.5
    config = OptimizerConfig(schedule="inverse_sqrt", warmup_rate=warmup / steps)
    np.testing.assert_allclose(share_of_peak(config, jnp.array(step / steps)), wanted, rtol=1e-5)
    for refused in ({"warmup_rate": 0.0}, {"final_rate": 0.1}):
        with pytest.raises(ConfigError, match="inverse_sqrt falls from the end of its warm-up"):
            OptimizerConfig(schedule="inverse_sqrt", **refused)


def test_before_and_after_the_run_the_rate_is_that_of_its_ends():
    config = OptimizerConfig(warmup_rate=0.0, final_rate=0.3)
    np.testing.assert_allclose(share_of_peak(config, jnp.array([-0.5, 1.5])), [1.0, 0.3], rtol=1e-6)
