"""A task is one record of functions; other code reads the record and never asks which task it is."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from flax import nnx
from jaxtyping import Array

from flax_encoder.config import ConfigError, RunConfig, differences
from flax_encoder.config.model import PoolingMode
from flax_encoder.config.phases import SETTINGS
from flax_encoder.data.reading import Reading
from flax_encoder.data.sources.records import Record
from flax_encoder.data.store.store import Split
from flax_encoder.data.tokens.tokenizer import TextTokenizer
from flax_encoder.tasks.loss import LossSum
from flax_encoder.tasks.samples import Samples

Batch = dict[str, Array]
Labels = list[str] | None
Answer = dict[str, Any]
"""A model's answer to one document, ready for JSON except for arrays, which scores use and files leave out."""


class Objective(Protocol):
    """A model with its loss: an `nnx.Module` with an `encoder`."""

    encoder: Any

    def __call__(self, batch: Batch, *, key: Array | None = None) -> Array: ...

    def loss(self, batch: Batch, *, key: Array | None = None) -> LossSum:
        """The loss as a sum and a count; without a key there is no dropout."""
        ...

    def outputs(self, batch: Batch) -> dict[str, Array]:
        """Arrays [B, M, ...], with an entry for each target of the batch, from which answers are made."""
        ...


@runtime_checkable
class CoupledObjective(Objective, Protocol):
    """An objective whose loss compares rows of a batch with one another, so it is not a sum over parts of the batch.
    `loss(batch)` is `coupled_loss(represent(batch), batch)`."""

    def represent(self, batch: Batch, *, key: Array | None = None) -> Array:
        """What the loss needs of each row, computed from that row alone: [B, ...]."""
        ...

    def coupled_loss(self, representations: Array, batch: Batch) -> LossSum:
        """The loss of a whole batch; it reads only small fields of the batch, and parameters outside the encoder."""
        ...


class VectorSettings(NamedTuple):
    """How a task's encoder makes vectors of texts; vectors are scaled to length 1."""

    pooling: PoolingMode
    prompts: Mapping[str, str] = MappingProxyType({})
    """The prompts that are put before texts, by name: `query` and `document`."""


class Question(NamedTuple):
    """A document and the model's outputs for it, from which a task makes an answer."""

    outputs: Sequence[Mapping[str, np.ndarray]]
    """Arrays [m, ...] of m targets, for each window or piece of the document that has targets, in order."""
    labels: Labels
    config: RunConfig
    record: Record | None = None
    """The document's texts; None where only tokens are known, as in a run's evaluation."""
    window_starts: Sequence[int] = (0,)
    """Where each window or piece begins in the document's last text, in tokens."""
    offsets: np.ndarray | None = None
    """int32 [tokens, 2]: where each token's characters begin and end in its text, for all texts end to end."""
    text_lengths: np.ndarray | None = None
    """Tokens of each text."""
    tokens: np.ndarray | None = None
    """Ids of all texts end to end."""
    decode: Callable[[np.ndarray], str] | None = None
    """Turns ids into text, if the record is not known."""
    written: Callable[[np.ndarray], str] | None = None
    """Turns the ids that a model wrote into text, without special tokens."""


def _nothing(config: RunConfig) -> None: ...


def _no_labels_to_check(labels: Labels) -> None: ...


def _without_value(record: Record) -> Record:
    return record._replace(value=None)


def _settled(config: RunConfig, data: Any) -> RunConfig:
    return config


@dataclass(frozen=True)
class Task:
    """A training objective: the data that it reads, its model, its answers and its scores."""

    reading: Reading
    make_model: Callable[[RunConfig, Labels], Callable[[nnx.Rngs], nnx.Module]]
    """Makes the factory of an `Objective`; labels are the names of classes or tags, if the data has them."""
    report: Callable[[LossSum], dict[str, float]]
    """Turns summed metrics into means for a line of the log, `loss` among them."""
    headline: str = "accuracy"
    """The metric that stands beside the loss on the progress line."""
    reads: tuple[str, ...] = ()
    """Settings, dotted, that only some tasks read and this one does; one that ends in a dot is a section."""
    check: Callable[[RunConfig], None] = _nothing
    """Raises ConfigError for settings that the task cannot have."""
    check_labels: Callable[[Labels], None] = _no_labels_to_check
    """Raises DataError for labels that the task cannot learn."""
    settle: Callable[[RunConfig, Any], RunConfig] = _settled
    """Fills in settings of the config that were left open and that its data (`RunData`) decides."""
    answer: Callable[[Question], Answer] | None = None
    """Makes the answer to a document. None: the task has no answers, and an evaluation gives only its loss."""
    asked: Callable[[Record], Record] = _without_value
    """A record as the model gets it, without the value to predict."""
    gold: Callable[[Split, int, Labels], Any] | None = None
    """The right value of a stored document, as a `Record` has it, with token ids in place of a text."""
    score: Callable[[Sequence[Answer], Sequence[Any], Labels], dict[str, float]] | None = None
    """The scores of answers against right values, by the library that defines each metric."""
    details: Callable[[Sequence[Answer], Sequence[Any], Labels], dict[str, Any]] | None = None
    """More that `evaluate` shows, such as the scores of each label."""
    baselines: Callable[[Any, Any], dict[str, dict[str, float]]] | None = None
    """The scores of simple baselines, for a loaded run and its data (`RunData`): rows of the final table."""
    examples: Callable[[Any, Any], list[str]] | None = None
    """A few lines with a loaded run's answers to its held-out data (`RunData`)."""
    samples: Callable[[RunConfig, TextTokenizer, Split, tuple[int, int]], Samples | None] | None = None
    """For a task without answers: held-out rows that the model is asked about at every evaluation; the last argument
    must divide their number and their length. A task with answers shows some of its answers."""
    commands: Callable[[Any, Any], list[str]] | None = None
    """The commands to type next, to use a loaded run, given the data that it learned from (`RunData`)."""
    parts: Mapping[str, Callable[[Any], tuple[RunConfig, Any]]] = field(default_factory=dict)
    """For a task whose model holds several models: their names, and a function of a loaded run to (config, module) of
    each, which is exported like a run of its own. The first one is the run's main model. Empty: there is one model."""
    head: str | None = None
    """Name of its head among a published family's `heads`; None exports only the encoder."""
    problem_type: str | None = None
    """`problem_type` in a published config, for a head that several tasks have."""
    answers_for: Literal["tokens", "documents"] | None = None
    """What the head has logits for: each token, or the whole text of a row. With None `export --stablehlo` writes only
    the encoder."""
    fills_masks: bool = False
    """Whether the model predicts masked tokens, so that `fill_mask` can ask it."""
    needs_offsets: bool = False
    """Whether answers count characters."""
    compares_start: bool = False
    """Whether the model's scores before training are meaningful, and so are another baseline."""
    vectors: Callable[[RunConfig], VectorSettings] | None = None
    """For a task that makes vectors: the settings that `embed` and `export` use."""


def reads_setting(task: Task, setting: str, of_some: frozenset[str]) -> bool:
    """Whether a task reads a setting, dotted. All tasks read a setting that no task names in `reads`.

    Args:
      of_some: the settings that at least one task names.
    """
    return not _is_among(setting, of_some) or _is_among(setting, task.reads)


def _is_among(setting: str, names: Iterable[str]) -> bool:
    return any(setting == name or (name.endswith(".") and setting.startswith(name)) for name in names)


def check_settings(task: Task, name: str, config: RunConfig, of_some: frozenset[str]) -> None:
    """A setting that only some tasks read must be at its default for a task that does not.

    Raises:
      ConfigError: there is such a setting, or the task's own rules refuse one.
    """
    for setting, (default, given) in differences(RunConfig(objective=config.objective), config).items():
        if not reads_setting(task, setting, of_some):
            raise ConfigError(f"{setting} is not read by the objective {name}: leave it at {default!r}; got {given!r}.")
    for number, phase in enumerate(config.phases):
        for changed in phase.changes:
            if not reads_setting(task, SETTINGS[changed], of_some):
                raise ConfigError(
                    f"phases.{number}.{changed} is not read by the objective {name}: leave it out; got "
                    f"{getattr(phase, changed)}."
                )
    task.check(config)
