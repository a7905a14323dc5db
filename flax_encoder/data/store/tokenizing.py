"""Texts to tokens, a part of a source at a time, by all cores; each part's folder is whole or not there.

A part's folder has its documents one after the other: `tokens.bin`, `words.bin` (whether a token starts a word),
`lengths.npy`, `hashes.npy` (of records, 128 bits), `splits.npy` (an index in SPLITS) and `about.json` (values, names of
tags, empty documents); where there are values `text_hashes.npy`, of several texts `text_lengths.npy`, and `tags.bin`
or `answers.npy` where these are the values, and `text_keys.npy` where texts are compared (`encoding.Encoded` says how).
`sums.json` has their SHA-256.
"""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import pickle
import shutil
import socket
import time
from array import array
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np

from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.opening import Source
from flax_encoder.data.sources.records import DataError, Part, Record, Say, SoftLabel
from flax_encoder.data.store.encoding import (
    Encoded,
    encode_records,
    exact_texts,
    held_out_text,
    join_text_lengths,
    other_number_of_texts,
)
from flax_encoder.data.tokens.tokenizer import TextTokenizer
from flax_encoder.data.workers import serve_parent, without_main_module

THIS_PROCESS = f"{socket.gethostname()}.{os.getpid()}"
_BATCH_CHARACTERS = 2**18
_POLL_SECONDS = 0.5
SPLITS = ("train", "validation", "test")
SUMS = "sums.json"  # of a part's other files
MOST_HELD_OUT = 2  # times the rate of held-out documents: no class has texts held out whose hash lies beyond


class HeldOut(NamedTuple):
    """What is kept for evaluation of a source that has no documents for it of its own."""

    rate: float
    """Share of the documents, chosen by a hash of their texts."""
    by_class: bool = False
    """Whether every class keeps its share."""
    keep_all: bool = False
    """Whether documents for evaluation are kept when they are duplicates: those of a split or a file that is there for
    it, of which results are published."""
    excluded: frozenset[bytes] = frozenset()
    """Digests of texts that others evaluate on: training leaves them out."""


def tokenize_parts(
    source: Source, tokenizer: TextTokenizer, work: pathlib.Path, columns: Columns, held_out: HeldOut, progress: Say,
    workers: int | None, shard: tuple[int, int],
) -> None:  # fmt: skip
    todo = [i for i in range(shard[0], len(source.parts), shard[1]) if not (work / f"{i:06}").exists()]
    # The longest first, so that no worker is left alone with one at the end.
    todo.sort(key=lambda i: -source.parts[i].size)
    total = sum(source.parts[i].size for i in todo)
    if source.has_held_out:
        held_out = held_out._replace(rate=0.0)
    counts, began, done = (0, 0), time.monotonic(), 0

    def report(documents: int, tokens: int) -> None:
        seconds = time.monotonic() - began
        share = f"{done / total:.0%} of the text, " if 0 < done < total else ""
        progress(f"tokenized {share}{documents:,} documents, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s")

    cores = num_cores()
    workers = 1 if any(part.is_local for part in source.parts) else min(workers or cores, len(todo))
    if workers <= 1:
        for i in todo:
            base = counts
            for documents, tokens in _tokenize_part(source.parts[i], work / f"{i:06}", tokenizer, columns, held_out):
                counts = (base[0] + documents, base[1] + tokens)
                report(*counts)
            done += source.parts[i].size
        return
    # Not forked: a fork of a process with JAX's threads can hang.
    context = multiprocessing.get_context("spawn")
    shared = context.Array("Q", 3)  # documents, tokens, and whether to stop
    settings = (tokenizer.json, held_out, shared, cores // workers)
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, settings)
    # A part of the program's own making can only be read where its main module has run.
    is_of_main = any(b"__main__" in pickle.dumps((part, columns)) for part in source.parts)
    try:
        with contextlib.nullcontext() if is_of_main else without_main_module():
            waiting = {pool.submit(_tokenize_in_worker, source.parts[i], work / f"{i:06}", columns): i for i in todo}
        while waiting:
            finished, _ = concurrent.futures.wait(waiting, _POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                future.result()
                done += source.parts[waiting.pop(future)].size
            if shared[0]:
                report(*shared[:2])
    except BrokenProcessPool:
        unguarded = ", or because the program does its work outside `if __name__ == '__main__':`" if is_of_main else ""
        raise DataError(
            f"a worker that tokenizes died, as for want of memory (there are {workers}; --workers sets it){unguarded}. "
            f"The parts that are done are kept; the same command goes on from them."
        ) from None
    except BaseException:
        shared[2] = 1  # else every worker would end its part first, which can be a whole compressed file
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(tokenizer_json: str, held_out: HeldOut, shared: Any, threads: int) -> None:
    # What cores the other workers leave: with a few large files, several each.
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(max(1, threads))
    serve_parent()
    _worker.update(tokenizer=TextTokenizer(tokenizer_json), held_out=held_out, shared=shared)


def _tokenize_in_worker(part: Part, folder: pathlib.Path, columns: Columns) -> None:
    before = (0, 0)
    for now in _tokenize_part(part, folder, _worker["tokenizer"], columns, _worker["held_out"]):
        with _worker["shared"].get_lock():
            for i in range(2):
                _worker["shared"][i] += now[i] - before[i]
        if _worker["shared"][2]:
            raise InterruptedError("another part could not be read, or all are to stop")
        before = now


def _tokenize_part(
    part: Part, folder: pathlib.Path, tokenizer: TextTokenizer, columns: Columns, held_out: HeldOut
) -> Iterator[tuple[int, int]]:
    """Write a part's folder, whole or not at all; yields (documents, tokens) so far."""
    work = folder.with_name(f"{folder.name}.{THIS_PROCESS}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    dtype = token_dtype(tokenizer)
    has_value, is_written = columns.value != "none", columns.value == "text"
    has_texts = columns.max_texts > 1 or is_written
    kinds = ("tokens", "words", *(("tags",) if columns.value == "tags" else ()))
    lengths, hashes, text_hashes, splits = array("I"), bytearray(), bytearray(), bytearray()
    text_lengths, text_keys, answers, values, tag_ids = [], [], [], [], {}
    is_listed = columns.value in ("class", "classes", "number")
    empty = excluded = unread = num_tokens = 0
    bad_rows: list[int] = []
    try:
        with contextlib.ExitStack() as stack:
            files = {kind: stack.enter_context((work / f"{kind}.bin").open("wb")) for kind in kinds}
            for batch in _batched(_counted(part, bad_rows)):
                encoded = encode_records(batch, tokenizer, columns, tag_ids, dtype)
                keep = _is_document(encoded, columns)
                unread += encoded.unread_words
                empty += int((~keep).sum())
                texts = ["\x1e".join(exact_texts(record, columns)) for record in batch]
                digests = [text_digest(text) for text in texts]
                sides = digests
                if any(record.group is not None for record in batch):
                    sides = [text_digest(held_out_text(record, columns)) for record in batch]
                if held_out.excluded and part.split == "train":
                    is_excluded = np.array([side in held_out.excluded for side in sides])
                    excluded += int((keep & is_excluded).sum())
                    keep &= ~is_excluded
                of_token = slice(None) if keep.all() else np.repeat(keep, encoded.lengths)
                for kind, file in files.items():
                    file.write(np.ascontiguousarray(getattr(encoded, kind)[of_token]).data)
                num_tokens += int(encoded.lengths[keep].sum())
                lengths.extend(encoded.lengths[keep].tolist())
                if has_texts:
                    is_other = text_lengths and encoded.text_lengths.shape[1] != text_lengths[0].shape[1]
                    if is_other and not columns.is_choice:
                        raise other_number_of_texts(batch[0], text_lengths[0].shape[1])
                    text_lengths.append(encoded.text_lengths[keep])
                if encoded.text_keys is not None:
                    text_keys.append(encoded.text_keys[keep])
                if encoded.answers is not None:
                    answers.append(encoded.answers[keep])
                of_each = zip(batch, texts, digests, sides, strict=True)
                for record, text, digest, side in itertools.compress(of_each, keep.tolist()):
                    is_held = part.split == "train" and is_held_out(side, held_out.rate)
                    splits.append(SPLITS.index("validation" if is_held else part.split))
                    if has_value:
                        text_hashes += digest
                        digest = text_digest(f"{text}\x1f{record.value!r}")
                        if is_listed:
                            soft = isinstance(record.value, SoftLabel)
                            values.append(record.value.shares if soft else record.value)  # as JSON has it
                    hashes += digest
                yield len(lengths), num_tokens
        np.save(work / "lengths.npy", np.frombuffer(lengths, np.uint32))
        np.save(work / "hashes.npy", np.frombuffer(bytes(hashes), "<u8").reshape(-1, 2))
        np.save(work / "splits.npy", np.frombuffer(bytes(splits), np.uint8))
        if has_value:
            np.save(work / "text_hashes.npy", np.frombuffer(bytes(text_hashes), "<u8").reshape(-1, 2))
        if has_texts:
            text_lengths = text_lengths or [np.zeros((0, columns.min_texts + is_written), np.uint32)]
            np.save(work / "text_lengths.npy", join_text_lengths(text_lengths))
        if columns.has_keys:
            np.save(work / "text_keys.npy", np.concatenate(text_keys or [np.zeros((0, columns.min_texts), np.uint64)]))
        if columns.value == "answers":
            np.save(work / "answers.npy", np.concatenate(answers or [np.zeros((0, 2), np.int32)]))
        about = {"empty": empty, "excluded": excluded, "bad": sum(bad_rows), "unread_words": unread}
        about |= {"values": values, "tags": list(tag_ids)}
        (work / "about.json").write_text(json.dumps(about))
        (work / SUMS).write_text(json.dumps(_sums(work)))
        try:
            os.rename(work, folder)
        except OSError:
            if not folder.exists():  # if another shard of other bounds was first, its part is the same
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def remove_damaged_parts(work: pathlib.Path, count: int, progress: Say) -> int:
    """Remove the parts among the first `count` that are not what was written, as after a crash of the machine; how
    many were."""
    damaged = 0
    for i in range(count):
        folder = work / f"{i:06}"
        if not folder.exists():
            continue
        progress(f"comparing part {i + 1:,} of {count:,} with its checksums")
        try:
            is_whole = json.loads((folder / SUMS).read_bytes()) == _sums(folder)
        except (OSError, ValueError, RecursionError):
            is_whole = False
        if not is_whole:
            damaged += 1
            shutil.rmtree(folder)
    return damaged


def _sums(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of a part's files."""
    found = {}
    for path in folder.iterdir():
        if path.name != SUMS:
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _counted(part: Part, bad_rows: list[int]) -> Iterator[Record]:
    """A part's records; at their end `bad_rows` gets the number of rows that were left out."""
    bad_rows.append((yield from part.read()) or 0)


def _is_document(encoded: Encoded, columns: Columns) -> np.ndarray:
    """Whether there is something to read in each of these records [N]: a token, a tagged word, a passage, a target."""
    if columns.value == "text":
        return (encoded.text_lengths[:, -2:] > 0).all(1)  # a conversation may begin here
    if encoded.answers is not None:
        return encoded.text_lengths[:, -1] > 0
    if encoded.tags is not None:
        ends = np.cumsum(encoded.lengths, dtype=np.int64)
        tagged = np.concatenate([[0], np.cumsum(encoded.tags > 0)])
        return tagged[ends] > tagged[ends - encoded.lengths]
    return ~encoded.is_empty


def text_digest(text: str) -> bytes:
    """128 bits that tell a text from others."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def is_held_out(digest: bytes, rate: float) -> bool:
    return int.from_bytes(digest[:8], "big") / 2**64 < rate


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def token_dtype(tokenizer: TextTokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def _batched(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch, characters = [], 0
    for record in records:
        batch.append(record)
        characters += sum(map(len, record.texts)) + sum(map(len, record.history or ()))
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
