"""What a run asks of the machine it is on: a folder, in which nobody else trains."""

import os
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import jax
from filelock import FileLock, Timeout

from flax_encoder.config import ConfigError


@contextmanager
def run_folder(run_dir: pathlib.Path) -> Iterator[None]:
    """Make the run's folder; a new run that is refused, or ends otherwise before its log's first line, leaves none.

    Raises:
      ConfigError: it cannot be made, or not be written to.
    """
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"a run has a folder: {run_dir} cannot be made: {error.strerror}. Give another --run-dir."
        ) from error
    if not os.access(run_dir, os.W_OK):
        raise ConfigError(f"a run writes to its folder: {run_dir} is read-only. Give another --run-dir.")
    try:
        yield
    except BaseException:
        if made and jax.process_index() == 0 and not (run_dir / "metrics.jsonl").exists():
            for name in ("lock", "config.json", "tokenizer.json"):
                (run_dir / name).unlink(missing_ok=True)
            with suppress(OSError):  # what others put there stays
                for folder in [run_dir / "checkpoints", *made]:
                    if folder.exists():
                        folder.rmdir()
        raise


@contextmanager
def run_lock(run_dir: pathlib.Path) -> Iterator[None]:
    """Hold the folder's lock, for all processes of this run; it goes with the process, however that ends.

    Raises:
      ConfigError: another process holds it.
    """
    lock = FileLock(run_dir / "lock")
    try:
        if jax.process_index() == 0:
            lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"one process trains in a folder at a time: another is at work in {run_dir}. Give another --run-dir, or "
            f"--mesh.num-processes for several that train together."
        ) from None
    except (NotImplementedError, OSError):  # a file system without locks
        pass
    try:
        yield
    finally:
        lock.release()
