"""One label for each document, with documents packed into rows like any others."""

import functools
import shlex
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from flax_encoder.config import DistillationConfig, EncoderConfig, HeadConfig, RunConfig
from flax_encoder.config.rules import require
from flax_encoder.data.reading import Reading
from flax_encoder.data.rows.documents import Batch
from flax_encoder.data.rows.targets import Rows, TargetInputs, Targets, document_targets
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.store.store import Split
from flax_encoder.tasks import distillation
from flax_encoder.tasks.distillation import distillation_loss
from flax_encoder.tasks.document_model import (
    DocumentModel,
    ask_file_commands,
    check_whole_documents,
    has_pairs,
    right_and_wrong,
)
from flax_encoder.tasks.loss import LossSum, target_loss
from flax_encoder.tasks.metrics import sklearn_metrics
from flax_encoder.tasks.task import Answer, Labels, Question, Task


class Classifier(DocumentModel):
    """One logit per class; a document's target is its label."""

    def __init__(
        self,
        config: EncoderConfig,
        num_classes: int,
        pooling: Literal["cls", "mean", "late"] = "cls",
        head: HeadConfig | None = None,
        *,
        smoothing: float = 0.0,
        distillation: DistillationConfig | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, num_classes, pooling, head, rngs=rngs)
        self.smoothing, self.distillation = smoothing, distillation or DistillationConfig()

    def loss(self, batch: dict[str, Array], *, key: Array | None = None, teacher: Any = None) -> LossSum:
        """The loss of `self(batch)`; with a teacher, which is a model like this one, `distillation_loss`."""
        if teacher is not None:
            return distillation_loss(self, teacher, batch, self.distillation, key=key)
        return self.loss_of(self(batch, key=key), batch)

    def loss_of(self, logits: Float[Array, "B M C"], batch: dict[str, Array]) -> LossSum:
        """Cross-entropy with the targets, which are classes or shares of them, and counts [actual, predicted] of the
        classes."""
        targets = batch["targets"]
        total = target_loss(logits, targets, batch["target_weights"], self.smoothing)
        classes = targets.argmax(-1) if targets.ndim == 3 else targets
        actual = jax.nn.one_hot(classes, logits.shape[-1]) * batch["target_weights"][..., None]
        predicted = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1])
        confusion = jnp.einsum("BMA,BMP->AP", actual, predicted)
        return total._replace(metrics=total.metrics | {"confusion": confusion})

    def outputs(self, batch: dict[str, Array]) -> dict[str, Array]:
        """The probability of each class, [B, M, C]."""
        return {"probabilities": jax.nn.softmax(self(batch))}

    @staticmethod
    def report(total: LossSum) -> dict[str, float]:
        """Means for people: loss (nats a document), accuracy, macro-F1 over the classes that occur; with a teacher the
        terms of the loss too."""
        scores = {"macro_f1": macro_f1(np.asarray(total.metrics["confusion"]))}
        return total.means(accuracy="correct") | scores | distillation.term_means(total)


def macro_f1(confusion: np.ndarray) -> float:
    """Mean over classes of 2 TP / (actual + predicted), from counts [actual, predicted], without absent classes."""
    both = confusion.sum(0) + confusion.sum(1)
    f1 = 2 * np.diag(confusion)[both > 0] / both[both > 0]
    return float(f1.mean()) if f1.size else 0.0


def _make_model(config: RunConfig, labels: Labels) -> Callable[[nnx.Rngs], Classifier]:
    own, names = config.labels, labels or []
    return lambda rngs: Classifier(
        config.model, len(names), config.pooling, config.head, smoothing=own.smoothing,
        distillation=config.distillation, rngs=rngs,
    )  # fmt: skip


def _targets(inputs: TargetInputs) -> Targets:
    made = document_targets(inputs, "shares" if "shares" in inputs.documents.split.values else "labels")
    wanted = inputs.config.labels.class_weights
    if wanted is None or not inputs.is_training:
        return made
    labels = inputs.documents.split.values["labels"]
    num_classes = int(labels.max()) + 1
    if wanted == "balanced":  # as scikit-learn balances: each class weighs the same in all
        weights = len(labels) / (num_classes * np.maximum(np.bincount(labels), 1))
    else:
        weights = np.asarray(wanted)
        require(
            len(weights) == num_classes,
            f"labels.class_weights are one number a class: got {len(weights)} for {num_classes} classes.",
        )
    return functools.partial(_weighted, made, weights.astype(np.float32))


def _weighted(targets: Targets, class_weights: np.ndarray, rows: Rows) -> Batch:
    batch = targets(rows)
    own = batch["targets"]
    weights = own @ class_weights if own.ndim == 3 else class_weights[own]
    return batch | {"target_weights": batch["target_weights"] * weights}


def _check(config: RunConfig) -> None:
    check_whole_documents(config)
    distillation.check_settings(config)


def _check_labels(labels: Labels) -> None:
    if labels is None or len(labels) < 2:
        raise DataError(
            f"classification needs at least two classes: the data has {len(labels or [])}"
            f"{', ' + repr(labels[0]) if labels else ''}. Is --data.label-column the right column?"
        )


def rank(probabilities: np.ndarray, labels: list[str]) -> list[dict[str, Any]]:
    """[{"label", "probability"}, ...] of probabilities [C], likeliest first."""
    return [{"label": labels[i], "probability": float(probabilities[i])} for i in np.argsort(-probabilities)]


def _answer(question: Question) -> Answer:
    """`label` and `probability` of the likeliest class, and `probabilities` by label."""
    assert question.labels is not None
    ranked = rank(question.outputs[0]["probabilities"][0], question.labels)
    return ranked[0] | {"probabilities": {entry["label"]: entry["probability"] for entry in ranked}}


def _gold(split: Split, document: int, labels: Labels) -> str:
    return (labels or [])[split.values["labels"][document]]


def score(answers: Sequence[Answer], golds: Sequence[str], labels: Labels) -> dict[str, float]:
    """Accuracy, macro and weighted F1 over the classes that occur, Matthews' correlation (scikit-learn), and the
    expected calibration error of 15 bins (Guo et al., arXiv 1706.04599)."""
    metrics = sklearn_metrics()
    predicted, actual = [a["label"] for a in answers], list(golds)
    scores = {
        "accuracy": float(metrics.accuracy_score(actual, predicted)),
        "macro_f1": float(metrics.f1_score(actual, predicted, average="macro", zero_division=0)),
        "weighted_f1": float(metrics.f1_score(actual, predicted, average="weighted", zero_division=0)),
        "matthews": float(metrics.matthews_corrcoef(actual, predicted)) if len({*actual, *predicted}) > 1 else 0.0,
    }
    if answers and "probability" in answers[0]:
        correct = np.array([a == p for a, p in zip(actual, predicted, strict=True)], float)
        scores["calibration_error"] = calibration_error(np.array([a["probability"] for a in answers]), correct)
    return scores


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Mean distance of confidence and accuracy over equal bins of confidence, weighted by what is in them."""
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(which, confidence - correct, bins)
    return float(np.abs(gaps).sum() / len(confidence))


def _baselines(run: Any, data: Any) -> dict[str, dict[str, float]]:
    train, held_out = data.stores[0].train.values["labels"], data.stores[0].validation
    majority = run.label_names[int(np.bincount(train).argmax())]
    golds = [_gold(held_out, i, run.label_names) for i in range(len(held_out))]
    return {"majority class": score([{"label": majority}] * len(golds), golds, run.label_names)}


def details(answers: Sequence[Answer], golds: Sequence[str], labels: Labels) -> dict[str, Any]:
    """Precision, recall, F1 and support of each class, and the confusion matrix [actual][predicted] (scikit-learn)."""
    metrics, predicted = sklearn_metrics(), [a["label"] for a in answers]
    report = metrics.classification_report(list(golds), predicted, labels=labels, output_dict=True, zero_division=0)
    confusion = metrics.confusion_matrix(list(golds), predicted, labels=labels).tolist()
    return {name: report[name] for name in labels or []} | {"confusion": confusion}


def _is_right(answer: Answer, gold: str) -> bool:
    return answer["label"] == gold


def _said(answer: Answer) -> str:
    return f"{answer['label']} {answer['probability']:.0%}"


def _commands(run: Any, data: Any) -> list[str]:
    ids = data.stores[0].validation.document(0)[:24]  # a line of it
    text = " ".join(data.tokenizer.decode(ids).split())
    one = [f"python -m flax_encoder classify {shlex.quote(run.config.run_dir)} {shlex.quote(text)}"]
    return [*(() if has_pairs(data) else one), *ask_file_commands(run, data)]


TASK = Task(
    reading=Reading(Columns("class", 1, 2), _targets),
    make_model=_make_model,
    report=Classifier.report,
    reads=(
        "pooling", "labels.smoothing", "labels.class_weights", "data.label_column", "data.text_pair_column",
        *distillation.READS,
    ),
    check=_check,
    check_labels=_check_labels,
    answer=_answer,
    gold=_gold,
    score=score,
    details=details,
    baselines=_baselines,
    examples=functools.partial(right_and_wrong, _is_right, _said, str),
    commands=_commands,
    head="classification",
    answers_for="documents",
    problem_type="single_label_classification",
)  # fmt: skip
