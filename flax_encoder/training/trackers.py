"""Where a run's numbers go besides metrics.jsonl: TensorBoard, Weights & Biases, or a tracker of your own."""

import importlib.util
import logging
import os
import pathlib
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol, runtime_checkable

from flax_encoder.config import ConfigError

logger = logging.getLogger(__name__)


@runtime_checkable
class Tracker(Protocol):
    """What takes in the numbers of a run, on its first process. `train(config, trackers=[...])` calls its methods in
    this order. A tracker that raises is left out from then on, with a warning: metrics.jsonl has its numbers."""

    def begin(self, run_dir: pathlib.Path, config: dict[str, Any], resume_step: int) -> None:
        """Called before the first `log`.

        Args:
          config: the run's settings, ready for JSON.
          resume_step: the step that the run goes on from: what was logged of later ones will be logged again.
        """
        ...

    def log(self, step: int, values: dict[str, float]) -> None:
        """A line of metrics.jsonl."""
        ...

    def end(self) -> None:
        """The run has ended, or was stopped."""
        ...


class TensorBoard:
    """Events in the run's folder, a point for every number."""

    def begin(self, run_dir: pathlib.Path, config: dict[str, Any], resume_step: int) -> None:
        from tensorboardX import SummaryWriter  # slow to import, and only needed here

        self._writer = SummaryWriter(str(run_dir), purge_step=resume_step + 1, write_to_disk=True)
        for writer in self._writer.all_writers.values():
            _forgive_full_disk(writer.event_writer._ev_writer)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def end(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which a resumed run goes on with: RUN_DIR/wandb-id keeps its name there. Project,
    account and mode are those of its environment variables (WANDB_PROJECT, WANDB_MODE=offline, ...)."""

    def begin(self, run_dir: pathlib.Path, config: dict[str, Any], resume_step: int) -> None:
        import wandb

        kept = run_dir / "wandb-id"
        with suppress(OSError):
            if not kept.exists():
                kept.write_text(uuid.uuid4().hex[:8] + "\n", "utf-8")
        name = kept.read_text("utf-8").strip() if kept.exists() else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "flax-encoder"), name=run_dir.name, dir=str(run_dir), id=name,
            resume="allow", config=config,
        )  # fmt: skip

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def end(self) -> None:
        self._run.finish()


_KNOWN: dict[str, tuple[Callable[[], Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboardX"), "wandb": (WeightsAndBiases, "wandb"),
}  # fmt: skip


def make_trackers(names: Sequence[str]) -> list[Tracker]:
    """The trackers of these names, not begun.

    Raises:
      ConfigError: the library of one is not installed.
    """
    for name in names:
        if importlib.util.find_spec(_KNOWN[name][1]) is None:
            raise ConfigError(
                f"--trackers {name} needs a library that is not here: pip install 'flax-encoder[{name}]', or leave "
                f"{name} out."
            )
    return [_KNOWN[name][0]() for name in names]


class Tracked:
    """Trackers together, each left out once it has raised."""

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = list(trackers)

    def call(self, method: str, *arguments: Any) -> None:
        for tracker in list(self._trackers):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # whatever a service does, the run goes on
                self._trackers.remove(tracker)
                logger.warning("%s failed, gets no more: %s: %s", type(tracker).__name__, type(error).__name__, error)


def _forgive_full_disk(events: Any) -> None:
    """Let TensorBoard's file go where it cannot be written. Its thread would end, and the run would wait for that for
    ever, or end in its traceback; metrics.jsonl has the same numbers, and says what is wrong."""
    is_told = False

    def forgiving(act: Callable[..., Any]) -> Callable[..., Any]:
        def maybe(*arguments: Any) -> Any:
            nonlocal is_told
            try:
                return act(*arguments)
            except (OSError, ValueError) as error:
                if not is_told:
                    logger.warning("TensorBoard's events cannot be written (%s); metrics.jsonl has them.", error)
                is_told = True

        return maybe

    for name in ("write_event", "flush", "close"):
        setattr(events, name, forgiving(getattr(events, name)))
