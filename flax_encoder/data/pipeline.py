"""From a config to batches: sources, tokenizer, stores, packing plans and targets, in that order."""

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from flax_encoder.config import DataConfig, Ramp, RunConfig
from flax_encoder.data.reading import MASKED_TEXT, Reading
from flax_encoder.data.rows.batches import Batches, Mixture, OneByOne, Stages
from flax_encoder.data.rows.documents import Documents, Frame, Layout, balanced_length
from flax_encoder.data.rows.packing import RowPlan
from flax_encoder.data.rows.targets import TargetInputs
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.labels import LabelCheck
from flax_encoder.data.sources.opening import Source, open_source
from flax_encoder.data.sources.records import DataError, LabelError, Say
from flax_encoder.data.store.copied import is_remote_store, local_store
from flax_encoder.data.store.encoding import held_out_text, tokenized_texts
from flax_encoder.data.store.prepare import prepare, store_identity, unhurried
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
from flax_encoder.data.store.tokenizing import MOST_HELD_OUT, HeldOut, is_held_out, text_digest
from flax_encoder.data.tokens.byte_pairs import train_byte_pairs
from flax_encoder.data.tokens.tokenizer import TextTokenizer, UnknownCount, load_tokenizer, train_wordpiece
from flax_encoder.data.tokens.tokenizer_files import read_tokenizer

logger = logging.getLogger(__name__)

# A vocabulary of this size is settled by far less text; more would only take memory.
_TRAINING_BYTES = 2**28


def default_cache_dir() -> pathlib.Path:
    """$FLAX_ENCODER_CACHE, else ~/.cache/flax_encoder.

    Raises:
      DataError: there is no such variable, and no home.
    """
    try:
        return pathlib.Path(os.environ.get("FLAX_ENCODER_CACHE") or "~/.cache/flax_encoder").expanduser()
    except RuntimeError as error:
        raise DataError(f"prepared text needs a place: {error} Set FLAX_ENCODER_CACHE to a folder.") from None


@dataclass(frozen=True)
class RunData:
    tokenizer: TextTokenizer
    stores: list[Store]
    train: Stages
    evaluation: Batches
    """Of what is held out to choose by: the validation split."""
    test: Batches | None
    """Of what is reported alone, if there is both."""
    train_plans: list[RowPlan]
    num_cut: int
    """Training documents that are cut to fit a row."""
    num_left_out: int
    """Training documents that are left out, since no row holds their targets."""
    weights: list[float] | None
    """Of several stores, if they are mixed otherwise than evenly."""
    config: RunConfig
    """The settings, with what follows from the data."""

    @property
    def rows_per_epoch(self) -> int:
        """Rows of all training text, of the run's last length."""
        return sum(plan.rows_per_epoch for plan in self.train_plans)

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
    reading: Reading = MASKED_TEXT,
    *,
    tokenizer: TextTokenizer | None = None,
    label_names: list[str] | None = None,
    progress: Say = lambda message: None,
    process: tuple[int, int] = (0, 1),
    settle: Callable[[RunConfig, int, int], RunConfig] = lambda config, rows, texts: config,
    reading_of: Callable[[str], Reading] | None = None,
) -> RunData:
    """Everything a run reads.

    Args:
      reading: the task's.
      tokenizer: settled already (by a checkpoint); else data.tokenizer, else that of a store, else one is trained on
        the training text.
      label_names: settled already, likewise.
      process: (index, count); each process makes its own rows of every batch.
      settle: gives the config once the rows and the texts of an epoch are known; `RunData.config` has it.
      reading_of: that of an objective that a phase has, of the same columns and layout; without it all have `reading`.
    """
    local = with_local_stores(config.data, progress)
    tokenizer, stores, weights = open_stores(
        local, reading.columns_of(config), tokenizer=tokenizer, label_names=label_names, progress=progress
    )
    frame = Frame.of(tokenizer, config.model.position_offset)
    if reading.columns.value == "text" and config.data.target_length is None:
        length = balanced_length(stores[0].train, config.data.row_length, frame)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, target_length=length))
    layout = reading.layout(config)
    data, stages = config.data, []
    documents, plans = _lay_out(stores, layout, frame, data, data.row_length)
    config = settle(config, sum(p.rows_per_epoch for p in plans), sum(len(store.train) for store in stores))
    make = functools.partial(_batches, config, tokenizer=tokenizer, process=process)
    row_length, of_sources, first_row, order = data.row_length, data.weights, 0, None
    left: list[np.ndarray] = []
    start: list[int] = []
    for stage in config.stages:
        is_same = order is not None
        if stage.weights != of_sources:
            if order is not None:  # every source goes on where it was
                (left, start), first_row = order.unread(first_row, config.seed), 0
            of_sources, weights, is_same = stage.weights, _members(local, stage.weights)[1], False
        if stage.row_length != row_length:
            start = [first - len(rest) for first, rest in zip(start, left, strict=True)]  # rows read, in any order
            left = [rest[:0] for rest in left]
            first_row, *start = (n * row_length // stage.row_length for n in (first_row, *start))
            row_length, is_same = stage.row_length, False
            documents, plans = _lay_out(stores, layout, frame, data, row_length)
        if order is None or not is_same:
            order = Mixture(plans, weights or [float(plan.rows_per_epoch) for plan in plans], left, start)
        is_own = stage.objective == config.objective or reading_of is None
        stages.append(make(
            reading if is_own else reading_of(stage.objective), documents, order, row_length, stage.batch_size,
            is_training=True, num_batches=stage.end_step, first=(stage.start_step, first_row),
            masking_rate=stage.masking_rate,
        ))  # fmt: skip
        first_row += (stage.end_step - stage.start_step) * stage.batch_size
    for store in stores:
        if not len(store.validation):
            raise DataError(
                f"evaluation needs held-out documents, and of {len(store.train)} none fell to it: give "
                f"--data.validation FILE, raise --data.held-out-rate (now {data.held_out_rate}), or cut a .txt finer "
                f"with --data.text-unit line; a store that prepare wrote must be prepared again."
            )
    last = config.timeline.stages[-1]  # perhaps one whose steps are not known yet
    T, batch_size = last.row_length, last.batch_size
    if last.weights != of_sources:
        weights = _members(local, last.weights)[1]

    def held_out(splits: list[Split]) -> Batches:
        written = layout.written and layout.written._replace(leave_out_long=False)
        documents = [Documents(split, layout._replace(written=written), frame, T) for split in splits]
        packing = "one-per-row" if reading.asks_one_a_row else data.packing
        order = OneByOne([d.plan(T, packing) for d in documents])
        batches = -(-len(order) // batch_size)
        return make(
            reading, documents, order, T, batch_size, is_training=False, stop_row=len(order),
            num_batches=min(batches, config.eval_batches or batches),
        )  # fmt: skip

    tests = [store.separate_test for store in stores if store.separate_test is not None]
    test = held_out(tests) if tests else None
    num_cut, num_left_out = sum(d.num_cut for d in documents), sum(d.num_left_out for d in documents)
    return RunData(
        tokenizer, stores, Stages(stages), held_out([s.validation for s in stores]), test, plans, num_cut,
        num_left_out, weights, config,
    )  # fmt: skip


def _lay_out(stores: list[Store], layout: Layout, frame: Frame, data: DataConfig, row_length: int):
    """(training documents, their plans) of each store, for rows of this length."""
    documents = [Documents(store.train, layout, frame, row_length) for store in stores]
    return documents, [d.plan(row_length, data.packing) for d in documents]


def _batches(
    config: RunConfig, reading: Reading, documents: list[Documents], order: Mixture | OneByOne, row_length: int,
    batch_size: int, *, tokenizer: TextTokenizer, process: tuple[int, int], is_training: bool, num_batches: int,
    first: tuple[int, int] = (0, 0), stop_row: int | None = None, masking_rate: Ramp | None = None,
) -> Batches:  # fmt: skip
    max_pieces = max(plan.max_pieces_per_row for plan in order.plans)
    inputs = TargetInputs(
        config, tokenizer, documents[0], row_length, max_pieces, is_training, not is_training, masking_rate
    )
    is_asked = reading.asks_one_a_row and not is_training
    share = batch_size // process[1]
    return Batches(
        documents, order, reading.targets(inputs), row_length=row_length, batch_size=batch_size, seed=config.seed,
        num_batches=num_batches, first=first, rows=slice(process[0] * share, (process[0] + 1) * share),
        stop_row=stop_row, streams=reading.streams(config), with_types=config.model.num_token_types > 1,
        buckets=few_lengths(row_length) if is_asked else config.data.buckets,
    )  # fmt: skip


def few_lengths(row_length: int) -> tuple[int, ...]:
    """At most two shorter lengths for batches of short rows: few, since each is compiled."""
    return tuple(length for length in (row_length // 4, row_length // 2) if length >= 32)


def open_stores(
    config: DataConfig,
    columns: Columns,
    *,
    tokenizer: TextTokenizer | None = None,
    label_names: list[str] | None = None,
    progress: Say = lambda message: None,
) -> tuple[TextTokenizer, list[Store], list[float] | None]:
    """(tokenizer, stores, their weights): each source opened if it is a store, else prepared into the cache.

    Raises:
      DataError: as `open_source`, `prepare` and `open_store`; or a store was made with another tokenizer.
    """
    config = with_local_stores(config, progress)
    names, weights = _members(config, config.weights)
    prepared = {name: open_store(pathlib.Path(name)) for name in names if is_store(pathlib.Path(name))}
    if prepared and (config.validation or config.test):
        raise DataError(
            "a prepared store has its held-out documents: give --data.validation and --data.test to prepare, or "
            "--data.source the text itself."
        )
    sources = _open_sources([name for name in names if name not in prepared], config, columns, progress)
    if tokenizer is None:
        tokenizer = settle_tokenizer(config, columns, list(prepared.values()), list(sources.values()), progress)
    for name, store in prepared.items():
        _check_store(name, store, columns, tokenizer, label_names)
    held_out = _held_out(config, columns, sources, progress)
    cache_dir = cache_folder(config) if sources else pathlib.Path()  # stores alone need none
    for name, source in sources.items():
        identity = store_identity(source, tokenizer, columns, held_out[name], label_names)
        folder = cache_dir / "stores" / identity[:24]
        if not folder.exists():
            _check_labels(source, columns, progress)
        store = prepare(
            source, tokenizer, folder, columns, held_out=held_out[name], label_names=label_names, progress=progress,
            wait=True,
        )  # fmt: skip
        assert store is not None  # there is one shard
        prepared[name] = store
    if columns.value != "none" and len(names) > 1:
        raise DataError(f"documents with values come from one source, or one store: {config.source} is a mixture.")
    for store in prepared.values():
        _warn_of_unknown(store, tokenizer)
    if config.verify:
        for store in prepared.values():
            store.verify(unhurried(progress))
    return tokenizer, [prepared[name] for name in names], weights


def with_local_stores(config: DataConfig, progress: Say) -> DataConfig:
    """The settings with the folder of a copy in place of each store that is elsewhere.

    Raises:
      DataError: as `local_store`.
    """
    remote = {name for name in config.sources if is_remote_store(name)}
    if not remote:
        return config
    folder, say = cache_folder(config), unhurried(progress)
    names = tuple(os.fspath(local_store(n, folder, say)) if n in remote else n for n in config.sources)
    return dataclasses.replace(config, source=names if len(names) > 1 else names[0])


def _check_labels(source: Source, columns: Columns, progress: Say) -> None:
    """Say which labels are likely two spellings of one, before hours of preparing."""
    if columns.value not in ("class", "classes"):
        return
    check, say = LabelCheck(), unhurried(progress)
    for part in source.parts:
        for record in part.read():
            for name in (record.value,) if columns.value == "class" else record.value or ():
                if name is not None:
                    check.add(name, record.where)
            say(f"reading the labels of {source.name}")
    for problem in check.problems():
        progress(problem)


def cache_folder(config: DataConfig) -> pathlib.Path:
    """Where prepared text is kept, made if it is new.

    Raises:
      DataError: it cannot be made.
    """
    folder = pathlib.Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"prepared text needs a place: {folder} cannot be made: {error.strerror}. Set FLAX_ENCODER_CACHE, or give "
            f"--data.cache-dir, a folder that can be written."
        ) from None
    return folder


def _open_sources(names: list[str], config: DataConfig, columns: Columns, progress: Say) -> dict[str, Source]:
    """The sources by their names; data.validation and data.test are parts of the first."""
    cache_dir, sources = cache_folder(config) if names else pathlib.Path(), {}
    for name in names:
        progress(f"reading {name}")
        sources[name] = open_source(name, config, columns, cache_dir)
        for note in sources[name].notes:
            progress(note)
    for split, path in (("validation", config.validation), ("test", config.test)):
        if path is not None and names:
            own = sources[names[0]]
            more = open_source(path, config, columns, cache_dir)
            parts = [part for part in own.parts if part.split != split]
            parts += [dataclasses.replace(part, split=split) for part in more.parts if part.split == "train"]
            print_ = hashlib.sha256(repr((own.fingerprint, split, more.fingerprint)).encode()).hexdigest()
            for note in more.notes:
                progress(note)
            sources[names[0]] = dataclasses.replace(
                own, parts=parts, fingerprint=print_, has_test_apart=own.has_test_apart or split == "test"
            )
    return sources


def _held_out(config: DataConfig, columns: Columns, sources: dict[str, Source], progress: Say) -> dict[str, HeldOut]:
    """What is held out of each source. Training leaves out what any other source, or a file of its own, holds out."""
    by_class, are_named = columns.value == "class" and config.held_out_by_class, bool(config.validation or config.test)
    rules = {
        name: HeldOut(config.held_out_rate, by_class and not s.has_held_out, keep_all=s.has_held_out or are_named)
        for name, s in sources.items()
    }
    if len(sources) < 2 and not any(rule.keep_all for rule in rules.values()):
        return rules
    rates = {name: 0.0 if source.has_held_out else config.held_out_rate for name, source in sources.items()}
    texts: dict[str, frozenset[bytes]] = {}
    for name, source in sources.items():
        # Sources that hold out by the same rule hold out the same texts; the others' are read here.
        is_by_hash = rates[name] > 0 and len(set(rates.values())) > 1
        say, found = unhurried(progress), set()
        for part in source.parts:
            if part.split == "train" and not is_by_hash:
                continue
            for record in part.read():
                say(f"reading what {name} holds out")
                digest = text_digest(held_out_text(record, columns))
                if part.split != "train" or is_held_out(digest, rates[name]):
                    found.add(digest)
        texts[name] = frozenset(found)
    return {
        name: rules[name]._replace(excluded=frozenset().union(
            *(held for other, held in texts.items() if other != name or rules[name].keep_all)))
        for name in sources
    }  # fmt: skip


def _check_store(
    name: str, store: Store, columns: Columns, tokenizer: TextTokenizer, label_names: list[str] | None
) -> None:
    if store.manifest["tokenizer"] != tokenizer.hash:
        raise DataError(
            f"a store must have been made with the run's tokenizer: {name} was with {store.manifest['tokenizer']}, "
            f"the run has {tokenizer.hash}. Give --data.tokenizer {name}, or prepare the text again."
        )
    if columns.value not in ("none", store.value):
        raise DataError(
            f"the task needs documents with a value of the kind {columns.value}: the store {name} was prepared with "
            f"{store.value}. Prepare it again with the task's --objective."
        )
    if columns.has_keys and "text_keys" not in store.train.values:
        raise DataError(
            f"texts that are compared need their hashes, which the store {name} lacks. Prepare it again with the "
            f"task's --objective, or give --data.source the text itself."
        )
    if list(columns.prompts) != (prompts := store.manifest.get("prompts", [])) and any((*columns.prompts, *prompts)):
        raise DataError(
            f"prompts are put before texts as these are tokenized: the store {name} was prepared with "
            f"{prompts if any(prompts) else 'none'}, the run has {list(columns.prompts)}. Give --data.source the text "
            f"itself."
        )
    separator = store.manifest.get("turn_separator")
    if columns.has_turns and columns.turn_separator != separator:
        raise DataError(
            f"turns are joined as they are tokenized: the store {name} was prepared with the turn separator "
            f"{separator!r}, the run has {columns.turn_separator!r}. Give "
            + ("the run no --data.turn-separator" if separator is None else f"the run --data.turn-separator "
               f"{separator!r}") + ", or prepare the text again."
        )  # fmt: skip
    if label_names is not None and store.label_names != label_names:
        raise LabelError(
            f"a store's labels must be the model's, in their order: {name} has {store.label_names}, the model "
            f"{label_names}. Train from the text itself, or prepare it again."
        )


def _members(config: DataConfig, shares: Sequence[float] | None) -> tuple[list[str], list[float] | None]:
    """The sources, a mixture's folder replaced by its members, and their weights, where the sources' are `shares`."""
    names: list[str] = []
    weights: list[float] = []
    is_weighted = shares is not None
    for name, weight in zip(config.sources, shares or [1.0] * len(config.sources), strict=True):
        folder = pathlib.Path(name)
        manifest = read_manifest(folder) if is_store(folder) else {}
        members = manifest.get("members", [{"folder": "", "weight": 1.0}])
        total = sum(m["weight"] for m in members)
        names += [os.fspath(folder / m["folder"]) if "members" in manifest else name for m in members]
        weights += [weight * m["weight"] / total for m in members]
        is_weighted |= "members" in manifest
    if is_weighted and shares is None and len(config.sources) > 1:
        raise DataError(
            f"a mixture among several sources needs --data.weights, one for each: got none for {config.sources}."
        )
    return names, weights if is_weighted else None


def prepare_stores(
    config: DataConfig, out: pathlib.Path, columns: Columns, *, workers: int | None, shard: tuple[int, int],
    progress: Say,
) -> list[Store] | None:  # fmt: skip
    """Prepare the sources into `out`: one as a store, several as a mixture of stores in it.

    Returns:
      the stores; None if other shards have not finished.
    """
    if stores := [name for name in config.sources if is_store(pathlib.Path(name))]:
        raise DataError(f"text is prepared into a store: {stores[0]} is one. Train with --data.source {stores[0]}.")
    by_name = _open_sources(list(config.sources), config, columns, progress)
    held_out, sources = _held_out(config, columns, by_name, progress), [by_name[name] for name in config.sources]
    is_mixture = len(sources) > 1
    if is_mixture and (out / MANIFEST).exists() and "members" not in read_manifest(out):
        raise DataError(f"a mixture is prepared into a new folder: {out} is a store. Name another --out.")
    marker = partial_folder(out)
    if is_mixture and not (out / MANIFEST).exists():
        marker.mkdir(parents=True, exist_ok=True)  # so that a half-made mixture is known as one
    tokenizer = settle_tokenizer(config, columns, [], sources, progress)
    folders = [out] if not is_mixture else [out / f"{i:02}" for i in range(len(sources))]
    stores = [
        prepare(
            source, tokenizer, folder, columns, held_out=held_out[source.name], workers=workers, shard=shard,
            progress=progress,
        )
        for source, folder in zip(sources, folders, strict=True)
    ]  # fmt: skip
    finished = [store for store in stores if store is not None]
    for store in finished:
        _warn_of_unknown(store, tokenizer)
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


def _warn_of_unknown(store: Store, tokenizer: TextTokenizer) -> None:
    splits = store.manifest["splits"].values()
    counts = (sum(split.get(what, 0) for split in splits) for what in ("unknown", "tokens"))  # older stores count none
    if warning := UnknownCount(tokenizer, *counts).warning:
        logger.warning("%s: %s", store.manifest["source"], warning)


def settle_tokenizer(
    config: DataConfig, columns: Columns, stores: list[Store], sources: list[Source], progress: Say
) -> TextTokenizer:
    """data.tokenizer, else that of the first store, else one trained on the sources' training text: a WordPiece, or
    where texts are written, byte-level BPE."""
    if config.tokenizer is not None:
        return read_tokenizer(config.tokenizer)
    if stores:
        return load_tokenizer(stores[0].folder)
    kind, train = "WordPiece", train_wordpiece
    if columns.writes:
        kind, train = "byte-level BPE", functools.partial(train_byte_pairs, more=columns.special_tokens)
    progress(f"training a {kind} tokenizer of {config.vocab_size:,} tokens")
    rate = config.held_out_rate * (MOST_HELD_OUT if config.held_out_by_class and columns.value == "class" else 1)
    texts = (text for source in sources for text in _sample(source, columns, rate))
    return train(texts, config.vocab_size)


def _sample(source: Source, columns: Columns, held_out_rate: float) -> Iterator[str]:
    """The training text, or where that is long, parts of it from all over."""
    parts = [part for part in source.parts if part.split == "train"]
    every, left = max(1, -(-sum(part.size for part in parts) // _TRAINING_BYTES)), _TRAINING_BYTES
    rate = 0.0 if source.has_held_out else held_out_rate
    for record in itertools.chain.from_iterable(part.read() for part in parts[::every]):
        if is_held_out(text_digest(held_out_text(record, columns)), rate):
            continue
        for text in tokenized_texts(record, columns):
            left -= len(text.strip())
            if left < 0:
                return
            yield text.strip()
