"""From a config to batches: sources, tokenizer, stores, packing plans and targets, in that order."""

import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from flax_encoder.config import DataConfig, RunConfig
from flax_encoder.data.rows.batches import Batches, Frame, Mixture, OneByOne, Stages, label_targets, masked_lm_targets
from flax_encoder.data.rows.masking import budget
from flax_encoder.data.rows.packing import PackingPlan
from flax_encoder.data.sources.opening import Source, open_source
from flax_encoder.data.sources.records import DataError, LabelError, Say
from flax_encoder.data.store.prepare import prepare, unhurried
from flax_encoder.data.store.store import (
    FORMAT,
    MANIFEST,
    Split,
    Store,
    is_store,
    open_store,
    partial_folder,
    read_manifest,
)
from flax_encoder.data.store.tokenizing import is_held_out, text_digest
from flax_encoder.data.tokens.tokenizer import TextTokenizer, load_tokenizer, train_wordpiece
from flax_encoder.data.tokens.tokenizer_files import read_tokenizer

# A vocabulary of this size is settled by far less text; more would only take memory.
_TRAINING_BYTES = 2**28


def default_cache_dir() -> pathlib.Path:
    """$FLAX_ENCODER_CACHE, else ~/.cache/flax_encoder."""
    return pathlib.Path(os.environ.get("FLAX_ENCODER_CACHE") or "~/.cache/flax_encoder").expanduser()


@dataclass(frozen=True)
class RunData:
    tokenizer: TextTokenizer
    stores: list[Store]
    train: Stages
    evaluation: Batches
    train_plans: list[PackingPlan]
    weights: list[float] | None
    """Of several stores, if they are mixed otherwise than evenly."""

    @property
    def label_names(self) -> list[str] | None:
        return self.stores[0].label_names

    @property
    def hash(self) -> str:
        """Of all stores' contents: with the seed and the step, the loader's whole state."""
        what = ([store.hash for store in self.stores], self.weights)
        return hashlib.sha256(repr(what).encode()).hexdigest()


def open_data(
    config: RunConfig,
    *,
    tokenizer: TextTokenizer | None = None,
    label_names: list[str] | None = None,
    progress: Say = lambda message: None,
    process: tuple[int, int] = (0, 1),
) -> RunData:
    """Everything a run reads.

    Args:
      tokenizer: settled already (by a checkpoint); else data.tokenizer, else that of a store, else one is trained on
        the training text.
      label_names: settled already, likewise.
      process: (index, count); each process makes its own rows of every batch.
    """
    with_labels = config.objective == "classification"
    tokenizer, stores, weights = open_stores(
        config.data, tokenizer=tokenizer, label_names=label_names, with_labels=with_labels, progress=progress
    )
    frame = Frame.of(tokenizer)
    make = functools.partial(_batches, config, stores, tokenizer, frame, with_labels)
    data, stages, plans, order = config.data, [], [], None
    first_step, first_row, row_length = 0, 0, 0
    for stage in config.stages:
        if stage.row_length != row_length:
            first_row, row_length = first_row * row_length // stage.row_length, stage.row_length
            plans = _plans(config, [s.train for s in stores], row_length, frame, split_long=not with_labels)
            order = Mixture(plans, weights or [float(plan.rows_per_epoch) for plan in plans])
        stages.append(make(
            order, "train", row_length, stage.batch_size, config.masking.rates, process, num_batches=stage.end_step,
            first=(first_step, first_row),
        ))  # fmt: skip
        first_row += (stage.end_step - first_step) * stage.batch_size
        first_step = stage.end_step
    for store in stores:
        if not len(store.test):
            raise DataError(
                f"evaluation needs held-out documents, and of {len(store.train)} none fell to it: raise "
                f"--data.held-out-rate (now {data.held_out_rate}), or cut text finer with --data.text-unit line; a "
                f"store that prepare wrote must be prepared again."
            )
    T, batch_size = data.final_row_length, config.stages[-1].batch_size
    order = OneByOne(_plans(config, [s.test for s in stores], T, frame, split_long=not with_labels))
    batches = -(-len(order) // batch_size)
    evaluation = make(
        order, "test", T, batch_size, (config.masking.eval_rate,) * 2, process,
        num_batches=min(batches, config.eval_batches or batches), stop_row=len(order),
    )  # fmt: skip
    return RunData(tokenizer, stores, Stages(stages), evaluation, plans, weights)


def _plans(config: RunConfig, splits: list[Split], row_length: int, frame: Frame, *, split_long: bool):
    return [
        PackingPlan(
            s.offsets, row_length, frame.specials, packing=config.data.packing, split_long=split_long,
            histogram=s.histogram,
        )
        for s in splits
    ]  # fmt: skip


def _batches(
    config: RunConfig, stores: list[Store], tokenizer: TextTokenizer, frame: Frame, with_labels: bool, order,
    split: str, row_length: int, batch_size: int, rates: tuple[float, float], process: tuple[int, int], *,
    num_batches: int, first: tuple[int, int] = (0, 0), stop_row: int | None = None,
) -> Batches:  # fmt: skip
    masking = config.masking
    splits = [getattr(store, split) for store in stores]
    if with_labels:
        targets = label_targets(splits[0].labels, order.plans[0].max_pieces_per_row)
    else:
        slots = masking.budget or budget(masking.kind, max(rates), row_length)
        targets = masked_lm_targets(tokenizer, masking, rates, slots, config.steps, config.seed)
    share = batch_size // process[1]
    return Batches(
        splits, order, targets, frame, row_length=row_length, batch_size=batch_size, seed=config.seed,
        num_batches=num_batches, first=first, rows=slice(process[0] * share, (process[0] + 1) * share),
        stop_row=stop_row, with_words=not with_labels and masking.kind != "token", buckets=config.data.buckets,
    )  # fmt: skip


def open_stores(
    config: DataConfig,
    *,
    tokenizer: TextTokenizer | None = None,
    label_names: list[str] | None = None,
    with_labels: bool = False,
    progress: Say = lambda message: None,
) -> tuple[TextTokenizer, list[Store], list[float] | None]:
    """(tokenizer, stores, their weights): each source opened if it is a store, else prepared into the cache.

    Raises:
      DataError: as `open_source`, `prepare` and `open_store`; or a store was made with another tokenizer.
    """
    cache_dir = pathlib.Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_dir()
    names, weights = _members(config)
    prepared = {name: open_store(pathlib.Path(name)) for name in names if is_store(pathlib.Path(name))}
    sources = {}
    for name in names:
        if name not in prepared:
            progress(f"reading {name}")
            sources[name] = open_source(name, config, with_labels=with_labels, cache_dir=cache_dir)
    tokenizer = tokenizer or settle_tokenizer(config, list(prepared.values()), list(sources.values()), progress)
    for name, store in prepared.items():
        if store.manifest["tokenizer"] != tokenizer.hash:
            raise DataError(
                f"a store must have been made with the run's tokenizer: {name} was with {store.manifest['tokenizer']}, "
                f"the run has {tokenizer.hash}. Give --data.tokenizer {name}, or prepare the text again."
            )
        if with_labels and store.label_names is None:
            raise DataError(f"classification needs labels: the store {name} was prepared without --with-labels.")
        if label_names is not None and store.label_names != label_names:
            raise LabelError(
                f"a store's labels must be the model's, in their order: {name} has {store.label_names}, the model "
                f"{label_names}. Train from the text itself, or prepare it again."
            )
    for name, source in sources.items():
        what = (FORMAT, source.fingerprint, tokenizer.hash, config.held_out_rate, label_names)
        folder = cache_dir / "stores" / hashlib.sha256(repr(what).encode()).hexdigest()[:24]
        store = prepare(
            source, tokenizer, folder, held_out_rate=config.held_out_rate, label_names=label_names, progress=progress,
            wait=True,
        )  # fmt: skip
        assert store is not None  # there is one shard
        prepared[name] = store
    if with_labels and len(names) > 1:
        raise DataError(f"classification takes one store, whose labels it learns: {config.source} is a mixture.")
    if config.verify:
        for store in prepared.values():
            store.verify(unhurried(progress))
    return tokenizer, [prepared[name] for name in names], weights


def _members(config: DataConfig) -> tuple[list[str], list[float] | None]:
    """The sources, a mixture's folder replaced by its members, and their weights."""
    names: list[str] = []
    weights: list[float] = []
    is_weighted = config.weights is not None
    for name, weight in zip(config.sources, config.weights or [1.0] * len(config.sources), strict=True):
        folder = pathlib.Path(name)
        manifest = read_manifest(folder) if is_store(folder) else {}
        members = manifest.get("members", [{"folder": "", "weight": 1.0}])
        total = sum(m["weight"] for m in members)
        names += [os.fspath(folder / m["folder"]) if "members" in manifest else name for m in members]
        weights += [weight * m["weight"] / total for m in members]
        is_weighted |= "members" in manifest
    if is_weighted and config.weights is None and len(config.sources) > 1:
        raise DataError(
            f"a mixture among several sources needs --data.weights, one for each: got none for {config.sources}."
        )
    return names, weights if is_weighted else None


def prepare_stores(
    config: DataConfig, out: pathlib.Path, *, with_labels: bool, workers: int | None, shard: tuple[int, int],
    progress: Say,
) -> list[Store] | None:  # fmt: skip
    """Prepare the sources into `out`: one as a store, several as a mixture of stores in it.

    Returns:
      the stores; None if other shards have not finished.
    """
    cache_dir = pathlib.Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_dir()
    if stores := [name for name in config.sources if is_store(pathlib.Path(name))]:
        raise DataError(f"text is prepared into a store: {stores[0]} is one. Train with --data.source {stores[0]}.")
    sources = [open_source(name, config, with_labels=with_labels, cache_dir=cache_dir) for name in config.sources]
    is_mixture = len(sources) > 1
    if is_mixture and (out / MANIFEST).exists() and "members" not in read_manifest(out):
        raise DataError(f"a mixture is prepared into a new folder: {out} is a store. Name another --out.")
    marker = partial_folder(out)
    if is_mixture and not (out / MANIFEST).exists():
        marker.mkdir(parents=True, exist_ok=True)  # so that a half-made mixture is known as one
    tokenizer = settle_tokenizer(config, [], sources, progress)
    folders = [out] if not is_mixture else [out / f"{i:02}" for i in range(len(sources))]
    stores = [
        prepare(
            source, tokenizer, folder, held_out_rate=config.held_out_rate, workers=workers, shard=shard,
            progress=progress,
        )
        for source, folder in zip(sources, folders, strict=True)
    ]  # fmt: skip
    finished = [store for store in stores if store is not None]
    if len(finished) < len(stores):
        return None
    if is_mixture:
        weights = config.weights or [s.manifest["splits"]["train"]["tokens"] for s in finished]
        members = [{"folder": f.name, "weight": w} for f, w in zip(folders, weights, strict=True)]
        manifest = out / f"{MANIFEST}.new"
        manifest.write_text(json.dumps({"format": FORMAT, "members": members}, indent=1))
        os.replace(manifest, out / MANIFEST)
        shutil.rmtree(marker, ignore_errors=True)
    return finished


def settle_tokenizer(config: DataConfig, stores: list[Store], sources: list[Source], progress: Say) -> TextTokenizer:
    """data.tokenizer, else that of the first store, else a WordPiece trained on the sources' training text."""
    if config.tokenizer is not None:
        path = pathlib.Path(config.tokenizer)
        return read_tokenizer(path) if path.is_dir() else load_tokenizer(path)
    if stores:
        return load_tokenizer(stores[0].folder)
    progress(f"training a WordPiece tokenizer of {config.vocab_size:,} tokens")
    texts = (text for source in sources for text in _sample(source, config.held_out_rate))
    return train_wordpiece(texts, config.vocab_size)


def _sample(source: Source, held_out_rate: float) -> Iterator[str]:
    """The training text, or where that is long, parts of it from all over."""
    parts = [part for part in source.parts if part.split == "train"]
    every, left = max(1, -(-sum(part.size for part in parts) // _TRAINING_BYTES)), _TRAINING_BYTES
    rate = 0.0 if source.has_test else held_out_rate
    for record in itertools.chain.from_iterable(part.read() for part in parts[::every]):
        text = record["text"].strip()
        if is_held_out(text_digest(text), rate):
            continue
        left -= len(text)
        if left < 0:
            return
        yield text
