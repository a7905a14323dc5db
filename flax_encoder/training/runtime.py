"""What a process sets up before it trains: compile cache, memory allocator, signals."""

import ctypes
import hashlib
import logging
import os
import pathlib
import platform
import signal
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax

from flax_encoder.config import ConfigError
from flax_encoder.data.pipeline import default_cache_dir
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.store.tokenizing import num_cores
from flax_encoder.training.roll_call import begin_roll_call

# glibc's mallopt parameters, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_MADV_HUGEPAGE = 14
_ACCELERATORS = "/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/vfio"
# What /proc/cpuinfo calls them on x86 and on Arm.
_CPU_FIELDS = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU implementer", "CPU part")


def set_up_runtime() -> None:
    """Keep freed memory between steps, and compiled programs between runs. Call before JAX starts.

    XLA:CPU calls each program that it loads an error, at length, for want of `prefer-no-gather`, which is a hint and no
    instruction (jax issue 38445). Only TF_CPP_MIN_LOG_LEVEL=3 before JAX is imported quiets it, so programs set that.
    """
    if sys.platform == "linux" and not may_find_accelerator():
        keep_memory()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        try:
            folder = default_cache_dir() / "xla"
        except DataError as error:
            logging.getLogger(__name__).warning("compiled programs are not cached: %s", error)
            return
        # JAX's keys hold its version, the flags, the program and the kind of device, but of CPUs nothing that tells one
        # from another, and code made for one may be illegal on the next.
        folder = folder / host_cpu() if jax.default_backend() == "cpu" else folder
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):  # JAX's second is a third of a short command
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def join_processes(num_processes: int) -> None:
    """Find the other processes that train with this one, by JAX's own start-up. Call before anything else of JAX.

    Raises:
      ConfigError: they cannot be found, or are not as many.
    """
    if num_processes == 1:
        return
    own = os.environ.get("JAX_PROCESS_ID")
    try:
        told = {} if own is None else {"num_processes": num_processes, "process_id": int(own)}
        if not jax.distributed.is_initialized():
            jax.distributed.initialize(**told)
            begin_roll_call()
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"mesh.num_processes is {num_processes}, and they could not join: {error} Start one on each machine by "
            f"Slurm, Kubernetes, Open MPI or on Cloud TPU, or set JAX_COORDINATOR_ADDRESS (host:port of the first) for "
            f"all and JAX_PROCESS_ID (from 0) for each."
        ) from error
    if jax.process_count() != num_processes:
        raise ConfigError(f"mesh.num_processes is {num_processes}, and {jax.process_count()} have joined.")


def may_find_accelerator() -> bool:
    """Whether JAX may use more than CPUs and there is a GPU's or TPU's file: asking JAX would start its threads."""
    platforms = jax.config.jax_platforms or ""
    return platforms != "cpu" and any(pathlib.Path(path).exists() for path in _ACCELERATORS)


def memory_in_use() -> dict[str, float]:
    """`device_memory_gb`, the most GB that any device of this process has held so far; or where devices keep no count,
    as on a CPU, `process_memory_gb`, those that the process holds now; {} where nothing tells."""
    counts = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("peak_bytes_in_use" in count for count in counts):
        return {"device_memory_gb": max(count["peak_bytes_in_use"] for count in counts) / 1e9}
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return {}
    return {"process_memory_gb": pages * os.sysconf("SC_PAGE_SIZE") / 1e9}


def keep_memory() -> None:
    """Have glibc keep what is freed, in huge pages; with another C library, nothing.

    XLA:CPU allocates a step's temporaries anew each step, on whichever thread. By default glibc gives such blocks back
    to the kernel, which clears every page again: a fifth of a small model's step (LOG.md). Threads must share one
    arena, since only that one can grow to such sizes, and it must be so before they start. Half of the machine's
    memory is reserved as the heap's room, though only what is used of it is ever backed, so that its pages can be
    asked to be huge: a large step spends an eighth of its time looking small ones up. Where the kernel counts room as
    if it were used (`vm.overcommit_memory` 2), none is reserved.

    Not where an accelerator makes the steps: there it is compiling that allocates, on all cores, and one arena made it
    take 57 s instead of 15 (BERT-base for an H100, 16 cores).
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt, malloc, free, madvise = libc.mallopt, libc.malloc, libc.free, libc.madvise
    except (OSError, AttributeError):
        return
    never = -1
    for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, never), (_M_TOP_PAD, 2**28)):
        mallopt(parameter, value)
    page, size = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    free.restype, free.argtypes = None, [ctypes.c_void_p]
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    counting = pathlib.Path("/proc/sys/vm/overcommit_memory")
    is_room_free = not counting.exists() or counting.read_text().strip() != "2"
    if is_room_free and (start := malloc(size)):
        first = -(-start // page) * page
        madvise(first, (start + size - first) // page * page, _MADV_HUGEPAGE)
        free(start)


def free_temporaries(step_result: Any) -> None:
    """On a CPU, wait for the last step's end, so that the next finds its memory; elsewhere, nothing.

    XLA:CPU begins a step that waits for another before it has freed the other's temporaries, which are most of a large
    step's memory, and the process grew by two to four times their size (LOG.md). They are freed by a thread that has
    yet to run when the result is there, so it is given a moment.
    """
    if jax.default_backend() == "cpu":
        jax.block_until_ready(step_result)
        time.sleep(0.001)


def host_cpu() -> str:
    """A name for all that code compiled for this CPU depends on: its model, its instructions, the cores to be used."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        kind = sorted(line for line in text.splitlines() if line.startswith(_CPU_FIELDS))
    except OSError:
        kind = [platform.processor(), platform.version()]
    return hashlib.sha256(repr((platform.machine(), kind, num_cores())).encode()).hexdigest()[:16]


@contextmanager
def cache_hits() -> Iterator[list[str]]:
    """A list that grows by one for each program that is loaded from the compilation cache in here."""
    hits: list[str] = []

    def listen(event: str, **_: str | int) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


class StopSignals:
    """Turns SIGINT, SIGTERM and SIGHUP, of a terminal that closes, into a request to stop after the step at hand; a
    second one stops at once. What was ignored from the start, as SIGHUP is under nohup, stays so."""

    def __init__(self):
        self.requested: str | None = None

    def __enter__(self) -> "StopSignals":
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        # Not by print: the program may be amidst one, and the terminal may be gone.
        with suppress(OSError):
            os.write(2, f"\n{self.requested}: saving after this step. Once more stops at once.\n".encode())

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
