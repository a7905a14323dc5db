"""A model's loss and scores on held-out batches: during a run, at its end, and by command."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from flax_encoder.config import RunConfig
from flax_encoder.data.rows.batches import Batches
from flax_encoder.data.sources.records import Say
from flax_encoder.data.store.prepare import unhurried
from flax_encoder.data.tokens.tokenizer import TextTokenizer
from flax_encoder.runs.loaded import Piece, by_owner, in_order
from flax_encoder.tasks import Task
from flax_encoder.tasks.loss import LossSum
from flax_encoder.tasks.task import Answer, Labels, Question

_IN_FLIGHT = 2  # batches that the host runs ahead of the device


def evaluate(
    task: Task,
    batches: Batches,
    step: Callable[[dict[str, np.ndarray]], tuple[LossSum, dict[str, Any]]],
    config: RunConfig,
    labels: Labels,
    tokenizer: TextTokenizer,
    *,
    say: Say = lambda message: None,
    is_stopped: Callable[[], bool] = lambda: False,
    most: int | None = None,
) -> dict[str, float] | None:
    """The mean loss of the batches and, of a task with answers, its scores; None if it was stopped.

    Args:
      step: the model's loss and outputs of a batch.
      most: of the batches; None is all.
    """
    say, totals, answers, golds = unhurried(say), [], [], []
    found: dict[int, list[Piece]] = {}
    waiting: list[tuple[dict[str, np.ndarray], LossSum, dict[str, Any]]] = []
    documents = batches.documents[0]

    def take(owners: dict[str, np.ndarray], total: LossSum, outputs: dict[str, Any]) -> None:
        totals.append(jax.block_until_ready(total))
        if task.answer is None or not owners:
            return
        for piece in by_owner(owners, {name: np.asarray(x) for name, x in outputs.items()}):
            source = piece.document if documents.source is None else int(documents.source[piece.document])
            found.setdefault(source, []).append(piece)

    count = len(batches) if most is None else min(most, len(batches))
    for i in range(count):
        batch = batches[i]
        waiting.append((_all_owners(batch), *step(batch)))
        if len(waiting) > _IN_FLIGHT:
            take(*waiting.pop(0))
            say(f"evaluating: {i - 1:,} of {count:,} batches")
        if is_stopped():
            return None
    for rest in waiting:
        take(*rest)
    metrics = task.report(jax.device_get(functools.reduce(operator.add, totals)))
    if task.answer is None or task.score is None or task.gold is None:
        return metrics
    if config.eval_batches is not None:  # which may end within a long document
        found = {source: pieces for source, pieces in found.items() if len(pieces) == documents.num_pieces(source)}
    for source in sorted(found):
        answers.append(_stored_answer(task, documents, source, found[source], config, labels, tokenizer))
        golds.append(_decoded(task.gold(documents.split, source, labels), tokenizer))
    return metrics | task.score(answers, golds, labels)


def _decoded(gold: Any, tokenizer: TextTokenizer) -> Any:
    """A right value with texts where it has token ids."""
    if isinstance(gold, np.ndarray):
        return tokenizer.decode(gold)
    return tuple(_decoded(part, tokenizer) for part in gold) if isinstance(gold, tuple) else gold


def _all_owners(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What says whose the targets are, of all processes' rows."""
    owners = {name: batch[name] for name in ("owners", "starts") if name in batch}
    if not owners or jax.process_count() == 1:
        return owners
    from jax.experimental import multihost_utils

    return {name: np.asarray(multihost_utils.process_allgather(x, tiled=True)) for name, x in owners.items()}


def _stored_answer(task: Task, documents, source: int, pieces, config, labels, tokenizer) -> Answer:
    """The answer of a stored document, of which only tokens are known."""
    outputs, starts = in_order(pieces, documents)
    split = documents.split
    lengths = split.values["text_lengths"][source] if "text_lengths" in split.values else split.lengths[[source]]
    question = Question(
        outputs, labels, config, None, starts, None, lengths, split.document(source), tokenizer.decode,
        tokenizer.written,
    )  # fmt: skip
    return task.answer(question)  # type: ignore[misc]
