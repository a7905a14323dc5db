"""How a folder makes vectors of texts: what a sentence-transformers folder or a run says of it, written down too."""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from flax_encoder.config import ConfigError, RunConfig
from flax_encoder.config.model import PoolingMode
from flax_encoder.data.tokens.tokenizer_files import read_tokenizer
from flax_encoder.families import find_family
from flax_encoder.families.configs import read_config
from flax_encoder.published.load import is_published, read_json
from flax_encoder.published.sentence_transformers import (
    NORMALIZE,
    POOLING_MODES,
    SentenceSettings,
    is_sentence_folder,
    read_sentence_settings,
    write_sentence_settings,
)
from flax_encoder.runs.record import read_record
from flax_encoder.tasks import find_task


def settings_of_run(config: RunConfig) -> SentenceSettings | None:
    """What a run that was trained to make vectors says of them; None of any other."""
    make = find_task(config.objective).vectors
    if make is None:
        return None
    made = make(config)
    return SentenceSettings((made.pooling,), layers=(NORMALIZE,), prompts=made.prompts, similarity_fn_name="cosine")


def with_given(settings: SentenceSettings, pooling: Any, normalize: bool | None) -> SentenceSettings:
    """The settings with what is given instead of what they say, as far as anything is."""
    if pooling is not None:
        is_one = isinstance(pooling, str) or not isinstance(pooling, Iterable)
        modes = tuple(map(str, (pooling,) if is_one else pooling))
        if not modes or not {*modes} <= {*POOLING_MODES}:
            raise ConfigError(f"pooling must be of {', '.join(POOLING_MODES)}: got {', '.join(modes) or 'none'}.")
        settings = dataclasses.replace(settings, pooling=modes)
    if normalize is not None:
        layers = list(settings.layers)
        while layers and layers[-1] == NORMALIZE:
            layers.pop()
        settings = dataclasses.replace(settings, layers=(*layers, NORMALIZE) if normalize else tuple(layers))
    return settings


def check_layers(folder: pathlib.Path, settings: SentenceSettings, embed_dim: int) -> None:
    width = embed_dim * len(settings.pooling)
    for layer in settings.layers:
        axes = {name: array.shape[0] for name, array in layer.arrays.items() if name != "bias" or layer.kind != "Dense"}
        if {*axes.values()} - {width}:
            raise ConfigError(f"{folder}: {layer.kind} must take vectors of {width}, which come before it: got {axes}.")
        width = layer.arrays["kernel"].shape[1] if layer.kind == "Dense" else width


def most_positions(folder: pathlib.Path) -> int | None:
    """How long a published folder's config says that texts may be, of any kind of positions."""
    count = read_json(folder / "config.json").get("max_position_embeddings")
    return count if type(count) is int and count > 0 else None


def own_settings(folder: str | pathlib.Path) -> SentenceSettings | None:
    """What a sentence-transformers folder says of its vectors, or a run that learned to make them; None of others."""
    folder = pathlib.Path(folder)
    if is_sentence_folder(folder):
        return read_sentence_settings(folder)
    return None if is_published(folder) else settings_of_run(read_record(folder).config)


def write_sentence_files(
    source: str | pathlib.Path,
    out: str | pathlib.Path,
    pooling: PoolingMode | Sequence[PoolingMode] | None = None,
    normalize: bool | None = None,
    max_tokens: int | None = None,
) -> None:
    """Make `out`, which has the encoder of `source`, a sentence-transformers folder: with what is given, or else what
    `source` says (`own_settings`), or its length.

    Raises:
      ConfigError: no pooling is given and `source` says nothing of vectors.
    """
    source = pathlib.Path(source)
    settings = own_settings(source)
    if settings is None and pooling is None:
        raise ConfigError(f"{source} does not say how to pool: give cls or mean.")
    settings = settings or SentenceSettings()
    if is_published(inner := source / settings.encoder_path):
        published = read_json(inner / "config.json")
        config = read_config(find_family(published), published)
        embed_dim, limits = config.embed_dim, [read_tokenizer(inner).max_tokens, most_positions(inner)]
        limits += [config.max_length] if config.position == "learned" else []
    else:
        record = read_record(source)
        embed_dim = record.config.model.embed_dim
        limits = [record.tokenizer.max_tokens or record.config.row_lengths[-1]]
    limit = max_tokens or settings.max_tokens or min([n for n in limits if n is not None], default=None)
    settings = with_given(dataclasses.replace(settings, max_tokens=limit), pooling, normalize)
    check_layers(source, settings, embed_dim)
    write_sentence_settings(out, settings, embed_dim)
