"""What a family is: presets, and tables that map its published config and tensors to ours, both ways.

A table is read in either direction: `read_config` and `write_config`, `import_tensors` and `export_tensors` use the
same rows. What a table says of a config is proven at every export by reading the result back.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from flax_encoder.config import (
    FREE_OF_PARAMETERS,
    ConfigError,
    DecoderConfig,
    EncoderConfig,
    HeadConfig,
    from_dict,
)
from flax_encoder.families.fields import FIXED, IGNORED, is_aside

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


class Layout(NamedTuple):
    """How a parameter of some shape lies in a torch tensor."""

    read: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


def _pairs_to_halves(w: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    w = w.T.reshape(*shape[:-1], shape[-1] // 2, 2)
    return w.swapaxes(-1, -2).reshape(shape)


def _halves_to_pairs(w: np.ndarray) -> np.ndarray:
    halves = w.reshape(*w.shape[:-1], 2, w.shape[-1] // 2)
    return halves.swapaxes(-1, -2).reshape(w.shape[0], -1).T


LAYOUTS = {
    "as_is": Layout(lambda w, shape: w.reshape(shape), lambda w: w),
    "flat": Layout(lambda w, shape: w.reshape(shape), lambda w: w.reshape(-1)),
    # torch keeps [out, in]; our kernels have the inputs' axes first, and heads have an axis of their own.
    "linear": Layout(lambda w, shape: w.T.reshape(shape), lambda w: w.reshape(w.shape[0], -1).T),
    "from_heads": Layout(lambda w, shape: w.T.reshape(shape), lambda w: w.reshape(-1, w.shape[-1]).T),
    # Rotary features that turn as neighbours (2i, 2i + 1) there and as halves (i, i + H/2) here.
    "rotated_pairs": Layout(_pairs_to_halves, _halves_to_pairs),
    "conv": Layout(lambda w, shape: w.transpose(2, 1, 0).reshape(shape), lambda w: w.transpose(2, 1, 0)),
}


def _split(w: np.ndarray, count: int, split: str, heads: int) -> list[np.ndarray]:
    if split == "rows":
        return np.split(w, count)
    by_head = w.reshape(heads, count, -1, *w.shape[1:])
    return [by_head[:, k].reshape(-1, *w.shape[1:]) for k in range(count)]


def _join(parts: list[np.ndarray], split: str, heads: int) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    if split == "rows":
        return np.concatenate(parts)
    by_head = np.stack([p.reshape(heads, -1, *p.shape[1:]) for p in parts], axis=1)
    return by_head.reshape(-1, *parts[0].shape[1:])


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


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


_SIZE = re.compile(r"(^|_)(size|dim|layers|heads|groups|embeddings)$|^[dn]_")  # names of fields that are sizes
_MOST, _MOST_LAYERS = 2**31, 10_000


@contextmanager
def understood(what: str) -> Iterator[None]:
    """Whatever a value of a kind that nobody writes makes a reader raise is a ConfigError that says of what."""
    try:
        yield
    except ConfigError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise ConfigError(f"{what} is not understood: {error}.") from None


def modernized(family: "Family", config: Mapping[str, Any]) -> dict[str, Any]:
    """A config in today's spelling, each field under the name that tables know."""
    own = dict(config)
    for other, name in family.aliases.items():
        if other in own and own.setdefault(name, own[other]) != (value := own.pop(other)):
            raise ConfigError(
                f"config fields {name} and {other} are one for {family.model_type}: got {own[name]!r} and {value!r}; "
                f"remove one from config.json."
            )
    for name, value in own.items():
        most = _MOST_LAYERS if "layer" in name else _MOST
        if _SIZE.search(name) and isinstance(value, int) and abs(value) >= most:  # what is made of it would never end
            raise ConfigError(f"config field {name} is a size, below {most:,}: got {value}.")
    with understood(f"a field of this {family.model_type} config"):
        return family.modernize(own)


def _read_fields(fields: tuple[Field, ...], config: Mapping[str, Any]) -> dict[str, Any]:
    ours: dict[str, Any] = {}
    for f in fields:
        theirs, names = _names(f.theirs), _names(f.ours)
        defaults = f.default if len(theirs) > 1 else (f.default,)
        given = [config.get(name, default) for name, default in zip(theirs, defaults, strict=True)]
        with understood(f"config field {' and '.join(theirs)}, {', '.join(map(repr, given))},"):
            values = f.read(*given)
        ours |= dict(zip(names, values if len(names) > 1 else (values,), strict=True))
    return ours


def _write_fields(fields: tuple[Field, ...], ours: Mapping[str, Any]) -> dict[str, Any]:
    theirs: dict[str, Any] = {}
    for f in fields:
        names = _names(f.theirs)
        values = f.write(*(ours[name] for name in _names(f.ours)))
        theirs |= dict(zip(names, values if len(names) > 1 else (values,), strict=True))
    return theirs


def read_config(family: Family, config: Mapping[str, Any]) -> EncoderConfig:
    """The EncoderConfig that a published config stands for.

    Raises:
      ConfigError: a field that could change the computation and is not understood, or has a value that is not.
    """
    config = modernized(family, config)
    must = {name: allowed for name, allowed in (FIXED | family.must).items() if name not in _read_names(family)}
    for name, value in config.items():
        if name in must and name not in family.ignored and value not in must[name]:
            allowed = " or ".join(map(repr, must[name]))
            raise ConfigError(f"config field {name} must be {allowed}: got {value!r}; no other value is understood.")
    for name, value in _unnamed_fields(family, config).items():
        if not (family.is_in_transformers and is_aside(name, config)):
            own_code = ", which the folder's own code (auto_map) may read" if "auto_map" in config else ""
            raise ConfigError(
                f"config field {name} (here {value!r}) is not understood for model_type {family.model_type}{own_code}, "
                f"and may change the computation. If you know it does not, remove it from config.json."
            )
    return from_dict(EncoderConfig, {**family.fixed, **_read_fields(family.fields, config)})


def fields_left_unread(family: Family, config: Mapping[str, Any]) -> list[str]:
    """Names of the fields that no table names, and that `read_config` takes all the same."""
    return sorted(_unnamed_fields(family, modernized(family, config)))


def _read_names(family: Family) -> set[str]:
    fields = [*family.fields, *(f for head in family.heads.values() for f in head.fields)]
    return {name for f in fields for name in _names(f.theirs)}


def _unnamed_fields(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    named = {*_read_names(family), *family.ignored, *family.must, *IGNORED, *FIXED, family.marker}
    return {name: value for name, value in config.items() if name not in named}


def read_head(family: Family, task: str, config: Mapping[str, Any]) -> tuple[HeadConfig, str]:
    """(a task's HeadConfig, how it pools)."""
    head = family.heads[task]
    values = {"transform": True, **head.fixed, **_read_fields(head.fields, modernized(family, config))}
    pooling = values.pop("pooling", "cls")
    if pooling not in POOLINGS:
        raise ConfigError(f"a head pools by {', '.join(POOLINGS)}: config.json says {pooling!r}.")
    return from_dict(HeadConfig, values), pooling


def write_config(
    family: Family,
    config: EncoderConfig,
    task: str | None = None,
    head: HeadConfig | None = None,
    pooling: str = "cls",
    decoder: DecoderConfig | None = None,
) -> dict[str, Any]:
    """The published config of an encoder and, if a task is given, its head or decoder.

    Raises:
      ConfigError: the family cannot say it; the settings that it would change are named.
    """
    theirs = {"model_type": family.model_type, "architectures": [family.base]}
    wanted = settled(config)
    own = dict(vars(config))
    # A family whose heads have a width of their own where nothing is said is told this one's.
    if any(f.ours == "attention_head_dim" and f.default is not None for f in family.fields):
        own["attention_head_dim"] = config.head_dim
    try:
        theirs |= {k: v for k, v in _write_fields(family.fields, own).items() if v is not None}
        theirs |= family.older(theirs)
        got = settled(read_config(family, theirs))
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"a {family.model_type} config cannot say this model: {error}") from None
    if task is not None:
        if task not in family.heads:
            raise ConfigError(f"{family.model_type} has no {task} head; it has {', '.join(family.heads) or 'none'}.")
        theirs["architectures"] = [family.heads[task].architectures[0]]
        head = settled_head(config, task, head or HeadConfig())
        fields = _write_fields(family.heads[task].fields, {**vars(head), "pooling": pooling})
        theirs |= {k: v for k, v in fields.items() if v is not None}
        own_head, own_pooling = read_head(family, task, theirs)
        own_head = settled_head(config, task, own_head)
        reads = [name for name in vars(head) if name != "tied" or task in OF_VOCABULARY]
        wanted |= {f"head.{name}": getattr(head, name) for name in reads}
        got |= {f"head.{name}": getattr(own_head, name) for name in reads}
        if task in POOLED:
            wanted, got = wanted | {"pooling": pooling}, got | {"pooling": own_pooling}
    if decoder is not None:
        if family.write_decoder is None:
            raise ConfigError(f"{family.model_type} has no decoder.")
        theirs |= family.write_decoder(config, decoder)
    if differing := [name for name in wanted if wanted[name] != got.get(name)]:
        listed = ", ".join(f"{name} {wanted[name]} (there {got.get(name)})" for name in differing)
        raise ConfigError(f"a {family.model_type} config cannot say this model: {listed}.")
    return theirs


def settled(config: EncoderConfig) -> dict[str, Any]:
    """What is computed: derived settings in full, and none that nothing reads. Two configs that agree here are one."""
    c = config
    out = {name: value for name, value in vars(c).items() if name not in (*FREE_OF_PARAMETERS, "init_std")}
    drop = ["use_bias", "window", "global_every", "rope_theta", "local_rope_theta"]
    out |= {f"{part}_bias": value for part, value in c.biases._asdict().items()}
    out |= {
        "projection_bias": c.embedding_dim is not None and c.use_bias,
        "num_layer_groups": c.num_layer_groups or c.num_layers,
        "num_kv_heads": c.num_kv_heads or c.num_heads,
        "attention_head_dim": c.head_dim,
        "attention_scale": c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale,
        "embedding_norm": c.norm_placement == "post" if c.embedding_norm is None else c.embedding_norm,
        "windows": c.windows,
    }
    if c.position == "rope":
        out["rope_thetas"] = tuple(c.rope_theta if w is None else c.local_rope_theta or c.rope_theta for w in c.windows)
    if c.position != "learned":
        drop += ["max_length"]
    if c.norm == "rms_norm":
        drop += ["norm_bias"]
    if c.relative_position in ("none", "alibi"):
        drop += ["relative_buckets", "relative_max_distance"]
    if c.relative_position != "disentangled":
        drop += ["disentangled_terms", "share_relative_projections", "relative_norm"]
    if not c.conv_width:
        drop += ["conv_activation"]
    return {name: value for name, value in out.items() if name not in drop}


def settled_head(config: EncoderConfig, task: str, head: HeadConfig) -> HeadConfig:
    """A head with nothing left to its kind."""
    if head.transform is None:
        head = dataclasses.replace(head, transform=task not in WITHOUT_TRANSFORM)
    if not head.transform:
        return head
    kind = (config.activation, True, config.use_bias) if task in OF_VOCABULARY else ("tanh", False, True)
    names = ("activation", "norm", "dense_bias")
    own = {n: d for n, d in zip(names, kind, strict=True) if getattr(head, n) is None}
    return dataclasses.replace(head, **own)


Shapes = Mapping[str, tuple[int, ...]]


class _Tensor(NamedTuple):
    """One tensor of a folder: its names, and where its pieces go (path, index in the stack or None, layout)."""

    names: tuple[str, ...]
    pieces: tuple[tuple[str, int | None, str], ...]
    row: Row


def _tensors(family: Family, task: str | None, shapes: Shapes) -> Iterator[_Tensor]:
    """Every tensor that parameters of these shapes stand for, by full names."""
    head = family.heads[task] if task else None
    prefix = family.prefix if head is None or head.prefix is None else head.prefix
    rows = [(row, prefix, "encoder.") for row in family.rows]
    rows += [(row, prefix, "") for row in family.pooler]
    rows += [(row, "", "") for row in (head.rows if head else ())]
    for row, before, root in rows:
        if row.when is not None and (root + row.when[0] in shapes) != row.when[1]:
            continue
        paths = [(root + path, layout) for path, layout in row.ours]
        stack = paths[0][0].partition(".")[0]  # encoder, or decoder
        has_first = any(path.startswith(f"{stack}.first.") for path in shapes)
        count = 1
        if "{i}" in row.theirs[0]:
            count = has_first + max((shapes[p][0] for p in shapes if p.startswith(f"{stack}.layers.")), default=0)
        for i in range(count):
            pieces = []
            for path, layout in paths:
                index = 0 if path.startswith(f"{stack}.first.") else None
                if path.startswith(f"{stack}.layers."):
                    is_first = has_first and i == 0
                    path, index = path.replace(".layers.", ".first.") if is_first else path, i - has_first * (i > 0)
                if path in shapes:
                    pieces.append((path, index, layout))
            if len(pieces) == len(paths):
                yield _Tensor(tuple(before + name.replace("{i}", str(i)) for name in row.theirs), tuple(pieces), row)


def export_tensors(
    family: Family, task: str | None, params: Mapping[str, np.ndarray], num_heads: int
) -> dict[str, np.ndarray]:
    """A folder's tensors from parameters by path (`encoder.embedding.token`); also gradients, which lie alike."""
    shapes = {path: value.shape for path, value in params.items()}
    out: dict[str, np.ndarray] = {}
    written: set[str] = set()
    for tensor in _tensors(family, task, shapes):
        names = tensor.names if task else [name.removeprefix(family.prefix) for name in tensor.names]
        parts = []
        for path, index, layout in tensor.pieces:
            value = params[path] if index is None else params[path][index]
            parts.append(LAYOUTS[layout].write(value))
            written.add(path)
        whole = _join(parts, tensor.row.split, num_heads)
        out |= dict.fromkeys(names[: tensor.row.num_written], whole)
    if unwritten := sorted(set(params) - written):
        raise ConfigError(f"{family.model_type} has no tensor for {', '.join(unwritten)}.")
    return out


def wrapping(family: Family, names: Iterable[str]) -> str:
    """What some program put before the names of a family's tensors, such as DataParallel's `module.`; "" is nothing.

    It is told by the token embedding's name, which ends each such name.
    """
    token = family.rows[0].theirs
    found = {name.removesuffix(end) for name in names for end in token if name.endswith(end)}
    found = {before.removesuffix(family.prefix) for before in found}
    return found.pop() if len(found) == 1 else ""


def unwrapped(family: Family, tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], str]:
    """(tensors without what all of their names begin with, that beginning)."""
    before = wrapping(family, tensors)
    if not before or not all(name.startswith(before) for name in tensors):
        return dict(tensors), ""
    return {name.removeprefix(before): value for name, value in tensors.items()}, before


def _elsewhere(family: Family, tensors: Mapping[str, np.ndarray]) -> str:
    """Where some names begin with what others lack, nobody but the user knows what the others are."""
    if not (before := wrapping(family, tensors)):
        return ""
    others = sorted(name for name in tensors if not name.startswith(before))
    return (
        f" Names under {before!r} look like them, but {others[0]} is not there. Write the file again without it: "
        f"{{name.removeprefix({before!r}): tensor for name, tensor in tensors.items()}}."
    )


class Imported(NamedTuple):
    params: dict[str, np.ndarray]
    """By path, float32: all of the encoder's, and those of heads that the tensors had."""
    unused: list[str]
    """Names of tensors that no parameter needs."""


def plain_name(family: Family, name: str) -> str:
    """A tensor's name without the family's prefix, in today's spelling."""
    plain = name.removeprefix(family.prefix)
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", plain))


def with_table(
    family: Family, published: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The tensors with the token embedding, where a tied head's name for it is the only one that is there. Tables of
    encoder-decoders have several names, and logits often a table of their own: `arranged` has those."""
    if family.decoder is not None or published.get("tie_word_embeddings", True) is False:
        return dict(tensors)
    table, names = family.rows[0].theirs[0], {plain_name(family, name): name for name in tensors}
    for task, head in family.heads.items():
        if table not in names and head.tied in names and getattr(read_head(family, task, published)[0], "tied", False):
            return {**tensors, family.prefix + table: tensors[names[head.tied]]}
    return dict(tensors)


def import_tensors(
    family: Family, task: str | None, tensors: Mapping[str, np.ndarray], shapes: Shapes, num_heads: int
) -> Imported:
    """Parameters of these shapes from a folder's tensors. Names may have the family's prefix or not, and may be old.

    Raises:
      ConfigError: a tensor of the encoder that is missing, with the prefix under which it lies if it does; one of
        another shape than the config says, with its name and both; one of whole numbers; a copy that is none; two names
        of one tensor.
    """
    by_name: dict[str, str] = {}
    for name in tensors:
        plain = plain_name(family, name)
        if plain in by_name:
            raise ConfigError(f"tensors {by_name[plain]} and {name} are two of one meaning; leave one out.")
        by_name[plain] = name
    params: dict[str, np.ndarray] = {}
    missing: list[str] = []
    used: set[str] = set()
    for tensor in _tensors(family, task, shapes):
        found = [name for name in (n.removeprefix(family.prefix) for n in tensor.names) if name in by_name]
        used |= set(found)
        if not found:
            missing += [tensor.names[0]] if tensor.pieces[0][0].startswith(("encoder.", "decoder.")) else []
            continue
        value = np.asarray(tensors[by_name[found[0]]])
        if value.dtype.kind in "iub":
            raise ConfigError(
                f"tensor {by_name[found[0]]} must hold floating-point numbers: it holds {value.dtype}. Quantized "
                f"weights are not read: take the folder that they were made from."
            )
        # Of a bias that is written twice the first is used; tables and kernels that differ are two meanings.
        for other in found[1:] if tensor.row.num_written == 1 else ():
            if not np.array_equal(value, tensors[by_name[other]]):
                raise ConfigError(
                    f"tensors {by_name[found[0]]} and {by_name[other]} are two of one meaning, and differ; leave one "
                    f"out."
                )
        piece_shapes = [shapes[path] if index is None else shapes[path][1:] for path, index, _ in tensor.pieces]
        layouts = [LAYOUTS[layout] for _, _, layout in tensor.pieces]
        blanks = [lay.write(np.broadcast_to(np.int8(0), s)) for lay, s in zip(layouts, piece_shapes, strict=True)]
        expected = _join(blanks, tensor.row.split, num_heads).shape
        if value.shape != expected:
            raise ConfigError(
                f"tensor {by_name[found[0]]} must have shape {list(expected)}, says config.json: found "
                f"{list(value.shape)}."
            )
        parts = _split(value, len(layouts), tensor.row.split, num_heads)
        for part, layout, (path, index, _) in zip(parts, layouts, tensor.pieces, strict=True):
            shape = shapes[path] if index is None else shapes[path][1:]
            if index is None:
                params[path] = layout.read(part, shape).astype(np.float32)
            else:
                stack = params.setdefault(path, np.empty(shapes[path], np.float32))
                stack[index] = layout.read(part, shape)
    if missing:
        raise ConfigError(
            f"the encoder needs tensors that are missing: {', '.join(missing[:8])}.{_elsewhere(family, tensors)}"
        )
    tied = family.heads[task].tied if task else None
    if tied in by_name and tied not in used:
        if not np.array_equal(tensors[by_name[tied]], tensors[by_name[family.rows[0].theirs[0]]]):
            raise ConfigError(
                f"tensor {by_name[tied]} must equal the token embedding, for config.json ties them: it differs. "
                "Set tie_word_embeddings to false to use it."
            )
        used.add(tied)
    return Imported(params, sorted(by_name[name] for name in set(by_name) - used))
