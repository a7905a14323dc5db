"""The length of a run: epochs and texts as steps and rows, when it is over, and when evaluations are due."""

import dataclasses
import math

from flax_encoder.config import RunConfig
from flax_encoder.config.rules import counted
from flax_encoder.data.sources.records import Say
from flax_encoder.runs.best import Best


def settle_length(config: RunConfig, rows: int, texts: int, *, unit: int = 1, say: Say = lambda message: None):
    """`config` with the steps that its epochs come to, and the rows that hold its batch_texts.

    Args:
      rows, texts: of one epoch.
      unit: batch_size stays a multiple of it, and is at least that: devices that split rows, times microbatches.
    """
    if config.batch_texts is not None:
        wanted = config.batch_texts * rows / texts
        batch_size = max(1, round(wanted / unit)) * unit
        config = dataclasses.replace(config, batch_size=batch_size)
        say(f"batch_size is {batch_size}: {batch_size * texts / rows:.1f} texts per update, {texts / rows:.1f} per row")
    if config.epochs is not None:
        steps = max(1, math.ceil(config.epochs * rows / config.batch_size - 1e-6))
        config = dataclasses.replace(config, steps=steps)
        read = f"{counted(config.epochs, 'epoch')} of {counted(rows, 'row')}"
        say(f"steps are {steps:,}: {read}, {config.batch_size} per step")
    return config


def with_lengths_of(config: RunConfig, before: RunConfig) -> tuple[RunConfig, RunConfig]:
    """(config, before) where the steps and the batch size that follow from the text are those that the run settled
    when it began, and phases in minutes that have ended have their steps. Of other epochs than before the steps are in
    proportion, to a step: the run is to be made longer."""
    if [phase.minutes for phase in config.phases] == [phase.minutes for phase in before.phases]:
        pairs = zip(config.phases, before.phases, strict=True)
        phases = (mine if mine.minutes is None else dataclasses.replace(mine, steps=was.steps) for mine, was in pairs)
        config = dataclasses.replace(config, phases=tuple(phases))
    if config.epochs is not None and before.epochs is not None:
        steps = math.ceil(before.steps * (config.epochs / before.epochs) - 1e-6)
        config = dataclasses.replace(config, steps=steps)
        before = dataclasses.replace(before, epochs=config.epochs)
    if config.batch_texts is not None and config.batch_texts == before.batch_texts:
        config = dataclasses.replace(config, batch_size=before.batch_size)
    return config, before


def budget_seconds(config: RunConfig) -> float:
    """The time that a run may spend on steps; infinite without budget_minutes."""
    return math.inf if config.budget_minutes is None else 60 * config.budget_minutes


def is_over(config: RunConfig, step: int, spent_seconds: float, best: Best | None) -> bool:
    """Whether a run ends at a step: by its steps, its time or its patience."""
    is_out_of_patience = best is not None and config.patience is not None and best.since >= config.patience
    return step == config.steps or spent_seconds >= budget_seconds(config) or is_out_of_patience


def epochs_after(config: RunConfig, rows: int, step: int) -> float:
    """How often all text has been read after so many steps.

    Args:
      rows: of an epoch, of the last stage's length.
    """
    tokens = 0
    for stage in config.stages:
        tokens += max(0, min(step, stage.end_step) - stage.start_step) * stage.batch_size * stage.row_length
    return tokens / (rows * config.stages[-1].row_length)


def is_evaluation_due(config: RunConfig, rows: int, step: int) -> bool:
    """Whether held-out text is evaluated after a step: each eval_every-th, or the one that ends an epoch."""
    if config.eval_every is None or step == 0:
        return False
    if config.eval_every == "epoch":
        return math.floor(epochs_after(config, rows, step)) > math.floor(epochs_after(config, rows, step - 1))
    return step % config.eval_every == 0
