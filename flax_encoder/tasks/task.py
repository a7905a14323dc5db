"""What a task is: one record of functions, which the rest of the house reads without asking which task it has."""

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
"""What a model says of one document, ready for JSON but for arrays, which scores are made of and files leave out."""


class Objective(Protocol):
    """A model with what it is trained for: an `nnx.Module` with an `encoder`."""

    encoder: Any

    def __call__(self, batch: Batch, *, key: Array | None = None) -> Array: ...

    def loss(self, batch: Batch, *, key: Array | None = None) -> LossSum:
        """The loss as a sum and a count; without a key there is no dropout."""
        ...

    def outputs(self, batch: Batch) -> dict[str, Array]:
        """What answers are made of: arrays [B, M, ...], an entry for each target of the batch."""
        ...


@runtime_checkable
class CoupledObjective(Objective, Protocol):
    """An objective whose loss compares rows of a batch with one another, so that it is no sum over parts of the batch:
    `loss(batch)` is `coupled_loss(represent(batch), batch)`."""

    def represent(self, batch: Batch, *, key: Array | None = None) -> Array:
        """What the loss needs of each row, made of that row alone: [B, ...]."""
        ...

    def coupled_loss(self, representations: Array, batch: Batch) -> LossSum:
        """The loss of a whole batch; it reads small fields of it, and parameters besides the encoder's."""
        ...


class VectorSettings(NamedTuple):
    """How a task's encoder makes vectors of texts, which are scaled to length 1."""

    pooling: PoolingMode
    prompts: Mapping[str, str] = MappingProxyType({})
    """What is put before texts, by name: `query` and `document`."""


class Question(NamedTuple):
    """A document and what the model puts out for it, to be made an answer."""

    outputs: Sequence[Mapping[str, np.ndarray]]
    """For each of its windows or pieces that has targets, in order: arrays [m, ...], m the targets."""
    labels: Labels
    config: RunConfig
    record: Record | None = None
    """The document's texts; None where only tokens are known, as in a run's evaluation."""
    window_starts: Sequence[int] = (0,)
    """Where each window or piece begins in the document's last text, in tokens."""
    offsets: np.ndarray | None = None
    """int32 [tokens, 2]: where each token's characters begin and end in its text; of all texts end to end."""
    text_lengths: np.ndarray | None = None
    """Tokens of each text."""
    tokens: np.ndarray | None = None
    """Ids of all texts end to end."""
    decode: Callable[[np.ndarray], str] | None = None
    """Ids to text, where the record is not known."""
    written: Callable[[np.ndarray], str] | None = None
    """Ids that a model wrote to text, without special tokens."""


def _nothing(config: RunConfig) -> None: ...


def _no_labels_to_check(labels: Labels) -> None: ...


def _without_value(record: Record) -> Record:
    return record._replace(value=None)


def _settled(config: RunConfig, data: Any) -> RunConfig:
    return config


@dataclass(frozen=True)
class Task:
    """One way to learn: what it reads, its model, and what is said of the model afterwards."""

    reading: Reading
    make_model: Callable[[RunConfig, Labels], Callable[[nnx.Rngs], nnx.Module]]
    """An `Objective`'s factory; labels are the names of classes or tags, where the data has them."""
    report: Callable[[LossSum], dict[str, float]]
    """Means of summed metrics, `loss` among them: a line of the log."""
    headline: str = "accuracy"
    """The metric that stands beside the loss on the progress line."""
    reads: tuple[str, ...] = ()
    """Settings, dotted, that only some tasks read and this one does; one that ends in a dot is a section."""
    check: Callable[[RunConfig], None] = _nothing
    """Raises ConfigError for settings that the task cannot have."""
    check_labels: Callable[[Labels], None] = _no_labels_to_check
    """Raises DataError for labels that the task cannot learn."""
    settle: Callable[[RunConfig, Any], RunConfig] = _settled
    """The config with what its data (`RunData`) decides filled in, where it was left open."""
    answer: Callable[[Question], Answer] | None = None
    """None: the task has no answers, and its loss is all that an evaluation gives."""
    asked: Callable[[Record], Record] = _without_value
    """A record as it is put to the model, without what is to be found."""
    gold: Callable[[Split, int, Labels], Any] | None = None
    """The right value of a stored document, as a `Record` has it, with token ids in place of a text."""
    score: Callable[[Sequence[Answer], Sequence[Any], Labels], dict[str, float]] | None = None
    """Answers held against the right values, by the library that defines each metric."""
    details: Callable[[Sequence[Answer], Sequence[Any], Labels], dict[str, Any]] | None = None
    """What `evaluate` shows besides: scores of each label and the like."""
    baselines: Callable[[Any, Any], dict[str, dict[str, float]]] | None = None
    """What can be had without the model, of a loaded run and its data (`RunData`): rows of the final table."""
    examples: Callable[[Any, Any], list[str]] | None = None
    """A few lines of what a loaded run says of its held-out data (`RunData`)."""
    samples: Callable[[RunConfig, TextTokenizer, Split, tuple[int, int]], Samples | None] | None = None
    """Of a task without answers: held-out rows that the model is asked about at every evaluation, given what must
    divide their number and their length. A task with answers shows some of those."""
    commands: Callable[[Any, Any], list[str]] | None = None
    """What to type to use a loaded run, which learned of this data (`RunData`)."""
    parts: Mapping[str, Callable[[Any], tuple[RunConfig, Any]]] = field(default_factory=dict)
    """Of a task whose model holds several: what each is called, and (its config, its module) of a loaded run, to be
    exported like a run of its own. The first is what the run gives where no part is named. None: the model is one."""
    head: str | None = None
    """Name of its head among a published family's `heads`; None exports the encoder alone."""
    problem_type: str | None = None
    """What a published config says of a head that several tasks have."""
    answers_for: Literal["tokens", "documents"] | None = None
    """What the head has logits of, where a row is one text: each of its tokens, or all of it. None: a program of the
    model (`export --stablehlo`) is the encoder alone."""
    fills_masks: bool = False
    """Whether the model predicts masked tokens, so that `fill_mask` can ask it."""
    needs_offsets: bool = False
    """Whether answers count characters."""
    compares_start: bool = False
    """Whether the model before training has scores that mean something: they are another baseline."""
    vectors: Callable[[RunConfig], VectorSettings] | None = None
    """Of a task that is there to make vectors: `embed` and `export` follow it."""


def reads_setting(task: Task, setting: str, of_some: frozenset[str]) -> bool:
    """Whether a task reads a setting, dotted: one that no task names in `reads` is read by all.

    Args:
      of_some: the settings that any task names.
    """
    return not _is_among(setting, of_some) or _is_among(setting, task.reads)


def _is_among(setting: str, names: Iterable[str]) -> bool:
    return any(setting == name or (name.endswith(".") and setting.startswith(name)) for name in names)


def check_settings(task: Task, name: str, config: RunConfig, of_some: frozenset[str]) -> None:
    """A setting that only some tasks read must be at its default for a task that does not.

    Raises:
      ConfigError: such a setting, or one that the task's own rules refuse.
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
