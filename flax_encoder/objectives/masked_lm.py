"""Masked language modelling (Devlin et al., arXiv 1810.04805)."""

import math

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from flax_encoder.config import EncoderConfig, HeadConfig
from flax_encoder.nn.encoder import Encoder
from flax_encoder.nn.heads import MaskedLMHead, gather_rows
from flax_encoder.objectives.loss import LossSum, target_loss


class MaskedLM(nnx.Module):
    """Encoder and vocabulary head; reads only the batch's target positions."""

    def __init__(self, config: EncoderConfig, head: HeadConfig | None = None, *, rngs: nnx.Rngs):
        self.encoder = Encoder(config, rngs=rngs)
        self.head = MaskedLMHead(config, head, rngs=rngs)

    def __call__(self, batch: dict[str, Array], *, key: Array | None = None) -> Float[Array, "B M V"]:
        """Logits at `target_positions` [B, M]; the batch also holds tokens, segment_ids and positions [B, T], and
        token_types if it has any."""
        rows = (batch["tokens"], batch["segment_ids"], batch["positions"], batch.get("token_types"))
        hidden = self.encoder(*rows, key=key)
        return self.head(gather_rows(hidden, batch["target_positions"]), self.encoder.embedding.token[...])

    def loss(self, batch: dict[str, Array], *, key: Array | None = None) -> LossSum:
        return target_loss(self(batch, key=key), batch["targets"], batch["target_weights"])

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
