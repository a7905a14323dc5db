"""Which of several choices fits a context: the model reads each pair of context and choice alone, and one softmax takes
all their logits (Radford et al. 2018; Zellers et al., arXiv 1808.05326)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_encoder.config import EncoderConfig, HeadConfig, RunConfig
from flax_encoder.data.reading import Reading
from flax_encoder.data.rows.documents import Layout
from flax_encoder.data.rows.targets import TargetInputs, Targets, document_targets
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.store.store import Split
from flax_encoder.tasks.document_model import (
    DocumentModel,
    ask_file_commands,
    check_whole_documents,
    right_and_wrong,
)
from flax_encoder.tasks.loss import LossSum, accuracy_report, target_loss
from flax_encoder.tasks.task import Answer, Labels, Question, Task

_FAR = -1e30  # stands for minus infinity, whose differences would be no numbers


class MultipleChoice(DocumentModel):
    """Encoder, and one logit of each choice, which is a segment with the context. `target_positions` [B, M, n] are the
    first tokens of a document's n choices, -1 for one that it has not; its target [B, M] is the right one's number."""

    def __init__(
        self, config: EncoderConfig, pooling: str = "cls", head: HeadConfig | None = None, *, smoothing: float = 0.0,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        super().__init__(config, 1, pooling, head, rngs=rngs)
        self.smoothing = smoothing

    def __call__(self, batch: dict[str, Array], *, key: Array | None = None) -> Float[Array, "B M n"]:
        """Logits of the choices, -1e30 of those that a document has not."""
        positions: Int[Array, "B M n"] = batch["target_positions"]
        at = jnp.maximum(positions, 0).reshape(positions.shape[0], -1)
        logits = super().__call__(batch | {"target_positions": at}, key=key)
        return jnp.where(positions < 0, _FAR, logits.reshape(positions.shape))

    def loss(self, batch: dict[str, Array], *, key: Array | None = None) -> LossSum:
        """Cross-entropy over each document's choices; `smoothing` is a share spread over those that it has."""
        logits, weights = self(batch, key=key), batch["target_weights"]
        total = target_loss(logits, batch["targets"], weights)
        if self.smoothing:
            is_choice = batch["target_positions"] >= 0
            spread = jnp.mean(-jax.nn.log_softmax(logits), axis=-1, where=is_choice)
            mixed = (1 - self.smoothing) * total.sum + self.smoothing * (weights * spread).sum()
            total = total._replace(sum=mixed)
        return total

    def outputs(self, batch: dict[str, Array]) -> dict[str, Array]:
        """The probability of each choice, [B, M, n]."""
        return {"probabilities": jax.nn.softmax(self(batch))}


def _make_model(config: RunConfig, labels: Labels) -> Callable[[nnx.Rngs], MultipleChoice]:
    smoothing = config.labels.smoothing
    return lambda rngs: MultipleChoice(config.model, config.pooling, config.head, smoothing=smoothing, rngs=rngs)


def _targets(inputs: TargetInputs) -> Targets:
    return document_targets(inputs, "labels")


def _layout(config: RunConfig) -> Layout:
    return Layout("choices")


def _answer(question: Question) -> Answer:
    """The number of the likeliest `choice`, from 0, its `probability`, and the `probabilities` of all in order."""
    probabilities = question.outputs[0]["probabilities"][0]
    if question.record is not None:  # other documents may have more
        probabilities = probabilities[: len(question.record.texts) - 1]
    choice = int(probabilities.argmax())
    return {
        "choice": choice,
        "probability": float(probabilities[choice]),
        "probabilities": [float(p) for p in probabilities],
    }


def _gold(split: Split, document: int, labels: Labels) -> str:
    return str(int(split.values["labels"][document]))


def score(answers: Sequence[Answer], golds: Sequence[str], labels: Labels = None) -> dict[str, float]:
    """Accuracy.

    Args:
      golds: the number of the right choice of each document, as a string.
    """
    correct = [answer["choice"] == int(gold) for answer, gold in zip(answers, golds, strict=True)]
    return {"accuracy": float(np.mean(correct))}


def _baselines(run: Any, data: Any) -> dict[str, dict[str, float]]:
    train, split = data.stores[0].train.values["labels"], data.stores[0].validation
    golds = [_gold(split, i, None) for i in range(len(split))]
    lengths = split.values["text_lengths"]
    guesses = {
        "most frequent place": np.full(len(split), np.bincount(train).argmax()),
        "longest choice": lengths[:, 1:].argmax(1),
        "most tokens of the context": np.array([_overlaps(split, i).argmax() for i in range(len(split))]),
    }
    return {name: score([{"choice": int(c)} for c in chosen], golds) for name, chosen in guesses.items()}


def _overlaps(split: Split, document: int) -> np.ndarray:
    """Share of each choice's tokens that the context has."""
    ends = np.cumsum(split.values["text_lengths"][document])[:-1]
    context, *choices = np.split(split.document(document), ends)
    return np.array([np.isin(choice, context).mean() if len(choice) else 0.0 for choice in choices])


def _is_right(answer: Answer, gold: str) -> bool:
    return answer["choice"] == int(gold)


def _said(answer: Answer) -> str:
    return f"{_truth(answer['choice'])} ({answer['probability']:.0%})"


def _truth(choice: int | str) -> str:
    return f"choice {choice}"


TASK = Task(
    reading=Reading(Columns("class", 3, 27), _targets, _layout),
    make_model=_make_model,
    report=accuracy_report,
    reads=("pooling", "labels.smoothing", "data.label_column", "data.text_pair_column"),
    check=check_whole_documents,
    answer=_answer,
    gold=_gold,
    score=score,
    baselines=_baselines,
    examples=functools.partial(right_and_wrong, _is_right, _said, _truth),
    commands=ask_file_commands,
    head="multiple_choice",
)
