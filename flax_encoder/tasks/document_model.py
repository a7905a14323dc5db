"""What tasks share whose documents have one value each: an encoder, pooled, and a head on it."""

import shlex
from typing import Any, Literal

import jax
from flax import nnx
from jaxtyping import Array, Float

from flax_encoder.config import EncoderConfig, HeadConfig, RunConfig
from flax_encoder.config.rules import require
from flax_encoder.nn.encoder import Encoder, short_repr
from flax_encoder.nn.heads import ClassificationHead, gather_rows, segment_mean


class DocumentModel(nnx.Module):
    """Encoder and head; a target position is the first token of a document, whose outputs the head gives."""

    __repr__ = short_repr

    def __init__(
        self,
        config: EncoderConfig,
        num_outputs: int,
        pooling: Literal["cls", "mean", "late"] = "cls",
        head: HeadConfig | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.encoder = Encoder(config, rngs=rngs)
        self.head = ClassificationHead(config, num_outputs, head, rngs=rngs)
        self.pooling = pooling

    def __call__(self, batch: dict[str, Array], *, key: Array | None = None) -> Float[Array, "B M C"]:
        """Outputs of the documents at `target_positions` [B, M]."""
        encoder_key, head_key = (None, None) if key is None else jax.random.split(key)
        rows = (batch["tokens"], batch["segment_ids"], batch["positions"], batch.get("token_types"))
        return self.logits(self.encoder(*rows, key=encoder_key), batch, key=head_key)

    def logits(
        self, hidden: Float[Array, "B T D"], batch: dict[str, Array], *, key: Array | None = None
    ) -> Float[Array, "B M C"]:
        """Those of the documents at `target_positions`, of the encoder's output."""
        if self.pooling == "late":
            return segment_mean(self.head(hidden, key=key), batch["segment_ids"], batch["target_positions"])
        if self.pooling == "mean":
            pooled = segment_mean(hidden, batch["segment_ids"], batch["target_positions"])
        else:
            pooled = gather_rows(hidden, batch["target_positions"])
        return self.head(pooled, key=key)


def check_whole_documents(config: RunConfig) -> None:
    """The rules of tasks whose documents have values: they are not cut into pieces, and come from one source.

    Raises:
      ConfigError: another packing, or several sources.
    """
    require(
        config.data.packing != "concatenate",
        "a document with a value stays whole: data.packing must be best-fit or one-per-row, got concatenate.",
    )
    require(
        len(config.data.sources) == 1,
        f"{config.objective} takes one source, whose values it learns: got {len(config.data.sources)}.",
    )


def ask_file_commands(run: Any) -> list[str]:
    """The commands that use a trained run on a file."""
    run_dir = shlex.quote(run.config.run_dir)
    return [
        f"python -m flax_encoder predict {run_dir} --input texts.txt --output answers.jsonl",
        f"python -m flax_encoder evaluate {run_dir} --data.source test.csv",
    ]
