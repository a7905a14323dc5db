"""A model's loss and scores on held-out batches: during a run, at its end, and by command."""

import functools
import operator
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flax_encoder.config import RunConfig
from flax_encoder.data.pipeline import RunData
from flax_encoder.data.rows.batches import Batches
from flax_encoder.data.sources.records import Say
from flax_encoder.data.store.prepare import unhurried
from flax_encoder.data.tokens.tokenizer import TextTokenizer
from flax_encoder.runs.best import read_evaluations
from flax_encoder.runs.loaded import Piece, by_owner, in_order
from flax_encoder.runs.programs import Programs
from flax_encoder.tasks import Task
from flax_encoder.tasks.loss import LossSum
from flax_encoder.tasks.samples import NUM_SAMPLES, Sample, Samples, answered
from flax_encoder.tasks.task import Answer, Labels, Question
from flax_encoder.training.run_log import RunLog
from flax_encoder.training.sharding import put_batch, rows_of_process
from flax_encoder.training.step import make_answer_step, make_eval_step, make_outputs_step

_IN_FLIGHT = 2  # batches that the host runs ahead of the device


class Evaluations:
    """A run's evaluations on its held-out documents, with those that its log holds from before.

    `by_step` has every evaluation's metrics, `eval/loss` and the like; `made_at` is the last step of which this start
    of the run made one.
    """

    def __init__(
        self, task: Task, data: RunData, config: RunConfig, programs: Programs, shardings: Any, log: RunLog, mesh: Mesh,
        start: int,
    ):  # fmt: skip
        self._task, self._data, self._config, self._log, self._mesh = task, data, config, log, mesh
        self.by_step = read_evaluations(pathlib.Path(config.run_dir), start)
        self.made_at: int | None = None
        self._programs, self._shardings, self._steps, self._outputs = programs, shardings, {}, {}

    def _step_of(self, step: int) -> Callable[[Any, Any], tuple[LossSum, dict[str, Any]]]:
        """The loss and outputs of (parameters, batch) with the model as it is after `step` updates."""
        graphdef = self._programs.model_after(step)
        if id(graphdef) not in self._steps:
            if self._task.answer is None:
                loss_step = make_eval_step(graphdef, self._shardings)
                self._steps[id(graphdef)] = lambda params, batch: (loss_step(params, batch), {})
            else:
                self._steps[id(graphdef)] = make_answer_step(graphdef, self._shardings)
        return self._steps[id(graphdef)]

    def evaluate(
        self, params: Any, step: int, *, stop: Any = None, name: str = "eval", most: int | None = None,
        made_after: int | None = None,
    ) -> dict[str, float] | None:  # fmt: skip
        """Metrics of the held-out documents, or of the test's if `name` is "test", written to the log; None if `stop`,
        of `StopSignals`, was asked to meanwhile. Those of the first `most` batches alone are not written. `made_after`
        is the step of which the parameters are, where that is another."""
        step_of = self._step_of(step if made_after is None else made_after)
        samples: list[Sample] = []
        metrics = evaluate(
            self._task, self._data.evaluation if name == "eval" else self._data.test,
            lambda batch: step_of(params, put_batch(batch, self._mesh)), self._config,
            self._data.label_names, self._data.tokenizer, say=self._log.say, most=most, samples=samples,
            is_stopped=lambda: stop is not None and stop.requested is not None and jax.process_count() == 1,
        )  # fmt: skip
        if metrics is not None:
            metrics = {f"{name}/{key}": value for key, value in metrics.items()}
        if metrics is not None and most is None:
            self._log.write(step, metrics)
            if name == "eval":
                self.by_step[step], self.made_at = metrics, step
                samples += self._asked(params, step)
                self._log.write_samples(step, [sample._asdict() for sample in samples])
        return metrics

    @functools.cached_property
    def _samples(self) -> Samples | None:
        if self._task.samples is None or self._config.eval_every is None:  # at the end alone, the examples show it
            return None
        rows = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        unit, held_out = (rows, self._mesh.shape["context"]), self._data.stores[0].validation
        return self._task.samples(self._config, self._data.tokenizer, held_out, unit)

    def _asked(self, params: Any, step: int) -> list[Sample]:
        """What the model says of its task's samples."""
        if self._samples is None:
            return []
        graphdef = self._programs.model_after(step)
        if id(graphdef) not in self._outputs:
            self._outputs[id(graphdef)] = make_outputs_step(graphdef, self._shardings)
        part, count = rows_of_process(self._mesh)
        own = {name: np.split(rows, count)[part] for name, rows in self._samples.batch.items()}
        outputs = self._outputs[id(graphdef)](params, put_batch(own, self._mesh))
        return self._samples.read({name: np.asarray(x) for name, x in outputs.items()})


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
    samples: list[Sample] | None = None,
) -> dict[str, float] | None:
    """The mean loss of the batches and, of a task with answers, its scores; None if it was stopped.

    Args:
      step: the model's loss and outputs of a batch.
      most: of the batches; None is all.
      samples: where the answers to the first few documents go.
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
    if samples is not None:
        writes = task.reading.columns.writes
        some = zip(sorted(found)[:NUM_SAMPLES], answers, golds, strict=False)
        said = [answered(documents.split, *of_one, tokenizer, writes=writes) for of_one in some]
        samples += [sample for sample in said if sample is not None]
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

    index, count = rows_of_process(jax.sharding.get_mesh())
    each = multihost_utils.process_allgather({"index": np.asarray(index), **owners})
    first = [int(np.argmax(each["index"] == i)) for i in range(count)]  # some may have the same rows
    return {name: np.concatenate(np.asarray(each[name])[first]) for name in owners}


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
