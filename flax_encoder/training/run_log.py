"""What a run tells: metrics.jsonl and trackers for later, a progress line for whoever is watching."""

import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import numpy as np
from rich.live import Live

from flax_encoder.training.console import make_news_console
from flax_encoder.training.panel import run_panel
from flax_encoder.training.trackers import Tracked, Tracker

logger = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 10.0
SAMPLES = "samples.jsonl"
"""In a run folder: what each evaluation says of the same few held-out texts."""


class NotFinite(ArithmeticError):
    """A metric is no finite number. The message names it."""


class Clock:
    """Throughput between two readings: real tokens a second, and the share of time spent waiting for data.

    `spent_seconds` is the time that counted since the run began, from what it was in runs before.
    """

    def __init__(self, spent_seconds: float = 0.0):
        self.tokens, self.steps, self.overflow = 0, 0, 0
        self.seconds_per_step = 0.0
        self._began, self._waited = time.monotonic(), 0.0
        self._run_began = self._began - spent_seconds

    @property
    def spent_seconds(self) -> float:
        return time.monotonic() - self._run_began

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is time that the device may have had nothing to do."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here does not count."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began
        self._run_began += time.monotonic() - began

    def count(self, rows: dict[str, np.ndarray], shares: int = 1) -> None:
        """Take in a batch's real tokens, a decoder's too, and what masking left out for want of slots, of which this
        process has one of several equal shares."""
        for name in ("segment_ids", "decoder_segment_ids"):
            self.tokens += int(np.count_nonzero(rows[name])) * shares if name in rows else 0
        self.overflow += int(rows["overflow"].sum()) * shares if "overflow" in rows else 0

    def read(self) -> dict[str, float]:
        """Figures since the last reading, which starts anew here, and the seconds that count since the run began."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        if self.steps:
            self.seconds_per_step = seconds / self.steps
        values = {"tokens_per_second": self.tokens / seconds, "data_wait_fraction": self._waited / seconds}
        values["spent_seconds"] = self.spent_seconds
        if self.overflow:
            values["masking_overflow"] = float(self.overflow)
        self.tokens, self.steps, self.overflow = 0, 0, 0
        self._began, self._waited = time.monotonic(), 0.0
        return values


class RunLog:
    """Metrics and messages of one run.

    Opened at a step that a run resumes from, its first line drops what was logged after that step, so that the file is
    the same as an uninterrupted run's; a run that is refused before has changed nothing. Until then `steps` and
    `is_finished` may be set to what the run has settled. Lines that cannot be written are kept until they can be; if
    they cannot at the end, that is an OSError. A terminal shows a panel with the loss as a curve; elsewhere a
    line is printed every ten seconds or so.
    """

    def __init__(
        self, run_dir: pathlib.Path, *, steps: int, resume_step: int, is_finished: bool = False, is_main: bool = True,
        trackers: Sequence[Tracker] = (), config: dict[str, Any] | None = None,
    ):  # fmt: skip
        self.steps, self.is_finished, self._is_main = steps, is_finished, is_main
        self._console = make_news_console(is_shown=is_main)
        self._live: Live | None = None
        self._losses: list[float] = []
        self._last_line = 0.0
        self._run_dir, self._resume_step = run_dir, resume_step
        self._file: BinaryIO | None = None
        self._unwritten = b""
        self._after: list[dict[str, Any]] = []
        self._trackers, self._config = Tracked(trackers), config or {}

    def _open(self) -> BinaryIO:
        path = self._run_dir / "metrics.jsonl"
        if (samples := self._run_dir / SAMPLES).exists():
            last = self._resume_step - self.is_finished
            kept = [line for line in read_metrics(self._run_dir, SAMPLES) if line["step"] <= last]
            write_atomically(samples, "".join(json.dumps(line) + "\n" for line in kept))
        kept = [line for line in read_metrics(self._run_dir) if line["step"] <= self._resume_step]
        if self.is_finished:  # the last evaluation and the test are made, and written, again, before what came last
            kept = [line for line in kept if line["step"] < self._resume_step or not _is_of(line, "eval/", "test/")]
            self._after = [line for line in kept if line["step"] == self._resume_step and _is_of(line, "goodput/")]
            kept = [line for line in kept if line not in self._after]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._trackers.call("begin", self._run_dir, self._config, self._resume_step)
        return path.open("ab", buffering=0)

    def say(self, message: str) -> None:
        self._console.print(message)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, which trackers get too."""
        if not self._is_main:
            return
        path = self._run_dir / "metrics.jsonl"
        if odd := {name: value for name, value in values.items() if not math.isfinite(value)}:
            raise NotFinite(f"a metric is a finite number: at step {step}, {_listed(odd)}. Nothing of it is in {path}.")
        line = json.dumps({"step": step, **values}, allow_nan=False) + "\n"
        had_all = not self._unwritten
        self._unwritten += line.encode()
        error = self._write_rest()
        if error is not None and had_all:
            logger.warning("%s cannot be written (%s): its lines are kept and written later.", path, error.strerror)
        self._trackers.call("log", step, values)

    def _write_rest(self) -> OSError | None:
        """What of the log is not written yet, as far as there is room for it; the error, if not all could be."""
        try:
            self._file = self._file or self._open()
            while self._unwritten:  # a disk may take a part
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            return error
        return None

    def write_samples(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        """One line of samples.jsonl: what an evaluation, whose metrics are written, says of a few held-out texts."""
        if self._is_main and samples:
            path = self._run_dir / SAMPLES
            try:
                with path.open("ab") as file:
                    file.write((json.dumps({"step": step, "samples": samples}) + "\n").encode())
            except OSError as error:
                logger.warning("%s cannot be written (%s): step %d has no samples.", path, error.strerror, step)

    def progress(self, step: int, values: dict[str, float], headline: str, seconds_left: float) -> None:
        """Show where the run is: step, loss, the task's headline metric, tokens/s, data wait, time left."""
        if not self._is_main:
            return
        facts = [f"{values['tokens_per_second']:,.0f} tokens/s", f"data wait {values['data_wait_fraction']:.1%}"]
        if headline in values:
            facts.insert(0, f"{headline.replace('_', ' ')} {values[headline]:.3f}")
        epoch = [f"epoch {values['epoch']:.2f}"] if "epoch" in values else []
        left, loss = _duration(seconds_left), f"loss {values['loss']:.3f}"
        if self._console.is_terminal:
            if not self._losses:  # of a run that goes on, with what was before
                self._losses = [line["loss"] for line in read_metrics(self._run_dir) if "loss" in line][:-1]
            self._losses.append(values["loss"])
            is_plain = not self._console.encoding.lower().startswith("utf")
            panel = run_panel(
                str(self._run_dir), step, self.steps, self._losses, [*epoch, *facts], left, self._console.width,
                is_plain,
            )  # fmt: skip
            if self._live is None:
                self._live = Live(panel, console=self._console, auto_refresh=False)
                self._live.start()
            self._live.update(panel, refresh=True)
        elif (now := time.monotonic()) - self._last_line >= _SECONDS_BETWEEN_LINES or step == self.steps:
            self._last_line = now
            self.say(f"step {step}/{self.steps}  " + "  ".join([*epoch, loss, *facts, f"{left} left"]))

    def end_progress(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if sys.stdout is not None:
            sys.stdout.flush()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type | None, *exc_info: object) -> None:
        self.end_progress()
        error = None
        if self._unwritten or self._after:
            self._unwritten += "".join(json.dumps(line) + "\n" for line in self._after).encode()
            error = self._write_rest()
        if self._file is not None:
            self._file.close()
            self._trackers.call("end")
        if error is not None and kind is None:  # or else the first error is the one to hear of
            path = str(self._run_dir / "metrics.jsonl")
            raise OSError(error.errno, f"{error.strerror}; the log's last lines are lost", path)


def _is_of(line: dict[str, Any], *prefixes: str) -> bool:
    return any(name.startswith(prefixes) for name in line)


def write_atomically(path: pathlib.Path, text: str) -> None:
    """The whole text or the old file, whenever the program dies."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def read_metrics(run_dir: pathlib.Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, or of another file like it, each with its `step`. A last line that a kill cut
    short is left out. So is, with a warning, one that is damaged: no UTF-8, no JSON object, no step, or a number that
    is not finite."""
    path = run_dir / name
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    lines = []
    *whole, cut = content.split(b"\n")
    for number, text in enumerate(whole, 1):
        try:
            lines.append(_metrics_line(text))
        except (ValueError, RecursionError) as error:
            logger.warning("%s: line %d is damaged and left out: %s", path, number, error)
    with suppress(ValueError, RecursionError):
        lines.append(_metrics_line(cut))
    return lines


def _metrics_line(text: bytes) -> dict[str, Any]:
    line = json.loads(text.decode("utf-8"), parse_constant=_refuse_constant)
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        raise ValueError(f"it must be an object with a step: {text[:40]!r}")
    return line


def _refuse_constant(name: str) -> None:
    raise ValueError(f"numbers must be finite: {name}")


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} is {value}" for name, value in values.items())
