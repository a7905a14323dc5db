"""Turns published folders into runs, and runs into published folders."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_encoder.config import ConfigError, RunConfig, to_dict
from flax_encoder.data.tokens.tokenizer import TextTokenizer
from flax_encoder.data.tokens.tokenizer_files import published_files
from flax_encoder.families.tensors import export_tensors
from flax_encoder.nn.partition import flatten
from flax_encoder.published.generation_settings import FILE as GENERATION_FILE
from flax_encoder.published.generation_settings import written_settings
from flax_encoder.published.load import TOKENIZER_FILES, is_published, load_pretrained
from flax_encoder.published.tasks import Task
from flax_encoder.published.weights import write_weights
from flax_encoder.published.write import copied_table, write_pretrained
from flax_encoder.runs.as_published import generation_said, has_decoder, published_config
from flax_encoder.runs.load import from_pretrained, load, objective_of
from flax_encoder.runs.record import RunRecord
from flax_encoder.training.checkpoint import Checkpoints
from flax_encoder.training.run_log import write_atomically
from flax_encoder.training.step import TrainState

# What transformers reads beside a tokenizer's own file.
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")


def import_folder(
    folder: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    head: Task | Literal["none"] | None = None,
    allow_unused: bool = False,
) -> None:
    """Turn a published folder into a run folder, which can be trained from, queried or exported like any other.

    A folder without a head gets a new masked_lm head, which a log line names.

    Raises:
      ConfigError: `out` is not empty; or no objective trains the folder's head. And whatever `load_pretrained` raises.

    Example:
      >>> import_folder("bert", "runs/from-bert", head="none")
      >>> load("runs/from-bert").step
      0
    """
    out = pathlib.Path(out)
    refuse_filled(out)
    if is_published(folder):
        loaded = load_pretrained(folder, task=head, allow_unused=allow_unused, seed=None)
        objective = objective_of(loaded, pathlib.Path(folder))
        if loaded.task is not None and objective is None:
            raise ConfigError(
                f"a run holds the head of its objective, and none has the {loaded.task} head of {folder}: --task none "
                f"imports the encoder without it; export {folder} OUT writes it whole."
            )
        run = from_pretrained(loaded, objective)
    else:
        run = load(folder)
    record = RunRecord(dataclasses.replace(run.config, run_dir=str(out)), run.tokenizer, run.label_names)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "tokenizer.json", run.tokenizer.json)
    write_atomically(out / "config.json", json.dumps(to_dict(record.config), indent=1) + "\n")
    with Checkpoints(out, keep=1) as checkpoints:
        params = nnx.to_pure_dict(nnx.split(run.model)[1])
        checkpoints.save(TrainState(jnp.zeros((), jnp.int32), params, {}), 0, record.to_json())


def export_run(
    run_dir: str | pathlib.Path,
    out: str | pathlib.Path,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    model_type: str | None = None,
    encoder_only: bool = False,
    head: Task | Literal["none"] | None = None,
    allow_unused: bool = False,
    part: str | None = None,
) -> str:
    """Write a run, a checkpoint or a published folder as a folder that transformers opens. Returns the name of its
    architecture in transformers.

    Args:
      dtype: dtype of the weights.
      model_type: the family to write; None takes the first that can express the model.
      encoder_only: leave out the head.
      part: the model to write, of a run that trains several, such as "generator" of replaced_token_detection; None is
        the encoder.
      head, allow_unused: for a published folder, as in `load`. All that is loaded is written.

    Raises:
      ConfigError: no published family can express this model (the message says why model_type, or the nearest family,
        cannot); `out` is not empty; or the folder lacks the requested head.

    Example:
      >>> export_run("bert", "bert-encoder", encoder_only=True)
      'BertModel'
    """
    out = pathlib.Path(out)
    refuse_filled(out)
    if is_published(run_dir):
        loaded = load_pretrained(run_dir, task="none" if encoder_only else head, allow_unused=allow_unused)
        if loaded.fresh:
            raise ConfigError(
                f"{run_dir} has no {', '.join(loaded.fresh)} of its {loaded.task} head: --task none exports the "
                f"encoder without it."
            )
        if model_type in (None, loaded.family.model_type) and loaded.family.is_in_transformers:
            architecture = write_pretrained(loaded, out, dtype)
            for name in (*TOKENIZER_FILES, *TOKENIZER_SETTINGS):
                if (pathlib.Path(run_dir) / name).exists():
                    shutil.copy(pathlib.Path(run_dir) / name, out)
            return architecture
    run = load(run_dir, head=head, allow_unused=allow_unused).part(part)
    config, task = run.config, None if encoder_only else run.task.head
    family, published, query_factor = published_config(config, model_type, task)
    pad = run.tokenizer.special("pad")
    if published.setdefault("pad_token_id", pad) != pad:
        raise ConfigError(
            f"{family.model_type} counts positions from its padding's id, {published['pad_token_id']}: the tokenizer's "
            f"is {pad}."
        )
    params = flatten(nnx.to_pure_dict(nnx.split(run.model)[1]))
    names = run.label_names or []
    if task and run.task.problem_type:
        published["problem_type"] = run.task.problem_type
        names = names or [f"LABEL_{i}" for i in range(params["head.out.kernel"].shape[-1])]
    if names and task:
        published |= {
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
        }
    params = {path: np.asarray(x) for path, x in params.items() if task or path.startswith("encoder.")}
    if query_factor != 1.0:
        params = {path: x * np.float32(query_factor) if ".query." in path else x for path, x in params.items()}
    tensors = export_tensors(family, task, params, config.model.num_heads)
    files = _tokenizer_files(run.tokenizer, config)
    if has_decoder(task):
        tensors |= copied_table(family.heads[task], published, config.decoder, params)
        ids = {"decoder_start_token_id": config.decoder.start_id, "eos_token_id": config.decoder.end_id}
        published |= {name: value for name, value in ids.items() if value is not None}
        files[GENERATION_FILE] = written_settings(generation_said(config), config.decoder, pad)
    write_weights(out, tensors, dtype)
    for name, value in {"config.json": published | {"dtype": dtype}, **files}.items():
        write_atomically(out / name, value if isinstance(value, str) else json.dumps(value, indent=1) + "\n")
    return published["architectures"][0]


def _tokenizer_files(tokenizer: TextTokenizer, config: RunConfig) -> dict[str, Any]:
    """tokenizer.json, which puts special tokens around texts as runs do, and what transformers asks beside it."""
    limit = config.model.max_length if config.model.position == "learned" else None
    return published_files(tokenizer, max_tokens=limit, has_types=config.model.num_token_types >= 2)


def refuse_filled(folder: pathlib.Path) -> None:
    """Raise ConfigError if a folder has something in it."""
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} must be empty or new: it has {sorted(folder.iterdir())[0].name}.")
