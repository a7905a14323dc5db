"""Attention: every implementation on every named shape, forward and with its gradients, measured and checked.

    python benchmarks/bench_attention.py [--case NAME ...] [--implementation NAME ...] [--dtype bfloat16] [--json]

Milliseconds are medians, with the least and the most. FLOP/s count the products of pairs of one document that a
window lets through, two forward and four more backward, whatever an implementation makes again; the share is of the
matmul peak measured in the same run and dtype. Temporaries are what the compiled program of both passes allocates
beside its arguments and results. An implementation that cannot serve a shape shows its reason.

Errors are the largest of the result, and of the gradients, against the definition (`reference`) in float32, over the
largest number there, or 1 if that is more; past what rounding explains the command fails. --interpret checks the
Pallas kernels for TPUs and GPUs on this machine, run as plain XLA, and does not time them.
"""

import argparse
import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from cases import ATTENTION_CASES, AttentionCase
from harness import header, matmul_peak, measure, parser, say, show

from flax_encoder.ops.attention import IMPLEMENTATIONS, attention
from flax_encoder.ops.platform import platform_for_tracing
from flax_encoder.plan.flops import visible_pairs
from flax_encoder.training.runtime import set_up_runtime

_PLATFORMS = {"flash": "gpu"}  # of Pallas kernels, where it is not a TPU
_QUADRATIC_AT_MOST = 2**28  # logits, 1 GB in float32: past it `reference` would not fit where the others do


def arguments(case: AttentionCase, dtype: str):
    rng = np.random.default_rng(0)
    shapes = [(case.B, case.T, heads, case.H) for heads in (case.N, case.K, case.K, case.N)]
    query, key, value, d_out = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    bias = None if case.bias is None else jnp.asarray(rng.standard_normal((*case.bias, case.T, case.T)), dtype)
    segments = jnp.asarray(case.segment_ids())
    return (query, key, value, bias), d_out, segments


def passes(case: AttentionCase, name: str):
    """(forward, forward and backward) of (arrays, d_out, segments); arrays are query, key, value and perhaps a bias."""
    key = jax.random.key(0) if case.dropout_rate else None

    def forward(arrays, d_out, segments):
        del d_out
        query, keys, value, bias = arrays
        return attention(
            query, keys, value, bias=bias, segment_ids=segments, window=case.window, dropout_rate=case.dropout_rate,
            dropout_key=key, implementation=name,
        )  # fmt: skip

    def both(arrays, d_out, segments):
        out, vjp = jax.vjp(lambda arrays: forward(arrays, d_out, segments), arrays)
        return out, *jax.tree.leaves(vjp(d_out))

    return forward, both


def is_large(case: AttentionCase) -> bool:
    return case.B * case.N * case.T**2 > _QUADRATIC_AT_MOST


def definition(case: AttentionCase, arrays, d_out, segments) -> list[np.ndarray] | None:
    """Result and gradients by `reference`, in float32; of a large shape one head at a time, if all are alike."""
    if is_large(case) and (case.N != case.K or case.bias or case.dropout_rate):
        return None
    arrays, d_out = jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, d_out))
    both = passes(case, "reference")[1]
    if not is_large(case):
        return list(map(np.asarray, jax.jit(both)(arrays, d_out, segments)))
    *qkv, _ = arrays
    heads = [x[:, :, :, None].transpose(2, 0, 1, 3, 4) for x in (*qkv, d_out)]  # [N B T 1 H]
    results = jax.jit(lambda *x: jax.lax.map(lambda x: both((*x[:3], None), x[3], segments), x))(*heads)
    return [np.asarray(x)[:, :, :, 0].transpose(1, 2, 0, 3) for x in results]


def errors(got, want, dtype: str, length: int) -> tuple[float, float, bool]:
    """(of the result, of the gradients, whether they are rounding), in shares of an array's largest number or 1."""
    shares = []
    for g, w in zip(got, want, strict=True):
        difference = np.abs(np.asarray(g, np.float32) - w).max()  # not finite if anything is not
        shares.append(float(difference / max(1.0, np.abs(w).max())))
    # As in the tests: float32 rounds in every addition, bfloat16 what goes into the second products and the result.
    bound = float(jnp.finfo(dtype).eps) * (length if dtype == "float32" else 4) ** 0.5
    return shares[0], max(shares[1:]), all(share <= bound for share in shares)


def row(case_name: str, name: str, args: argparse.Namespace, peak: float, defined: dict) -> dict:
    """`defined` keeps the definition's results by case."""
    case, dtype = ATTENTION_CASES[case_name], args.dtype
    case = case._replace(B=args.rows or case.B)
    result = dict.fromkeys(("forward_ms", "both_ms", "least_ms", "most_ms", "temporary_mb", "gflops", "share"))
    result |= dict.fromkeys(("out_error", "gradient_error", "is_right"))
    result = {"case": case_name, "implementation": name, **result, "refusal": ""}
    if name == "reference" and is_large(case):
        return result | {"refusal": "its logits would take gigabytes"}
    operands = arguments(case, dtype)
    try:
        interpreted = platform_for_tracing(_PLATFORMS.get(name, "tpu"), interpret_kernels=True)
        with interpreted if args.interpret else contextlib.nullcontext():
            forward, both = (jax.jit(f).lower(*operands).compile() for f in passes(case, name))
    except ValueError as error:
        if "cannot serve" not in str(error):
            raise
        return result | {"refusal": str(error).split("cannot serve: ")[1].split(": got")[0]}
    if case_name not in defined:
        defined[case_name] = definition(case, *operands)
    got = both(*operands)
    if (want := defined[case_name]) is None:
        say(f"{case_name}, {case.B} rows: not compared with the definition, whose logits would take gigabytes")
    else:
        names = ("out_error", "gradient_error", "is_right")
        result |= dict(zip(names, errors(got, want, dtype, case.T), strict=True))
    if args.interpret:
        return result
    first, second = (measure(functools.partial(f, *operands), args.repeats) for f in (forward, both))
    flops = 6 * 2 * visible_pairs(case.segment_ids(), case.window) * case.N * case.H / second.median
    return result | {
        "forward_ms": 1e3 * first.median,
        "both_ms": 1e3 * second.median,
        "least_ms": 1e3 * second.least,
        "most_ms": 1e3 * second.most,
        "temporary_mb": both.memory_analysis().temp_size_in_bytes / 2**20,
        "gflops": flops / 1e9,
        "share": flops / peak,
    }


def main():
    options = parser(__doc__)
    options.add_argument("--case", nargs="+", choices=ATTENTION_CASES, default=list(ATTENTION_CASES))
    options.add_argument("--implementation", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options.add_argument("--rows", type=int, metavar="B", help="of every case, for hardware that takes more of them")
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--interpret", action="store_true", help="check the Pallas kernels here, without times")
    args = options.parse_args()
    set_up_runtime()  # or each run's temporaries were pages that the kernel clears first
    jax.config.update("jax_enable_compilation_cache", False)
    peak = matmul_peak(args.dtype)
    rows, defined = [], {}
    for case in args.case:
        for name in args.implementation:
            say(f"{case} {name}")
            rows.append(row(case, name, args, peak, defined))
        defined.clear()
    result = {"header": header(dtype=args.dtype, batch=args.rows, peak_gflops=round(peak / 1e9)), "rows": rows}
    show(result, [_cells(row) for row in rows], args.json)
    if wrong := [f"{row['case']} by {row['implementation']}" for row in rows if row["is_right"] is False]:
        raise SystemExit(f"WRONG, by more than rounding explains: {', '.join(wrong)}")


def _cells(row: dict) -> dict:
    """A row as people read it."""
    cells = {"case": row["case"], "implementation": row["implementation"], "forward": row["refusal"]}
    cells |= dict.fromkeys(("both", "temporary", "of peak", "error", "of gradients"), "")
    if row["out_error"] is not None:
        cells |= {"error": f"{row['out_error']:.1e}", "of gradients": f"{row['gradient_error']:.1e}"}
    if row["both_ms"] is not None:
        cells |= {
            "forward": f"{row['forward_ms']:,.3g} ms",
            "both": f"{row['both_ms']:,.3g} ms ({row['least_ms']:,.3g} to {row['most_ms']:,.3g})",
            "temporary": f"{row['temporary_mb']:.0f} MB",
            "of peak": f"{100 * row['share']:.0f}%",
        }
    return cells


if __name__ == "__main__":
    main()
