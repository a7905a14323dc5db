"""Parts to a store: duplicates found and left out, the rest copied into shards."""

import hashlib
import json
import os
import pathlib
import shutil
from typing import Any, BinaryIO

import numpy as np

from flax_encoder.data.rows.packing import length_histogram
from flax_encoder.data.sources.opening import Source
from flax_encoder.data.sources.records import DataError, LabelError, Say
from flax_encoder.data.store.store import FORMAT, MANIFEST
from flax_encoder.data.store.tokenizing import token_dtype
from flax_encoder.data.tokens.tokenizer import TextTokenizer

SHARD_TOKENS = 2**30
_HASHES_AT_ONCE = 2**22
_COPIED_AT_ONCE = 2**16  # documents
_SPLITS = ("train", "test")


def merge_parts(
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

    writers = {split: _SplitWriter(store / split, kept[split], token_dtype(tokenizer)) for split in _SPLITS}
    starts = np.cumsum([0, *counts])
    for number, part in enumerate(parts):
        progress(f"writing the store: part {number + 1:,} of {len(parts):,}")
        lengths = np.load(part / "lengths.npy", mmap_mode="r")
        if not len(lengths):
            continue
        tokens = np.memmap(part / "tokens.bin", token_dtype(tokenizer), "r")
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
        "source": source.name,
        "fingerprint": source.fingerprint,
        "tokenizer": tokenizer.hash,
        "dtype": token_dtype(tokenizer).name,
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
            raise LabelError(f"unknown label {label!r}; known are {', '.join(names)}.")
    return np.array([by_name[str(label)] for label in labels], np.int32)
