"""What a process sets up before it trains."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from flax_encoder.training import runtime
from flax_encoder.training.runtime import free_temporaries

HUGE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
SCRIPT = """
import ctypes, resource
from flax_encoder.training.runtime import keep_memory

libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size = 2**28

def faults():
    block, before = libc.malloc(size), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = resident()
keep_memory()
is_advised = any(" hg" in line for line in open("/proc/self/smaps") if line.startswith("VmFlags"))
print(resident() - before, int(is_advised), faults(), faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")
def test_freed_memory_is_kept_and_its_pages_are_huge():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    reserved, is_advised, _, again = map(int, run.stdout.split())
    assert reserved < 2**24  # room that is not used is not taken
    assert again < 100  # of 65,536 pages of 4 kB
    if HUGE.exists() and pathlib.Path("/proc/sys/vm/overcommit_memory").read_text().strip() != "2":
        assert is_advised  # whether the kernel finds a huge page is its own affair


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_only_a_cpu_waits_for_a_step_to_free_its_temporaries(platform, monkeypatch):
    x = jnp.ones((1500, 1500))
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: y @ x / 1500, x)).lower(x).compile()
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    result = slow(x)
    assert not result.is_ready()
    free_temporaries(result)
    assert result.is_ready() == (platform == "cpu")


@pytest.mark.parametrize(("platforms", "path", "may"), [("cpu", ".", False), ("", ".", True), ("", "none", False)])
def test_an_accelerator_is_looked_for_without_asking_jax(platforms, path, may, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "_ACCELERATORS", (str(tmp_path / path),))
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", platforms)
        assert runtime.may_find_accelerator() == may
    finally:
        jax.config.update("jax_platforms", before)
