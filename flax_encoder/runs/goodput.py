"""Where a run's wall time goes: the share of steps, and of everything else."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("step", "compile", "data_wait", "evaluation", "save", "restore", "lost_work", "open")


class Goodput:
    """Accounts each second since it was made to one phase.

    `step` is making steps, `lost_work` making those again that a run which died had made after its last checkpoint,
    `save` the part of saving that steps wait for, `open` reading text and making the model, and the others what they
    say. Phases within phases count for themselves alone.
    """

    def __init__(self):
        self.phase, self.step = "open", 0
        self.last_step_at = time.monotonic()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._since = time.monotonic()

    def enter(self, phase: str) -> str:
        """Account what follows to a phase; returns the one before."""
        now, before = time.monotonic(), self.phase
        self._seconds[before] += now - self._since
        self.phase, self._since = phase, now
        return before

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before = self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def made(self, step: int) -> None:
        """A step was sent to the device, as others before it have ended."""
        self.step, self.last_step_at = step, time.monotonic()

    def shares(self) -> dict[str, float]:
        """Of all phases that took time, their share of it, the sum being 1."""
        self.enter(self.phase)
        whole = sum(self._seconds.values()) or 1.0
        return {name: seconds / whole for name, seconds in self._seconds.items() if seconds > 0}

    def __str__(self) -> str:
        shares = sorted(self.shares().items(), key=lambda pair: -pair[1])
        said = ", ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in shares)
        return f"of {sum(self._seconds.values()):,.0f} s: {said}"
