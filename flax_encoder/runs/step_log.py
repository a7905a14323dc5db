"""What a run logs of its steps, fetched one log interval late: the device never waits for the host."""

import collections
import pathlib

import jax
import numpy as np

from flax_encoder.config import RunConfig
from flax_encoder.runs.length import budget_seconds, epochs_after
from flax_encoder.tasks import Task
from flax_encoder.training.checkpoint import Checkpoints
from flax_encoder.training.run_log import Clock, RunLog
from flax_encoder.training.schedule import share_of_update
from flax_encoder.training.step import StepMetrics


class Diverged(RuntimeError):
    """The loss or the gradient is no finite number any more."""


class StepLog:
    """Steps whose metrics wait on the device to be logged."""

    def __init__(
        self, task: Task, config: RunConfig, rows_per_epoch: int, log: RunLog, clock: Clock, checkpoints: Checkpoints,
        start: int,
    ):  # fmt: skip
        self._task, self._config, self._rows_per_epoch = task, config, rows_per_epoch
        self._log, self._clock, self._checkpoints = log, clock, checkpoints
        self._waiting: collections.deque[tuple[int, StepMetrics]] = collections.deque()
        self._finite_step = start  # the last that is known to have been

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
            began = config.schedule_began
            progress = float(metrics.progress or 0.0)
            share = share_of_update(config.optimizer, step - 1 - began, config.steps - began, progress)
            rate = config.optimizer.learning_rate * float(share)
            values |= {"learning_rate": rate, "epoch": epochs_after(config, self._rows_per_epoch, step)} | throughput
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
        values = self._task.report(jax.device_get(metrics.loss)) | {"grad_norm": float(metrics.grad_norm)}
        if not np.isfinite(values["loss"]) or not np.isfinite(values["grad_norm"]):
            saved, run_dir = self._checkpoints.latest_step(), pathlib.Path(self._config.run_dir)
            way_out = f"{run_dir} holds step {saved}, from before" if saved else "no checkpoint was made yet"
            raise Diverged(
                f"the loss must stay finite: it is {values['loss']} and the gradient norm {values['grad_norm']} at "
                f"step {step}; it broke after step {self._finite_step}. {way_out}. A lower learning rate, a longer "
                f"warm-up or a smaller optimizer.clip_norm often helps."
            )
        self._finite_step = step
        return values
