"""Schedules at their corners, and what all of them have in common."""

import jax.numpy as jnp
import numpy as np
import pytest

from flax_encoder.config import ConfigError, OptimizerConfig, Ramp
from flax_encoder.training.schedule import share_of_peak, share_of_update

SCHEDULES = [("linear", "linear"), ("cosine", "linear"), ("wsd", "linear"), ("wsd", "one_minus_sqrt")]


@pytest.mark.parametrize(
    ("schedule", "decay_shape", "values"),
    [
        # Up to 0.1; the middle of what is left is 0.55; with wsd the fall begins at 0.8.
        ("linear", "linear", {0: 0.0, 0.05: 0.5, 0.1: 1.0, 0.55: 0.55, 1: 0.1}),
        ("cosine", "linear", {0: 0.0, 0.05: 0.5, 0.1: 1.0, 0.55: 0.55, 0.325: 0.1 + 0.9 * (1 + 0.5**0.5) / 2, 1: 0.1}),
        ("wsd", "linear", {0: 0.0, 0.05: 0.5, 0.1: 1.0, 0.55: 1.0, 0.8: 1.0, 0.9: 0.55, 1: 0.1}),
        ("constant", "linear", {0: 0.0, 0.05: 0.5, 0.1: 1.0, 0.9: 1.0, 1: 1.0}),
        ("wsd", "one_minus_sqrt", {0.05: 0.5, 0.1: 1.0, 0.8: 1.0, 0.85: 0.55, 0.9: 1 - 0.9 * 0.5**0.5, 1: 0.1}),
    ],
)
def test_schedules_pass_through_the_points_written_here(schedule, decay_shape, values):
    final_rate = 0.0 if schedule == "constant" else 0.1
    config = OptimizerConfig(
        schedule=schedule, warmup_rate=0.1, decay_rate=0.2, decay_shape=decay_shape, final_rate=final_rate
    )
    got = share_of_peak(config, jnp.array(list(values)))
    # A rounding of progress just after 0.8 comes out as its root.
    np.testing.assert_allclose(got, list(values.values()), atol=1e-3 if decay_shape == "one_minus_sqrt" else 1e-6)


@pytest.mark.parametrize(("schedule", "decay_shape"), SCHEDULES)
@pytest.mark.parametrize("warmup_rate", [0.0, 0.06, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("decay_rate", [0.0, 0.2])
def test_schedules_rise_to_the_peak_then_fall_to_the_final_rate(schedule, decay_shape, warmup_rate, decay_rate):
    if warmup_rate + decay_rate > 1 if schedule == "wsd" else decay_rate == 0:
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


@pytest.mark.parametrize("updates", [1, 2, 5, 16, 17, 40])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd", "inverse_sqrt", "constant"])
def test_no_update_is_lost_to_a_warm_up_of_less_than_one(schedule, updates):
    """A warm-up of less than one update is none; a longer one begins at 0, and its rates are as they were."""
    config = OptimizerConfig(schedule=schedule, warmup_rate=0.06)
    rates = np.array([float(share_of_update(config, number, updates)) for number in range(updates)])
    plain = np.asarray(share_of_peak(config, jnp.arange(updates) / updates))
    np.testing.assert_allclose(rates[1:], plain[1:], atol=1e-6)  # of shares up to 1, in float32
    if 0.06 * updates < 1:
        assert rates[0] == pytest.approx(1.0) and rates.min() > 0
    else:
        assert rates[0] == 0


def test_phases_take_the_place_of_the_schedule_from_their_start_on():
    config = OptimizerConfig(learning_rate=4e-4, warmup_rate=0.1)
    phases = (Ramp(40, 60, 2e-4, 2e-4), Ramp(60, 80, 2e-4, 0.0, "cosine"), Ramp(80, 100, 0.0, 1e-4))
    rates = np.array([float(share_of_update(config, number, 100, 0.0, phases)) for number in range(100)]) * 4e-4
    plain = [float(share_of_update(config, number, 100)) * 4e-4 for number in range(40)]
    np.testing.assert_allclose(rates[:40], plain, rtol=1e-6)
    np.testing.assert_allclose(rates[40:60], 2e-4, rtol=1e-6)
    gone = np.arange(20) / 20
    np.testing.assert_allclose(rates[60:80], 2e-4 * (1 + np.cos(np.pi * gone)) / 2, rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(rates[80:], 1e-4 * gone, rtol=1e-5, atol=1e-12)


def test_t5s_rate_is_one_over_the_root_of_the_step_after_ten_thousand():
    """1 / sqrt(max(n, k)) of Raffel et al., arXiv 1910.10683, section 3.1.2, with k a quarter of the run."""
    config, k, steps = OptimizerConfig(learning_rate=0.1), 100, 400
    phases = (Ramp(0, k, k**-0.5, k**-0.5), Ramp(k, steps, k**-0.5, steps**-0.5, "inverse_sqrt"))
    rates = [float(share_of_update(config, n, steps, 0.0, phases)) * 0.1 for n in range(steps)]
    np.testing.assert_allclose(rates, np.maximum(np.arange(steps), k) ** -0.5, rtol=1e-5)
