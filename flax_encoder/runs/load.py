"""The one door to every folder that holds a model: a run, one of its checkpoints, or a published folder."""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from flax import nnx

from flax_encoder.config import ConfigError, DataConfig, GenerationConfig, HeadConfig, RunConfig, differences
from flax_encoder.data.sources.records import DataError, Say
from flax_encoder.data.tokens.tokenizer import TextTokenizer
from flax_encoder.families import find_family
from flax_encoder.nn.lora import assembled
from flax_encoder.nn.partition import abstract_model, flatten, unflatten
from flax_encoder.published.generation_settings import DRAWN_TOP_K, Settings
from flax_encoder.published.load import (
    TOKENIZER_FILES,
    is_published,
    load_pretrained,
    named_heads,
    read_published_config,
)
from flax_encoder.published.model import Pretrained
from flax_encoder.published.sentence_transformers import (
    NORMALIZE,
    encoder_folder,
    is_sentence_folder,
    read_sentence_settings,
)
from flax_encoder.published.tasks import Task
from flax_encoder.runs.best import best_checkpoint, best_evaluation, read_evaluations
from flax_encoder.runs.elsewhere import local_folder
from flax_encoder.runs.loaded import LoadedRun, model_factory
from flax_encoder.runs.record import RunRecord, read_record
from flax_encoder.tasks import TASKS, find_task, is_setting_read
from flax_encoder.training.checkpoint import checkpoint_steps, read_params

logger = logging.getLogger(__name__)

_LONGEST_SOURCE = 512  # tokens that an encoder-decoder reads whose folder does not say


def load(
    path: str | pathlib.Path,
    *,
    objective: str | None = None,
    head: Task | Literal["none"] | None = None,
    allow_unused: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> LoadedRun:
    """Open a run folder (its newest checkpoint, or its best with keep_best), one checkpoint, or a published folder, to
    query it, export it, embed with it or train from it. The folder may be at a URL, such as gs://BUCKET/RUN.

    Args:
      objective: the task to open a published folder for; None is what its config.json says. A run has its own, and is
        opened for no other.
      head: the head to load from a published folder if there is no objective; "none" loads only the encoder.
      allow_unused: leave out tensors of a published folder that no part of the model reads, rather than refuse them.
      dtype: dtype of the operands of matrix products; None is the model's own. Parameters stay float32.

    Raises:
      CheckpointError: there is no checkpoint, or it cannot be read.
      ConfigError, WeightsError: as `load_pretrained`; or the objective is unknown, or needs another head than the
        folder's.
      DataError: a published folder has no tokenizer.

    Example:
      >>> run = load("runs/movie")
      >>> [answer["label"] in run.label_names for answer in run.predict(["a b", "c d"])]
      [True, True]
    """
    path = local_folder(path)
    given, path = path, encoder_folder(path)
    head = head if objective is None else find_task(objective).head
    if not is_published(path):
        run = load_run(path)
        if objective not in (None, run.config.objective):
            raise _another(str(given), f"is a run of {run.config.objective}", objective)
        return run.with_dtype(dtype)
    loaded = load_pretrained(path, task=head, allow_unused=allow_unused, seed=None)
    if objective is not None:
        _check_head(loaded, read_published_config(path), str(given), objective)
    return from_pretrained(loaded, objective or objective_of(loaded, path), str(given)).with_dtype(dtype)


def load_run(path: str | pathlib.Path) -> LoadedRun:
    """Load a run folder's newest checkpoint (with keep_best its best), or one checkpoint, which needs no other file.
    LoRA adapters are merged into the model's kernels.

    Raises:
      CheckpointError: there is no checkpoint, or it cannot be read.

    Example:
      >>> load_run("runs/movie").config.objective
      'classification'
    """
    path = best_checkpoint(path)
    record = read_record(path)
    config = record.config.after(record.step)
    graphdef, _ = abstract_model(model_factory(config, record.label_names))
    model = assembled(graphdef, read_params(path))
    run_dir = path if checkpoint_steps(path) else path.absolute().parent.parent
    evaluations = read_evaluations(run_dir)  # none of a checkpoint that lies by itself
    best = best_evaluation(evaluations, config.keep_best)
    return LoadedRun(
        model, config, record.tokenizer, record.label_names, record.step, scores=evaluations.get(record.step, {}),
        is_best=best is not None and best.step == record.step,
    )  # fmt: skip


def objective_of(loaded: Pretrained, path: pathlib.Path) -> str | None:
    """The task that a published folder's head is of, or None. Of several that share a head the config's problem_type
    decides, or else, as transformers has it, whether there is one label."""
    tasks = {name: task for name, task in TASKS.items() if task.head is not None and task.head == loaded.task}
    if not tasks:
        return None
    if (answers := loaded.family.heads[loaded.task].objective) is not None:
        return answers
    kind = _problem_types(loaded)[0]
    if len(kinds := {task.problem_type for task in tasks.values()} - {None}) == 0:
        return next(iter(tasks))
    found = next((name for name, task in tasks.items() if task.problem_type == kind), None)
    if found is None:
        raise DataError(
            f"{path} has a {loaded.task} head of problem_type {kind!r}: known are {', '.join(sorted(kinds))}."
        )
    return found


def _problem_types(loaded: Pretrained) -> tuple[str, ...]:
    """What a classification head can be of, as transformers has it, the likeliest first: where config.json says
    nothing, the number of labels leaves two open."""
    if loaded.problem_type is not None:
        return (loaded.problem_type,)
    return ("regression" if loaded.num_outputs == 1 else "single_label_classification", "multi_label_classification")


def _check_head(loaded: Pretrained, published: Mapping[str, Any], folder: str, objective: str) -> None:
    """
    Raises:
      ConfigError: a folder says that its head is another than the objective's.
    """
    task, heads = find_task(objective), named_heads(loaded.family, published)
    if task.head is None:
        return
    has = f"has a {heads[0]} head (config.json: {published['architectures'][0]})" if heads else ""
    if heads and task.head not in heads:
        raise _another(folder, has, objective)
    if (answers := loaded.family.heads[task.head].objective) not in (None, objective):
        raise _another(folder, f"is of {loaded.family.model_type}, whose {task.head} head is of {answers}", objective)
    if not heads:
        return
    if task.problem_type not in (None, *(kinds := _problem_types(loaded))):
        raise _another(folder, f"{has}, of {' or '.join(kinds)}", objective)


def _another(folder: str, has: str, objective: str) -> ConfigError:
    return ConfigError(
        f"a model is asked by the head that it was trained with: {folder} {has}, and the objective asked for is "
        f"{objective}. Leave --objective out; or `train --objective {objective} --init-from {folder} --data.source "
        f"FILE` teaches it that."
    )


def as_record(loaded: Pretrained, objective: str | None) -> tuple[RunRecord, dict[str, Any]]:
    """(a record of a run that has this model, the parameters that the folder had).

    A folder whose head is of no task is a masked_lm run without its head.

    Raises:
      DataError: no tokenizer, without which there is no run.
    """
    if loaded.tokenizer is None:
        raise DataError(f"a run needs a tokenizer, and the folder has none: looked for {', '.join(TOKENIZER_FILES)}.")
    keeps_head = objective is not None and TASKS[objective].head == loaded.task
    limit = loaded.config.max_length if loaded.config.position == "learned" else None
    has_decoder = keeps_head and loaded.decoder is not None
    if has_decoder:
        limit = loaded.tokenizer.max_tokens or _LONGEST_SOURCE
    length = limit or DataConfig.row_length
    config = RunConfig(
        objective=objective or "masked_lm",
        model=loaded.config,
        head=loaded.head if keeps_head and not has_decoder else HeadConfig(),
        pooling=loaded.pooling,
        data=DataConfig(row_length=length if keeps_head and objective != "masked_lm" else min(
            DataConfig.row_length, length)),
    )  # fmt: skip
    if has_decoder:
        assert loaded.decoder is not None and loaded.settings is not None
        start, end, generation = as_settings(loaded.settings, loaded.tokenizer)
        decoder = dataclasses.replace(loaded.decoder, start_id=start, end_id=end)
        config = dataclasses.replace(config, decoder=decoder, generation=generation)
    params = flatten(nnx.to_pure_dict(nnx.split(loaded.model)[1]))
    kept = ("encoder.", "head.", "decoder.", "pair_head.") if keeps_head else ("encoder.",)
    params = {path: value for path, value in params.items() if path.startswith(kept) and path not in loaded.fresh}
    # Names of classes that a head made anew has are nobody's.
    names = loaded.label_names if "head.out.kernel" in params else None
    return RunRecord(config, loaded.tokenizer, names), unflatten(params)


def as_settings(settings: Settings, tokenizer: TextTokenizer) -> tuple[int, int | None, GenerationConfig]:
    """(the token that starts a target, the one that ends it, how a run writes) of what a folder says of writing; what a
    run cannot say is named in a log line."""
    ends = settings.meant["end_id"]
    if isinstance(ends, tuple):
        ends = tokenizer.frame[1] if tokenizer.frame[1] in ends else ends[0]
    known = {field.name for field in dataclasses.fields(GenerationConfig)}
    meant = {name: value for name, value in settings.meant.items() if name in known and value is not None}
    if lost := sorted({*settings.meant, *settings.not_done} - known - {"start_id", "end_id", "pad_id"}):
        logger.warning("%s: left out %s, which a run does not have", settings.path, ", ".join(lost))
    # `over` leaves out what is of sampled text or of beams where there are none.
    if settings.do_sample:
        meant.setdefault("top_k", DRAWN_TOP_K)
    folder = GenerationConfig(**meant, sample=settings.do_sample or None)
    return settings.meant["start_id"], ends, GenerationConfig().over(folder)


def from_pretrained(loaded: Pretrained, objective: str | None, folder: str | None = None) -> LoadedRun:
    """A published model as that of a task. What is missing of the head is made anew; a head whose labels nobody knows
    then is left out. `folder` may be a sentence-transformers one that says how vectors are made."""
    if objective is not None and any(path.startswith("head.out") for path in loaded.fresh):
        objective = None
    record, params = as_record(loaded, objective)
    record = record.replace(config=with_vectors_of(record.config, folder, logger.warning))
    make_model = model_factory(record.config, record.label_names)
    graphdef, abstract = abstract_model(make_model)
    own = flatten(params)
    for path, leaf in flatten(nnx.to_pure_dict(abstract)).items():
        if path in own and own[path].shape != leaf.shape:
            raise DataError(
                f"a {record.config.objective} model has {path} of shape {list(leaf.shape)}: the folder's is "
                f"{list(own[path].shape)}. Mend problem_type in its config.json if that is wrong; `train --init-from "
                f"{folder or 'FOLDER'} --data.source FILE` teaches the encoder anew."
            )
    if fresh := [path for path in flatten(nnx.to_pure_dict(abstract)) if path not in own]:
        made = flatten(nnx.to_pure_dict(nnx.split(make_model())[1]))
        params = unflatten(own | {path: np.asarray(made[path]) for path in fresh})
        logger.warning("a %s run needs %s, which is newly initialized", record.config.objective, ", ".join(fresh))
    model = nnx.merge(graphdef, params)
    return LoadedRun(model, record.config, record.tokenizer, record.label_names, 0, tuple(fresh))


def with_vectors_of(config: RunConfig, folder: str | None, say: Say) -> RunConfig:
    """The config of a run that learns vectors, with the pooling and, where it has none, the prompts of the
    sentence-transformers folder that it starts from: with others its vectors would not be those that are published.

    Raises:
      ConfigError: the folder pools in several ways.
    """
    if folder is None or not is_setting_read(config.objective, "contrastive.pooling"):
        return config
    if not is_sentence_folder(folder := str(local_folder(folder))):
        return config
    theirs, own = read_sentence_settings(folder), config.contrastive
    if len(theirs.pooling) > 1:
        raise ConfigError(
            f"vectors are pooled in one way here: {folder} has {', '.join(theirs.pooling)}. --init-from "
            f"{encoder_folder(folder)} with a --contrastive.pooling starts from its encoder, if that is a folder of "
            f"its own."
        )
    if left_out := [layer.kind for layer in theirs.layers if layer != NORMALIZE]:
        say(f"left out {', '.join(left_out)} after the pooling of {folder}: the run trains the encoder's own vectors")
    prompts = {} if any(own.prompts) else {
        f"{name}_prompt": theirs.prompts[name] for name in ("query", "document") if theirs.prompts.get(name)
    }  # fmt: skip
    found = dataclasses.replace(own, pooling=theirs.pooling[0], **prompts)
    for name, (was, now) in differences(own, found).items():
        say(f"contrastive.{name} is {now!r}, from {folder} (the config has {was!r})")
    return dataclasses.replace(config, contrastive=found)


def read_origin(path: str | pathlib.Path, objective: str) -> tuple[RunRecord, Any]:
    """(record, parameters) of what `init_from` names: a run folder, a checkpoint or a published folder.

    `objective` says which head to load of a published folder, as far as it has one; a run folder has its own.
    """
    path = encoder_folder(local_folder(path))
    if not is_published(path):
        run = load_run(path)
        whole = run if run.config.objective == objective else run.part()
        record = read_record(best_checkpoint(path))
        record = record.replace(config=record.config.after(record.step))
        return record, nnx.to_pure_dict(nnx.split(whole.model)[1])
    family = find_family(read_published_config(path))
    head = TASKS[objective].head
    loaded = load_pretrained(path, task=head if head in family.heads else None, seed=None)
    return as_record(loaded, objective if loaded.task == head else None)

