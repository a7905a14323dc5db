"""What processes that make batches or tokenize have in common: they leave signals to their parent, and end with it."""

import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager


def serve_parent() -> None:
    """Call first in a worker: Ctrl-C is its parent's to answer, and it ends when the parent does, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):  # of a terminal that closes: the parent saves first
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)


@contextmanager
def without_main_module() -> Iterator[None]:
    """Processes that are spawned in here do not run the program's main module anew, as Python's otherwise do.

    A script without `if __name__ == "__main__":` would prepare its text again in every worker, which would wait for
    the one that started it; and a program that was typed, or read from standard input, has no file to run. The workers
    need nothing of it: what they are sent is this library's.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
