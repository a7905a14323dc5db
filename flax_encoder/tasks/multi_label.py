"""Any of several labels for each document; each label has a probability of its own."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from flax_encoder.config import RunConfig
from flax_encoder.data.reading import Reading
from flax_encoder.data.rows.targets import TargetInputs, Targets, document_targets
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.store.store import Split
from flax_encoder.tasks.document_model import (
    DocumentModel,
    ask_file_commands,
    check_whole_documents,
    right_and_wrong,
)
from flax_encoder.tasks.loss import LossSum
from flax_encoder.tasks.metrics import sklearn_metrics
from flax_encoder.tasks.task import Answer, Labels, Question, Task


class MultiLabelClassifier(DocumentModel):
    """A logit a label; the loss of a document is the mean of its labels' binary cross-entropies."""

    def loss(self, batch: dict[str, Array], *, key: Array | None = None) -> LossSum:
        """Summed over documents, as torch's BCEWithLogitsLoss averages over documents and labels."""
        logits, weights = self(batch, key=key).astype(jnp.float32), batch["target_weights"]
        targets = batch["targets"].astype(jnp.float32)
        nats = jax.nn.softplus(logits) - targets * logits
        exact = ((logits > 0) == (targets > 0)).all(-1)
        return LossSum((nats.mean(-1) * weights).sum(), weights.sum(), {"exact": (exact * weights).sum()})

    def outputs(self, batch: dict[str, Array]) -> dict[str, Array]:
        """The probability of each label, [B, M, C]."""
        return {"probabilities": jax.nn.sigmoid(self(batch).astype(jnp.float32))}


def _report(total: LossSum) -> dict[str, float]:
    return total.means(accuracy="exact")


def _make_model(config: RunConfig, labels: Labels) -> Callable[[nnx.Rngs], MultiLabelClassifier]:
    return lambda rngs: MultiLabelClassifier(config.model, len(labels or []), config.pooling, config.head, rngs=rngs)


def _targets(inputs: TargetInputs) -> Targets:
    return document_targets(inputs, "classes")


def _check_labels(labels: Labels) -> None:
    if not labels:
        raise DataError("multi_label needs at least one label: no document has any. Is --data.label-column right?")


def _answer(question: Question) -> Answer:
    """`labels` whose probability is above `labels.threshold`, and `probabilities` by label, likeliest first."""
    probabilities = question.outputs[0]["probabilities"][0]
    ranked = {(question.labels or [])[i]: float(probabilities[i]) for i in np.argsort(-probabilities)}
    chosen = [label for label, p in ranked.items() if p > question.config.labels.threshold]
    return {"labels": chosen, "probabilities": ranked}


def _is_right(answer: Answer, gold: tuple[str, ...]) -> bool:
    return set(answer["labels"]) == set(gold)


def _said(answer: Answer) -> str:
    return _truth(answer["labels"])


def _truth(labels: Sequence[str]) -> str:
    return ", ".join(labels) or "no label"


def _gold(split: Split, document: int, labels: Labels) -> tuple[str, ...]:
    return tuple((labels or [])[i] for i in np.flatnonzero(split.values["classes"][document]))


def _matrix(chosen: Sequence[Sequence[str]], labels: Labels) -> np.ndarray:
    index = {name: i for i, name in enumerate(labels or [])}
    matrix = np.zeros((len(chosen), len(index)), int)
    for row, names in zip(matrix, chosen, strict=True):
        row[[index[name] for name in names]] = 1
    return matrix


def score(answers: Sequence[Answer], golds: Sequence[Sequence[str]], labels: Labels) -> dict[str, float]:
    """Micro and macro F1 over the labels, the share of documents whose labels are all right (accuracy), and the mean
    over the labels that occur of their average precision (scikit-learn)."""
    metrics, actual = sklearn_metrics(), _matrix(golds, labels)
    predicted = _matrix([answer["labels"] for answer in answers], labels)
    scores = {
        "accuracy": float((actual == predicted).all(1).mean()),
        "micro_f1": float(metrics.f1_score(actual, predicted, average="micro", zero_division=0)),
        "macro_f1": float(metrics.f1_score(actual, predicted, average="macro", zero_division=0)),
    }
    if answers and "probabilities" in answers[0]:
        p = np.array([[answer["probabilities"][name] for name in labels or []] for answer in answers])
        occurs = np.flatnonzero(actual.any(0))
        each = [metrics.average_precision_score(actual[:, i], p[:, i]) for i in occurs]
        scores["mean_average_precision"] = float(np.mean(each)) if each else 0.0
    return scores


def details(answers: Sequence[Answer], golds: Sequence[Sequence[str]], labels: Labels) -> dict[str, Any]:
    """Precision, recall, F1 and support of each label (scikit-learn)."""
    actual, predicted = _matrix(golds, labels), _matrix([answer["labels"] for answer in answers], labels)
    report = sklearn_metrics().classification_report(
        actual, predicted, target_names=labels, output_dict=True, zero_division=0
    )
    return {name: report[name] for name in labels or []}


def _baselines(run: Any, data: Any) -> dict[str, dict[str, float]]:
    train, held_out = data.stores[0].train.values["classes"], data.stores[0].validation
    golds = [_gold(held_out, i, run.label_names) for i in range(len(held_out))]
    usual = [name for name, rate in zip(run.label_names, train.mean(0), strict=True) if rate > 0.5]
    most = [run.label_names[int(train.sum(0).argmax())]]
    return {
        "labels of most documents": score([{"labels": usual}] * len(golds), golds, run.label_names),
        "most frequent label": score([{"labels": most}] * len(golds), golds, run.label_names),
    }


TASK = Task(
    reading=Reading(Columns("classes", 1, 2), _targets),
    make_model=_make_model,
    report=_report,
    headline="accuracy",
    reads=("pooling", "labels.threshold", "data.label_column", "data.text_pair_column"),
    check=check_whole_documents,
    check_labels=_check_labels,
    answer=_answer,
    gold=_gold,
    score=score,
    details=details,
    baselines=_baselines,
    examples=functools.partial(right_and_wrong, _is_right, _said, _truth),
    commands=ask_file_commands,
    head="classification",
    answers_for="documents",
    problem_type="multi_label_classification",
)
