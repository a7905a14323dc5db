"""Attention, measured: every implementation on every named shape, forward and with its gradients.

    python benchmarks/bench_attention.py [--case NAME ...] [--implementation NAME ...] [--dtype bfloat16] [--json]

Milliseconds are medians, with the least and the most. FLOP/s count the products of the pairs that a window lets
through, two forward and four more backward, whatever an implementation makes again; the share is of the matmul peak
measured in the same run and dtype. Temporaries are what the compiled program of both passes allocates beside its
arguments and results. An implementation that cannot serve a shape shows its reason.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from cases import ATTENTION_CASES, AttentionCase
from harness import header, matmul_peak, measure, parser, say, show

from flax_encoder.ops.attention import IMPLEMENTATIONS, attention

_QUADRATIC_AT_MOST = 2**28  # logits, 1 GB in float32: past it `reference` would not fit where the others do


def arguments(case: AttentionCase, dtype: str):
    rng = np.random.default_rng(0)
    shapes = [(case.B, case.T, heads, case.H) for heads in (case.N, case.K, case.K, case.N)]
    query, key, value, d_out = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    bias = None if case.bias is None else jnp.zeros((*case.bias, case.T, case.T), dtype)
    segments = jnp.asarray(case.segment_ids())
    return (query, key, value, bias), d_out, segments


def seen_pairs(case: AttentionCase) -> int:
    """Of queries and keys that the window lets through."""
    if case.window is None:
        return case.B * case.T**2
    index = np.arange(case.T)
    left, right = case.window
    return case.B * int((np.minimum(index, left) + np.minimum(case.T - 1 - index, right) + 1).sum())


def compiled_passes(case: AttentionCase, name: str, arrays, d_out, segments):
    """(forward, forward and backward), as functions of no arguments and as compiled."""
    key = jax.random.key(0) if case.dropout_rate else None

    def forward(arrays, segments, key):
        query, keys, value, bias = arrays
        return attention(
            query, keys, value, bias=bias, segment_ids=segments, window=case.window, dropout_rate=case.dropout_rate,
            dropout_key=key, implementation=name,
        )  # fmt: skip

    def both(arrays, d_out, segments, key):
        out, vjp = jax.vjp(lambda arrays: forward(arrays, segments, key), arrays)
        return out, vjp(d_out)

    first = jax.jit(forward).lower(arrays, segments, key).compile()
    second = jax.jit(both).lower(arrays, d_out, segments, key).compile()
    run = functools.partial(first, arrays, segments, key), functools.partial(second, arrays, d_out, segments, key)
    return run, second.memory_analysis().temp_size_in_bytes


def row(case_name: str, name: str, dtype: str, peak: float, repeats: int) -> dict:
    case = ATTENTION_CASES[case_name]
    result = dict.fromkeys(("forward_ms", "both_ms", "least_ms", "most_ms", "temporary_mb", "gflops", "share"))
    result = {"case": case_name, "implementation": name, **result, "refusal": ""}
    if name == "reference" and case.B * case.N * case.T**2 > _QUADRATIC_AT_MOST:
        return result | {"refusal": "its logits would take gigabytes"}
    try:
        (forward, both), temporary_bytes = compiled_passes(case, name, *arguments(case, dtype))
    except ValueError as error:
        if "cannot serve" not in str(error):
            raise
        return result | {"refusal": str(error).split("cannot serve: ")[1].split(": got")[0]}
    first, second = measure(forward, repeats), measure(both, repeats)
    flops = 6 * 2 * seen_pairs(case) * case.N * case.H / second.median
    return result | {
        "forward_ms": 1e3 * first.median,
        "both_ms": 1e3 * second.median,
        "least_ms": 1e3 * second.least,
        "most_ms": 1e3 * second.most,
        "temporary_mb": temporary_bytes / 2**20,
        "gflops": flops / 1e9,
        "share": flops / peak,
    }


def main():
    options = parser(__doc__)
    options.add_argument("--case", nargs="+", choices=ATTENTION_CASES, default=list(ATTENTION_CASES))
    options.add_argument("--implementation", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options.add_argument("--repeats", type=int, default=7)
    args = options.parse_args()
    peak = matmul_peak(args.dtype)
    rows = []
    for case in args.case:
        for name in args.implementation:
            say(f"{case} {name}")
            rows.append(row(case, name, args.dtype, peak, args.repeats))
    result = {"header": header(dtype=args.dtype, peak_gflops=round(peak / 1e9)), "rows": rows}
    show(result, [_cells(row) for row in rows], args.json)


def _cells(row: dict) -> dict:
    """A row as people read it."""
    cells = {"case": row["case"], "implementation": row["implementation"], "forward": row["refusal"]}
    if row["refusal"]:
        return cells | dict.fromkeys(("both", "temporary", "of peak"), "")
    return cells | {
        "forward": f"{row['forward_ms']:.1f} ms",
        "both": f"{row['both_ms']:.1f} ms ({row['least_ms']:.1f} to {row['most_ms']:.1f})",
        "temporary": f"{row['temporary_mb']:.0f} MB",
        "of peak": f"{100 * row['share']:.0f}%",
    }


if __name__ == "__main__":
    main()
