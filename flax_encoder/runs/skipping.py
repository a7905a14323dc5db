"""Updates that are left out: those whose loss or gradient is not finite or exploded, and those that the user names."""

import math
from collections.abc import Callable

import numpy as np

from flax_encoder.config import RunConfig
from flax_encoder.runs.record import RunRecord
from flax_encoder.training.step import StepMetrics

_NORMS = 64  # of which the median is taken ...
_LEAST_NORMS = 16  # ... from so many on
NEVER = -1.0  # a largest norm that no gradient has


class Skipping:
    """Says which gradients a step may take, and counts those that it did not.

    What a step may take is decided from the steps that are known to have ended before it, always the same ones; so a
    run that is resumed decides as one that was not stopped.

    Args:
      lag: how many steps before one have perhaps not ended when it begins.
    """

    def __init__(self, config: RunConfig, record: RunRecord, lag: int, say: Callable[[str], None]):
        self._most, self._factor, self._named = config.max_skipped, config.max_norm_factor, set(config.skip_rows)
        self._lag, self._say = lag, say
        self.steps = list(record.skipped_steps)
        """Those that were left out for what they were, in order."""
        self._norms = [(int(step), float(norm)) for step, norm in record.grad_norms]

    @property
    def is_possible(self) -> bool:
        """Whether any step can be left out."""
        return self._most > 0 or bool(self._named)

    @property
    def is_spent(self) -> bool:
        """Whether more were left out than may be."""
        return len(self.steps) > self._most

    def marks(self, step: int) -> dict[str, float]:
        """What a step's batch tells it: the largest norm that its gradient may have."""
        if not self.is_possible:
            return {}
        return {"max_norm": NEVER if step in self._named else self._largest(step)}

    def _largest(self, step: int) -> float:
        if self._factor is None:
            return math.inf
        known = [norm for at, norm in self._norms if at < step - self._lag]
        return self._factor * float(np.median(known[-_NORMS:])) if len(known) >= _LEAST_NORMS else math.inf

    def ended(self, step: int, metrics: StepMetrics) -> None:
        """Take in what a step, which has ended, came to."""
        if metrics.is_skipped is None or step in self._named:
            return
        norm = float(metrics.grad_norm)
        if not bool(metrics.is_skipped):
            if self._factor is not None:
                self._norms = [*self._norms[-_NORMS - self._lag - 2 :], (step, norm)]
            return
        self.steps.append(step)
        count = float(np.asarray(metrics.loss.count))
        loss = float(np.asarray(metrics.loss.sum)) / max(count, 1.0)
        if not self.is_spent:
            self._say(
                f"step {step} makes no update: loss {loss:.4g}, gradient norm {norm:.4g}; {len(self.steps)} of at most "
                f"{self._most} updates are skipped"
            )

    def in_record(self, record: RunRecord, step: int) -> RunRecord:
        """`record` with what a run that is resumed after `step` needs to go on as this one does."""
        return record.replace(
            skipped_steps=tuple(at for at in self.steps if at <= step),
            grad_norms=tuple(pair for pair in self._norms if pair[0] <= step),
        )
