"""What a task reads: the contract between tasks and data, which knows columns, layouts and targets but no task."""

from collections.abc import Callable
from dataclasses import dataclass

from flax_encoder.config import RunConfig
from flax_encoder.data.rows.documents import Layout
from flax_encoder.data.rows.targets import TargetInputs, Targets
from flax_encoder.data.sources.columns import Columns


def _no_streams(config: RunConfig) -> tuple[str, ...]:
    return ()


def _cut(config: RunConfig) -> Layout:
    return Layout()


@dataclass(frozen=True)
class Reading:
    """How a task's documents are read, laid out in rows and given targets."""

    columns: Columns
    targets: Callable[[TargetInputs], Targets]
    layout: Callable[[RunConfig], Layout] = _cut
    streams: Callable[[RunConfig], tuple[str, ...]] = _no_streams
    """What the targets read of each token besides: `word_starts` or `tags`."""
    asks_one_a_row: bool = False
    """Evaluation and questions have one document a row, and batches of like lengths: outputs are made row by row."""
