"""Text to a store: tokenized once, part by part, by all cores and machines; killed at any time, it goes on.

A source comes in parts (`records.Part`). Each is tokenized by one worker into a folder of its own under STORE.partial,
moved into place when it is whole, so a later start skips it. When all parts are there they are merged: duplicates are
found by hash and left out, and the rest is copied into STORE. No step holds more than a few parts in memory.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

from filelock import FileLock, Timeout

from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.opening import Source
from flax_encoder.data.sources.records import DataError, Say
from flax_encoder.data.store.merging import merge_parts
from flax_encoder.data.store.store import FORMAT, Store, open_store, partial_folder, read_manifest
from flax_encoder.data.store.tokenizing import THIS_PROCESS, HeldOut, remove_damaged_parts, tokenize_parts
from flax_encoder.data.tokens.tokenizer import TextTokenizer


def prepare(
    source: Source,
    tokenizer: TextTokenizer,
    folder: pathlib.Path,
    columns: Columns,
    *,
    held_out: HeldOut,
    label_names: list[str] | None = None,
    progress: Say = lambda message: None,
    workers: int | None = None,
    shard: tuple[int, int] = (0, 1),
    wait: bool = False,
) -> Store | None:
    """Tokenize a source into `folder`, or go on where that was interrupted, or find it done.

    Exact duplicates and empty documents are dropped and counted. Held out are the source's own splits for it, or
    else what `held_out` says.

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
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "a program that prepares its own parts of text does its work inside `if __name__ == '__main__':`: its "
            "workers run the rest of it anew."
        )
    say, progress = progress, unhurried(progress)
    identity = store_identity(source, tokenizer, columns, held_out, label_names)
    work = partial_folder(folder)
    if _is_taken(folder):
        _tidy(work)
        return _open_same(folder, identity)
    try:
        work.mkdir(parents=True, exist_ok=True)
        with _only_here(work / "lock-{}-of-{}".format(*shard), folder, say, wait=wait):
            if _is_taken(folder):  # made while we waited
                shutil.rmtree(work, ignore_errors=True)
                return _open_same(folder, identity)
            _settle(work, identity, len(source.parts))
            if damaged := remove_damaged_parts(work, len(source.parts), progress):
                say(f"{damaged} parts of {work} are damaged and are made again")
            tokenize_parts(source, tokenizer, work, columns, held_out, progress, workers, shard)
            if left := [i for i in range(len(source.parts)) if not (work / f"{i:06}").exists()]:
                say(f"{len(left)} of {len(source.parts)} parts are left to the other shards")
                return None
            with _only_here(work / "lock-merge", folder, say, wait=True):
                if not _is_taken(folder):
                    merge_parts(source, tokenizer, work, identity, columns, label_names, held_out, progress)
                    os.rename(work / "store", folder)
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if _is_taken(folder):  # others, of other shards, have finished it under our hands
            return _open_same(folder, identity)
        raise DataError(
            f"text cannot be prepared: {error.filename or work}: {error.strerror or error}. The parts that are done "
            f"are kept; the same command goes on from them."
        ) from error
    return open_store(folder)


def store_identity(
    source: Source, tokenizer: TextTokenizer, columns: Columns, held_out: HeldOut, label_names: list[str] | None
) -> str:
    """What a store is made from, as a hash: the same for the same, so that it is found again."""
    what: tuple[Any, ...] = (FORMAT, source.fingerprint, tokenizer.hash, held_out.rate, label_names)
    if columns.value not in ("none", "class") or columns.max_texts > 1:
        # Stores from before there were optional values, keys and prompts are found again.
        what += (tuple(columns) if columns.has_keys else tuple(columns)[:4],)
    if held_out[1:] != HeldOut(0.0)[1:]:
        excluded = hashlib.sha256(b"".join(sorted(held_out.excluded))).hexdigest()
        what += (held_out.by_class, held_out.keep_all, excluded)
    return hashlib.sha256(repr(what).encode()).hexdigest()


def unhurried(say: Say) -> Say:
    """Pass on a message after a second, then after twice as long each time, up to half a minute: short work is done in
    silence, and hours of it leave a log that can be read."""
    last, pause = time.monotonic(), 1.0

    def maybe(message: str) -> None:
        nonlocal last, pause
        if time.monotonic() - last >= pause:
            last, pause = time.monotonic(), min(2 * pause, 30.0)
            say(message)

    return maybe


def _is_taken(folder: pathlib.Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _tidy(work: pathlib.Path) -> None:
    """Remove what a process left that was killed just after its store was whole."""
    if work.exists():
        with contextlib.suppress(Timeout), FileLock(work / "lock-merge", timeout=0):
            shutil.rmtree(work, ignore_errors=True)


def _open_same(folder: pathlib.Path, identity: str) -> Store:
    if "members" in read_manifest(folder):
        raise DataError(f"a store is prepared into a new folder: {folder} is a mixture. Name another --out.")
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
    path, temporary = work / "plan.json", work / f"plan.{THIS_PROCESS}"
    temporary.write_text(json.dumps(note))
    with contextlib.suppress(FileExistsError):
        os.link(temporary, path)  # whole, and only if no other process was first
    temporary.unlink()
    try:
        begun = json.loads(path.read_bytes())
    except ValueError:  # cut by a crash of the machine
        begun = None
    if begun != note:
        raise DataError(
            f"an interrupted store can be finished only from what it was begun with: {work} was begun from another "
            f"text, tokenizer or held-out rate. Delete it to start anew."
        )
