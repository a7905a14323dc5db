"""Optimizers by name: Optax's where it has them, with what decays, what is stacked and what is frozen settled."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from flax_encoder.config import OptimizerConfig, Ramp
from flax_encoder.training.parameters import is_head, rates, trained
from flax_encoder.training.schedule import share_of_update
from flax_encoder.training.transformations import (
    averaged,
    clip_by_global_norm,
    each_parameter,
    like,
    matrix_axes,
    scale_by_muon,
    scale_by_soap,
    scale_by_stable_adam,
    scale_by_trust_ratio,
    schedule_free,
)


class ScheduledState(NamedTuple):
    count: Int[Array, ""]
    inner: Any


def make_optimizer(
    config: OptimizerConfig, steps: int, axes: Any, schedule_began: int = 0, phases: Sequence[Ramp] = ()
) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, then update by config.name with its schedule and decoupled weight decay. Frozen parameters
    do not change and have no state. With config.average the parameters are the average (`averaged`).

    The schedule follows the share of `steps` that are done, or `progress`, an extra argument of `update` (another share
    of the run from 0 to 1, such as of its time), whichever is larger. Optimizer state is float32.

    Args:
      axes: the tree of logical axes (training/sharding.py).
      schedule_began: the number of updates before the schedule began; it ends at `steps`.
      phases: learning rates in place of the schedule, as `share_of_update` takes them.

    Raises (`init`):
      ConfigError: config.freeze has a name that fits no parameter, or freezes all parameters.

    Example:
      >>> config = OptimizerConfig(learning_rate=0.1, schedule="linear", warmup_rate=0.0)
      >>> tx = make_optimizer(config, steps=10, axes={"kernel": ("embed", "mlp")})
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> bool((updates["kernel"] < 0).all())
      True
    """
    is_decayed = jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in ("bias", "scale"), axes, is_leaf=_is_axes
    )

    def at(share: Float[Array, ""] | float, params: Any) -> optax.GradientTransformation:
        """The optimizer with its rates at this share of their peaks."""
        mask = trained(config, params)
        descend = functools.partial(_descend, config, share, rates(config, params, mask))
        update = _by_name(config, share, axes, lambda params: like(params, is_decayed), descend)
        clip = [clip_by_global_norm(config.clip_norm)] if config.clip_norm is not None else []
        update = optax.chain(*clip, update)
        if config.average is not None:
            update = averaged(update, config.average)
        if not all(np.any(m) for m in jax.tree.leaves(mask)):
            kinds = jax.tree.map(lambda m: "trained" if np.any(m) else "frozen", mask)
            update = optax.partition({"trained": update, "frozen": optax.set_to_zero()}, kinds)
        return update

    def init(params):
        return ScheduledState(jnp.zeros((), jnp.int32), at(1.0, params).init(params))

    def update(updates, state, params=None, *, progress: Float[Array, ""] | float = 0.0):
        number = state.count - schedule_began if schedule_began else state.count
        share = share_of_update(config, number, steps - schedule_began, progress, phases)
        updates, inner = at(share, params).update(updates, state.inner, params)
        return updates, ScheduledState(optax.safe_increment(state.count), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _descend(config: OptimizerConfig, share: Any, multiples: Any, peak: float) -> optax.GradientTransformation:
    """Multiply updates by -1 and by the learning rate of each parameter.

    Args:
      multiples: of all parameters (training/parameters.py).
    """
    head_peak = peak if config.head_learning_rate is None else config.head_learning_rate

    def one(path, u, multiple):
        rate = share * (head_peak if is_head(path) else peak)
        return u * -(rate if isinstance(multiple, float) and multiple == 1.0 else rate * multiple)

    def update(updates, state, params=None):
        return jax.tree_util.tree_map_with_path(one, updates, like(updates, multiples)), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _by_name(
    config: OptimizerConfig, share: Any, axes: Any, is_decayed: Any, descend_from: Callable[[float], Any]
) -> optax.GradientTransformation:
    """The optimizer of config.name; the comment of that setting names its paper.

    Args:
      descend_from: makes the last step from a peak learning rate.
    """
    rate = share * config.learning_rate
    decay = optax.add_decayed_weights(config.weight_decay, is_decayed)
    descend = descend_from(config.learning_rate)
    adam = optax.scale_by_adam(config.b1, config.b2, config.epsilon)
    adamw = optax.chain(adam, decay, descend)
    if config.name == "adamw":
        return adamw
    if config.name == "stable_adamw":
        stable = scale_by_stable_adam(config.b1, config.b2, config.epsilon, config.weight_decay, is_decayed, axes)
        return optax.chain(stable, descend)
    if config.name == "lamb":
        # What does not decay has no trust ratio, as in the authors' code: biases start at zero, and would stay near it.
        ratio = optax.masked(scale_by_trust_ratio(axes), is_decayed)
        return optax.chain(adam, decay, ratio, descend)
    if config.name == "lion":
        return optax.chain(optax.scale_by_lion(config.b1, config.b2), decay, descend)
    if config.name == "adafactor":
        factored = optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
        )
        return optax.chain(each_parameter(factored, axes), decay, descend)
    if config.name == "schedule_free":
        squares = optax.scale_by_rms(config.b2, config.epsilon, eps_in_sqrt=False, bias_correction=True)
        without_momentum = optax.chain(squares, decay, descend)
        return schedule_free(without_momentum, rate, config.b1)
    if config.name == "muon":
        muon = scale_by_muon(config.muon_momentum, config.epsilon, config.muon_dtype, axes)
        matrices = optax.chain(muon, decay, descend_from(config.muon_learning_rate))
    else:
        soap = scale_by_soap(config.b1, config.b2, config.epsilon, config.soap_every, axes)
        matrices = optax.chain(soap, decay, descend)
    kinds = jax.tree.map(lambda names: "matrix" if matrix_axes(names) else "other", axes, is_leaf=_is_axes)
    return optax.partition({"matrix": matrices, "other": adamw}, kinds)


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple)
