"""Parts to a store: duplicates found and left out, the rest copied into shards."""

import hashlib
import json
import os
import pathlib
import shutil
from typing import Any, BinaryIO

import numpy as np

from flax_encoder.data.rows.packing import length_histogram
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.opening import Source
from flax_encoder.data.sources.records import DataError, LabelError, Say, SoftLabel, shares_of
from flax_encoder.data.store.encoding import join_text_lengths, other_number_of_texts
from flax_encoder.data.store.store import FORMAT, MANIFEST
from flax_encoder.data.store.tokenizing import MOST_HELD_OUT, SPLITS, HeldOut, token_dtype
from flax_encoder.data.tokens.tokenizer import TextTokenizer

SHARD_TOKENS = 2**30
_HASHES_AT_ONCE = 2**22
_COPIED_AT_ONCE = 2**16  # documents


def merge_parts(
    source: Source, tokenizer: TextTokenizer, work: pathlib.Path, identity: str, columns: Columns,
    label_names: list[str] | None, held_out: HeldOut, progress: Say,
) -> None:  # fmt: skip
    """All parts to work/store. Killed half-way it is done again: it only copies."""
    parts = [work / f"{i:06}" for i in range(len(source.parts))]
    store = work / "store"
    shutil.rmtree(store, ignore_errors=True)
    about = [json.loads((part / "about.json").read_text()) for part in parts]
    counts = [len(np.load(part / "lengths.npy", mmap_mode="r")) for part in parts]
    values = [SoftLabel(value) if isinstance(value, dict) else value for a in about for value in a["values"]]
    codes = _joined(parts, "splits.npy", np.zeros(0, np.uint8))
    if held_out.by_class:
        codes = _held_out_by_class(codes, _joined(parts, "text_hashes.npy"), values, held_out.rate)
    if not (codes == 1).any():  # a source with one set for evaluation has it for every evaluation
        codes[codes == 2] = 1
    keep = _first_of_each(parts, counts, work / "keep.bin", progress)
    if held_out.keep_all:
        keep[codes > 0] = True
    kept = {split: int((keep & (codes == k)).sum()) for k, split in enumerate(SPLITS)}
    if not kept["train"]:
        raise DataError(
            f"the source must have at least one document to train on: every one of {source.name} was empty or held out."
        )
    if not kept["test"]:
        del kept["test"]
    names = label_names or _names(columns, source, values, [a["tags"] for a in about])
    columns_of_values = _values(source, columns, values, names)
    has_names = columns.value == "class" and not columns.is_choice
    if has_names and label_names is None and (source.has_held_out or held_out.by_class):
        _check_seen_in_training(source, columns_of_values["labels"], keep & (codes == 0), names)
    for name in ("answers", "text_lengths", "text_keys"):
        if any((part / f"{name}.npy").exists() for part in parts):
            if name == "text_lengths":
                if not columns.is_choice:
                    _check_as_many_texts(source, parts)
                column = join_text_lengths([np.load(part / "text_lengths.npy") for part in parts])
            else:
                column = _joined(parts, f"{name}.npy")
            if column.shape[1] > 1 or name == "text_keys":
                columns_of_values[name] = column

    kinds = ("tokens", "words", *(("tags",) if columns.value == "tags" else ()))
    writers = {s: _SplitWriter(store / s, n, tokenizer, kinds) for s, n in kept.items()}
    starts = np.cumsum([0, *counts])
    for number, part in enumerate(parts):
        progress(f"writing the store: part {number + 1:,} of {len(parts):,}")
        lengths = np.load(part / "lengths.npy", mmap_mode="r")
        if not len(lengths):
            continue
        streams = {"tokens": np.memmap(part / "tokens.bin", token_dtype(tokenizer), "r")}
        streams["words"] = np.memmap(part / "words.bin", bool, "r")
        if "tags" in kinds:
            streams["tags"] = _renumbered(np.fromfile(part / "tags.bin", np.int16), about[number]["tags"], names)
        at = 0
        for begin in range(0, len(lengths), _COPIED_AT_ONCE):
            some = slice(begin, begin + _COPIED_AT_ONCE)
            num_tokens = int(lengths[some].sum(dtype=np.int64))
            chunk = {kind: stream[at : at + num_tokens] for kind, stream in streams.items()}
            here = slice(starts[number] + begin, starts[number] + begin + len(lengths[some]))
            for split, writer in writers.items():
                writer.write(chunk, lengths[some], keep[here] & (codes[here] == SPLITS.index(split)))
            at += num_tokens
    for split in kept:
        for name, column in columns_of_values.items():
            np.save(store / split / f"{name}.npy", column[keep & (codes == SPLITS.index(split))])
    files: dict[str, dict] = {}
    for split, writer in writers.items():
        for path, size, digest in writer.close():
            files[f"{split}/{path.name}"] = {"bytes": size, "sha256": digest}
    for split, writer in writers.items():
        if kept[split] and not writer.num_predictable:
            raise DataError(
                f"a text must have tokens that a model can predict: of the {writer.num_tokens:,} in the {split} split "
                f"of {source.name} {writer.num_unknown:,} are unknown and the others special. Give the tokenizer of "
                f"this text as --data.tokenizer, or none, and one is trained on it"
                f"{'.' if split == 'train' else '; or hold out more, by --data.held-out-rate.'}"
            )
    for split in kept:
        offsets = np.load(store / split / "offsets.npy", mmap_mode="r")
        np.save(store / split / "histogram.npy", length_histogram(offsets))
    (store / "tokenizer.json").write_text(tokenizer.json, "utf-8")
    for path in [store / "tokenizer.json", *sorted(store.glob("*/*.npy"))]:
        with path.open("rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        files[path.relative_to(store).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    rare = {"also held out": sum(a["excluded"] for a in about), "bad rows": sum(a["bad"] for a in about)}
    manifest = {
        "format": FORMAT,
        "identity": identity,
        "source": source.name,
        "fingerprint": source.fingerprint,
        "tokenizer": tokenizer.hash,
        "dtype": token_dtype(tokenizer).name,
        "value": columns.value,
        "pair": source.pair,
        "prompts": list(columns.prompts),
        **({} if columns.turn_separator is None else {"turn_separator": columns.turn_separator}),
        "dropped": {"empty": sum(a["empty"] for a in about), "duplicate": int(len(keep) - keep.sum())}
        | {name: count for name, count in rare.items() if count},
        "contradictory": _contradictory(parts) if columns.value != "none" else 0,
        "unread_words": sum(a["unread_words"] for a in about),
        "label_names": names,
        "splits": {
            split: {
                "documents": kept[split], "tokens": w.num_tokens, "unknown": w.num_unknown, "shards": w.num_shards,
            }
            for split, w in writers.items()
        },
        "files": files,
    }
    with (store / MANIFEST).open("w", encoding="utf-8") as f:
        f.write(json.dumps(manifest, indent=1))
        f.flush()
        os.fsync(f.fileno())


def _joined(parts: list[pathlib.Path], name: str, empty: np.ndarray | None = None) -> np.ndarray:
    """A column of all parts, [documents, ...]."""
    found = [np.load(part / name) for part in parts if (part / name).exists()]
    filled = [column for column in found if len(column)]  # one without documents cannot tell how many texts they have
    return np.concatenate(filled or found[:1]) if found else np.asarray(empty)


def _check_as_many_texts(source: Source, parts: list[pathlib.Path]) -> None:
    """Of documents in different parts; those of one are checked where they are tokenized."""
    widths = [np.load(part / "text_lengths.npy", mmap_mode="r").shape for part in parts]
    filled = {i: width for i, (count, width) in enumerate(widths) if count}
    usual = next(iter(filled.values()), 0)
    if other := next((i for i, width in filled.items() if width != usual), None):
        raise other_number_of_texts(next(iter(source.parts[other].read())), usual)


def _held_out_by_class(codes: np.ndarray, hashes: np.ndarray, values: list[str], rate: float) -> np.ndarray:
    """The split of each document, uint8 [documents], test documents left as they are: of every class the share `rate`
    with the least hashes, at least one of two or more, and none with a hash past twice the rate, which may have trained
    the tokenizer."""
    order = hashes[:, 0].byteswap() / 2.0**64  # as `is_held_out` reads a digest
    is_test = codes == SPLITS.index("test")
    codes = np.where(is_test, codes, 0).astype(np.uint8)
    _, class_of = np.unique(np.array([str(v) for v in values], object).astype(str), return_inverse=True)
    for k in range(int(class_of.max(initial=-1)) + 1):
        own = np.flatnonzero((class_of == k) & ~is_test)
        wanted = max(1, round(rate * len(own))) if len(own) > 1 and rate else 0
        if wanted:
            last = np.sort(order[own])[wanted - 1]
            codes[own[(order[own] <= last) & (order[own] < MOST_HELD_OUT * rate)]] = 1
    # The same text goes to one side, whatever its labels.
    held = order[codes == 1]
    codes[np.isin(order, held) & ~is_test] = 1
    return codes


def _contradictory(parts: list[pathlib.Path]) -> int:
    """How many texts occur with more than one value."""
    texts = _joined(parts, "text_hashes.npy", np.zeros((0, 2), np.uint64))[:, 0]
    records = _joined(parts, "hashes.npy", np.zeros((0, 2), np.uint64))[:, 0]
    pairs = np.unique(np.stack([texts, records], 1), axis=0)
    return int((np.unique(pairs[:, 0], return_counts=True)[1] > 1).sum())


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

    def __init__(self, folder: pathlib.Path, documents: int, tokenizer: TextTokenizer, kinds: tuple[str, ...]):
        folder.mkdir(parents=True)
        self._folder, self._dtype, self._kinds = folder, token_dtype(tokenizer), kinds
        self._unknown = tokenizer.unknown_id
        self._is_predictable = np.ones(tokenizer.vocab_size, bool)
        self._is_predictable[tokenizer.special_ids] = False
        self.num_unknown = self.num_predictable = 0
        self._offsets = np.lib.format.open_memmap(folder / "offsets.npy", "w+", np.int64, (documents + 1,))
        self._offsets[0] = 0
        self._documents = self.num_tokens = self.num_shards = self._in_shard = 0
        self._files: dict[str, tuple[BinaryIO, Any]] = {}
        self._bits = np.zeros(0, bool)  # of words, fewer than fill a byte
        self._closed: list[tuple[pathlib.Path, int, str]] = []

    def write(self, streams: dict[str, np.ndarray], lengths: np.ndarray, chosen: np.ndarray) -> None:
        """Append those documents that are chosen; every stream has an entry a token."""
        if not chosen.any():
            return
        if not chosen.all():
            of_token = np.repeat(chosen, lengths)
            streams, lengths = {kind: stream[of_token] for kind, stream in streams.items()}, lengths[chosen]
        tokens = streams["tokens"]
        self.num_unknown += 0 if self._unknown is None else int(np.count_nonzero(tokens == self._unknown))
        self.num_predictable += int(np.count_nonzero(self._is_predictable[tokens]))
        num_tokens = len(tokens)
        if not self._files or self._in_shard + num_tokens > SHARD_TOKENS:
            self._end_shard()
            for kind in self._kinds:
                path = self._folder / f"{kind}-{self.num_shards:05}.bin"
                self._files[kind] = (path.open("wb"), hashlib.sha256())
            self.num_shards += 1
        ends = self.num_tokens + np.cumsum(lengths, dtype=np.int64)
        self._offsets[self._documents + 1 : self._documents + 1 + len(lengths)] = ends
        self._documents += len(lengths)
        self.num_tokens += num_tokens
        self._in_shard += num_tokens
        self._put("tokens", np.ascontiguousarray(streams["tokens"], self._dtype))
        if "tags" in streams:
            self._put("tags", np.ascontiguousarray(streams["tags"]))
        words = np.concatenate([self._bits, streams["words"]])
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


def _names(columns: Columns, source: Source, values: list, tags: list[list[str]]) -> list[str] | None:
    """The labels' names in order: those of the source, else numbers by size, anything else by spelling."""
    if columns.value == "tags":
        found = {name for names in tags for name in names}
        return source.label_names or sorted(found, key=lambda name: (name != "O", name))
    if columns.value not in ("class", "classes") or columns.is_choice:
        return None
    if source.label_names is not None:
        return source.label_names
    listed = (shares_of(value) if columns.value == "class" else value for value in values if value is not None)
    found = {name for some in listed for name in some}
    is_number = all(name.lstrip("-").isdecimal() for name in found)
    return sorted(found, key=(lambda name: int(name)) if is_number else None) or None


def _values(source: Source, columns: Columns, values: list, names: list[str] | None) -> dict[str, np.ndarray]:
    """The documents' values as a column: `labels` int32 [N], with `shares` float32 [N, C] where any label is soft,
    `classes` uint8 [N, C] or `number` float32 [N].

    Raises:
      DataError: a document without a value. LabelError: a label that is not among the names; both name the record.
    """

    def first_with(value) -> str:
        records = (record for part in source.parts for record in part.read())
        found = (r.where for r in records if r.value == value or (isinstance(r.value, tuple) and value in r.value))
        return next(found, "") or "a record"

    if columns.is_optional:
        numbers = np.array([np.nan if value is None else value for value in values], np.float32)
        return {} if np.isnan(numbers).all() else {"number": numbers}
    if any(value is None for value in values):
        what = "number" if columns.value == "number" else "label"
        raise DataError(f"every document must have a {what}: {first_with(None)} has none.")
    if columns.value == "number":
        return {"number": np.array(values, np.float32)}
    if columns.value not in ("class", "classes"):
        return {}
    if columns.is_choice:
        names = [str(i) for i in range(columns.max_texts - 1)]
    ids = {name: i for i, name in enumerate(names or [])}
    listed = [shares_of(value) for value in values] if columns.value == "class" else values
    if unknown := next((name for some in listed for name in some if name not in ids), None):
        raise LabelError(f"unknown label {unknown!r} in {first_with(unknown)}; known are {', '.join(ids)}.")
    if columns.value == "class":
        made = {"labels": np.array([ids[value] for value in values], np.int32)}
        if any(isinstance(value, SoftLabel) for value in values):
            made["shares"] = np.zeros((len(values), len(ids)), np.float32)
            for row, shares in zip(made["shares"], listed, strict=True):
                row[[ids[name] for name in shares]] = list(shares.values())
        return made
    classes = np.zeros((len(values), len(ids)), np.uint8)
    for row, some in zip(classes, values, strict=True):
        row[[ids[name] for name in some]] = 1
    return {"classes": classes}


def _check_seen_in_training(source: Source, labels: np.ndarray, is_train: np.ndarray, names: list[str] | None) -> None:
    unseen = np.setdiff1d(labels[~is_train], labels[is_train])
    if len(unseen):
        name = (names or [])[unseen[0]]
        found = (r.where for part in source.parts if part.split != "train" for r in part.read() if r.value == name)
        where = next(found, "") or "a held-out record"
        raise LabelError(f"every label must occur in training: {name!r} of {where} does not.")


def _renumbered(tags: np.ndarray, own: list[str], names: list[str] | None) -> np.ndarray:
    """A part's tags by the numbers of the store's names; `Encoded.tags` says how they are written."""
    ids = {name: i for i, name in enumerate(names or [])}
    if unknown := next((name for name in own if name not in ids), None):
        raise LabelError(f"unknown tag {unknown!r}; known are {', '.join(ids)}.")
    table = np.array([0, *(ids[name] + 1 for name in own)], np.int16)
    return np.sign(tags) * table[np.abs(tags)]
