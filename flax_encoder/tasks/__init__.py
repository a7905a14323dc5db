"""The training objectives: one file per task, each a record of functions, in one table."""

from dataclasses import replace

from flax_encoder.config import ConfigError, RunConfig
from flax_encoder.config.rules import require
from flax_encoder.tasks import (
    autoencoder,
    causal_lm,
    classification,
    contrastive,
    masked_lm,
    multi_label,
    multiple_choice,
    question_answering,
    regression,
    replaced_token_detection,
    span_corruption,
    text_to_text,
    token_classification,
    two_sentences,
)
from flax_encoder.tasks.classification import Classifier
from flax_encoder.tasks.masked_lm import MaskedLM
from flax_encoder.tasks.task import Objective, Task, check_settings, reads_setting

__all__ = ["TASKS", "Classifier", "MaskedLM", "Objective", "Task", "check_task", "find_task", "is_setting_read",
           "shares_head"]  # fmt: skip

TASKS: dict[str, Task] = {
    "masked_lm": masked_lm.TASK,
    "classification": classification.TASK,
    "multi_label": multi_label.TASK,
    "regression": regression.TASK,
    "token_classification": token_classification.TASK,
    "question_answering": question_answering.TASK,
    "multiple_choice": multiple_choice.TASK,
    "causal_lm": causal_lm.TASK,
    "next_sentence": two_sentences.NEXT_SENTENCE,
    "sentence_order": two_sentences.SENTENCE_ORDER,
    "replaced_token_detection": replaced_token_detection.TASK,
    "contrastive": contrastive.TASK,
    "autoencoder": autoencoder.TASK,
    "text_to_text": text_to_text.TASK,
    "span_corruption": span_corruption.TASK,
}


def find_task(name: str) -> Task:
    """The task of a name, such as a config's `objective`.

    Raises:
      ConfigError: there is none; the message lists the known.
    """
    if name not in TASKS:
        raise ConfigError(f"no objective {name!r}; known are {', '.join(TASKS)}.")
    return TASKS[name]


def shares_head(objective: str, other: str) -> bool:
    """Whether models of two tasks have the same parts, the head and the decoder too."""
    task, its = find_task(objective), find_task(other)
    return objective == other or (task.head is not None and task.head == its.head and task.problem_type is None)


def check_task(config: RunConfig) -> Task:
    """The config's task, if its settings are those that the task reads.

    Raises:
      ConfigError: an unknown objective, or a setting that it does not read or refuses.
    """
    task = find_task(config.objective)
    check_settings(task, config.objective, config, _settings_of_some())
    for stage in config.timeline.stages:
        if stage.objective != config.objective:
            other = find_task(stage.objective)
            mine, theirs = ((t.reading.columns, t.reading.layout(config)) for t in (task, other))
            require(
                shares_head(config.objective, stage.objective) and mine == theirs,
                f"phases change to an objective whose model has the same parameters, and of the same rows: got "
                f"phases.{stage.phase}.objective {stage.objective} in a run of {config.objective}. --init-from starts "
                f"a run of another objective from this one's encoder.",
            )
            other.check(replace(config, objective=stage.objective, phases=()))
    return task


def is_setting_read(objective: str, setting: str) -> bool:
    """Whether a task reads a setting, dotted."""
    return reads_setting(find_task(objective), setting, _settings_of_some())


def _settings_of_some() -> frozenset[str]:
    return frozenset(setting for task in TASKS.values() for setting in task.reads)
