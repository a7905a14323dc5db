"""What a run asks of the machine it is on: that nobody else trains in its folder."""

import pathlib
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from filelock import FileLock, Timeout

from flax_encoder.config import ConfigError


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
