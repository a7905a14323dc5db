"""One number for each document or pair of texts."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from flax_encoder.config import RunConfig
from flax_encoder.data.reading import Reading
from flax_encoder.data.rows.targets import TargetInputs, Targets, document_targets
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.store.store import Split
from flax_encoder.tasks.document_model import (
    DocumentModel,
    ask_file_commands,
    check_whole_documents,
    held_out_answers,
    spelled,
)
from flax_encoder.tasks.loss import LossSum
from flax_encoder.tasks.metrics import scipy_stats
from flax_encoder.tasks.task import Answer, Labels, Question, Task


class Regressor(DocumentModel):
    """One output a document; the loss is its squared error."""

    def loss(self, batch: dict[str, Array], *, key: Array | None = None) -> LossSum:
        """Squared errors, summed over documents."""
        error = self(batch, key=key)[..., 0].astype(jnp.float32) - batch["targets"]
        weights = batch["target_weights"]
        metrics = {"absolute": (jnp.abs(error) * weights).sum()}
        return LossSum((jnp.square(error) * weights).sum(), weights.sum(), metrics)

    def outputs(self, batch: dict[str, Array]) -> dict[str, Array]:
        """The number, [B, M]."""
        return {"score": self(batch)[..., 0]}


def _report(total: LossSum) -> dict[str, float]:
    return total.means(mae="absolute")


def _make_model(config: RunConfig, labels: Labels) -> Callable[[nnx.Rngs], Regressor]:
    return lambda rngs: Regressor(config.model, 1, config.pooling, config.head, rngs=rngs)


def _targets(inputs: TargetInputs) -> Targets:
    return document_targets(inputs, "number")


def _answer(question: Question) -> Answer:
    """`score`, the number."""
    return {"score": float(question.outputs[0]["score"][0])}


def _gold(split: Split, document: int, labels: Labels) -> float:
    return float(split.values["number"][document])


def score(answers: Sequence[Answer], golds: Sequence[float], labels: Labels) -> dict[str, float]:
    """Pearson's and Spearman's correlation (scipy; 0 where either side does not vary), mean squared and absolute
    error."""
    predicted, actual = np.array([a["score"] for a in answers], float), np.array(golds, float)
    varies = len(actual) > 1 and np.ptp(predicted) > 0 and np.ptp(actual) > 0
    stats = scipy_stats()
    return {
        "pearson": float(stats.pearsonr(predicted, actual).statistic) if varies else 0.0,
        "spearman": float(stats.spearmanr(predicted, actual).statistic) if varies else 0.0,
        "mse": float(np.square(predicted - actual).mean()),
        "mae": float(np.abs(predicted - actual).mean()),
    }


def _baselines(run: Any, data: Any) -> dict[str, dict[str, float]]:
    held_out = data.stores[0].validation
    golds = [_gold(held_out, i, None) for i in range(len(held_out))]
    mean = float(data.stores[0].train.values["number"].mean())
    return {"mean of training": score([{"score": mean}] * len(golds), golds, None)}


def _examples(run: Any, data: Any) -> list[str]:
    """A few held-out documents whose number it has nearly, and a few that it is farthest from."""
    found = sorted(held_out_answers(run, data), key=lambda own: abs(own[1]["score"] - own[2]))
    return [
        f"\n{spelled(record)}\n  the model says {answer['score']:.3g}; the data has {gold:.3g}"
        for record, answer, gold in [*found[:2], *found[2:][-2:]]
    ]


TASK = Task(
    reading=Reading(Columns("number", 1, 2), _targets),
    make_model=_make_model,
    report=_report,
    headline="mae",
    reads=("pooling", "data.label_column", "data.text_pair_column"),
    check=check_whole_documents,
    answer=_answer,
    gold=_gold,
    score=score,
    baselines=_baselines,
    examples=_examples,
    commands=ask_file_commands,
    head="classification",
    answers_for="documents",
    problem_type="regression",
)
