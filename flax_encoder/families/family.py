"""What a family is: presets, and tables of the fields of its published configs and of its tensors.

A table is read in either direction, so that what is read is what is written: fields by `configs`, rows by `tensors`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from flax_encoder.config import ConfigError, DecoderConfig, EncoderConfig

# Names of activations in published configs, and ours. Of several with one meaning the first is written.
ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "quick_gelu": "quick_gelu",
    "silu": "silu", "swish": "silu", "relu": "relu", "relu2": "relu2", "relu6": "relu6", "leaky_relu": "leaky_relu",
    "mish": "mish", "tanh": "tanh", "sigmoid": "sigmoid", "linear": "identity",
}  # fmt: skip

POOLINGS = ("cls", "mean", "late")
# Tasks whose head reads one vector a document; those of the others read every token.
POOLED = ("classification", "multiple_choice", "next_sentence")
# Tasks whose head has no transform, unless one is asked for.
WITHOUT_TRANSFORM = ("token_classification", "question_answering")
# Tasks whose head gives logits of the vocabulary; `pretraining` is that of masked_lm with one more, of two segments.
OF_VOCABULARY = ("masked_lm", "pretraining")


class Field(NamedTuple):
    """Fields of a published config and the settings they stand for, with the value of each that is left out."""

    theirs: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    default: Any
    read: Callable[..., Any] = lambda *values: values[0] if len(values) == 1 else values
    write: Callable[..., Any] = lambda *values: values[0] if len(values) == 1 else values


def activation(theirs: str, ours: str = "activation", default: str = "gelu") -> Field:
    def read(name):
        if name not in ACTIVATIONS:
            raise ConfigError(f"{theirs} {name!r} is not understood; known are {', '.join(ACTIVATIONS)}.")
        return ACTIVATIONS[name]

    return Field(theirs, ours, default, read, lambda name: name and activation_name(name))


def activation_name(ours: str) -> str:
    return next(name for name, value in ACTIVATIONS.items() if value == ours)


class Row(NamedTuple):
    """A published tensor and the parameter, or the parameters, that it holds."""

    theirs: tuple[str, ...]
    """Its names, `{i}` counting layers. Any is read, the first found."""
    ours: tuple[tuple[str, str], ...]
    """(path, layout) of each parameter; paths through `layers` are of layer `{i}`."""
    split: str = "rows"
    """How several lie in one tensor."""
    num_written: int = 1
    """How many of the names are written: the other side can want copies."""
    when: tuple[str, bool] | None = None
    """A parameter, and whether the row is of models that have it or of those that do not."""


def linear(theirs: str | tuple[str, ...], ours: str, layout: str = "linear") -> list[Row]:
    """A torch Linear."""
    names = (theirs,) if isinstance(theirs, str) else theirs
    return [
        Row(tuple(f"{name}.weight" for name in names), ((f"{ours}.kernel", layout),)),
        Row(tuple(f"{name}.bias" for name in names), ((f"{ours}.bias", "flat"),)),
    ]


def norm(theirs: str | tuple[str, ...], ours: str) -> list[Row]:
    names = (theirs,) if isinstance(theirs, str) else theirs
    return [
        Row(tuple(f"{name}.weight" for name in names), ((f"{ours}.scale", "flat"),)),
        Row(tuple(f"{name}.bias" for name in names), ((f"{ours}.bias", "flat"),)),
    ]


def table(theirs: str | tuple[str, ...], ours: str) -> list[Row]:
    return [Row((theirs,) if isinstance(theirs, str) else theirs, ((ours, "as_is"),))]


def fused(theirs: str, *ours: tuple[str, str], split: str = "rows") -> list[Row]:
    """A torch Linear that makes several of our linear maps at once."""
    return [
        Row((f"{theirs}.weight",), tuple((f"{path}.kernel", layout) for path, layout in ours), split),
        Row((f"{theirs}.bias",), tuple((f"{path}.bias", "flat") for path, _ in ours), split),
    ]


@dataclass(frozen=True)
class Head:
    """One task's head: the architecture it is published as, its settings and its tensors (full names)."""

    architectures: tuple[str, ...]
    rows: tuple[Row, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Of HeadConfig, and `pooling`."""
    fields: tuple[Field, ...] = ()
    num_outputs: int | None = None
    """None counts the config's labels; masked_lm has the vocabulary's."""
    tied: str | None = None
    """Name of the tensor that is the token embedding over again where the head is tied."""
    prefix: str | None = None
    """Before the encoder's names in this head's folders; None is the family's."""
    objective: str | None = None
    """What its outputs answer, where several objectives train heads of this shape; None is any of them."""


@dataclass(frozen=True)
class Family:
    model_type: str
    fixed: Mapping[str, Any]
    """What every member has, of EncoderConfig."""
    fields: tuple[Field, ...]
    rows: tuple[Row, ...]
    """Of the encoder: names without `prefix`, paths from the encoder."""
    heads: Mapping[str, Head]
    prefix: str
    """Before the encoder's names in a folder that has a head; without one they stand bare."""
    base: str
    """The architecture of the bare encoder."""
    pooler: tuple[Row, ...] = ()
    """The bare encoder's pooler, paths from the model; names without `prefix`."""
    presets: Mapping[str, EncoderConfig] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    must: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields with one known meaning, and the values they may have."""
    modernize: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config
    """Old spellings of a config to today's."""
    older: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    """Old spellings that a config in today's is written with too: a transformers that knows only those would take its
    defaults for what it does not find."""
    arranged: Callable[[Mapping[str, np.ndarray], str | None], Mapping[str, np.ndarray]] = lambda tensors, task: tensors
    """Tensors as a folder has them, and the task that is loaded, to tensors as `rows` name them."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Names that transformers takes for those of `fields`."""
    leftovers: tuple[str, ...] = ()
    """Patterns of tensors that are published beside the model and that no head here reads."""
    marker: str | None = None
    """A field that tells this family from another with the same model_type."""
    counts_real_tokens: bool = False
    """Positions count tokens that are no padding (RoBERTa), not columns."""
    is_in_transformers: bool = True
    decoder: Callable[[Mapping[str, Any], Mapping[str, np.ndarray]], DecoderConfig] | None = None
    """Of its encoder-decoders, from the published config and tensors; their task is `text_to_text`."""
    write_decoder: Callable[[EncoderConfig, DecoderConfig], dict[str, Any]] | None = None
    """The fields of a published config that `decoder` reads."""


@contextmanager
def understood(what: str) -> Iterator[None]:
    """Whatever a value of a kind that nobody writes makes a reader raise is a ConfigError that says of what."""
    try:
        yield
    except ConfigError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise ConfigError(f"{what} is not understood: {error}.") from None
