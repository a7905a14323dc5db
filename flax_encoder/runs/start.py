"""What a run starts from: its own checkpoint, another run's or a published model, word vectors, or nothing."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from flax_encoder.config import (
    FREE_OF_PARAMETERS,
    ConfigError,
    EncoderConfig,
    HeadConfig,
    RunConfig,
    differences,
)
from flax_encoder.data.pipeline import settle_tokenizer
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.records import Say
from flax_encoder.data.tokens.tokenizer import TextTokenizer
from flax_encoder.data.tokens.word_vectors import embedding_from_vectors, word_level_tokenizer
from flax_encoder.nn.partition import flatten, round_up_vocab
from flax_encoder.runs.as_published import export_note, family_head
from flax_encoder.runs.length import with_lengths_of
from flax_encoder.runs.load import read_origin, with_vectors_of
from flax_encoder.runs.record import RunRecord, read_record
from flax_encoder.tasks import is_setting_read, shares_head

# Settings that do not change what is computed: a resumed run may differ in them. (Text may have moved, and its columns
# have other names: the prepared text's hash says whether it is the same. So does the teacher's.)
FREE_ON_RESUME = (
    "run_dir", "init_from", "compare_with_scratch", "log_every", "eval_every", "eval_batches", "checkpoint_every",
    "patience", "seeds", "stall_seconds", "profile", "max_skipped", "max_norm_factor", "skip_rows", "trackers",
    "keep_checkpoints", "keep_every", "mesh.", "data.cache_dir", "data.source", "data.validation", "data.test",
    "data.tokenizer", "data.text_column", "data.text_pair_column", "data.label_column", "data.skip_bad_rows",
    "generation.", "data.word_vectors", "data.workers", "data.verify", "model.scan_layers", "model.remat",
    "model.attention_implementation", "distillation.teacher",
)  # fmt: skip
# Settings that a run fills in itself, and the value that leaves them to it.
LEFT_OPEN = {
    "model.vocab_size": 0, "labels.null_threshold": None, "data.target_length": None, "decoder.start_id": None,
    "decoder.end_id": None,
}  # fmt: skip


def settle(
    config: RunConfig, run_dir: pathlib.Path, start: int, say: Say
) -> tuple[RunConfig, RunRecord | None, TextTokenizer | None, list[str] | None]:
    """(config, the record that is resumed, tokenizer, labels): what is fixed by the checkpoint that is resumed, or by
    the run that init_from names; None where it is still to be made.

    Raises:
      ConfigError: a resumed run's settings that matter differ from before.
    """
    config = with_vectors_of(config, config.init_from, (lambda message: None) if start else say)
    if start:
        record = read_record(run_dir)
        config, before = with_lengths_of(config, record.config)
        known, is_from_other = like_origin(config, record, has_head=True), begins_elsewhere(config)
        if not before.data.held_out_by_class:  # a run from before there was the choice keeps its documents
            known, config = (dataclasses.replace(
                c, data=dataclasses.replace(c.data, held_out_by_class=False)) for c in (known, config))  # fmt: skip
        length = {"steps": config.steps, "schedule_began": schedule_start(before, config, start), "extend": False}
        if config.steps > before.steps:
            before = dataclasses.replace(before, **length)
        config, known = (dataclasses.replace(c, **length) for c in (config, known))
        changed = {
            name: values
            for name, values in differences(before, known if is_from_other else config).items()
            if not name.startswith(FREE_ON_RESUME)
            and is_setting_read(config.objective, name)
            and not (name in LEFT_OPEN and values[1] == LEFT_OPEN[name])
        }
        if changed:
            lines = "".join(f"\n  {name}: {was} before, {now} now" for name, (was, now) in changed.items())
            raise ConfigError(
                f"a run resumes with the settings it began with; {run_dir} has a checkpoint at step {start}, and these "
                f"differ:{lines}\nGive the same, or another --run-dir (--init-from {run_dir} starts from its model)."
            )
        config = dataclasses.replace(known, init_from=before.init_from)
        return config, record, record.tokenizer, record.label_names
    if config.extend or config.schedule_began:
        raise ConfigError(f"extend needs a run to make longer: {run_dir} has no checkpoint. Leave extend out.")
    if config.init_from:
        record, params = read_origin(config.init_from, config.objective)
        settled = reaching(like_origin(config, record, has_head="head.out.kernel" in flatten(params)), config.model)
        model = dataclasses.replace(config.model, vocab_size=settled.model.vocab_size)
        for name, (was, now) in differences(dataclasses.replace(config, model=model), settled).items():
            say(f"{name} is {now}, from {config.init_from} (the config has {was})")
        if settled.model.rope_theta != (theirs := record.config.model.rope_theta):
            theta = settled.model.rope_theta
            say(f"model.rope_theta is {theta:g}, from the config; {config.init_from} has {theirs:g}")
        if note := export_note(settled):
            say(note)
        if config.data.tokenizer is not None:
            given = settle_tokenizer(config.data, Columns(), [], [], say)
            if given.hash != record.tokenizer.hash:
                raise ConfigError(
                    f"a model reads the tokens it was made for: data.tokenizer {config.data.tokenizer} is not that of "
                    f"{config.init_from}. Leave it out."
                )
        has_labels = record.config.objective == config.objective
        return settled, None, record.tokenizer, record.label_names if has_labels else None
    tokenizer = None
    if config.data.word_vectors and config.data.tokenizer is None:
        tokenizer = word_level_tokenizer(config.data.word_vectors, config.data.vocab_size)
    return config, None, tokenizer, None


def begins_elsewhere(config: RunConfig) -> bool:
    """Whether a run's model has the settings of another, which it begins from."""
    return config.init_from is not None or config.distillation.initial_layers is not None


def schedule_start(before: RunConfig, config: RunConfig, start: int) -> int:
    """The step at which the schedule begins of a run that is resumed at step `start`, perhaps to be made longer.

    Raises:
      ConfigError: it is made longer, and its learning rate has begun to fall, or something else went by its steps.
    """
    if config.steps <= before.steps:
        return before.schedule_began
    by_steps = {
        "masking.last_rate": before.masking.last_rate, "data.last_row_length": before.data.last_row_length,
        "first_batch_size": before.first_batch_size, "budget_minutes": before.budget_minutes,
        "phases": before.phases or None,
    }  # fmt: skip
    if fixed := [name for name, value in by_steps.items() if value is not None]:
        raise ConfigError(
            f"a run can be made longer only if no setting but its learning rate follows its length: {before.run_dir} "
            f"was begun for {before.steps} steps with {', '.join(fixed)}. --init-from {before.run_dir} starts another "
            f"run from its model."
        )
    if config.extend:
        return start
    began, optimizer = before.schedule_began, before.optimizer
    gone = [(start - began) / (steps - began) for steps in (before.steps, config.steps)]
    if optimizer.peak_end is None or not all(optimizer.warmup_rate <= share <= optimizer.peak_end for share in gone):
        raise ConfigError(
            f"a run is made longer while its learning rate is at its peak: that of {before.run_dir}, schedule "
            f"{optimizer.schedule}, has gone {gone[0]:.0%} of its way to step {before.steps}, and would jump with "
            f"{config.steps} steps. --extend begins a new schedule at step {start}."
        )
    return began


def like_origin(config: RunConfig, record: RunRecord, *, has_head: bool) -> RunConfig:
    """`config` with the settings that another run's parameters depend on; its head's and decoder's too if it has the
    same, its pooling if that head was trained, and how it writes where `config` does not say. Of another objective, the
    head that is published on such an encoder, if the config leaves it open."""
    origin = record.config
    theirs = {name: value for name, value in vars(origin.model).items() if name not in FREE_OF_PARAMETERS}
    head: dict[str, Any] = {}
    if shares_head(config.objective, origin.objective):
        head = {"head": origin.head, "decoder": origin.decoder}
        head["generation"] = config.generation.over(origin.generation)
    elif config.head == HeadConfig():
        head = {"head": family_head(origin, config.objective)}
    if has_head and config.objective == origin.objective:
        head["pooling"] = origin.pooling
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **theirs), **head)


def reaching(config: RunConfig, asked: EncoderConfig) -> RunConfig:
    """`config`, whose model is another's, with the rope_theta that was asked for, if one was, and a max_length of its
    longest rows at least: without a table of positions neither is of any parameter.

    Raises:
      ConfigError: the model cannot read rows so long, or phases change what it has not.
    """
    model = config.model
    if model.position == "rope" and asked.rope_theta != EncoderConfig.rope_theta:
        model = dataclasses.replace(model, rope_theta=asked.rope_theta)
    if model.position != "learned":
        model = dataclasses.replace(model, max_length=max(model.max_length, *config.row_lengths))
    config = dataclasses.replace(config, model=model)
    config.check_model_serves()
    return config


def with_vocab_size(config: RunConfig, tokenizer_size: int) -> RunConfig:
    """Settle model.vocab_size, rounded up so that any usual mesh divides it."""
    size = config.model.vocab_size or round_up_vocab(tokenizer_size)
    if tokenizer_size > size:
        raise ConfigError(f"model.vocab_size must hold the tokenizer's {tokenizer_size} tokens: got {size}.")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def start_from(config: RunConfig, label_names: list[str] | None, params: Any, say: Say) -> Any:
    """`params` with the encoder of init_from, and its head and decoder too if those are of the same kind, but for the
    outputs of other labels; what is new is named."""
    origin, params_there = read_origin(config.init_from, config.objective)
    is_same = shares_head(config.objective, origin.config.objective)
    is_of_these = origin.label_names is None or origin.label_names == label_names
    found = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(params_there)}
    fresh = []

    def pick(path, own):
        is_kept = path[0].key == "encoder" or (is_same and (is_of_these or path[1].key != "out"))
        theirs = found.get(jax.tree_util.keystr(path)) if is_kept else None
        if theirs is None or theirs.shape != own.shape:
            fresh.append(".".join(key.key for key in path))
            return own
        return jax.make_array_from_callback(own.shape, own.sharding, np.asarray(theirs).__getitem__)

    picked = jax.tree_util.tree_map_with_path(pick, params)
    say(f"started from {config.init_from}; new parameters: {', '.join(fresh) or 'none'}")
    return picked


def with_word_vectors(path: str, tokenizer: TextTokenizer, params: Any, say: Say) -> Any:
    """`params` with the file's vectors as rows of the token embedding; the rows of other tokens stay as they are."""
    rows = embedding_from_vectors(path, tokenizer)
    token = params["encoder"]["embedding"]["token"]
    if (found := rows.vectors.shape[1]) != token.shape[1]:
        raise ConfigError(
            f"word vectors must be as long as the token embedding: {path} has {found} numbers a word, the model "
            f"{token.shape[1]}."
        )
    place = jax.jit(lambda token, rows: token.at[rows[0]].set(rows[1]), out_shardings=token.sharding)
    token = place(token, (rows.ids, rows.vectors))
    say(f"token embedding: {len(rows.ids):,} rows from {path}, {rows.num_missing:,} tokens are not in it")
    embedding = params["encoder"]["embedding"] | {"token": token}
    return params | {"encoder": params["encoder"] | {"embedding": embedding}}
