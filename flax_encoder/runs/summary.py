"""What the end of a run finds out, for its page: report.json says it, report.html shows it."""

import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flax_encoder.config import RunConfig
from flax_encoder.data.inspect import length_counts
from flax_encoder.data.pipeline import RunData
from flax_encoder.pages.report import report_page
from flax_encoder.pages.story import FORMAT, SUMMARY, read_stories
from flax_encoder.runs.evaluate import evaluate
from flax_encoder.runs.loaded import LoadedRun
from flax_encoder.tasks.task import Answer
from flax_encoder.training.run_log import write_atomically

_BATCHES = 64  # of held-out documents that are asked about, at most
_ROW_BATCHES = 16  # whose rows' fill is counted
_WRONG, _RIGHT = 20, 10  # answers that are shown
_LETTERS = 240  # of a text
_BINS = 10
_LIBRARIES = ("flax-encoder", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")

# What of an answer is held against the right value, whichever the task.
_SAID = {"label": str, "choice": str, "score": float, "labels": tuple, "tags": list}


def write_summary(run: LoadedRun, data: RunData, **found: Any) -> pathlib.Path:
    """Write RUN/report.json and RUN/report.html of a finished run.

    Args:
      found: what is known already, ready for JSON: `held_out` (rows of scores), `examples`, `commands` and `text`,
        which describes the data.

    Returns:
      The path of the page.
    """
    run_dir = pathlib.Path(run.config.run_dir)
    text = found.pop("text", "")
    summary = {
        "format": FORMAT,
        **found,
        "step": run.step,
        "parameters": sum(x.size for x in jax.tree.leaves(run.params)),
        **held_out_answers(run, data),
        "data": {"text": text, "lengths": _length_bins(data), "fill": _fill_bins(data)},
        "machine": describe_machine(),
    }
    write_atomically(run_dir / SUMMARY, json.dumps(_finite(summary), indent=1, allow_nan=False) + "\n")
    page = run_dir / "report.html"
    write_atomically(page, report_page(read_stories([run_dir])))
    return page


def _finite(tree: Any) -> Any:
    """The tree with None where a number is not finite, such as the correlation of a baseline that is constant."""
    if isinstance(tree, dict):
        return {name: _finite(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def held_out_answers(run: Any, data: Any) -> dict[str, Any]:
    """What a run says of held-out documents, against what they have: `answers`, those that are wrong first, and by
    what the answers are `confusion` and `reliability`, or `scatter`. {} for a task whose answers are none of these, and
    for documents that have no right value."""
    task = run.task
    if task.answer is None or task.gold is None or task.score is None:
        return {}
    split, kinds = data.evaluation.documents[0].split, tuple(_SAID.values())
    if not len(split) or not isinstance(task.gold(split, 0, run.label_names), kinds):
        return {}
    documents: list[int] = []
    pairs: list[tuple[Answer, Any]] = []

    def gold(split, document, labels):
        documents.append(document)
        return task.gold(split, document, labels)

    def keep(answers: Sequence[Answer], golds: Sequence[Any], labels) -> dict[str, float]:
        pairs.extend(zip(answers, golds, strict=True))
        return {}

    asked = dataclasses.replace(task, gold=gold, score=keep, report=lambda total: {})
    name = None
    for some in (1, min(len(data.evaluation), _BATCHES)):  # the first batch tells whether there is more to ask
        documents.clear()
        pairs.clear()
        config: RunConfig = dataclasses.replace(run.config, eval_batches=some)
        step = run.loss_and_outputs
        evaluate(asked, data.evaluation, step, config, run.label_names, run.tokenizer, most=some)
        name = next((name for name in _SAID if pairs and name in pairs[0][0]), None)
        if name is None or not all(isinstance(truth, _SAID[name]) for _, truth in pairs):
            return {}
    said = [_SAID[name](answer[name]) for answer, _ in pairs]
    right = [_SAID[name](truth) for _, truth in pairs]
    sure = [answer.get("probability") for answer, _ in pairs]
    is_right = [a == b for a, b in zip(said, right, strict=True)]
    order = sorted(range(len(pairs)), key=lambda i: (is_right[i], -_wrongness(said[i], right[i], sure[i])))
    wrong = [i for i in order if not is_right[i]][:_WRONG]
    shown = wrong + [i for i in order if is_right[i]][:_RIGHT]
    made: dict[str, Any] = {
        "answers": [
            {
                "text": _cut(run.tokenizer.decode(split.document(documents[i]))), "says": _shown(said[i]),
                "right": _shown(right[i]), "is_right": is_right[i], "probability": sure[i],
            }
            for i in shown
        ]
    }  # fmt: skip
    if name == "score":
        return made | {"scatter": [[a, b] for a, b in zip(right, said, strict=True)][:1000]}
    if name == "label" and run.label_names:
        made["confusion"] = {"labels": run.label_names, "counts": confusion(right, said, run.label_names)}
    if sure and None not in sure:
        made["reliability"] = reliability(np.array(sure), np.array(is_right, float))
    return made


def confusion(right: Sequence[str], said: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """Counts [data's label][model's label]."""
    index = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), int)
    np.add.at(counts, ([index[label] for label in right], [index[label] for label in said]), 1)
    return counts.tolist()


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = _BINS) -> list[dict[str, Any]]:
    """[{"confidence", "accuracy", "count"}, ...] of equal bins of confidence that have something in them (Guo et al.,
    arXiv 1706.04599)."""
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    sums = [np.bincount(which, values, bins) for values in (confidence, correct)]
    return [
        {"confidence": float(sums[0][i] / count[i]), "accuracy": float(sums[1][i] / count[i]), "count": int(count[i])}
        for i in np.flatnonzero(count)
    ]


def _wrongness(said: Any, right: Any, sure: float | None) -> float:
    if isinstance(said, float):
        return abs(said - right)
    return sure or 0.0


def _shown(value: Any) -> str | float:
    if isinstance(value, tuple | list):
        return _cut(", ".join(map(str, value)) or "none")
    return value


def _cut(text: str) -> str:
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"


def _length_bins(data: RunData) -> list[dict[str, Any]]:
    """Training documents by their tokens, in bins that double."""
    lengths, counts = (np.concatenate(x) for x in zip(*(length_counts(s.train) for s in data.stores), strict=True))
    if not len(lengths):
        return []
    which = np.array([int(n).bit_length() for n in lengths])
    found = np.bincount(which, counts, int(which.max()) + 1).astype(int)
    first = int(np.flatnonzero(found)[0])
    return [
        {"label": f"{2 ** (k - 1) if k else 0:,}", "count": int(found[k])} for k in range(first, len(found))
    ]


def _fill_bins(data: RunData) -> list[dict[str, Any]]:
    """Rows of the first batches by the share of them that is no padding, in tenths."""
    fills = []
    for i in range(min(_ROW_BATCHES, len(data.train))):
        segments = data.train[i]["segment_ids"]
        fills.append((segments != 0).mean(1))
    counts = np.bincount(np.minimum((np.concatenate(fills) * 10).astype(int), 9), minlength=10)
    return [{"label": f"{10 * i}%", "count": int(n)} for i, n in enumerate(counts)]


def describe_machine() -> dict[str, str | int]:
    """Hardware and versions, and the most memory that this process has had."""
    devices = jax.devices()
    found: dict[str, str | int] = {
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "processor": f"{os.cpu_count()} cores, {platform.machine()}",
        "system": platform.system() + " " + platform.release(),
        "Python": platform.python_version(),
    }
    try:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        found["most memory of the process"] = f"{most / 1e9:.2f} GB"
    except ImportError:
        pass  # Windows has no such count
    statistics: Mapping[str, int] = devices[0].memory_stats() or {}
    if peak := statistics.get("peak_bytes_in_use"):
        found["most memory of a device"] = f"{peak / 1e9:.2f} GB"
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
