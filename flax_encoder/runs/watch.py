"""What watches a run's loop: a dog that ends it when no step is made any more, and the profiler."""

import faulthandler
import os
import pathlib
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import jax

from flax_encoder.runs.goodput import Goodput

STALLED = 86
"""Exit status of a run in which no step was made for stall_seconds."""


class Watchdog:
    """Ends the process with STALLED when no step was made for so many seconds, after it has printed to standard error
    what was waited for and where every thread stands. None watches nothing."""

    def __init__(self, stall_seconds: float | None, goodput: Goodput):
        self._limit, self._goodput, self._ended = stall_seconds, goodput, threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._limit is not None:
            self._goodput.last_step_at = time.monotonic()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def _watch(self) -> None:
        assert self._limit is not None
        while not self._ended.wait(min(self._limit / 10, 1.0)):
            if time.monotonic() - self._goodput.last_step_at > self._limit:
                self._end()

    def _end(self) -> None:
        with suppress(OSError, ValueError):
            os.write(2, (
                f"\nno step for {self._limit:g} s (--stall-seconds): the last one sent to the device was "
                f"{self._goodput.step}, and the run was waiting in: {self._goodput.phase.replace('_', ' ')}. Where "
                f"every thread stands follows; the process ends with status {STALLED}, and the same command goes on "
                f"from the last checkpoint.\n\n"
            ).encode())  # fmt: skip
            faulthandler.dump_traceback(file=2, all_threads=True)
        os._exit(STALLED)

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()


class Profile:
    """Writes a trace of some steps to RUN/profile, for TensorBoard's profiler and xprof.

    Args:
      steps: "FIRST:LAST", as config.profile has it; None writes none.
    """

    def __init__(self, steps: str | None, run_dir: pathlib.Path):
        self._first, self._last = map(int, steps.split(":")) if steps else (0, -1)
        self._folder, self._is_on = run_dir / "profile", False

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._is_on = True

    def after(self, step: int, result: Any) -> None:
        if self._is_on and step == self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()
            print(f"a trace of steps {self._first} to {self._last} is in {self._folder}", file=sys.stderr)

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
