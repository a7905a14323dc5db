"""Learning rates, as functions of how much of a run is behind it."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_encoder.config import OptimizerConfig, Ramp


def share_of_update(
    config: OptimizerConfig, number: Int[Array, ""] | int, updates: int, progress: Float[Array, ""] | float = 0.0,
    phases: Sequence[Ramp] = (),
) -> Float[Array, ""]:  # fmt: skip
    """The learning rate of update `number`, from 0, of so many, as a share of its peak; by `progress`, from 0 to 1,
    where that is further.

    A warm-up of less than one update has no room: the first update's rate is what comes after it, and is not 0.

    Args:
      phases: learning rates that hold from their start on, in place of the schedule's and of those before them.
    """
    gone = jnp.maximum(number / updates, progress)
    if updates == 1 or config.warmup_rate * updates < 1:
        gone = jnp.maximum(gone, config.warmup_rate)
    share = share_of_peak(config, gone)
    for ramp in phases:
        share = jnp.where(number >= ramp.start, _rate(ramp, number) / config.learning_rate, share)
    return share


def _rate(ramp: Ramp, number: Int[Array, ""] | int) -> Float[Array, ""]:
    done = jnp.clip(jnp.asarray(number - ramp.start, jnp.float32) / max(ramp.end - ramp.start, 1), 0.0, 1.0)
    if ramp.shape == "inverse_sqrt":  # one over its square goes straight
        return jnp.reciprocal(jnp.sqrt(ramp.first**-2 + (ramp.last**-2 - ramp.first**-2) * done))
    if ramp.shape == "cosine":
        done = (1.0 - jnp.cos(jnp.pi * done)) / 2
    elif ramp.shape == "one_minus_sqrt":
        done = jnp.sqrt(done)
    return ramp.first + (ramp.last - ramp.first) * done


def share_of_peak(config: OptimizerConfig, progress: Float[Array, "..."] | float) -> Float[Array, "..."]:
    """The learning rate as a share of its peak when `progress` of the run, from 0 to 1, is done.

    It rises linearly from 0 over warmup_rate of the run, and then follows config.schedule to final_rate at 1. linear
    with warmup_rate 0.5 is a triangle; cosine is Loshchilov and Hutter's (arXiv 1608.03983); wsd is constant and decays
    at the end (Hu et al., arXiv 2404.06395), in the shape one_minus_sqrt as Hägele et al. (arXiv 2405.18392).
    inverse_sqrt falls as the root of warmup_rate / progress (Vaswani et al., arXiv 1706.03762), and ends above 0;
    constant stays at the peak.

    Example:
      >>> config = OptimizerConfig(schedule="linear", warmup_rate=0.1, final_rate=0.0)
      >>> [round(float(share_of_peak(config, at)), 2) for at in (0.05, 0.1, 0.55, 1.0)]
      [0.5, 1.0, 0.5, 0.0]
    """
    progress = jnp.clip(jnp.asarray(progress, jnp.float32), 0.0, 1.0)
    start = config.warmup_rate if config.peak_end is None else config.peak_end
    fallen = jnp.clip((progress - start) / (1.0 - start), 0.0, 1.0) if start < 1 else jnp.zeros_like(progress)
    shape = config.schedule if config.peak_end is None else config.decay_shape
    if shape == "inverse_sqrt":
        left = jnp.sqrt(config.warmup_rate / jnp.maximum(progress, config.warmup_rate))
    elif shape == "cosine":
        left = (1.0 + jnp.cos(jnp.pi * fallen)) / 2
    else:
        left = 1.0 - (jnp.sqrt(fallen) if shape == "one_minus_sqrt" else fallen)
    after = config.final_rate + (1.0 - config.final_rate) * left
    if config.warmup_rate == 0:
        return after
    return jnp.where(progress < config.warmup_rate, progress / config.warmup_rate, after)
