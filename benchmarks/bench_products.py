"""The matrix products of a model's layers and nothing else: what bounds its training step, whatever surrounds them.

    python benchmarks/bench_products.py --model bert_base --batch 16 --length 128 --dtype float32 [--repeats 7] [--json]

One layer's products after the other, as the layers make them, by the library's `linear`: forward, and forward with the
gradients of kernels and inputs. `of peak` is over the fastest plain product in that dtype, measured in the same run.
"""

import jax
import jax.numpy as jnp
from harness import header, matmul_peak, measure, parser, say, show

from flax_encoder.families import PRESETS, preset
from flax_encoder.ops.linear import linear
from flax_encoder.training.runtime import set_up_runtime


def layer_products(model: str) -> list[tuple[int, int]]:
    """(inputs, outputs) of a layer's kernels: query, key and value side by side, and gate and up."""
    config = preset(model)
    D, F, H, N = config.embed_dim, config.mlp_dim, config.head_dim, config.num_heads
    K = config.num_kv_heads or N
    return [(D, (N + 2 * K) * H), (N * H, D), (D, (1 + config.gated) * F), (F, D)]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="bert_base", choices=PRESETS, metavar="MODEL", help=", ".join(PRESETS))
    options.add_argument("--batch", type=int, default=16, help="rows (default 16)")
    options.add_argument("--length", type=int, default=128, help="tokens in a row (default 128)")
    options.add_argument("--layers", type=int, help="fewer layers than the model has")
    options.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the products")
    options.add_argument("--repeats", type=int, default=7)
    args = options.parse_args()
    set_up_runtime()
    shapes = layer_products(args.model) * (args.layers or preset(args.model).num_layers)
    keys = iter(jax.random.split(jax.random.key(0), len(shapes) + 1))
    kernels = [jax.random.normal(next(keys), shape) * shape[0] ** -0.5 for shape in shapes]
    x = jax.random.normal(next(keys), (args.batch * args.length, shapes[0][0]))

    def forward(kernels, x):
        for kernel in kernels:  # of what is wider than the next product takes, a part
            x = linear(x[:, : kernel.shape[0]], kernel, dtype=args.dtype)
        return x

    def loss(kernels, x):
        return jnp.square(forward(kernels, x)[:8]).sum()

    flops = 2 * x.shape[0] * sum(inputs * outputs for inputs, outputs in shapes)
    rows = []
    for name, function, times in (("forward", forward, 1), ("with gradients", jax.grad(loss, (0, 1)), 3)):
        say(f"{name}: {args.model}, {args.batch} x {args.length}, {args.dtype}")
        compiled = jax.jit(function).lower(kernels, x).compile()
        before = matmul_peak(args.dtype)
        timing = measure(lambda: compiled(kernels, x), args.repeats)  # noqa: B023
        peak = max(before, matmul_peak(args.dtype))
        rows.append(
            {
                "products": name,
                "ms": 1e3 * timing.median,
                "least": 1e3 * timing.least,
                "most": 1e3 * timing.most,
                "GFLOP/s": times * flops / timing.median / 1e9,
                "peak": peak / 1e9,
                "of peak": times * flops / timing.median / peak,
            }
        )
    settings = {name: getattr(args, name) for name in ("model", "batch", "length", "layers", "dtype")}
    show({"header": header(**settings), "rows": rows}, rows, args.json)


if __name__ == "__main__":
    main()
