"""Schedules and optimizers, from Optax."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from flax_encoder.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int, peak: float) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, then config.schedule down to final_rate * peak at step `steps`."""
    warmup = round(config.warmup_rate * steps)
    final = config.final_rate * peak
    rest = max(steps - warmup, 1)
    if config.schedule == "cosine":
        after = [(rest, optax.cosine_decay_schedule(peak, rest, alpha=config.final_rate))]
    elif config.schedule == "linear":
        after = [(rest, optax.linear_schedule(peak, final, rest))]
    else:
        decay = min(max(round(config.decay_rate * steps), 1), rest)
        after = [(rest - decay, optax.constant_schedule(peak)), (decay, optax.linear_schedule(peak, final, decay))]
    pieces = [(warmup, optax.linear_schedule(0.0, peak, warmup))] * (warmup > 0) + after
    boundaries = [sum(n for n, _ in pieces[: i + 1]) for i in range(len(pieces) - 1)]
    return optax.join_schedules([schedule for _, schedule in pieces], boundaries)


def muon_dimensions(axes: tuple[str, ...]) -> MuonDimensionNumbers | None:
    """Which axes of a parameter Muon orthogonalises, from their names: a layer's matrices, each layer by itself.

    A layer's kernel maps `embed` to other axes, or other axes to `embed`. What is no such map (embeddings, heads,
    norms, biases) gives None.
    """
    if axes[0] != "layers" or "embed" not in axes or len(axes) < 3:
        return None
    matrix = tuple(range(1, len(axes)))
    return (
        MuonDimensionNumbers((1,), matrix[1:]) if axes[1] == "embed" else MuonDimensionNumbers(matrix[:-1], matrix[-1:])
    )


def make_optimizer(config: OptimizerConfig, steps: int, axes: Any) -> optax.GradientTransformation:
    """Clipping by global norm, then config.name with its schedule and decoupled weight decay; what is frozen stays.

    `axes` is the tree of logical axes (training/sharding.py). Optimizer state is float32. AdamW is Loshchilov and
    Hutter, arXiv 1711.05101; Muon is Jordan et al. 2024, kellerjordan.github.io/posts/muon.
    """
    decayed = jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in ("bias", "scale"), axes, is_leaf=_is_axes
    )
    update = optax.adamw(
        make_schedule(config, steps, config.learning_rate),
        b1=config.b1,
        b2=config.b2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=lambda params: _like(params, decayed),
    )
    if config.name == "muon":
        dimensions = jax.tree.map(muon_dimensions, axes, is_leaf=_is_axes)
        muon = optax.contrib.muon(
            make_schedule(config, steps, config.muon_learning_rate),
            beta=config.muon_momentum,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=lambda params: _like(params, dimensions),
        )
        # Optax's muon has an adamw inside for the rest, but with Nesterov momentum and no mask for the decay.
        kinds = jax.tree.map(lambda a: "adamw" if muon_dimensions(a) is None else "muon", axes, is_leaf=_is_axes)
        update = optax.partition({"adamw": update, "muon": muon}, kinds)
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm is not None else []
    update = optax.chain(*clip, update)
    if config.freeze_embedding:
        kinds = jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if _is_token_embedding(path) else "trained", axes, is_leaf=_is_axes
        )
        update = optax.partition({"trained": update, "frozen": optax.set_to_zero()}, kinds)
    return update


def _like(params: Any, values: Any) -> Any:
    """`values`, a tree like all parameters, at the paths that `params` has: a partition sees some of them only."""

    def at(path, _):
        value = values
        for key in path:
            value = value[key.key]
        return value

    return jax.tree_util.tree_map_with_path(at, params)


def _is_token_embedding(path: tuple[Any, ...]) -> bool:
    return [key.key for key in path[-2:]] == ["embedding", "token"]


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple)
