"""One label a document, with documents packed into rows like any others."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_encoder.config import EncoderConfig, HeadConfig
from flax_encoder.nn.encoder import Encoder
from flax_encoder.nn.heads import ClassificationHead, gather_rows
from flax_encoder.ops.platform import precision
from flax_encoder.tasks.loss import LossSum, target_loss


def segment_mean(
    hidden: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], target_positions: Int[Array, "B M"]
) -> Float[Array, "B M D"]:
    """The mean vector of the document that each target position lies in."""
    target_segments = jnp.take_along_axis(segment_ids, target_positions, axis=1)
    member = (segment_ids[:, None, :] == target_segments[:, :, None]).astype(jnp.float32)
    sums = jnp.einsum("BMT,BTD->BMD", member, hidden, precision=precision(hidden))
    return sums / jnp.maximum(member.sum(-1, keepdims=True), 1.0)


class Classifier(nnx.Module):
    """Encoder and classification head; a target position is the first token of a document, its target the label."""

    def __init__(
        self,
        config: EncoderConfig,
        num_classes: int,
        pooling: Literal["cls", "mean", "late"] = "cls",
        head: HeadConfig | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.encoder = Encoder(config, rngs=rngs)
        self.head = ClassificationHead(config, num_classes, head, rngs=rngs)
        self.pooling = pooling

    def __call__(self, batch: dict[str, Array], *, key: Array | None = None) -> Float[Array, "B M C"]:
        """Logits of the documents at `target_positions` [B, M]."""
        encoder_key, head_key = (None, None) if key is None else jax.random.split(key)
        rows = (batch["tokens"], batch["segment_ids"], batch["positions"], batch.get("token_types"))
        hidden = self.encoder(*rows, key=encoder_key)
        if self.pooling == "late":
            return segment_mean(self.head(hidden, key=head_key), batch["segment_ids"], batch["target_positions"])
        if self.pooling == "mean":
            pooled = segment_mean(hidden, batch["segment_ids"], batch["target_positions"])
        else:
            pooled = gather_rows(hidden, batch["target_positions"])
        return self.head(pooled, key=head_key)

    def loss(self, batch: dict[str, Array], *, key: Array | None = None) -> LossSum:
        logits = self(batch, key=key)
        total = target_loss(logits, batch["targets"], batch["target_weights"])
        actual = jax.nn.one_hot(batch["targets"], logits.shape[-1]) * batch["target_weights"][..., None]
        predicted = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1])
        confusion = jnp.einsum("BMA,BMP->AP", actual, predicted)
        return total._replace(metrics=total.metrics | {"confusion": confusion})

    @staticmethod
    def report(total: LossSum) -> dict[str, float]:
        """Means for people: loss (nats a document), accuracy, macro-F1 over the classes that occur."""
        count = max(float(total.count), 1.0)
        return {
            "loss": float(np.asarray(total.sum)) / count,
            "accuracy": float(np.asarray(total.metrics["correct"])) / count,
            "macro_f1": macro_f1(np.asarray(total.metrics["confusion"])),
        }


def macro_f1(confusion: np.ndarray) -> float:
    """Mean over classes of 2 TP / (actual + predicted), from counts [actual, predicted], without absent classes."""
    both = confusion.sum(0) + confusion.sum(1)
    f1 = 2 * np.diag(confusion)[both > 0] / both[both > 0]
    return float(f1.mean()) if f1.size else 0.0
