"""The loss as a sum and a count, so that microbatches, uneven masks and any number of devices give one update."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


class LossSum(NamedTuple):
    """Sums over targets, float32. The mean, sum / count, is taken once, after everything is added up."""

    sum: Float[Array, ""]
    count: Float[Array, ""]
    metrics: dict[str, Array]

    def __add__(self, other: "LossSum") -> "LossSum":  # type: ignore[override]
        metrics = {k: v + other.metrics[k] for k, v in self.metrics.items()}
        return LossSum(self.sum + other.sum, self.count + other.count, metrics)


def target_loss(logits: Float[Array, "B M V"], targets: Int[Array, "B M"], weights: Float[Array, "B M"]) -> LossSum:
    """Cross-entropy in float32, and how many targets no other class beats, both summed by weight."""
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    # Softmax needs the maximum anyway; an argmax would be one more pass over the logits.
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    correct = (target_logits >= logits.max(-1)).astype(jnp.float32)
    return LossSum((losses * weights).sum(), weights.sum(), {"correct": (correct * weights).sum()})
