"""What the benchmarks share: the header, timing, the measured matmul peak, and how results are shown."""

import argparse
import importlib.metadata
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from sides import resident_peak_bytes, serve_steps

from flax_encoder.config import OptimizerConfig
from flax_encoder.data.store.tokenizing import num_cores
from flax_encoder.ops.linear import linear
from flax_encoder.training.optimizer import make_optimizer
from flax_encoder.training.runtime import free_temporaries, set_up_runtime
from flax_encoder.training.sharding import logical_axes
from flax_encoder.training.step import init_train_state, make_train_step

ADAMW = OptimizerConfig(name="adamw", learning_rate=1e-4, warmup_rate=0.0, clip_norm=None)
# What a peer on torch or Flax reads of it.
PEER_ADAMW = {
    "learning_rate": ADAMW.learning_rate, "betas": [ADAMW.b1, ADAMW.b2], "epsilon": ADAMW.epsilon,
    "weight_decay": ADAMW.weight_decay,
}  # fmt: skip


class Timing(NamedTuple):
    """Seconds of repeated runs: what to quote, and the spread."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> "Timing":
        seconds = list(seconds)
        return cls(statistics.median(seconds), min(seconds), max(seconds))


def measure(work: Callable[[], Any], repeats: int = 7, least_seconds: float = 0.2) -> Timing:
    """Time `work` to the end of its computation, after one run that does not count (it may compile).

    Runs shorter than `least_seconds` / `repeats` are made in groups, so that the clock and the dispatch don't count.
    """
    jax.block_until_ready(work())
    began = time.perf_counter()
    jax.block_until_ready(work())
    group = max(1, round(least_seconds / repeats / max(time.perf_counter() - began, 1e-6)))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(group):
            result = work()
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - began) / group)
    return Timing.of(seconds)


def matmul_peak(dtype: str, repeats: int = 9) -> float:
    """FLOP/s of the fastest plain product of [2048, 768..3072] matrices here: operands `dtype`, float32 result.

    The least time counts: a peak is what the machine can do when nothing is in its way.
    """
    best = 0.0
    sizes = [(2048, 768, 3072), (2048, 3072, 768), (2048, 2048, 2048)]
    if jax.default_backend() != "cpu":
        sizes = [(8192, 8192, 8192)]
    for rows, inner, columns in sizes:
        # Numbers as a model has them: a chip multiplies ones with less power, and so faster.
        x, kernel = (jax.random.normal(jax.random.key(0), shape, dtype) for shape in ((rows, inner), (inner, columns)))
        product = jax.jit(lambda x, kernel: linear(x, kernel, dtype=dtype))
        timing = measure(lambda: product(x, kernel), repeats)  # noqa: B023
        best = max(best, 2 * rows * inner * columns / timing.least)
    return best


def serve_training(make_model: Callable[[], Any], folder: pathlib.Path, spec: dict[str, Any], dtype: str) -> None:
    """Our side of a comparison of training steps: compiles the step ahead of time, says what it is, and makes it on the
    batches `ours-*.npz` in `folder` as it is asked to.

    Args:
      spec: ours_tokens and ours_texts of each batch; microbatches, if there are several.
    """
    set_up_runtime()
    jax.config.update("jax_enable_compilation_cache", False)  # what it takes to compile is a result
    tx = make_optimizer(ADAMW, 10_000, logical_axes(make_model))
    graphdef, state, _ = init_train_state(make_model, tx)
    batches = [jax.device_put(dict(np.load(path))) for path in sorted(folder.glob("ours-*.npz"))]
    began = time.perf_counter()
    step_fn = make_train_step(graphdef, tx, num_microbatches=spec.get("microbatches", 1))
    compiled = step_fn.lower(state, batches[0]).compile()
    seconds = time.perf_counter() - began

    def step(i: int) -> None:
        nonlocal state
        state, metrics = compiled(state, batches[i])
        jax.block_until_ready(metrics)
        free_temporaries(metrics)  # as train.py does
        if not np.isfinite(float(metrics.loss.sum)):
            raise FloatingPointError("the loss is not finite")

    step(0)
    ready = {"compile_seconds": seconds, "matmul_peak": matmul_peak(dtype)}
    serve_steps(step, spec["ours_tokens"], spec["ours_texts"], ready, peak_memory_bytes)


def peak_memory_bytes() -> int:
    """The most that this process has held on its first device, or on a CPU at all."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use") or resident_peak_bytes()


def header(**settings: Any) -> dict[str, Any]:
    """Versions, device and commit, then what was asked for: every result begins with it."""
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        **versions,
        "device": _cpu_name() if device.platform == "cpu" else device.device_kind,
        "devices": jax.device_count(),
        "cores": num_cores(),
        **settings,
    }


def _commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=pathlib.Path(__file__).parent
    )
    return run.stdout.strip() or "unknown"


def _cpu_name() -> str:
    try:
        info = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "cpu"
    fields = dict(line.split("\t", 1) for line in info.splitlines() if "\t" in line)
    name = fields.get("model name", "cpu").strip("\t: ")
    flags = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in fields.get("flags", "").split()]
    return f"{name} ({', '.join(flags[:2])})"


def parser(documentation: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", action="store_true", help="print JSON for programs instead of a table")
    return made


def say(message: str) -> None:
    """News of the work, where it does not mix with results."""
    print(message, file=sys.stderr, flush=True)


def show(result: dict[str, Any], rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print `result`, whose "header" says under what; for people its rows as a table."""
    if as_json:
        print(json.dumps(result))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    console.print("  ".join(f"{name} {value}" for name, value in result["header"].items()), markup=False)
    table = Table()
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in rows[0]))
    # A table that is wider than the terminal, or than a pipe's 80 columns, wraps; cut off it would be of no use.
    console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
