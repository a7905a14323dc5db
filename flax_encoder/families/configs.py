"""Published configs to ours and back, by the tables of a family.

What a table says of a config is proven at every export by reading the result back.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from flax_encoder.config import (
    FREE_OF_PARAMETERS,
    ConfigError,
    DecoderConfig,
    EncoderConfig,
    HeadConfig,
    from_dict,
)
from flax_encoder.families.family import (
    OF_VOCABULARY,
    POOLED,
    POOLINGS,
    WITHOUT_TRANSFORM,
    Family,
    Field,
    understood,
)
from flax_encoder.families.fields import FIXED, IGNORED, is_aside


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


_SIZE = re.compile(r"(^|_)(size|dim|layers|heads|groups|embeddings)$|^[dn]_")  # names of fields that are sizes
_MOST, _MOST_LAYERS = 2**31, 10_000


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
