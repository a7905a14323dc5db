"""Folders of models and runs at URLs: copied here to be read, and a run that is trained here kept there too.

Orbax writes to some object stores by itself. A run folder needs more: a checkpoint's name that appears last and at
once, locks, and files that grow, none of which they have. So a run lies in a folder of this machine, and what is whole
of it is copied to its URL: a checkpoint's files, then its manifest, which makes it one.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import posixpath
import shutil
import threading
from collections.abc import Iterator

import jax
from filelock import FileLock
from jax.experimental import multihost_utils

from flax_encoder.config import ConfigError, DataConfig, RunConfig
from flax_encoder.data.pipeline import cache_folder
from flax_encoder.data.sources.records import DataError, Say
from flax_encoder.data.sources.remote import RemoteFile, is_remote, open_file_system, put_file, remote_files, size_of
from flax_encoder.runs.processes import as_first_has_it
from flax_encoder.training.checkpoint import CheckpointError, checkpoint_steps
from flax_encoder.training.checksums import MANIFEST
from flax_encoder.training.runtime import join_processes

logger = logging.getLogger(__name__)

_OF_RUNS = ("config.json", "tokenizer.json", "metrics.jsonl")
_OF_MODELS = (".json", ".jsonl", ".txt", ".model", ".safetensors", ".bin")
_SECONDS_BETWEEN_LOOKS = 2.0


def local_folder(folder: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The folder itself, or of a URL its copy in the cache: of a run its newest whole checkpoint, of one with keep_best
    all; of a published folder its settings, tokenizer and weights. What has not changed is not copied again.

    Raises:
      DataError: no folder there, or it cannot be read.
    """
    if not is_remote(folder):
        return folder
    url = os.fspath(folder).rstrip("/")
    files = _files(url)
    if not files:
        raise DataError(f"no folder of a model or a run at {url}.")
    steps = _whole_steps(files)
    if steps:
        keeps_best = _says_keep_best(files)
        wanted = {
            name: file for name, file in files.items()
            if name in _OF_RUNS or (_step_of(name) in steps and (keeps_best or _step_of(name) == max(steps)))
        }  # fmt: skip
    else:
        wanted = {name: file for name, file in files.items() if file.suffix in _OF_MODELS}
        if any(file.suffix == ".safetensors" for file in wanted.values()):
            wanted = {name: file for name, file in wanted.items() if file.suffix != ".bin"}
    identity = [(name, file.size, file.version) for name, file in sorted(wanted.items())]
    place = hashlib.sha256(repr((url, identity)).encode()).hexdigest()[:24]
    target = cache_folder(DataConfig()) / "folders" / place
    target.parent.mkdir(exist_ok=True)
    with FileLock(target.with_name(place + ".lock")):
        if not target.exists():
            _download(wanted, target, url)
    return target


@contextlib.contextmanager
def working_folder(config: RunConfig, say: Say) -> Iterator[RunConfig]:
    """The settings to train with: of a run at a URL those of a folder in the cache, which is made to hold what the URL
    has, and whose checkpoints, log and settings are copied there as they are made, by the first process.

    Whichever has the newer checkpoint is gone on with. Nothing keeps two machines from training into one URL.

    Raises:
      ConfigError: several seeds, a place that can only be read, or processes that do not share this machine's folder.
      DataError, CheckpointError: the place cannot be read; or at the end, written.
    """
    if not is_remote(config.run_dir):
        yield config
        return
    url = config.run_dir.rstrip("/")
    if config.seeds > 1 or url.startswith(("http://", "https://")):
        raise ConfigError(
            f"a run at a URL is one run, at a place that can be written to: got {config.seeds} seeds at {url}. Give a "
            f"local --run-dir, and copy it."
        )
    join_processes(config.mesh.num_processes)
    folder = cache_folder(config.data) / "runs" / hashlib.sha256(url.encode()).hexdigest()[:24]
    if jax.process_index() == 0:
        _adopt(url, folder, say)
    _check_shared(folder, url)
    inner = dataclasses.replace(config, run_dir=os.fspath(folder))
    if jax.process_index() > 0:
        yield inner
        return
    mirror, stop = _Mirror(folder, url, config.keep_every), threading.Event()
    thread = threading.Thread(target=mirror.follow, args=(stop,), name="copies the run", daemon=True)
    thread.start()
    try:
        yield inner
    finally:
        stop.set()
        thread.join()
        mirror.try_to_copy()
    if mirror.failure is not None:
        raise CheckpointError(f"{folder} is whole, and its copy at {url} is not: {mirror.failure}")
    say(f"{url} is a complete copy of {folder}")


def _files(url: str) -> dict[str, RemoteFile]:
    """A folder's files by their paths in it."""
    _, root = open_file_system(url)
    found = {file.path[len(root.rstrip("/")) :].lstrip("/"): file for file in remote_files(url + "/")}
    if odd := [name for name in found if ".." in name.split("/") or "\\" in name]:
        raise DataError(f"files of a folder lie in it: {url} has {odd[0]!r}.")
    return found


def _step_of(name: str) -> int | None:
    """Of a file of a checkpoint, by its path in the run's folder."""
    parts = name.split("/")
    is_of_one = len(parts) > 2 and parts[0] == "checkpoints" and parts[1].isascii() and parts[1].isdecimal()
    return int(parts[1]) if is_of_one else None


def _whole_steps(files: dict[str, RemoteFile]) -> set[int]:
    steps = {step for name in files if (step := _step_of(name)) is not None}
    return {step for step in steps if f"checkpoints/{step}/{MANIFEST}" in files}


def _says_keep_best(files: dict[str, RemoteFile]) -> bool:
    try:
        with files["config.json"].open() as file:
            return json.load(file).get("keep_best") is not None
    except (KeyError, ValueError, AttributeError, OSError):
        return False


def _download(files: dict[str, RemoteFile], target: pathlib.Path, url: str) -> None:
    """All of them into a new folder, which is there when it is whole."""
    work = target.with_name(target.name + ".part")
    shutil.rmtree(work, ignore_errors=True)
    try:
        for name, remote in files.items():
            path = work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with remote.open() as source, path.open("wb") as copy:
                shutil.copyfileobj(source, copy, 2**22)
            if remote.size is not None and path.stat().st_size != size_of(remote):
                raise DataError(f"{remote} came with {path.stat().st_size:,} bytes, and has {remote.size:,}.")
        shutil.rmtree(target, ignore_errors=True)
        os.rename(work, target)
    except OSError as error:
        raise DataError(f"{url} cannot be copied to {target}: {error}.") from error


def _adopt(url: str, folder: pathlib.Path, say: Say) -> None:
    """Make the folder hold the run at the URL, where that has gone further."""
    folder.parent.mkdir(exist_ok=True)
    files = _files(url)
    there, here = _whole_steps(files), checkpoint_steps(folder)
    if there and max(there) > max(here, default=-1):
        say(f"copying step {max(there)} of {url} to {folder}")
        is_half = {name for name in files if _step_of(name) not in (None, *there)}
        _download({name: file for name, file in files.items() if name not in is_half}, folder, url)


def _check_shared(folder: pathlib.Path, url: str) -> None:
    """That all processes see the first one's folder, by a note in it."""
    if jax.process_count() == 1:
        return
    note, number = folder.with_name(folder.name + ".shared"), as_first_has_it(os.getpid())
    if jax.process_index() == 0:
        note.write_text(str(number))
    multihost_utils.sync_global_devices("a note in the run's folder")
    is_seen = note.exists() and note.read_text() == str(number)
    if not multihost_utils.process_allgather(is_seen).all():
        raise ConfigError(
            f"processes that train together share the run's folder: {folder}, where {url} is copied, is not seen by "
            f"all. Give a --run-dir that all mount, or set FLAX_ENCODER_CACHE to a folder that they share."
        )


class _Mirror:
    """Copies of a run's folder at a URL."""

    def __init__(self, folder: pathlib.Path, url: str, keep_every: int | None):
        self._folder, self._url, self._keep_every = folder, url, keep_every
        self._sent: dict[str, tuple[int, int]] = {}
        self.failure: Exception | None = None
        """Why the URL has not what the folder had when it was last copied, if it has not."""

    def follow(self, stop: threading.Event) -> None:
        """Copy whenever there is another checkpoint."""
        seen: set[int] = set()
        while not stop.wait(_SECONDS_BETWEEN_LOOKS):
            if (steps := checkpoint_steps(self._folder)) != seen:
                self.try_to_copy()
                seen = seen if self.failure else steps

    def try_to_copy(self) -> None:
        """Bring the URL to what the folder has, or keep and tell the failure."""
        try:
            self._copy()
            self.failure = None
        except (DataError, OSError) as error:
            if not isinstance(error, FileNotFoundError):  # of a checkpoint that was deleted meanwhile
                logger.warning("%s is not copied yet: %s", self._folder, error)
            self.failure = error

    def _copy(self) -> None:
        there, steps = _files(self._url), checkpoint_steps(self._folder)
        for step in sorted(steps):
            manifest = f"checkpoints/{step}/{MANIFEST}"
            if not (self._folder / manifest).exists():
                continue  # of an earlier version, which nothing says the end of
            if manifest in there and self._is_same(there[manifest], manifest):
                continue
            self._remove(there, step)
            folder = self._folder / "checkpoints" / str(step)
            names = [path.relative_to(self._folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
            for name in [*(name for name in names if name != manifest), manifest]:
                self._put(name)
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder).as_posix()
            is_whole = path.is_file() and not name.startswith("checkpoints/") and not name.endswith(".partial")
            if is_whole and name != "lock":
                about = path.stat().st_size, path.stat().st_mtime_ns
                if self._sent.get(name) != about:
                    self._put(name)
                    self._sent[name] = about
        for step in {step for name in there if (step := _step_of(name)) is not None} - steps:
            is_kept = self._keep_every is not None and step % self._keep_every == 0  # of another machine's, perhaps
            if step < max(steps, default=-1) and not is_kept:
                self._remove(there, step)

    def _put(self, name: str) -> None:
        path = self._folder / name
        path.stat()  # or else FileNotFoundError
        put_file(path, posixpath.join(self._url, name))

    def _is_same(self, remote: RemoteFile, name: str) -> bool:
        try:
            with remote.open() as file:
                return file.read() == (self._folder / name).read_bytes()
        except OSError:
            return False

    def _remove(self, there: dict[str, RemoteFile], step: int) -> None:
        """A checkpoint there, its manifest first, without which it is none."""
        names = [name for name in there if _step_of(name) == step]
        for name in sorted(names, key=lambda name: not name.endswith(f"/{MANIFEST}")):
            try:
                there[name].file_system.rm_file(there[name].path)
            except Exception as error:  # drivers raise their own kinds
                raise DataError(f"{there[name]} cannot be deleted: {type(error).__name__}: {error}.") from None
