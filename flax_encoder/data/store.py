"""Tokenized documents on disk: flat tokens plus offsets, read by memory map.

STORE/manifest.json         counts, hashes, label names
STORE/{train,test}/tokens.bin    uint16 or uint32, all documents end to end
STORE/{train,test}/offsets.npy   int64 [documents + 1]
STORE/{train,test}/labels.npy    int32 [documents], where the source is labelled
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from flax_encoder.data.sources import DataError, Record, Source
from flax_encoder.data.tokenizer import TextTokenizer

_FORMAT = 1
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class Split:
    """Documents [offsets[i], offsets[i + 1]) of `tokens`, without special tokens."""

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray | None = None

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Store:
    train: Split
    test: Split
    manifest: dict

    @property
    def label_names(self) -> list[str] | None:
        return self.manifest["label_names"]


def prepare(
    source: Source,
    tokenizer: TextTokenizer,
    held_out_rate: float,
    cache_dir: pathlib.Path,
    progress: Callable[[str], None] = lambda message: None,
    label_names: list[str] | None = None,
) -> Store:
    """Tokenize a source into the cache, or find it there; a store is whole or absent, whenever the program dies.

    Exact duplicates and empty documents are dropped and counted. Held out is the source's own test split, or else
    each document whose hash falls in `held_out_rate`.

    Args:
      label_names: the labels' order, if it is settled already (by the model that will be evaluated).
    """
    identity = repr((_FORMAT, source.fingerprint, tokenizer.hash, held_out_rate, label_names))
    folder = cache_dir / "stores" / hashlib.sha256(identity.encode()).hexdigest()[:24]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = pathlib.Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
        try:
            _write(work, source, tokenizer, held_out_rate, label_names, progress)
            _move(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return open_store(folder)


def _move(work: pathlib.Path, folder: pathlib.Path) -> None:
    """Move a finished folder into place; if another process was first, its identical one stays."""
    try:
        os.rename(work, folder)
    except OSError:
        if not folder.exists():
            raise


def open_store(folder: pathlib.Path) -> Store:
    """Map a store's files.

    Raises:
      DataError: a file is missing, damaged, or does not fit the manifest.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return Store(_open_split(folder / "train", manifest), _open_split(folder / "test", manifest), manifest)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"prepared text is damaged: {error}. Delete {folder}; it is made again.") from error


def _open_split(folder: pathlib.Path, manifest: dict) -> Split:
    counts = manifest["splits"][folder.name]
    offsets = np.load(folder / "offsets.npy", mmap_mode="r")
    path, dtype = folder / "tokens.bin", np.dtype(manifest["dtype"])
    expected = counts["tokens"] * dtype.itemsize
    if (size := path.stat().st_size) != expected or len(offsets) != counts["documents"] + 1:
        raise DataError(
            f"a prepared file does not fit its manifest: {path} has {size} bytes, expected {expected}. "
            f"Delete {folder.parent}; it is made again."
        )
    tokens = np.memmap(path, dtype, "r") if expected else np.zeros(0, dtype)
    labels = np.load(folder / "labels.npy") if manifest["label_names"] is not None else None
    return Split(tokens, offsets, labels)


def _write(work, source: Source, tokenizer: TextTokenizer, held_out_rate, label_names, progress) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    dropped = {"empty": 0, "duplicate": 0}
    seen: set[bytes] = set()
    lengths: dict[str, list[int]] = {"train": [], "test": []}
    labels: dict[str, list] = {"train": [], "test": []}
    with contextlib.ExitStack() as stack:
        files = {}
        for split in lengths:
            (work / split).mkdir()
            files[split] = stack.enter_context((work / split / "tokens.bin").open("wb"))
        for split, records in source.splits.items():
            for batch in _batched(records(), _BATCH_DOCUMENTS):
                kept = []
                for record in batch:
                    text = record["text"].strip()
                    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
                    if not text or digest in seen:
                        dropped["duplicate" if text else "empty"] += 1
                        continue
                    seen.add(digest)
                    is_held_out = "test" not in source.splits and _share(digest) < held_out_rate
                    kept.append((text, "test" if is_held_out else split, record.get("label")))
                for (_, to, label), ids in zip(kept, tokenizer.encode_batch([text for text, *_ in kept]), strict=True):
                    if not len(ids):
                        dropped["empty"] += 1
                        continue
                    files[to].write(ids.astype(dtype).tobytes())
                    lengths[to].append(len(ids))
                    labels[to].append(label)
                documents, tokens = sum(map(len, lengths.values())), sum(map(sum, lengths.values()))
                progress(f"tokenized {documents:,} documents, {tokens:,} tokens")
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    if not lengths["train"]:
        raise DataError("the source must have at least one document to train on: every one was empty or held out.")
    if source.label_names is not None:  # its integers are indices of its own names
        known = dict(enumerate(source.label_names))
        labels = {split: [known.get(label, label) for label in values] for split, values in labels.items()}
    names = label_names or source.label_names or _names(labels)
    for split in lengths:
        np.save(work / split / "offsets.npy", np.concatenate([[0], np.cumsum(lengths[split], dtype=np.int64)]))
        if names is not None:
            np.save(work / split / "labels.npy", _label_ids(labels[split], names))
    manifest = {
        "format": _FORMAT,
        "source": source.fingerprint,
        "tokenizer": tokenizer.hash,
        "dtype": dtype.name,
        "dropped": dropped,
        "label_names": names,
        "splits": {s: {"documents": len(n), "tokens": sum(n)} for s, n in lengths.items()},
    }
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _batched(records: Iterator[Record], size: int) -> Iterator[list[Record]]:
    while batch := list(itertools.islice(records, size)):
        yield batch


def _share(digest: bytes) -> float:
    return int.from_bytes(digest[:8], "big") / 2**64


def _names(labels: dict[str, list]) -> list[str] | None:
    """Labels of a source that names none, in order: numbers by size, anything else by spelling."""
    values = set(labels["train"]) | set(labels["test"])
    if values == {None}:
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
