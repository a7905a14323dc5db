"""What a process sets up before it trains: compile cache, memory allocator, signals."""

import ctypes
import os
import signal
import sys
import types

import jax

from flax_encoder.data.pipeline import default_cache_dir

# glibc's mallopt parameters, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def set_up_runtime() -> None:
    """Keep freed memory between steps, and on accelerators compiled programs between runs. Call before JAX starts."""
    if sys.platform == "linux":
        # XLA:CPU allocates a step's temporaries anew each step, on whichever thread. By default glibc gives such blocks
        # back to the kernel, which then clears every page again: a fifth of a small model's step (LOG.md). Threads must
        # share one arena, since only that one can grow to such sizes, and it must be so before they start.
        try:
            mallopt = ctypes.CDLL("libc.so.6").mallopt
        except (OSError, AttributeError):
            pass  # another C library: as fast as it is
        else:
            for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
                mallopt(parameter, value)
    # XLA:CPU warns at length of every cached program that it loads, even on the machine that made it.
    if jax.default_backend() != "cpu" and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(default_cache_dir() / "xla"))


class StopSignals:
    """Turns SIGINT and SIGTERM into a request to stop after the step at hand; a second one stops at once."""

    def __init__(self):
        self.requested: str | None = None

    def __enter__(self) -> "StopSignals":
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        print(f"\n{self.requested}: saving after this step. Once more stops at once.", file=sys.stderr, flush=True)

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
