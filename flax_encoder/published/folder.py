"""Tells what a folder is before it is read: a published model, one of our runs, or neither."""

import json
import pathlib
from typing import Any

from flax_encoder.config import ConfigError
from flax_encoder.data.tokens.tokenizer_files import SENTENCEPIECE_FILES
from flax_encoder.published.weights import FILES

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", *SENTENCEPIECE_FILES)
# What only published folders have; a run's config.json has no model_type.
_PUBLISHED_FILES = (
    *FILES, "modules.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"
)  # fmt: skip


def is_published(path: str | pathlib.Path) -> bool:
    """Whether a path is to be read as a published model rather than as a run: also one that lacks a file or a field of
    a published folder, or that is not there at all, of which `load_pretrained` says so.
    """
    path = pathlib.Path(path)
    if (path / "checkpoints").is_dir() or (path / "params").is_dir():
        return False
    if not path.is_dir():
        return True
    try:
        config = read_json(path / "config.json")
    except ConfigError:
        config = {}
    # A run that has written its settings, and no checkpoint yet, is a run.
    is_run = "model_type" not in config and {"objective", "task"} & config.keys() and "model" in config
    return not is_run and ("model_type" in config or any((path / name).exists() for name in _PUBLISHED_FILES))


def read_published_config(folder: pathlib.Path) -> dict[str, Any]:
    """config.json of a published folder, which has a model_type.

    Raises:
      ConfigError: no folder, no file, no JSON or no model_type, with the way to a folder that has them.
    """
    if not folder.is_dir():
        is_file = f"{folder} is a file; give the folder that it is in" if folder.exists() else f"no folder at {folder}"
        raise ConfigError(
            f"{is_file}. Give a run folder, a checkpoint or a folder with config.json, weights and a tokenizer."
            f"{_fetch(folder)}"
        )
    if (folder / "checkpoints").is_dir():
        raise ConfigError(f"{folder} is a run folder, which load_run opens; `export` makes a published one of it.")
    if not (folder / "config.json").exists():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ConfigError(
            f"no published model in {folder}: it must have config.json, which says what the weights are; there is "
            f"{there}. Fetch the whole folder, or give the one below it that has config.json."
        )
    config = read_json(folder / "config.json")
    if type(config.get("model_type")) is not str:
        raise ConfigError(
            f"{folder / 'config.json'} must name its model_type: got {config.get('model_type')!r}. Add what the "
            f'weights are, such as "model_type": "bert".'
        )
    return config


def _fetch(folder: pathlib.Path) -> str:
    """How to get what may be a name on Hugging Face's hub: NAME or OWNER/NAME."""
    if folder.is_absolute() or len(folder.parts) not in (1, 2) or ".." in folder.parts:
        return ""
    return (
        f" If {folder} is a model's name on huggingface.co, fetch it first: `hf download {folder} --local-dir "
        f"{folder.name}` (pip install huggingface_hub), then give {folder.name}."
    )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ConfigError: no such file, no JSON, or no object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"no published model in {path.parent}: {path.name}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must be a JSON object: got {type(value).__name__}.")
    return value
