"""Masked language modelling (Devlin et al., arXiv 1810.04805)."""

import math

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from flax_encoder.config import EncoderConfig, HeadConfig
from flax_encoder.nn.encoder import Encoder
from flax_encoder.nn.heads import MaskedLMHead, gather_rows
from flax_encoder.tasks.loss import LossSum


class MaskedLM(nnx.Module):
    """Encoder and vocabulary head; reads only the batch's target positions."""

    def __init__(self, config: EncoderConfig, head: HeadConfig | None = None, *, rngs: nnx.Rngs):
        self.encoder = Encoder(config, rngs=rngs)
        self.head = MaskedLMHead(config, head, rngs=rngs)

    def __call__(self, batch: dict[str, Array], *, key: Array | None = None) -> Float[Array, "B M V"]:
        """Logits at `target_positions` [B, M]; the batch also holds tokens, segment_ids and positions [B, T], and
        token_types if it has any."""
        return self.head(self._target_rows(batch, key), self.encoder.embedding.token[...])

    def loss(self, batch: dict[str, Array], *, key: Array | None = None) -> LossSum:
        """Of `self(batch)`, without those logits all at once where they are large."""
        weights, token_embedding = batch["target_weights"], self.encoder.embedding.token[...]
        rows = self._target_rows(batch, key)
        total, correct = self.head.cross_entropy(rows, token_embedding, batch["targets"], weights)
        return LossSum(total, weights.sum(), {"correct": correct})

    def _target_rows(self, batch, key) -> Float[Array, "B M D"]:
        rows = (batch["tokens"], batch["segment_ids"], batch["positions"], batch.get("token_types"))
        return gather_rows(self.encoder(*rows, key=key), batch["target_positions"])

    @staticmethod
    def report(total: LossSum) -> dict[str, float]:
        """Means for people: loss (nats a target), accuracy, perplexity."""
        count = max(float(total.count), 1.0)
        loss = float(np.asarray(total.sum)) / count
        return {
            "loss": loss,
            "accuracy": float(np.asarray(total.metrics["correct"])) / count,
            "perplexity": math.exp(min(loss, 700.0)),
        }
