"""What a run logs of its steps, fetched one log interval late: the device never waits for the host."""

import collections
import pathlib
from contextlib import suppress

import jax
import numpy as np

from flax_encoder.config import RunConfig
from flax_encoder.data.rows.batches import Stages
from flax_encoder.runs.length import budget_seconds, epochs_after
from flax_encoder.runs.skipping import Skipping
from flax_encoder.tasks import Task, find_task
from flax_encoder.training.checkpoint import CheckpointError, Checkpoints
from flax_encoder.training.run_log import Clock, RunLog
from flax_encoder.training.runtime import memory_in_use
from flax_encoder.training.schedule import share_of_update
from flax_encoder.training.step import StepMetrics


class Diverged(RuntimeError):
    """The loss or the gradient is no finite number any more."""


class StepLog:
    """Steps whose metrics wait on the device to be logged."""

    def __init__(
        self, task: Task, config: RunConfig, rows_per_epoch: int, log: RunLog, clock: Clock, checkpoints: Checkpoints,
        start: int, skipping: Skipping, batches: Stages,
    ):  # fmt: skip
        self._task, self._config, self._rows_per_epoch = task, config, rows_per_epoch
        self._log, self._clock, self._checkpoints = log, clock, checkpoints
        self._waiting: collections.deque[tuple[int, StepMetrics]] = collections.deque()
        self._finite_step = start  # the last that is known to have been
        self._skipping, self._batches = skipping, batches

    def add(self, step: int, metrics: StepMetrics) -> None:
        self._waiting.append((step, metrics))

    def write(self, keep: int = 0) -> None:
        """Log the steps that wait, but for the last `keep` of them.

        Raises:
          Diverged: one of them was not finite.
        """
        config, throughput = self._config, None
        while len(self._waiting) > keep:
            step, metrics = self._waiting.popleft()
            throughput = throughput or self._clock.read()
            values = self._fetch(step, metrics)
            if self._skipping.is_possible:
                values["skipped_updates"] = float(sum(at <= step for at in self._skipping.steps))
            if "loss" not in values:
                self._log.write(step, values)
                continue
            began = config.schedule_began
            progress = float(metrics.progress or 0.0)
            phases = config.timeline.learning_rates
            share = share_of_update(config.optimizer, step - 1 - began, config.steps - began, progress, phases)
            rate = config.optimizer.learning_rate * float(share)
            values |= {"learning_rate": rate, "epoch": epochs_after(config, self._rows_per_epoch, step)} | throughput
            values |= memory_in_use()
            if config.phases:
                values["phase"] = config.timeline.stage_of(step - 1).phase + 1
            self._log.write(step, values)
            left = min(
                self._clock.seconds_per_step * (config.steps - step), budget_seconds(config) - self._clock.spent_seconds
            )
            self._log.progress(step, values, self._task.headline, seconds_left=max(left, 0.0))

    def check(self, step: int, metrics: StepMetrics) -> None:
        """Raise Diverged if a step, logged or not, was not finite: nothing is saved after it."""
        if self._finite_step < step:
            self._fetch(step, metrics)

    def _fetch(self, step: int, metrics: StepMetrics) -> dict[str, float]:
        if metrics.is_skipped is not None and bool(metrics.is_skipped):
            return {}  # its numbers are no finite ones, or of an update that was not made
        task = self._task
        if (objective := self._config.timeline.stage_of(step - 1).objective) != self._config.objective:
            task = find_task(objective)
        values = task.report(jax.device_get(metrics.loss)) | {"grad_norm": float(metrics.grad_norm)}
        if not np.isfinite(values["loss"]) or not np.isfinite(values["grad_norm"]):
            raise Diverged(
                f"the loss must stay finite: it is {values['loss']} and the gradient norm {values['grad_norm']} at "
                f"step {step}; it broke after step {self._finite_step}. {self._way_out()} --max-skipped N leaves out "
                f"up to N such updates and goes on."
            )
        self._finite_step = step
        return values

    def check_skipped(self) -> None:
        """Raise Diverged if more updates were left out than may be."""
        if not self._skipping.is_possible or not self._skipping.is_spent:
            return
        steps = self._skipping.steps
        of_rows = "; ".join(f"step {step}: {_listed(self._batches.documents_of(step - 1))}" for step in steps[-3:])
        raise Diverged(
            f"at most {self._config.max_skipped} updates may be left out: those of steps "
            f"{', '.join(map(str, steps))} had a loss or a gradient that was not finite or exploded. Documents of "
            f"their rows, by their numbers among those of training: {of_rows}. {self._way_out()} --skip-rows "
            f"{' '.join(map(str, steps))} leaves their rows out."
        )

    def _way_out(self) -> str:
        with suppress(CheckpointError):  # the save that is under way, if any, counts
            self._checkpoints.wait()
        saved, run_dir = self._checkpoints.latest_step(), pathlib.Path(self._config.run_dir)
        there = f"{run_dir} holds step {saved}, from before" if saved else "no checkpoint was made yet"
        return f"{there}. A lower learning rate, a longer warm-up or a smaller optimizer.clip_norm often helps."


def _listed(documents: list[int]) -> str:
    more = f" and {len(documents) - 20} more" if len(documents) > 20 else ""
    return f"{', '.join(map(str, documents[:20]))}{more}"
