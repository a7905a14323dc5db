"""The masked vocabulary head: its loss and every gradient, each implementation on each named shape.

    python benchmarks/bench_head.py [--case NAME ...] [--dtype float32 bfloat16] [--repeats 7] [--json]

Milliseconds are the median and the range of --repeats after one that does not count. `of peak` is the head's three
products over the matmul peak, measured in the same run and dtype. Temporaries are what the compiled program allocates
beside its arguments and results.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from cases import HEAD_CASES
from harness import header, matmul_peak, measure, parser, say, show

from flax_encoder.ops.cross_entropy import IMPLEMENTATIONS, linear_cross_entropy
from flax_encoder.training.runtime import set_up_runtime


def bench(name: str, dtype: str, implementation: str, repeats: int, peak: float) -> dict:
    B, M, E, V = (case := HEAD_CASES[name]).values()
    generator = np.random.default_rng(0)
    hidden, table, bias = (
        jnp.asarray(0.1 * generator.standard_normal(shape), jnp.float32) for shape in ((B, M, E), (V, E), (V,))
    )
    targets, weights = jnp.asarray(generator.integers(0, V, (B, M)), jnp.int32), jnp.ones((B, M))
    loss = functools.partial(linear_cross_entropy, dtype=dtype, implementation=implementation)
    began = time.perf_counter()
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True)).lower(hidden, table, bias, targets, weights)
    compiled = step.compile()
    compile_seconds = time.perf_counter() - began
    timing = measure(lambda: compiled(hidden, table, bias, targets, weights), repeats)
    return {
        "case": name,
        **case,
        "implementation": implementation,
        "dtype": dtype,
        "milliseconds": 1e3 * timing.median,
        "milliseconds_range": [1e3 * timing.least, 1e3 * timing.most],
        "compile_seconds": compile_seconds,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "peak_flops_per_second": peak,
        "fraction_of_peak": 3 * 2 * B * M * E * V / timing.median / peak,
    }


def main() -> None:
    asking = parser(__doc__)
    asking.add_argument("--case", nargs="+", choices=HEAD_CASES, default=list(HEAD_CASES)[:2])
    asking.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    asking.add_argument("--repeats", type=int, default=7)
    asked = asking.parse_args()
    set_up_runtime()
    jax.config.update("jax_enable_compilation_cache", False)  # what it takes to compile is a result
    rows = []
    for dtype in asked.dtype:
        peak = matmul_peak(dtype)
        for name in asked.case:
            for implementation in IMPLEMENTATIONS:
                say(f"{name} {dtype} {implementation}")
                rows.append(bench(name, dtype, implementation, asked.repeats, peak))
    show({"header": header(repeats=asked.repeats), "results": rows}, [_cells(row) for row in rows], asked.json)


def _cells(row: dict) -> dict:
    """A row as people read it."""
    low, high = row["milliseconds_range"]
    return {
        "case": row["case"],
        "B x M, E, V": "{B} x {M}, {E}, {V}".format_map(row),
        "dtype": row["dtype"],
        "implementation": row["implementation"],
        "ms": f"{row['milliseconds']:,.1f} ({low:,.1f} to {high:,.1f})",
        "compile s": row["compile_seconds"],
        "temporary MiB": row["temporary_bytes"] / 2**20,
        "of peak": f"{row['fraction_of_peak']:.2f}",
    }


if __name__ == "__main__":
    main()
