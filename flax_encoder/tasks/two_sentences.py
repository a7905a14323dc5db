"""Masked LM beside a question about the two segments of a text: whether they are in order, or whether they belong
together.

sentence_order swaps them (ALBERT; Lan et al., arXiv 1909.11942, section 3.1); next_sentence puts a segment of another
text in the second's place (BERT; Devlin et al., arXiv 1810.04805, section 3.1). Half of the pairs are left as they are.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from flax_encoder.config import EncoderConfig, HeadConfig, RunConfig
from flax_encoder.config.rules import require
from flax_encoder.data.reading import MASKED_TEXT
from flax_encoder.data.rows.sentence_pairs import sentence_pair_targets
from flax_encoder.nn.heads import ClassificationHead, gather_rows
from flax_encoder.tasks import masked_lm
from flax_encoder.tasks.document_model import check_whole_documents
from flax_encoder.tasks.loss import LossSum
from flax_encoder.tasks.masked_lm import MaskedLM
from flax_encoder.tasks.task import Labels, Task


class SentencePairLM(MaskedLM):
    """A masked LM with two logits more a document, of its first token: 0 where its segments are as they were, 1 where
    they are not."""

    def __init__(self, config: EncoderConfig, head: HeadConfig | None = None, weight: float = 1.0, *, rngs: nnx.Rngs):
        super().__init__(config, head, rngs=rngs)
        self.pair_head = ClassificationHead(config, 2, rngs=rngs)
        self.weight = weight

    def pair_logits(
        self, hidden: Float[Array, "B T D"], batch: dict[str, Array], *, key: Array | None = None
    ) -> Float[Array, "B P 2"]:
        """Of the documents that begin at `pair_positions` [B, P], of the encoder's output."""
        return self.pair_head(gather_rows(hidden, batch["pair_positions"]), key=key)

    def loss(self, batch: dict[str, Array], *, key: Array | None = None, teacher: Any = None) -> LossSum:
        """The cross-entropy of masked tokens plus `weight` times that of pairs, a mean over the pairs of each row.

        A sum over masked tokens: each row's mean over its pairs counts as often as the row has masked tokens, so that
        any split of a batch into rows makes the same update. A row without a pair adds nothing.
        """
        encoder_key, pair_key = (None, None) if key is None else jax.random.split(key)
        rows = (batch["tokens"], batch["segment_ids"], batch["positions"], batch.get("token_types"))
        hidden = self.encoder(*rows, key=encoder_key)
        weights, targets = batch["target_weights"], batch["pair_targets"]
        masked = gather_rows(hidden, batch["target_positions"])
        total, correct = self.head.cross_entropy(
            masked, self.encoder.embedding.token[...], batch["targets"], weights
        )
        # Rows that only fill a batch have no masked token, and their pairs do not count either.
        pairs = batch["pair_weights"] * (weights.sum(1, keepdims=True) > 0)
        logits = self.pair_logits(hidden, batch, key=pair_key)
        losses = pairs * optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        of_row = losses.sum(1) / jnp.maximum(pairs.sum(1), 1.0)
        metrics = {
            "correct": correct,
            "masked": total,
            "pairs": pairs.sum(),
            "pair": losses.sum(),
            "pair_correct": (pairs * (logits.argmax(-1) == targets)).sum(),
        }
        return LossSum(total + self.weight * (of_row * weights.sum(1)).sum(), weights.sum(), metrics)


def _make_model(config: RunConfig, labels: Labels) -> Callable[[nnx.Rngs], SentencePairLM]:
    return lambda rngs: SentencePairLM(config.model, config.head, config.sentences.weight, rngs=rngs)


def _report(total: LossSum) -> dict[str, float]:
    """Means for people: of masked tokens `masked_loss`, accuracy and perplexity; of pairs `pair_loss` and
    `pair_accuracy`."""
    masked = MaskedLM.report(total._replace(sum=total.metrics["masked"]))
    pairs = total._replace(sum=total.metrics["pair"], count=total.metrics["pairs"]).means(accuracy="pair_correct")
    return total.means(masked_loss="masked") | {
        "accuracy": masked["accuracy"],
        "perplexity": masked["perplexity"],
        "pair_loss": pairs["loss"],
        "pair_accuracy": pairs["accuracy"],
    }


def _check(config: RunConfig) -> None:
    masked_lm.TASK.check(config)
    check_whole_documents(config)
    require(
        config.model.layer == "attention",
        f"{config.objective} reads a text's first token, which must see the whole text: model.layer must be attention, "
        f"got {config.model.layer}.",
    )


def _settle(config: RunConfig, data: Any) -> RunConfig:
    require(
        len(data.stores) == 1,
        f"{config.objective} takes one source: got a mixture of {len(data.stores)}. Give one --data.source.",
    )
    return config


def _baselines(run: Any, data: Any) -> dict[str, dict[str, float]]:
    """Those of masked LM, and of pairs the more frequent answer."""
    assert masked_lm.TASK.baselines is not None
    rows, counts = masked_lm.TASK.baselines(run, data), np.zeros(2)
    for i in range(len(data.evaluation)):
        batch = data.evaluation[i]
        pairs = batch["pair_weights"] * (batch["target_weights"].sum(1, keepdims=True) > 0)
        counts += np.bincount(batch["pair_targets"].ravel(), pairs.ravel(), 2)
    return rows | {"the more frequent answer": {"pair_accuracy": float(counts.max() / max(counts.sum(), 1.0))}}


def _word_starts(config: RunConfig) -> tuple[str, ...]:
    return ("word_starts",)


def _task(kind: str) -> Task:
    return Task(
        reading=dataclasses.replace(
            MASKED_TEXT, targets=functools.partial(sentence_pair_targets, kind=kind), streams=_word_starts
        ),
        make_model=_make_model,
        report=_report,
        headline="pair_accuracy",
        reads=("masking.", "head.tied", "sentences."),
        check=_check,
        settle=_settle,
        baselines=_baselines,
        examples=masked_lm.TASK.examples,
        samples=masked_lm.TASK.samples,
        commands=masked_lm.TASK.commands,
        head="pretraining",
        fills_masks=True,
    )


SENTENCE_ORDER, NEXT_SENTENCE = _task("order"), _task("next")
