"""Runs of published folders, and published folders of runs."""

import dataclasses
import json
import logging
import pathlib
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from flax_encoder.config import ConfigError, DataConfig, HeadConfig, RunConfig, from_dict, to_dict
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.tokenizer import TextTokenizer
from flax_encoder.families import FAMILIES, find_family
from flax_encoder.families.mapping import Family, export_tensors, write_config
from flax_encoder.published.load import TOKENIZER_FILES, Pretrained, Task, is_published, load_pretrained, read_json
from flax_encoder.nn.partition import abstract_model, flatten, unflatten
from flax_encoder.tasks import OBJECTIVES
from flax_encoder.runs.loaded import LoadedRun, load_run, model_factory
from flax_encoder.training.checkpoint import Checkpoints, read_params, read_run
from flax_encoder.training.run_log import write_atomically
from flax_encoder.training.step import TrainState
from flax_encoder.published.weights import write_weights

logger = logging.getLogger(__name__)

ONE_OF_SEVERAL = "single_label_classification"  # of transformers' problem types


def as_run(loaded: Pretrained) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what a checkpoint says of its run, the parameters that the folder had), as `read_run` and `read_params` give.

    A folder whose head is of no objective is a masked_lm run without its head.

    Raises:
      DataError: no tokenizer, without which there is no run.
    """
    if loaded.tokenizer is None:
        raise DataError(f"a run needs a tokenizer, and the folder has none: looked for {', '.join(TOKENIZER_FILES)}.")
    keeps_head = loaded.task in OBJECTIVES
    limit = loaded.config.max_length if loaded.config.position == "learned" else DataConfig.row_length
    config = RunConfig(
        objective=loaded.task if keeps_head else "masked_lm",
        model=loaded.config,
        head=loaded.head if keeps_head else HeadConfig(),
        pooling=loaded.pooling,
        data=DataConfig(row_length=min(DataConfig.row_length, limit)),
    )
    params = flatten(nnx.to_pure_dict(nnx.split(loaded.model)[1]))
    kept = ("encoder.", "head.") if keeps_head else ("encoder.",)
    params = {path: value for path, value in params.items() if path.startswith(kept) and path not in loaded.fresh}
    # Names of classes that a head made anew has are nobody's.
    label_names = loaded.label_names if "head.out.kernel" in params else None
    run = {"config": to_dict(config), "tokenizer": loaded.tokenizer.json, "label_names": label_names, "step": 0}
    return run, unflatten(params)


def read_origin(path: str | pathlib.Path, task: Task) -> tuple[dict[str, Any], Any]:
    """(run, parameters) of what `init_from` names: a run folder, a checkpoint or a published folder.

    `task` is the head to load of a published folder, as far as it has one; a run folder has its own.
    """
    path = pathlib.Path(path)
    if not is_published(path):
        return read_run(path), read_params(path)
    family = find_family(read_json(path / "config.json"))
    return as_run(load_pretrained(path, task=task if task in family.heads else None))


def open_model(path: str | pathlib.Path) -> LoadedRun:
    """A run folder, a checkpoint or a published folder, ready to be asked.

    Raises:
      DataError: a published folder without the head of a run's objective, or whose classifier does not choose one of
        several labels.
    """
    path = pathlib.Path(path)
    if not is_published(path):
        return load_run(path)
    loaded = load_pretrained(path)
    if loaded.task not in OBJECTIVES or loaded.fresh:
        raise DataError(
            f"{path} must have the head of a {' or '.join(OBJECTIVES)} run to be asked: it has {loaded.task or 'none'}"
            f"{', which the weights lack' if loaded.fresh else ''}."
        )
    kind = read_json(path / "config.json").get("problem_type")
    if loaded.task == "classification" and (len(loaded.label_names) < 2 or kind not in (None, ONE_OF_SEVERAL)):
        raise DataError(
            f"{path} must choose one of several labels to be asked: it has {len(loaded.label_names)}, and problem_type "
            f"{kind}. load_pretrained gives its logits."
        )
    return _loaded_run(loaded)


def _loaded_run(loaded: Pretrained) -> LoadedRun:
    """What is missing of the head is made anew; a classifier, whose classes nobody knows then, is left out."""
    if loaded.task == "classification" and "head.out.kernel" in loaded.fresh:
        loaded = dataclasses.replace(loaded, task=None)
    run, params = as_run(loaded)
    config = from_dict(RunConfig, run["config"])
    make_model = model_factory(config, run["label_names"])
    graphdef, abstract = abstract_model(make_model)
    own = flatten(params)
    if fresh := [path for path in flatten(nnx.to_pure_dict(abstract)) if path not in own]:
        made = flatten(nnx.to_pure_dict(nnx.split(make_model())[1]))
        params = unflatten(own | {path: made[path] for path in fresh})
        logger.warning("a %s run needs %s: made anew", config.objective, ", ".join(fresh))
    return LoadedRun(nnx.merge(graphdef, params), config, loaded.tokenizer, run["label_names"], 0)


def import_folder(folder: str | pathlib.Path, out: str | pathlib.Path) -> None:
    """Make a run folder of a published one: what is trained from, asked or exported like any other.

    A folder without a masked_lm or classification head gets a new masked_lm one, which is named in a log line.

    Raises:
      ConfigError: `out` has something in it already. And whatever `load_pretrained` raises.
    """
    out = pathlib.Path(out)
    _refuse_filled(out)
    model = _loaded_run(load_pretrained(folder))
    config = to_dict(dataclasses.replace(model.config, run_dir=str(out)))
    settings = {"config": config, "tokenizer": model.tokenizer.json, "label_names": model.label_names}
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "tokenizer.json", model.tokenizer.json)
    write_atomically(out / "config.json", json.dumps(config, indent=1) + "\n")
    with Checkpoints(out, keep=1) as checkpoints:
        params = nnx.to_pure_dict(nnx.split(model.model)[1])
        checkpoints.save(TrainState(jnp.zeros((), jnp.int32), params, {}), 0, settings)


def export_run(
    run_dir: str | pathlib.Path,
    out: str | pathlib.Path,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    model_type: str | None = None,
    encoder_only: bool = False,
) -> str:
    """Write a run, a checkpoint or a published folder as one that transformers opens. Returns its architecture there.

    Args:
      dtype: of the weights.
      model_type: the family to write it as; None takes the first that can say it.
      encoder_only: leave out the head.

    Raises:
      ConfigError: no published family can say this model, with what keeps the given, or the nearest, from it; `out`
        has something in it already.
    """
    out = pathlib.Path(out)
    _refuse_filled(out)
    is_bare = encoder_only and is_published(run_dir)
    run = _loaded_run(load_pretrained(run_dir)) if is_bare else open_model(run_dir)
    config, task = run.config, None if encoder_only else run.config.objective
    family, published = _published_config(config, model_type, task)
    pad = run.tokenizer.special("pad")
    if published.setdefault("pad_token_id", pad) != pad:
        raise ConfigError(
            f"{family.model_type} counts positions from its padding's id, {published['pad_token_id']}: the tokenizer's "
            f"is {pad}."
        )
    names = run.label_names or []
    if names and task:
        published |= {
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
        }
    params = flatten(nnx.to_pure_dict(nnx.split(run.model)[1]))
    params = {path: np.asarray(x) for path, x in params.items() if task or path.startswith("encoder.")}
    tensors = export_tensors(family, task, params, config.model.num_heads)
    write_weights(out, tensors, dtype)
    for name, value in {"config.json": published | {"dtype": dtype}, **_tokenizer_files(run.tokenizer, config)}.items():
        write_atomically(out / name, value if isinstance(value, str) else json.dumps(value, indent=1) + "\n")
    return published["architectures"][0]


def _published_config(config: RunConfig, model_type: str | None, task: str | None) -> tuple[Family, dict[str, Any]]:
    candidates = [f for f in FAMILIES if model_type in (None, f.model_type)]
    if not candidates:
        known = ", ".join(sorted({f.model_type for f in FAMILIES}))
        raise ConfigError(f"model_type {model_type!r} is not known; known are {known}.")
    reasons = []
    for family in candidates:
        if model_type is None and task is not None and task not in family.heads:
            continue
        if not family.is_in_transformers:
            reasons.append(f"transformers has no {family.base}: it can read no folder of {family.model_type}.")
            continue
        try:
            return family, write_config(family, config.model, task, config.head, config.pooling)
        except ConfigError as error:
            reasons.append(str(error))
    nearest = min(reasons, key=lambda reason: reason.count("(there ") or len(reasons), default="none")
    raise ConfigError(
        f"no published family can say this model; nearest: {nearest}" if model_type is None else reasons[0]
    )


def _tokenizer_files(tokenizer: TextTokenizer, config: RunConfig) -> dict[str, Any]:
    """tokenizer.json, which puts special tokens around texts as runs do, and what transformers asks beside it."""
    roles = {"pad": "pad", "unk": "unknown", "cls": "first", "sep": "last", "mask": "mask"}
    named = {f"{theirs}_token": tokenizer.token(tokenizer.special(ours)) for theirs, ours in roles.items()}
    has_types = config.model.num_token_types >= 2
    text = tokenizer.json
    if json.loads(text).get("post_processor") is None:
        first, last = named["cls_token"], named["sep_token"]
        second = ":1" if has_types else ""
        own = Tokenizer.from_str(text)
        own.post_processor = TemplateProcessing(
            single=f"{first} $A {last}",
            pair=f"{first} $A {last} $B{second} {last}{second}",
            special_tokens=[(first, tokenizer.special("first")), (last, tokenizer.special("last"))],
        )
        text = own.to_str(pretty=True)
    limit = {"model_max_length": config.model.max_length} if config.model.position == "learned" else {}
    # By default some versions make token types for models that take none, and others none for those that do.
    inputs = ["input_ids", *["token_type_ids"] * has_types, "attention_mask"]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs}
    return {
        "tokenizer.json": text,
        "tokenizer_config.json": settings | named | limit,
        "special_tokens_map.json": named,
    }


def _refuse_filled(folder: pathlib.Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} must be empty or new: it has {sorted(folder.iterdir())[0].name}.")
