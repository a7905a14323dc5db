"""Texts to tokens, a part of a source at a time, by all cores; each part's folder is whole or not there.

A part's folder has its documents one after the other: `tokens.bin`, `words.bin` (whether a token starts a word),
`lengths.npy`, `hashes.npy` (of texts, 128 bits), `is_test.npy` and `about.json` (labels, empty documents).
"""

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import socket
import threading
import time
from array import array
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from flax_encoder.data.sources.opening import Source
from flax_encoder.data.sources.records import DataError, Part, Record, Say
from flax_encoder.data.tokens.tokenizer import TextTokenizer

THIS_PROCESS = f"{socket.gethostname()}.{os.getpid()}"
_BATCH_CHARACTERS = 2**18
_POLL_SECONDS = 0.5

def tokenize_parts(
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

    cores = num_cores()
    workers = min(workers or cores, len(todo))
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
    shared = context.Array("Q", 3)  # documents, tokens, and whether to stop
    settings = (tokenizer.json, shared, cores // workers)
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, settings)
    try:
        waiting = {pool.submit(_tokenize_in_worker, source.parts[i], work / f"{i:06}", rate): i for i in todo}
        while waiting:
            finished, _ = concurrent.futures.wait(waiting, _POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                future.result()
                done += source.parts[waiting.pop(future)].size
            if shared[0]:
                report(*shared[:2])
    except BrokenProcessPool:
        raise DataError(
            f"a worker that tokenizes died, as for want of memory (there are {workers}; --workers sets it). The parts "
            f"that are done are kept; the same command goes on from them."
        ) from None
    except BaseException:
        shared[2] = 1  # else every worker would end its part first, which can be a whole compressed file
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(tokenizer_json: str, shared: Any, threads: int) -> None:
    # What cores the other workers leave: with a few large files, several each.
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(max(1, threads))
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
        if _worker["shared"][2]:
            raise InterruptedError("another part could not be read, or all are to stop")
        before = now


def _tokenize_part(
    part: Part, folder: pathlib.Path, tokenizer: TextTokenizer, held_out_rate: float
) -> Iterator[tuple[int, int]]:
    """Write a part's folder, whole or not at all; yields (documents, tokens) so far."""
    work = folder.with_name(f"{folder.name}.{THIS_PROCESS}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    dtype = token_dtype(tokenizer)
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
                    digest = text_digest(text)
                    lengths.append(count)
                    hashes += digest
                    is_test.append(part.split == "test" or is_held_out(digest, held_out_rate))
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


def text_digest(text: str) -> bytes:
    """128 bits that tell a stripped text from others."""
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
        characters += len(record["text"])
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
