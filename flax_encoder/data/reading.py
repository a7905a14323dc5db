"""What a task reads: the contract between tasks and data, which knows columns, layouts and targets but no task."""

from collections.abc import Callable
from dataclasses import dataclass

from flax_encoder.config import RunConfig
from flax_encoder.data.rows.documents import Layout
from flax_encoder.data.rows.targets import TargetInputs, Targets, masked_lm, next_token_targets
from flax_encoder.data.sources.columns import Columns


def _cut(config: RunConfig) -> Layout:
    return Layout()


def _none(config: RunConfig) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Reading:
    """How a task's documents are read, laid out in rows and given targets."""

    columns: Columns
    targets: Callable[[TargetInputs], Targets]
    layout: Callable[[RunConfig], Layout] = _cut
    streams: Callable[[RunConfig], tuple[str, ...]] = _none
    """What the targets read of each token besides: `word_starts` or `tags`."""
    prompts: Callable[[RunConfig], tuple[str, ...]] = _none
    """`Columns.prompts` of a run."""
    special_tokens: Callable[[RunConfig], tuple[str, ...]] = _none
    """`Columns.special_tokens` of a run."""
    asks_one_a_row: bool = False
    """Evaluation and questions have one document a row, and batches of like lengths: outputs are made row by row."""

    def columns_of(self, config: RunConfig) -> Columns:
        """The columns with what the run's settings say of them."""
        separator = config.data.turn_separator if self.columns.has_turns else None
        return self.columns._replace(
            prompts=self.prompts(config), special_tokens=self.special_tokens(config), turn_separator=separator
        )


def _split(config: RunConfig) -> Layout:
    return Layout(long="split")


def _word_starts(config: RunConfig) -> tuple[str, ...]:
    return () if config.masking.kind == "token" else ("word_starts",)


MASKED_TEXT = Reading(Columns(), masked_lm, layout=_split, streams=_word_starts)
"""Texts alone, long ones in pieces, some of whose tokens are masked and predicted."""
CONTINUED_TEXT = Reading(Columns(), next_token_targets, layout=_split)
"""Texts alone, long ones in pieces, each of whose tokens is predicted from those before it."""
