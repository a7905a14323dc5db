"""The loss as a sum and a count, so that microbatches, uneven masks and any number of devices give one update."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

from flax_encoder.ops.cross_entropy import cross_entropy


class LossSum(NamedTuple):
    """A loss as sums over targets, float32. The mean, sum / count, is taken once, after all sums are added up."""

    sum: Float[Array, ""]
    count: Float[Array, ""]
    metrics: dict[str, Array]

    def __add__(self, other: "LossSum") -> "LossSum":  # type: ignore[override]
        metrics = {k: v + other.metrics[k] for k, v in self.metrics.items()}
        return LossSum(self.sum + other.sum, self.count + other.count, metrics)

    def means(self, **metrics: str) -> dict[str, float]:
        """The means over targets as floats: `loss`, and each metric under its new name. Without targets they are 0.

        Example:
          >>> LossSum(jnp.float32(3), jnp.float32(2), {"correct": jnp.float32(1)}).means(accuracy="correct")
          {'loss': 1.5, 'accuracy': 0.5}
        """
        count, sums = max(float(self.count), 1.0), {"loss": self.sum} | {k: self.metrics[v] for k, v in metrics.items()}
        return {name: float(value) / count for name, value in sums.items()}


def accuracy_report(total: LossSum) -> dict[str, float]:
    """The mean loss in nats, and the accuracy: the share of targets that no other class beats."""
    return total.means(accuracy="correct")


def target_loss(
    logits: Float[Array, "B M V"], targets: Int[Array, "B M"] | Float[Array, "B M V"], weights: Float[Array, "B M"],
    smoothing: float = 0.0,
) -> LossSum:  # fmt: skip
    """Cross-entropy in float32, and how many targets no other class beats, both summed by weight.

    Args:
      targets: classes, or the share of each class in a target.
      smoothing: share of each target that is spread evenly over all classes (Szegedy et al., arXiv 1512.00567).
    """
    if targets.ndim == 3:
        return _shares_loss(logits, targets, weights, smoothing)
    total, correct = cross_entropy(logits, targets, weights)
    if smoothing:
        spread = -jax.nn.log_softmax(logits.astype("float32")).mean(-1)
        total = (1 - smoothing) * total + smoothing * (weights * spread).sum()
    return LossSum(total, weights.sum(), {"correct": correct})


def _shares_loss(logits: Array, shares: Array, weights: Array, smoothing: float) -> LossSum:
    logs = jax.nn.log_softmax(logits.astype("float32"))
    shares = (1 - smoothing) * shares + smoothing / shares.shape[-1]
    correct = logs.argmax(-1) == shares.argmax(-1)
    return LossSum(-((shares * logs).sum(-1) * weights).sum(), weights.sum(), {"correct": (correct * weights).sum()})
