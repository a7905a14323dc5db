"""Families of encoders as data: presets by name, and what their published folders are called.

A family that is a mix of known parts is one more table; none has modules of its own.
"""

from collections.abc import Mapping
from typing import Any

from flax_encoder.config import ConfigError, EncoderConfig
from flax_encoder.families import bert, classic, deberta, modern, t5
from flax_encoder.families.family import Family

FAMILIES: tuple[Family, ...] = (
    bert.BERT,
    bert.MOSAIC_BERT,
    bert.ROBERTA,
    bert.XLM_ROBERTA,
    bert.ELECTRA,
    bert.ALBERT,
    bert.DISTILBERT,
    deberta.DEBERTA,
    t5.T5,
    modern.MODERNBERT,
    modern.EUROBERT,
    modern.NEOBERT,
)
PRESETS: dict[str, EncoderConfig] = {name: preset for family in FAMILIES for name, preset in family.presets.items()} | {
    "crammed_bert": modern.crammed_bert,
    "transformer_base": classic.transformer_base,
    "bilstm": classic.bilstm,
}


def preset(name: str) -> EncoderConfig:
    """A published architecture by its name, such as bert_base.

    Raises:
      ConfigError: there is none of that name; the message lists the known.

    Example:
      >>> preset("bert_base").num_layers
      12
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}; known are {', '.join(PRESETS)}.")
    return PRESETS[name]


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a published config.

    Raises:
      ConfigError: none; the message lists the known.
    """
    model_type = config.get("model_type")
    found = [f for f in FAMILIES if f.model_type == model_type and (f.marker is None or f.marker in config)]
    if not found:
        known = ", ".join(sorted({f.model_type for f in FAMILIES}))
        raise ConfigError(f"config.json has model_type {model_type!r}, which is not known; known are {known}.")
    return max(found, key=lambda f: f.marker is not None)
