"""Text to a store: tokenized once, part by part, by all cores and machines; killed at any time, it goes on.

A source comes in parts (`records.Part`). Each is tokenized by one worker into a folder of its own under STORE.partial,
moved into place when it is whole, so a later start skips it. When all parts are there they are merged: duplicates are
found by hash and left out, and the rest is copied into STORE. No step holds more than a few parts in memory.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from flax_encoder.data.packing import length_histogram
from flax_encoder.data.records import DataError, Part, Record
from flax_encoder.data.sources import Source
from flax_encoder.data.store import FORMAT, MANIFEST, Store, open_store, partial_folder
from flax_encoder.data.tokenizer import TextTokenizer

SHARD_TOKENS = 2**30
_BATCH_CHARACTERS = 2**18
_HASHES_AT_ONCE = 2**22
_COPIED_AT_ONCE = 2**16  # documents
_POLL_SECONDS = 0.5
_SPLITS = ("train", "test")

Say = Callable[[str], None]


def prepare(
    source: Source,
    tokenizer: TextTokenizer,
    folder: pathlib.Path,
    *,
    held_out_rate: float,
    label_names: list[str] | None = None,
    progress: Say = lambda message: None,
    workers: int | None = None,
    shard: tuple[int, int] = (0, 1),
    wait: bool = False,
) -> Store | None:
    """Tokenize a source into `folder`, or go on where that was interrupted, or find it done.

    Exact duplicates and empty documents are dropped and counted. Held out is the source's own test split, or else
    each document whose hash falls in `held_out_rate`.

    Args:
      label_names: the labels' order, if it is settled already (by the model that will be evaluated).
      workers: processes that tokenize; None is one a core. A source of one part is tokenized by threads instead.
      shard: (i, n) does every n-th part only; machines that share the folder each do one. Whoever is last merges.
      wait: for another process that prepares the same folder, rather than fail.

    Returns:
      The store; None if other shards have not finished their parts.

    Raises:
      DataError: nothing to train on, the folder holds or is becoming another store, the disk is full, a worker died.
    """
    say, progress = progress, unhurried(progress)
    what = (FORMAT, source.fingerprint, tokenizer.hash, held_out_rate, label_names)
    identity = hashlib.sha256(repr(what).encode()).hexdigest()
    if folder.exists():
        return _open_same(folder, identity)
    work = partial_folder(folder)
    try:
        work.mkdir(parents=True, exist_ok=True)
        with _only_here(work / "lock-{}-of-{}".format(*shard), folder, say, wait=wait):
            if folder.exists():  # made while we waited
                return _open_same(folder, identity)
            _settle(work, identity, len(source.parts))
            _tokenize(source, tokenizer, work, held_out_rate, progress, workers, shard)
            if left := [i for i in range(len(source.parts)) if not (work / f"{i:06}").exists()]:
                say(f"{len(left)} of {len(source.parts)} parts are left to the other shards")
                return None
            with _only_here(work / "lock-merge", folder, say, wait=True):
                if not folder.exists():
                    _merge(source, tokenizer, work, identity, label_names, progress)
                    os.rename(work / "store", folder)
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if folder.exists():  # others, of other shards, have finished it under our hands
            return _open_same(folder, identity)
        raise DataError(
            f"prepared text cannot be written: {error.filename or work}: {error.strerror}. The parts that are done are "
            f"kept; the same command goes on from them."
        ) from error
    return open_store(folder)


def unhurried(say: Say) -> Say:
    """Pass on a message a second at most: short work is done in silence."""
    last = time.monotonic()

    def maybe(message: str) -> None:
        nonlocal last
        if time.monotonic() - last >= 1.0:
            last = time.monotonic()
            say(message)

    return maybe


def _open_same(folder: pathlib.Path, identity: str) -> Store:
    store = open_store(folder)
    if store.manifest["identity"] != identity:
        raise DataError(
            f"a store is prepared into a new folder: {folder} holds another text, or one by another tokenizer or "
            f"held-out rate. Name another --out, or delete it."
        )
    return store


@contextlib.contextmanager
def _only_here(path: pathlib.Path, folder: pathlib.Path, progress: Say, *, wait: bool) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise DataError(
                f"one process prepares a store at a time: another is preparing {folder}. Wait for it, name another "
                f"--out, or give each machine its own --shard i/n."
            ) from None
        progress(f"waiting for another process that prepares {folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _settle(work: pathlib.Path, identity: str, num_parts: int) -> None:
    """Leave a note of what is being prepared, or find that it is the same."""
    note = {"identity": identity, "parts": num_parts}
    path = work / "plan.json"
    if not path.exists():
        temporary = work / f"plan.{os.getpid()}"
        temporary.write_text(json.dumps(note))
        os.replace(temporary, path)
    elif json.loads(path.read_text()) != note:
        raise DataError(
            f"an interrupted store can be finished only from what it was begun with: {work} was begun from another "
            f"text, tokenizer or held-out rate. Delete it to start anew."
        )


def _tokenize(
    source: Source, tokenizer: TextTokenizer, work: pathlib.Path, held_out_rate: float, progress: Say,
    workers: int | None, shard: tuple[int, int],
) -> None:  # fmt: skip
    todo = [i for i in range(shard[0], len(source.parts), shard[1]) if not (work / f"{i:06}").exists()]
    # The longest first, so that no worker is left alone with one at the end.
    todo.sort(key=lambda i: -source.parts[i].size)
    total = sum(source.parts[i].size for i in todo)
    rate = 0.0 if source.has_test else held_out_rate
    counts, began, done = (0, 0), time.monotonic(), 0

    def report(documents: int, tokens: int) -> None:
        seconds = time.monotonic() - began
        share = f"{done / total:.0%} of the text, " if 0 < done < total else ""
        progress(f"tokenized {share}{documents:,} documents, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s")

    workers = min(workers or len(os.sched_getaffinity(0)), len(todo))
    if workers <= 1:
        for i in todo:
            base = counts
            for documents, tokens in _tokenize_part(source.parts[i], work / f"{i:06}", tokenizer, rate):
                counts = (base[0] + documents, base[1] + tokens)
                report(*counts)
            done += source.parts[i].size
        return
    # Not forked: a fork of a process with JAX's threads can hang.
    context = multiprocessing.get_context("spawn")
    shared = context.Array("Q", 2)
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.json, shared))
    try:
        waiting = {pool.submit(_tokenize_in_worker, source.parts[i], work / f"{i:06}", rate): i for i in todo}
        while waiting:
            finished, _ = concurrent.futures.wait(waiting, _POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                future.result()
                done += source.parts[waiting.pop(future)].size
            if shared[0]:
                report(*shared)
    except BrokenProcessPool:
        raise DataError(
            f"a worker that tokenizes died, as for want of memory (there are {workers}; --workers sets it). The parts "
            f"that are done are kept; the same command goes on from them."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(tokenizer_json: str, shared: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken by the other workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.update(tokenizer=TextTokenizer(tokenizer_json), shared=shared)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)


def _tokenize_in_worker(part: Part, folder: pathlib.Path, held_out_rate: float) -> None:
    before = (0, 0)
    for now in _tokenize_part(part, folder, _worker["tokenizer"], held_out_rate):
        with _worker["shared"].get_lock():
            for i in range(2):
                _worker["shared"][i] += now[i] - before[i]
        before = now


def _tokenize_part(
    part: Part, folder: pathlib.Path, tokenizer: TextTokenizer, held_out_rate: float
) -> Iterator[tuple[int, int]]:
    """Write a part's folder, whole or not at all; yields (documents, tokens) so far."""
    work = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    dtype = _token_dtype(tokenizer)
    lengths, hashes, is_test, labels, empty = array("I"), bytearray(), bytearray(), [], 0
    num_tokens = 0
    try:
        with (work / "tokens.bin").open("wb") as tokens_file, (work / "words.bin").open("wb") as words_file:
            for batch in _batched(part.read()):
                texts = [record["text"].strip() for record in batch]
                ids, counts, words = tokenizer.encode_flat(texts, dtype)
                tokens_file.write(ids.data)
                words_file.write(words.data)
                num_tokens += len(ids)
                for text, count, record in zip(texts, counts.tolist(), batch, strict=True):
                    if not count:
                        empty += 1
                        continue
                    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
                    lengths.append(count)
                    hashes += digest
                    is_held_out = part.split == "test" or int.from_bytes(digest[:8], "big") / 2**64 < held_out_rate
                    is_test.append(is_held_out)
                    if "label" in record:
                        labels.append(record["label"])
                yield len(lengths), num_tokens
        np.save(work / "lengths.npy", np.frombuffer(lengths, np.uint32))
        np.save(work / "hashes.npy", np.frombuffer(bytes(hashes), "<u8").reshape(-1, 2))
        np.save(work / "is_test.npy", np.frombuffer(bytes(is_test), bool))
        (work / "about.json").write_text(json.dumps({"empty": empty, "labels": labels}))
        try:
            os.rename(work, folder)
        except OSError:
            if not folder.exists():  # if another shard of other bounds was first, its part is the same
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _token_dtype(tokenizer: TextTokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def _batched(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch, characters = [], 0
    for record in records:
        batch.append(record)
        characters += len(record["text"])
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _merge(
    source: Source, tokenizer: TextTokenizer, work: pathlib.Path, identity: str, label_names: list[str] | None,
    progress: Say,
) -> None:  # fmt: skip
    """All parts to work/store. Killed half-way it is done again: it only copies."""
    parts = [work / f"{i:06}" for i in range(len(source.parts))]
    store = work / "store"
    shutil.rmtree(store, ignore_errors=True)
    about = [json.loads((part / "about.json").read_text()) for part in parts]
    labels = [label for a in about for label in a["labels"]]
    if source.label_names is not None:  # its integers are indices of its own names
        known = dict(enumerate(source.label_names))
        labels = [known.get(label, label) for label in labels]
    names = label_names or source.label_names or _label_names(labels)
    ids = _label_ids(labels, names) if names is not None else None
    counts = [len(np.load(part / "lengths.npy", mmap_mode="r")) for part in parts]
    keep = _first_of_each(parts, counts, work / "keep.bin", progress)
    is_test = np.concatenate([np.load(part / "is_test.npy") for part in parts] or [np.zeros(0, bool)])
    kept = {"train": int((keep & ~is_test).sum()), "test": int((keep & is_test).sum())}
    if not kept["train"]:
        raise DataError("the source must have at least one document to train on: every one was empty or held out.")

    writers = {split: _SplitWriter(store / split, kept[split], _token_dtype(tokenizer)) for split in _SPLITS}
    starts = np.cumsum([0, *counts])
    for number, part in enumerate(parts):
        progress(f"writing the store: part {number + 1:,} of {len(parts):,}")
        lengths = np.load(part / "lengths.npy", mmap_mode="r")
        if not len(lengths):
            continue
        tokens = np.memmap(part / "tokens.bin", _token_dtype(tokenizer), "r")
        words = np.memmap(part / "words.bin", bool, "r")
        at = 0
        for begin in range(0, len(lengths), _COPIED_AT_ONCE):
            some = slice(begin, begin + _COPIED_AT_ONCE)
            num_tokens = int(lengths[some].sum(dtype=np.int64))
            chunk = slice(at, at + num_tokens)
            here = slice(starts[number] + begin, starts[number] + begin + len(lengths[some]))
            for split, writer in writers.items():
                chosen = keep[here] & (is_test[here] == (split == "test"))
                writer.write(tokens[chunk], words[chunk], lengths[some], chosen)
            at += num_tokens
    if ids is not None:
        for split in _SPLITS:
            np.save(store / split / "labels.npy", ids[keep & (is_test == (split == "test"))])
    files: dict[str, dict] = {}
    for split, writer in writers.items():
        for path, size, digest in writer.close():
            files[f"{split}/{path.name}"] = {"bytes": size, "sha256": digest}
    for split in _SPLITS:
        offsets = np.load(store / split / "offsets.npy", mmap_mode="r")
        np.save(store / split / "histogram.npy", length_histogram(offsets))
    (store / "tokenizer.json").write_text(tokenizer.json, "utf-8")
    for path in [store / "tokenizer.json", *sorted(store.glob("*/*.npy"))]:
        with path.open("rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        files[path.relative_to(store).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    manifest = {
        "format": FORMAT,
        "identity": identity,
        "source": source.fingerprint,
        "tokenizer": tokenizer.hash,
        "dtype": _token_dtype(tokenizer).name,
        "dropped": {"empty": sum(a["empty"] for a in about), "duplicate": int(len(keep) - keep.sum())},
        "label_names": names,
        "splits": {
            split: {"documents": kept[split], "tokens": w.num_tokens, "shards": w.num_shards}
            for split, w in writers.items()
        },
        "files": files,
    }
    with (store / MANIFEST).open("w", encoding="utf-8") as f:
        f.write(json.dumps(manifest, indent=1))
        f.flush()
        os.fsync(f.fileno())


def _first_of_each(parts: list[pathlib.Path], counts: list[int], path: pathlib.Path, progress: Say) -> np.ndarray:
    """Whether each document is the first of its text, [documents]; by their hashes, a range of these at a time."""
    total = sum(counts)
    if not total:
        return np.zeros(0, bool)
    keep = np.memmap(path, bool, "w+", shape=(total,))
    keep[:] = True
    bits = max(0, int(np.ceil(np.log2(total / _HASHES_AT_ONCE))))
    for bucket in range(2**bits):
        progress(f"looking for duplicates: {bucket + 1} of {2**bits}")
        hashes, index, at = [], [], 0
        for part, count in zip(parts, counts, strict=True):
            some = np.load(part / "hashes.npy", mmap_mode="r")
            mine = np.arange(count) if not bits else np.flatnonzero(some[:, 0] >> np.uint64(64 - bits) == bucket)
            hashes.append(some[mine])
            index.append(at + mine)
            at += count
        all_hashes, all_index = np.concatenate(hashes), np.concatenate(index)
        order = np.lexsort((all_hashes[:, 1], all_hashes[:, 0]))  # stable: the first stays first
        ordered = all_hashes[order]
        keep[all_index[order[1:][(ordered[1:] == ordered[:-1]).all(1)]]] = False
    return keep


class _SplitWriter:
    """A split's files, written from their start to their end."""

    def __init__(self, folder: pathlib.Path, documents: int, dtype: np.dtype):
        folder.mkdir(parents=True)
        self._folder, self._dtype = folder, dtype
        self._offsets = np.lib.format.open_memmap(folder / "offsets.npy", "w+", np.int64, (documents + 1,))
        self._offsets[0] = 0
        self._documents = self.num_tokens = self.num_shards = self._in_shard = 0
        self._files: dict[str, tuple[BinaryIO, Any]] = {}
        self._bits = np.zeros(0, bool)  # of words, fewer than fill a byte
        self._closed: list[tuple[pathlib.Path, int, str]] = []

    def write(self, tokens: np.ndarray, words: np.ndarray, lengths: np.ndarray, chosen: np.ndarray) -> None:
        """Append those documents that are chosen."""
        if not chosen.any():
            return
        if not chosen.all():
            of_token = np.repeat(chosen, lengths)
            tokens, words, lengths = tokens[of_token], words[of_token], lengths[chosen]
        if not self._files or self._in_shard + len(tokens) > SHARD_TOKENS:
            self._end_shard()
            for kind in ("tokens", "words"):
                path = self._folder / f"{kind}-{self.num_shards:05}.bin"
                self._files[kind] = (path.open("wb"), hashlib.sha256())
            self.num_shards += 1
        ends = self.num_tokens + np.cumsum(lengths, dtype=np.int64)
        self._offsets[self._documents + 1 : self._documents + 1 + len(lengths)] = ends
        self._documents += len(lengths)
        self.num_tokens += len(tokens)
        self._in_shard += len(tokens)
        self._put("tokens", np.ascontiguousarray(tokens, self._dtype))
        words = np.concatenate([self._bits, words])
        whole = len(words) // 8 * 8
        self._put("words", np.packbits(words[:whole], bitorder="little"))
        self._bits = words[whole:]

    def _put(self, kind: str, data: np.ndarray) -> None:
        file, digest = self._files[kind]
        file.write(data.data)
        digest.update(data.data)

    def _end_shard(self) -> None:
        if not self._files:
            return
        self._put("words", np.packbits(self._bits, bitorder="little"))
        for file, digest in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            self._closed.append((pathlib.Path(file.name), file.tell(), digest.hexdigest()))
            file.close()
        self._files, self._bits, self._in_shard = {}, np.zeros(0, bool), 0

    def close(self) -> list[tuple[pathlib.Path, int, str]]:
        """(path, bytes, SHA-256) of every token file."""
        self._end_shard()
        self._offsets.flush()
        return self._closed


def _label_names(labels: list) -> list[str] | None:
    """Labels of a source that names none, in order: numbers by size, anything else by spelling."""
    values = set(labels)
    if values <= {None}:
        return None
    is_number = all(isinstance(v, int) for v in values)
    return [str(v) for v in sorted(values)] if is_number else sorted({str(v) for v in values - {None}})


def _label_ids(labels: list, names: list[str]) -> np.ndarray:
    by_name = {name: i for i, name in enumerate(names)}
    for label in labels:
        if label is None:
            raise DataError("every document must have a label: some have none.")
        if str(label) not in by_name:
            raise DataError(f"unknown label {label!r}; known are {', '.join(names)}.")
    return np.array([by_name[str(label)] for label in labels], np.int32)
