"""From a config to batches: source, tokenizer, store, packing plan and targets, in that order."""

import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass

from flax_encoder.config import RunConfig
from flax_encoder.data.batches import SPECIAL_PER_PIECE, Batches, label_targets, masked_lm_targets, one_pass
from flax_encoder.data.packing import PackingPlan
from flax_encoder.data.sources import DataError, open_source
from flax_encoder.data.store import Split, Store, prepare
from flax_encoder.data.tokenizer import TextTokenizer, load_tokenizer, train_wordpiece


def default_cache_dir() -> pathlib.Path:
    """$FLAX_ENCODER_CACHE, else ~/.cache/flax_encoder."""
    return pathlib.Path(os.environ.get("FLAX_ENCODER_CACHE") or "~/.cache/flax_encoder").expanduser()


@dataclass(frozen=True)
class RunData:
    tokenizer: TextTokenizer
    store: Store
    train: Batches
    evaluation: Batches
    train_plan: PackingPlan


def open_data(
    config: RunConfig,
    *,
    tokenizer: TextTokenizer | None = None,
    label_names: list[str] | None = None,
    progress: Callable[[str], None] = lambda message: None,
    process: tuple[int, int] = (0, 1),
) -> RunData:
    """Everything a run reads.

    Args:
      tokenizer: settled already (by a checkpoint); else data.tokenizer, else one is trained on the training text.
      label_names: settled already, likewise.
      process: (index, count); each process makes its own rows of every batch.
    """
    cache_dir = pathlib.Path(config.data.cache_dir).expanduser() if config.data.cache_dir else default_cache_dir()
    is_labelled = config.objective == "classification"
    progress(f"reading {config.data.source}")
    source = open_source(config.data, with_labels=is_labelled, cache_dir=cache_dir)
    if tokenizer is None and config.data.tokenizer is not None:
        tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer is None:
        progress(f"training a WordPiece tokenizer of {config.data.vocab_size:,} tokens")
        tokenizer = train_wordpiece((r["text"] for r in source.splits["train"]()), config.data.vocab_size)
    store = prepare(source, tokenizer, config.data.held_out_rate, cache_dir, progress, label_names)
    if not len(store.test.lengths):
        raise DataError(
            f"evaluation needs held-out documents, and of {len(store.train.lengths)} none fell to it: raise "
            f"--data.held-out-rate (now {config.data.held_out_rate}), or cut text finer with --data.text-unit line."
        )
    train, train_plan = _batches(config, store.train, tokenizer, config.seed, process, is_training=True)
    evaluation, _ = _batches(config, store.test, tokenizer, config.seed, process, is_training=False)
    return RunData(tokenizer, store, train, evaluation, train_plan)


def _batches(config: RunConfig, split: Split, tokenizer, seed: int, process, *, is_training: bool):
    data, is_labelled = config.data, config.objective == "classification"
    plan = PackingPlan(
        split.lengths, data.row_length, SPECIAL_PER_PIECE,
        split_long=not is_labelled, one_per_row=data.packing == "one-per-row",
    )  # fmt: skip
    if is_labelled:
        targets = label_targets(split.labels, plan.max_pieces_per_row)
    else:
        rate = config.masking.rate if is_training else config.masking.eval_rate
        targets = masked_lm_targets(tokenizer, config.masking, rate, seed)
    index, count = process
    share = config.batch_size // count
    extent = {"num_batches": config.steps} if is_training else one_pass(plan, config.batch_size, config.eval_batches)
    batches = Batches(
        split, plan, targets, tokenizer, row_length=data.row_length, batch_size=config.batch_size, seed=seed,
        rows=slice(index * share, (index + 1) * share), **extent,
    )  # fmt: skip
    return batches, plan
