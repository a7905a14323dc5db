"""Writes what `load_pretrained` gives as a folder again: config.json, weights and what belongs to them."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from flax import nnx

from flax_encoder.config import ConfigError, DecoderConfig
from flax_encoder.families.configs import write_config
from flax_encoder.families.family import Head
from flax_encoder.families.tensors import export_tensors
from flax_encoder.nn.partition import flatten
from flax_encoder.published.generation_settings import FILE as GENERATION_FILE
from flax_encoder.published.model import Pretrained
from flax_encoder.published.weights import write_weights


def write_pretrained(
    loaded: Pretrained, out: str | pathlib.Path, dtype: Literal["float32", "bfloat16", "float16"] = "float32"
) -> str:
    """Write a folder that transformers opens with the same numbers: the encoder, its pooler, its head or its decoder.

    The tokenizer is written as tokenizer.json. Weights come last: a folder that has them is whole.

    Args:
      dtype: of the weights.

    Returns the architecture's name.

    Raises:
      ConfigError: transformers has no such family, or `out` has something in it. WeightsError: a number is too large
        for `dtype`.
    """
    out = pathlib.Path(out)
    if not loaded.family.is_in_transformers:
        raise ConfigError(
            f"transformers has no {loaded.family.base}: it can read no folder of {loaded.family.model_type}."
        )
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} must be empty or new: it has {sorted(out.iterdir())[0].name}.")
    config = published_config(loaded)
    params = {path: np.asarray(x) for path, x in flatten(nnx.to_pure_dict(nnx.split(loaded.model)[1])).items()}
    tensors = export_tensors(loaded.family, loaded.task, params, loaded.config.num_heads)
    if loaded.decoder is not None:
        tensors |= copied_table(loaded.family.heads[loaded.task], config, loaded.decoder, params)
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {"config.json": config | {"dtype": dtype}}
    if loaded.settings is not None:
        files[GENERATION_FILE] = dict(loaded.settings.given)
    for name, value in files.items():
        (out / name).write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    if loaded.tokenizer is not None:
        (out / "tokenizer.json").write_text(loaded.tokenizer.json, "utf-8")
    write_weights(out, tensors, dtype)
    return config["architectures"][0]


def copied_table(
    head: Head, config: Mapping[str, Any], decoder: DecoderConfig, params: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The table of logits that a config says to be one of its own where it is the embedding's, so one that is equal."""
    if not decoder.tied or config["tie_word_embeddings"]:
        return {}
    assert head.tied is not None
    return {head.tied: params["encoder.embedding.token"]}


def published_config(loaded: Pretrained) -> dict[str, Any]:
    """The config.json of a loaded folder, of the fields that compute, the labels and the ids.

    Raises:
      ConfigError: the family cannot say it.
    """
    config = write_config(
        loaded.family, loaded.config, loaded.task, loaded.head, loaded.pooling, decoder=loaded.decoder
    )
    config.setdefault("pad_token_id", loaded.pad_id)
    if loaded.settings is not None:
        meant = loaded.settings.meant
        config |= {"decoder_start_token_id": meant["start_id"], "eos_token_id": meant["end_id"]}
    if loaded.problem_type is not None:
        config["problem_type"] = loaded.problem_type
    if loaded.task is not None and loaded.decoder is None and loaded.family.heads[loaded.task].num_outputs is None:
        names = loaded.label_names
        if names is None and loaded.task != "masked_lm":
            names = [f"LABEL_{i}" for i in range(loaded.num_outputs)]
        if names is not None:
            config["id2label"] = {str(i): name for i, name in enumerate(names)}
            config["label2id"] = {name: i for i, name in enumerate(names)}
    return config
