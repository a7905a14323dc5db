"""The masked vocabulary head: its loss and every gradient, each implementation on each named shape.

    python benchmarks/bench_head.py [--case NAME ...] [--dtype float32 bfloat16] [--repeats 5] [--json]

Milliseconds are the median and the range of --repeats after one that does not count. The peak is a square product's in
the same dtype, measured before and after each case in the same run; `of peak` is the head's three products over that.
"""

import argparse
import json
import pathlib
import platform
import statistics
import subprocess
import time

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from cases import HEAD_CASES
from rich.console import Console
from rich.table import Table

from flax_encoder.ops.cross_entropy import IMPLEMENTATIONS, linear_cross_entropy
from flax_encoder.ops.linear import linear
from flax_encoder.training.runtime import set_up_runtime

PEAK_SIZE = 4096


def header() -> dict[str, str]:
    commit = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"]
    return {
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip() or "unknown",
    }


def seconds(work, *inputs, repeats: int) -> list[float]:
    """Of each of `repeats` runs, after one that does not count."""
    jax.block_until_ready(work(*inputs))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(work(*inputs))
        times.append(time.perf_counter() - began)
    return times


def peak_flops(dtype: str, repeats: int, size: int) -> float:
    square = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    product = jax.jit(lambda x: linear(x, x, dtype=dtype))
    return 2 * size**3 / statistics.median(seconds(product, square, repeats=repeats))


def measure(case: dict[str, int], dtype: str, repeats: int, peak_size: int) -> list[dict]:
    B, M, E, V = case.values()
    generator = np.random.default_rng(0)
    hidden, table, bias = (
        jnp.asarray(0.1 * generator.standard_normal(shape), jnp.float32) for shape in ((B, M, E), (V, E), (V,))
    )
    targets, weights = jnp.asarray(generator.integers(0, V, (B, M)), jnp.int32), jnp.ones((B, M))
    compiled, compile_seconds = {}, {}
    for name in IMPLEMENTATIONS:
        loss = lambda *parameters, name=name: linear_cross_entropy(  # noqa: E731
            *parameters, targets, weights, dtype=dtype, implementation=name
        )
        began = time.perf_counter()
        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
        compiled[name] = step.lower(hidden, table, bias).compile()
        compile_seconds[name] = time.perf_counter() - began
    times: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    peaks = [peak_flops(dtype, repeats, peak_size)]
    for half in (repeats - repeats // 2, repeats // 2):  # A B A B, since machines drift
        for name, step in compiled.items():
            times[name] += seconds(step, hidden, table, bias, repeats=half) if half else []
    peaks.append(peak_flops(dtype, repeats, peak_size))
    flops = 3 * 2 * B * M * E * V
    return [
        {
            "implementation": name,
            "dtype": dtype,
            "milliseconds": 1e3 * statistics.median(times[name]),
            "milliseconds_range": [1e3 * min(times[name]), 1e3 * max(times[name])],
            "compile_seconds": compile_seconds[name],
            "temporary_bytes": compiled[name].memory_analysis().temp_size_in_bytes,
            "peak_flops_per_second": statistics.mean(peaks),
            "fraction_of_peak": flops / statistics.median(times[name]) / statistics.mean(peaks),
        }
        for name in IMPLEMENTATIONS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=HEAD_CASES, default=list(HEAD_CASES)[:2])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak-size", type=int, default=PEAK_SIZE, help="rows of the square product")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    set_up_runtime()
    results = [
        {"case": name, **HEAD_CASES[name], **line}
        for name in args.case
        for dtype in args.dtype
        for line in measure(HEAD_CASES[name], dtype, args.repeats, args.peak_size)
    ]
    if args.json:
        print(json.dumps({**header(), "results": results}))
        return
    table = Table(title="  ".join(f"{k} {v}" for k, v in header().items()), title_justify="left")
    names = ("case", "B x M, E, V", "dtype", "implementation")
    for column in (*names, "ms", "range", "compile s", "temporaries MiB", "of peak"):
        table.add_column(column, justify="left" if column in names else "right")
    for r in results:
        low, high = r["milliseconds_range"]
        table.add_row(
            r["case"], f"{r['B']} x {r['M']}, {r['E']}, {r['V']}", r["dtype"], r["implementation"],
            f"{r['milliseconds']:,.1f}", f"{low:,.1f} to {high:,.1f}", f"{r['compile_seconds']:.1f}",
            f"{r['temporary_bytes'] / 2**20:,.0f}", f"{r['fraction_of_peak']:.2f}",
        )  # fmt: skip
    Console(highlight=False, width=150).print(table)


if __name__ == "__main__":
    main()
