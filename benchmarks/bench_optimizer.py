"""The optimizer's update: clipping, every optimizer by name, its schedule, on the parameters of named models.

    python benchmarks/bench_optimizer.py [--model NAME ...] [--optimizer NAME ...] [--repeats 7] [--json]
    python benchmarks/bench_optimizer.py --optimizer muon --muon-dtype float32 bfloat16

Parameters and state are donated, as in the training step. The bound is what memory allows: the parameters, gradients
and state read once, the parameters and state written once, and the gradients read once more for their norm, at the
bandwidth of a donated copy of the parameters (read and written), measured in the same run. `of bound` is that time over
the median. Optimizers that multiply matrices (muon, soap) are bound by those. soap's first update, which decomposes its
Gram matrices, does not count; its later decompositions, every 10th update, are the upper end of the range. Muon's
products are of --muon-dtype; the header says whether this CPU has instructions for those of bfloat16.
"""

import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from harness import Timing, header, measure, parser, say, show

from flax_encoder.config import EncoderConfig, OptimizerConfig
from flax_encoder.nn.partition import abstract_model
from flax_encoder.ops.platform import cpu_multiplies_bfloat16
from flax_encoder.tasks import MaskedLM
from flax_encoder.training.optimizer import make_optimizer
from flax_encoder.training.runtime import set_up_runtime
from flax_encoder.training.sharding import logical_axes
from flax_encoder.training.transformations import global_norm

MODELS = {
    "bert_mini": EncoderConfig(vocab_size=30592, num_layers=4, embed_dim=256, num_heads=4, mlp_dim=1024),
    "bert_base": EncoderConfig(vocab_size=30592),
}
NAMES = ("adamw", "stable_adamw", "lamb", "lion", "muon", "soap", "adafactor", "schedule_free")


def config_of(name: str, muon_dtype: str) -> OptimizerConfig:
    if name == "muon":
        return OptimizerConfig(name, muon_dtype=muon_dtype)  # type: ignore[arg-type]
    if name == "schedule_free":
        return OptimizerConfig(name, schedule="wsd", decay_rate=0.0)
    return OptimizerConfig(name)  # type: ignore[arg-type]


def make_update(tx: optax.GradientTransformationExtraArgs):
    def update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, global_norm(grads)

    return jax.jit(update, donate_argnums=(0, 1))


def num_bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def copy_bandwidth(params, repeats: int) -> float:
    """Bytes read and written a second by a pass over the parameters in place; the most that was seen."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0.999, tree), donate_argnums=0)
    held = [jax.tree.map(jnp.copy, params)]

    def work():
        held[0] = step(held[0])
        return held[0]

    return 2 * num_bytes(params) / measure(work, repeats).least


def bench(model: str, name: str, muon_dtype: str, repeats: int) -> dict:
    def make_model():
        return MaskedLM(MODELS[model], rngs=nnx.Rngs(0))

    _, abstract = abstract_model(make_model)
    shapes = nnx.to_pure_dict(abstract)
    keys = iter(jax.random.split(jax.random.key(0), 2 * len(jax.tree.leaves(shapes))))
    params, grads = (jax.tree.map(lambda x: 0.02 * jax.random.normal(next(keys), x.shape), shapes) for _ in range(2))
    bandwidth = copy_bandwidth(params, repeats)
    tx = make_optimizer(config_of(name, muon_dtype), 1000, logical_axes(make_model))
    state = jax.jit(tx.init)(params)
    state_bytes, param_bytes = num_bytes(state), num_bytes(params)
    update = make_update(tx)
    began = time.perf_counter()
    compiled = update.lower(params, state, grads).compile()
    compile_seconds = time.perf_counter() - began
    params, state, _ = compiled(params, state, grads)
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        params, state, norm = compiled(params, state, grads)
        jax.block_until_ready((params, state, norm))
        seconds.append(time.perf_counter() - began)
    timing = Timing.of(seconds[1:])
    bound = (4 * param_bytes + 2 * state_bytes) / bandwidth
    return {
        "model": model,
        "optimizer": f"muon, {muon_dtype}" if name == "muon" else name,
        "parameters": param_bytes // 4,
        "state_bytes": state_bytes,
        "milliseconds": 1e3 * timing.median,
        "least": 1e3 * timing.least,
        "most": 1e3 * timing.most,
        "bound_milliseconds": 1e3 * bound,
        "of_bound": bound / timing.median,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_seconds": compile_seconds,
        "copy_gigabytes_per_second": bandwidth / 1e9,
    }


def main() -> None:
    asking = parser(__doc__)
    asking.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    asking.add_argument("--optimizer", nargs="+", choices=NAMES, default=list(NAMES))
    asking.add_argument(
        "--muon-dtype", nargs="+", choices=("float32", "bfloat16"), default=[OptimizerConfig.muon_dtype],
        help="of Muon's products (default: the setting's)",
    )  # fmt: skip
    asking.add_argument("--repeats", type=int, default=7)
    asked = asking.parse_args()
    set_up_runtime()
    jax.config.update("jax_enable_compilation_cache", False)  # what it takes to compile is a result
    rows = []
    for model in asked.model:
        for name in asked.optimizer:
            for muon_dtype in asked.muon_dtype if name == "muon" else asked.muon_dtype[:1]:
                say(f"{model} {name}" + f", {muon_dtype}" * (name == "muon"))
                rows.append(bench(model, name, muon_dtype, asked.repeats))
    about = {"dtype": "float32", "repeats": asked.repeats, "CPU_has_bfloat16": cpu_multiplies_bfloat16()}
    result = {"header": header(**about), "results": rows}
    show(result, [_cells(row) for row in rows], asked.json)


def _cells(row: dict) -> dict:
    """A row as people read it."""
    return {
        "model": row["model"],
        "optimizer": row["optimizer"],
        "ms": f"{row['milliseconds']:,.0f} ({row['least']:,.0f} to {row['most']:,.0f})",
        "of bound": f"{row['of_bound']:.2f}",
        "state MB": row["state_bytes"] / 1e6,
        "temporary MB": row["temporary_bytes"] / 1e6,
        "compile s": row["compile_seconds"],
        "copy GB/s": row["copy_gigabytes_per_second"],
    }


if __name__ == "__main__":
    main()
