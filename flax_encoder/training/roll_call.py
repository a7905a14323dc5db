"""Processes that work together hear of it when one of them is gone.

What devices do together waits for all. JAX ends those that wait for a dead process after 100 s, by an abort with pages
of text. Here each process counts on, in the store that the first one keeps for all of them; where a count stands still
the others say whose it is, and end.
"""

import atexit
import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

LOST = 87
"""Exit status of a process that ended because another was gone."""
_LIMIT_SECONDS, _SECONDS_BETWEEN = 30.0, 2.0
_PLACE = "flax_encoder/roll_call/"
_ENDED, _FAILED = "ended", "failed "
_OF_CONNECTIONS = re.compile(r"gloo|nccl|coordination|connection|unavailable|deadline", re.IGNORECASE)


class RollCall:
    """Counts for this process, and reads the others' counts; a thread does both until `leave`.

    Args:
      client: of JAX's store of the processes (`key_value_set`, `key_value_dir_get`).
      index, count: which process this is, of how many.
      end: called with a line that names a process which is gone.
      limit_seconds: how long a count may stand still.
    """

    def __init__(
        self, client: Any, index: int, count: int, end: Callable[[str], None], limit_seconds: float = _LIMIT_SECONDS,
        seconds_between: float = _SECONDS_BETWEEN,
    ):  # fmt: skip
        self._client, self._index, self._count, self._end = client, index, count, end
        self._limit, self._between = limit_seconds, seconds_between
        self._seen: dict[int, tuple[str, float]] = {i: ("", time.monotonic()) for i in range(count) if i != index}
        self._has_left, self._turn = threading.Event(), 0
        self._thread = threading.Thread(target=self._watch, name="roll call", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._has_left.is_set():
            try:
                self._turn += 1
                self._set(f"{self._turn} of pid {os.getpid()} on {socket.gethostname()}")
                self._read()
            except Exception:  # the first process, which keeps the store, is gone: JAX ends this one, and says so
                return
            if (line := self._gone()) is not None:
                self._end(line)
            self._has_left.wait(self._between)

    def _set(self, value: str) -> None:
        self._client.key_value_set(f"{_PLACE}{self._index}", value, allow_overwrite=True)

    def _read(self) -> None:
        for name, value in self._client.key_value_dir_get(_PLACE):
            i = int(name.rpartition("/")[2])
            if i != self._index and value != self._seen[i][0]:
                self._seen[i] = value, time.monotonic()

    def _gone(self) -> str | None:
        for i, (value, since) in self._seen.items():
            if value == _ENDED or time.monotonic() - since <= self._limit:
                continue
            name = f"process {i} of {self._count}"
            if value.startswith(_FAILED):
                return f"{name} failed: {value.removeprefix(_FAILED)}"
            about = value.partition(" of ")[2]
            return (
                f"{name}{f' ({about})' if about else ''} has not been heard of for {self._limit:g} s: it was ended, or "
                f"its machine was."
            )
        return None

    def leave(self, error: str | None = None) -> None:
        """Stop counting: this process has done its work, or failed. If it failed and keeps the store, return when the
        others know, or after a while."""
        self._has_left.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(self._between)
        with contextlib.suppress(Exception):  # the store may be gone
            self._set(_ENDED if error is None else _FAILED + error)
            stop = time.monotonic() + self._limit + 5 * self._between
            while error is not None and self._index == 0 and time.monotonic() < stop:
                self._read()
                silent_since = time.monotonic() - self._limit
                if all(v.startswith((_ENDED, _FAILED)) or at < silent_since for v, at in self._seen.values()):
                    return
                time.sleep(self._between / 4)


_own: RollCall | None = None
_failure: tuple[str, int] | None = None


def begin_roll_call() -> None:
    """Begin it, in a process that has joined others (`jax.distributed`); it ends with the process."""
    global _own
    from jax._src.distributed import global_state  # its store has no public name

    if _own is None and global_state.client is not None:
        _own = RollCall(global_state.client, jax.process_index(), jax.process_count(), _end_too)
        atexit.register(_at_exit)  # before JAX's own, which waits for all


def tell_failure(error: BaseException, status: int = 1) -> None:
    """Have the other processes hear, as this one ends with this status, what it failed by."""
    global _failure
    _failure = f"{type(error).__name__}: {error}", status


def await_verdict(error: BaseException) -> None:
    """Return if `error` is not of a connection to a process that is gone; if it is, the process ends here."""
    if _own is not None and _OF_CONNECTIONS.search(str(error)):
        time.sleep(_LIMIT_SECONDS + 2 * _SECONDS_BETWEEN)


def _end_too(line: str) -> None:
    assert _own is not None
    with contextlib.suppress(OSError):
        os.write(2, (
            f"\n{line} This one ends too, with status {LOST}; the same command, on any number of processes, goes on "
            f"from what is saved.\n"
        ).encode())  # fmt: skip
    _own.leave(line)
    _flush()
    os._exit(LOST)


def _at_exit() -> None:
    assert _own is not None
    raised = getattr(sys, "last_value", None)  # of an error that nobody caught
    failure, status = _failure or (None if raised is None else f"{type(raised).__name__}: {raised}", 1)
    _own.leave(failure)
    if failure is not None:  # the others may wait for this one, which JAX would have wait for them
        _flush()
        os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
