"""Checkpoints through Orbax. Each stands alone: parameters, optimizer state, and the run's settings as JSON.

RUN_DIR/checkpoints/STEP/params          float32 parameters, by path
RUN_DIR/checkpoints/STEP/optimizer       step and optimizer state
RUN_DIR/checkpoints/STEP/run             {config, tokenizer, label_names, step, spent_seconds}; locates the data too
RUN_DIR/checkpoints/STEP/manifest.json   size and SHA-256 of every other file

A save is written as STEP.saving; it gets its plain name last, once Orbax has committed it and its manifest is on the
disk. So a folder named by a plain number is whole. One without a manifest is from a version of this library that made
none: Orbax itself gave it that name when all its files were written. One that says in its own metadata that it has a
manifest, and has none, is damaged. A damaged checkpoint is kept, as STEP.damaged.
"""

import contextlib
import functools
import gc
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_encoder.training.checksums import MANIFEST, Verification, sync_folder, write_manifest
from flax_encoder.training.plain_path import PathError, plain_path
from flax_encoder.training.step import TrainState

_METADATA = "_CHECKPOINT_METADATA"  # Orbax's own, of the whole checkpoint
_OF_RUN = ("run", _METADATA)
_OF_PARAMS = ("params", _METADATA)
_IS_FULL = re.compile(r"no space|quota|too large|resource_exhausted", re.IGNORECASE)
_NO_STEP, _NO_WHOLE_STEP = -1, -2


def _orbax() -> Any:
    """Orbax, imported when a checkpoint is: a published folder opens without it, in 0.4 s less."""
    from orbax.checkpoint import v1

    return v1


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. The message names it, the reason and a way out."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not what was written. `folder` is where it is, `reason` what is wrong with it."""

    def __init__(self, folder: pathlib.Path, reason: str):
        super().__init__(f"checkpoint {folder} could not be read: it is damaged: {reason}. {_before(folder)}")
        self.folder, self.reason = folder, reason


class Checkpoints:
    """A run's checkpoints, the last `keep` of them and the best. A save is atomic: killed half-way, it never was.

    A checkpoint that is not wanted any more is deleted only after a newer one is whole.

    Args:
      keep_every: those of steps that it divides are kept, however old they are.

    Raises:
      CheckpointError: the folder's path cannot be given to Orbax.
    """

    def __init__(self, run_dir: pathlib.Path, keep: int, keep_every: int | None = None):
        self._folder, self._keep, self._keep_every = (run_dir / "checkpoints").resolve(), keep, keep_every
        ocp = _orbax()
        # It reports saves and errors at length through this logger; ours says what a person needs.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        # Made in the background, a folder that cannot be made leaves threads that wait for it for minutes.
        self._context = ocp.Context(
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False)
        )
        self._saving: int | None = None
        self._best: int | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._has_read_back = False
        self._verification: tuple[int, Verification] | None = None
        self._open = contextlib.ExitStack()
        self._open.enter_context(_without_calls_too_late())
        try:
            self._plain = self._open.enter_context(plain_path(self._folder, jax.process_count()))
        except PathError as error:
            raise CheckpointError(str(error)) from None
        if jax.process_index() == 0:
            for debris in self._folder.glob("*.*"):
                if not debris.name.partition(".")[2].startswith("damaged"):
                    _remove(debris)

    def latest_step(self) -> int | None:
        """The newest checkpoint's; None if there is none. What is half-saved does not count."""
        return max((int(p.name) for p in _numbered(self._folder)), default=None)

    def resumable_step(self, say: Callable[[str], None] = lambda message: None) -> int | None:
        """The newest whole checkpoint's, the same in every process; None if none was ever saved. Those after it are
        damaged: each is kept aside, and `say` hears of it.

        Large files are hashed by threads until `restore`, which raises DamagedCheckpoint if one is wrong; where several
        processes train, they are compared here by the first, since none may go on alone.

        Raises:
          CheckpointError: there were checkpoints, and none is whole.
        """
        found, error = _NO_STEP, None
        if jax.process_index() == 0:
            try:
                found = self._newest_whole(say)
            except CheckpointError as raised:
                found, error = _NO_WHOLE_STEP, raised
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        if found == _NO_WHOLE_STEP:
            raise error or CheckpointError(f"no checkpoint in {self._folder} is whole: the first process names them.")
        return None if found == _NO_STEP else found

    def _newest_whole(self, say: Callable[[str], None]) -> int:
        for folder in _numbered(self._folder):
            try:
                verification = _verify(folder)
                if verification is not None and jax.process_count() > 1:
                    verification.finish()
            except DamagedCheckpoint as damage:
                self.set_aside(damage, say)
                continue
            if verification is not None:
                self._verification = int(folder.name), verification
            return int(folder.name)
        if damaged := sorted(p.name for p in self._folder.glob("*.damaged*")):
            raise CheckpointError(
                f"a run goes on from a whole checkpoint, and {self._folder} has none: damaged are {', '.join(damaged)}"
                f". Bring one back from a copy, or give another --run-dir to begin anew."
            )
        return _NO_STEP

    def set_aside(self, damage: DamagedCheckpoint, say: Callable[[str], None] = lambda message: None) -> None:
        """Give a damaged checkpoint another name, under which no run resumes from it."""
        self._forget_verification()
        aside = _set_aside(damage.folder)
        say(f"checkpoint {damage.folder} is damaged: {damage.reason}. It is kept as {aside.name}.")

    def save(self, state: TrainState, step: int, run: dict[str, Any], best: int | None = None) -> None:
        """Write in the background, once the previous save is whole; its error is raised here.

        Args:
          best: a step whose checkpoint is kept, however old it is.
        """
        items = {
            "params": state.params,
            "optimizer": {"step": state.step, "opt_state": state.opt_state},
            "run": {"json": json.dumps(run | {"step": step})},
        }
        self.wait()
        self._best = best  # not before, or the one that was best would go while the new one is still to be written
        if step == self.latest_step():
            return
        self._saving = step
        name = f"{step}.saving"
        with self._saving_explained():
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._context:
                saved = _orbax().save_checkpointables_async(
                    self._plain / name, items, overwrite=True, custom_metadata={"manifest": MANIFEST}
                )

            def finish() -> None:
                try:
                    saved.result()  # of all processes
                    if jax.process_index() == 0:
                        self._commit(self._folder / name, step)
                except BaseException as error:
                    self._error = error

            self._thread = threading.Thread(target=finish, name=f"checkpoint {step}", daemon=True)
            self._thread.start()

    def _commit(self, saved: pathlib.Path, step: int) -> None:
        """Make what Orbax has written a checkpoint, the last act being its name; then delete what is not kept."""
        write_manifest(saved)
        final = saved.with_name(str(step))
        if final.exists():  # never one that counts: `save` has looked
            _set_aside(final)
        os.rename(saved, final)
        sync_folder(self._folder)
        if not self._has_read_back:
            self._read_back(final, step)
            self._has_read_back = True
        for old in [p for p in _numbered(self._folder)[self._keep :] if not self._is_kept(int(p.name))]:
            doomed = old.with_name(f"{old.name}.deleting")
            os.rename(old, doomed)  # killed half-way, it is no checkpoint any more
            _remove(doomed)

    def _is_kept(self, step: int) -> bool:
        """However old it is."""
        return step == self._best or (self._keep_every is not None and step % self._keep_every == 0)

    def _read_back(self, folder: pathlib.Path, step: int) -> None:
        """A place that writes and cannot be read is found by the first save, not when the run is wanted again."""
        verification = _verify(folder)
        assert verification is not None
        verification.finish()
        if jax.process_count() > 1:  # Orbax reads with all processes or not at all
            return
        with plain_path(folder) as plain:
            _orbax().checkpointables_metadata(plain)
        if (found := read_run(folder)["step"]) != step:
            raise ValueError(f"step {found} was read back from {folder}")

    @contextlib.contextmanager
    def _saving_explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            latest, saving = self.latest_step(), self._folder / str(self._saving)
            self._saving = None
            if jax.process_index() == 0:
                for debris in self._folder.glob(f"{saving.name}.saving*"):
                    _remove(debris)
            before = "there is none before it" if latest is None else f"the last whole one is step {latest}"
            advice = "free some space" if _IS_FULL.search(f"{error}") else "mend what follows"
            raise CheckpointError(
                f"checkpoint {saving} could not be written, {before}; {advice} and run the same command again: "
                f"{_one_line(error)}"
            ) from error

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a step, on the shardings of `like`, which may be another mesh than it was saved from.

        Raises:
          DamagedCheckpoint: a file is not what was written. CheckpointError: it cannot be read for another reason.
        """
        folder = self._folder / str(step)
        optimizer = {"step": like.step, "opt_state": like.opt_state}
        begun, verification = self._verification or (None, None)
        if begun != step and jax.process_count() == 1:
            verification = _verify(folder)
        self._verification = None
        found = _read(folder, {"params": like.params, "optimizer": optimizer}, verification)
        return TrainState(found["optimizer"]["step"], found["params"], found["optimizer"]["opt_state"])

    def wait(self) -> None:
        """Return when the last save is whole; its error is raised here."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        with self._saving_explained():
            thread.join()
            error, self._error = self._error, None
            if error is not None:
                raise error
        if jax.process_count() > 1:  # none goes on before the first process has given it its name
            multihost_utils.sync_global_devices(f"checkpoint {self._saving}")

    def _forget_verification(self) -> None:
        if self._verification is not None:
            self._verification[1].close()
        self._verification = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *exc_info: object) -> None:
        try:
            self.wait()
        except CheckpointError:
            if kind is None:  # or else the first error is the one to hear of
                raise
        finally:
            self._forget_verification()
            self._open.close()


@contextlib.contextmanager
def _without_calls_too_late() -> Iterator[None]:
    """Once a save has failed, TensorStore reports the end of its other files to an event loop that Orbax has closed,
    and Python would print a traceback for each."""
    show = sys.unraisablehook

    def show_others(error: Any) -> None:
        if error.object is not None or f"{error.exc_value}" != "Event loop is closed":
            show(error)

    sys.unraisablehook = show_others
    try:
        yield
    finally:
        sys.unraisablehook = show


def _is_numbered(folder: pathlib.Path) -> bool:
    return folder.name.isascii() and folder.name.isdecimal()


def _numbered(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints in a folder, newest first. Saves under way have other names."""
    try:
        found = [p for p in folder.iterdir() if _is_numbered(p) and p.is_dir()]
    except OSError:
        return []
    return sorted(found, key=lambda p: -int(p.name))


def _before(folder: pathlib.Path) -> str:
    """What to do where a checkpoint cannot be read."""
    older = [p for p in _numbered(folder.parent) if _is_numbered(folder) and int(p.name) < int(folder.name)]
    if not older:
        return "There is none before it."
    return f"{older[0]} is the one before it: give that, or move {folder.name} away to go on from there."


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _set_aside(folder: pathlib.Path) -> pathlib.Path:
    names = (f"{folder.name}.damaged{'' if i == 1 else f'-{i}'}" for i in range(1, 1_000_000))
    aside = next(path for name in names if not (path := folder.with_name(name)).exists())
    os.rename(folder, aside)
    return aside


def checkpoint_steps(run_dir: pathlib.Path) -> set[int]:
    """The steps of a run folder's whole checkpoints."""
    return {int(p.name) for p in _numbered(run_dir / "checkpoints")}


def _checkpoint_folder(path: pathlib.Path) -> pathlib.Path:
    """A checkpoint, or the newest one of a run folder.

    Raises:
      CheckpointError: there is none.
    """
    if (path / "params").is_dir():
        return path.resolve()
    steps = _numbered(path / "checkpoints")
    if not steps:
        damaged = sorted(p.name for p in (path / "checkpoints").glob("*.damaged*"))
        raise CheckpointError(
            f"no whole checkpoint in {path}: {', '.join(damaged)} stand aside. Bring one back from a copy; `python -m "
            f"flax_encoder verify {path / 'checkpoints' / damaged[-1]}` says what is wrong with it."
            if damaged
            else f"no checkpoint in {path}. Give a run folder (it has a folder `checkpoints`) or one checkpoint in it."
        )
    return steps[0].resolve()


def _verify(folder: pathlib.Path, parts: tuple[str, ...] | None = None) -> Verification | None:
    """A begun comparison of a checkpoint's files with its manifest; None if it is of a version that made none.

    Raises:
      DamagedCheckpoint: a file is missing, cut, or wrong; or the manifest is.
    """
    complaint = functools.partial(DamagedCheckpoint, folder)
    try:
        return Verification(folder, parts, complaint)
    except FileNotFoundError:
        if _promises_manifest(folder):
            raise complaint(f"{MANIFEST} is missing") from None
        return None


def _promises_manifest(folder: pathlib.Path) -> bool:
    try:
        metadata = json.loads((folder / _METADATA).read_bytes())
        return "manifest" in (metadata.get("custom_metadata") or {})
    except (OSError, ValueError, AttributeError):
        return False


def _read(folder: pathlib.Path, items: dict[str, Any], verification: Verification | None) -> dict[str, Any]:
    """Orbax's items of a checkpoint, while it is compared with its manifest; on one that is damaged nothing returns."""
    tasks = logging.getLogger("asyncio")  # it prints what Orbax's tasks raise, at length
    level = tasks.level
    tasks.setLevel(logging.CRITICAL)
    found: dict[str, Any] = {}
    failure: str | None = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with plain_path(folder) as plain:
                    found = _orbax().load_checkpointables(plain, items)
            except Exception as error:  # whatever Orbax, TensorStore or the disk raises, the way out is the same
                failure = _one_line(error)
            if failure is not None:
                gc.collect()  # Orbax leaves what it had begun, of which Python warns when it goes
        if verification is not None:
            verification.finish()  # damage is the likeliest reason of a failure, and a better message
        if failure is not None:
            message = f"checkpoint {folder} could not be read: {failure}"
            if verification is None:
                message += f". It is of a version without checksums, and may be damaged. {_before(folder)}"
            raise CheckpointError(message)
        return found
    finally:
        tasks.setLevel(level)
        if verification is not None:
            verification.close()


def _one_line(error: BaseException, most: int = 300) -> str:
    text = " ".join(f"{error}".split())
    return f"{type(error).__name__}: {text[:most]}{'...' if len(text) > most else ''}"


def read_run(path: pathlib.Path) -> dict[str, Any]:
    """What a checkpoint, or a run's newest one, says of its run: {config, tokenizer, label_names, step, ...}.

    Raises:
      DamagedCheckpoint: a file of it is not what was written. CheckpointError: there is none, or it cannot be read.
    """
    folder = _checkpoint_folder(path)
    text = _read(folder, {"run": None}, _verify(folder, _OF_RUN))["run"]["json"]
    try:
        values = json.loads(text)
        if not isinstance(values, dict) or not isinstance(values.get("config"), dict):
            raise ValueError("what it says of its run is no JSON object with a config")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {folder} could not be read: {_one_line(error)}") from error
    return values


def read_params(path: pathlib.Path, like: Any | None = None) -> Any:
    """The parameters, on the shardings of `like`; without it as they were saved, on one device.

    Raises:
      DamagedCheckpoint: a file of them is not what was written. CheckpointError: there are none, or none can be read.
    """
    folder = _checkpoint_folder(path)
    verification = _verify(folder, _OF_PARAMS)
    if like is None:
        try:
            with plain_path(folder) as plain:
                metadata = _orbax().checkpointables_metadata(plain).metadata["params"]
        except Exception as error:
            if verification is not None:
                verification.finish()
            raise CheckpointError(f"checkpoint {folder} could not be read: {_one_line(error)}") from error
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), metadata)
    return _read(folder, {"params": like}, verification)["params"]


def verify_checkpoints(path: pathlib.Path) -> Iterator[tuple[pathlib.Path, Verification | DamagedCheckpoint | None]]:
    """Every checkpoint of a run folder, oldest first, or one checkpoint, with what comparing it with its
    manifest gave: the comparison, its damage, or None for one of a version that made no manifests.

    Raises:
      CheckpointError: there is none.
    """
    one = _checkpoint_folder(path)
    folders = [one] if (path / "params").is_dir() else _numbered(path / "checkpoints")[::-1]
    for folder in folders:
        try:
            verification = _verify(folder)
            if verification is not None:
                verification.finish()
            yield folder, verification
        except DamagedCheckpoint as damage:
            yield folder, damage
