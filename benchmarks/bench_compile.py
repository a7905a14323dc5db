"""The training step on a TPU or GPU that is not there: compiled for it, and what it would take, beside the peer's.

    python benchmarks/bench_compile.py --batch 64 --length 512 --dropout 0.1 \\
        --peer flax --peer-python PYTHON_WITH_TRANSFORMERS_4.57.6
    python benchmarks/bench_compile.py --platform gpu --batch 64 --length 512 --dropout 0.1 [--peer ...]

Needs the platform's compiler, not the hardware: `libtpu`; or `jax-cuda12-plugin` and `jax-cuda12-pjrt` of jax's own
version, and `nvidia-cuda-nvcc-cu12`, with `nvidia-cudnn-cu12` for `--attention cudnn`. So
does the peer's environment. --batch counts rows a chip. Nothing here is measured: a step is what the compiler expects
of each operation, loop bodies times their trip count, plus what it does not estimate, each at the longest of its
products over a fraction of the chip's peak, its bytes, and for Pallas kernels on TPUs the bundles of instructions that
the compiler made of them (flax_encoder/plan/estimate.py). All parts are shown.

For an H100 the compiler estimates elementwise work and sums, mostly as bytes over the data sheet's bandwidth; matrix
products count at 0.76 of the peak, as measured on one, or their bytes. Here is no GPU to time kernels on and choose
(--products), and nothing is counted between kernels: measured steps of ours took 0.95 to 1.25 times as long.

--peer flax is transformers' FlaxBert with the same AdamW, dropout and dtype, its labels at every position, compiled
for the same chip and read by the same reader. --top N lists the costliest operations of our side.
"""

import json
import os
import pathlib
import subprocess
import tempfile
import time
from typing import Any

from flax_encoder.plan.targets import CHIPS, WITHOUT_ACCELERATOR, compiler_options, devices, topology_arguments

os.environ |= WITHOUT_ACCELERATOR

import jax
import jax.numpy as jnp
import numpy as np
from bench_step import add_model_arguments, configs, masked_rows, peer_config
from flax import nnx
from harness import ADAMW, PEER_ADAMW, header, parser, say, show
from jax.sharding import NamedSharding

from flax_encoder.config import ConfigError, EncoderConfig, MeshConfig
from flax_encoder.nn.partition import abstract_model
from flax_encoder.ops.platform import platform_for_tracing
from flax_encoder.plan.estimate import costliest, memory_of, report
from flax_encoder.plan.flops import step_flops
from flax_encoder.plan.schedules import dump_schedules, kernel_cycles
from flax_encoder.tasks import MaskedLM
from flax_encoder.training.optimizer import make_optimizer
from flax_encoder.training.sharding import BATCH_SPEC, logical_axes, make_mesh
from flax_encoder.training.step import TrainState, make_train_step, state_shardings

HERE = pathlib.Path(__file__).parent
TOPOLOGIES = {"tpu": "v5e:2x2", "gpu": "h100:1x1x1"}


def compile_step(
    config: EncoderConfig, batch: dict[str, Any], mesh: jax.sharding.Mesh, platform: str, products: str | None
) -> Any:
    """The library's own step, compiled for the mesh's devices from shapes alone."""

    def make_model():
        return MaskedLM(config, rngs=nnx.Rngs(0))

    tx = make_optimizer(ADAMW, 10_000, logical_axes(make_model))
    graphdef, params = abstract_model(make_model)

    def init(params):
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))

    state = jax.eval_shape(init, nnx.to_pure_dict(params))
    shardings = state_shardings(make_model, tx, mesh, state)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    rows = NamedSharding(mesh, BATCH_SPEC)
    batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for k, x in batch.items()}
    options = compiler_options(platform, products)
    with jax.set_mesh(mesh), platform_for_tracing(platform):
        return make_train_step(graphdef, tx, shardings=shardings).lower(state, batch).compile(options)


def compile_peer(asked, config: EncoderConfig) -> dict[str, Any]:
    spec = {
        "config": peer_config(asked.model, config),
        "batch": asked.batch,
        "length": asked.length,
        "dtype": asked.dtype,
        "topology": topology_arguments(asked.topology),
        "options": compiler_options(asked.platform, asked.products),
        **PEER_ADAMW,
    }
    run = subprocess.run(
        [asked.peer_python, str(HERE / "peer_compile.py"), json.dumps(spec)], capture_output=True, text=True,
        env=os.environ | WITHOUT_ACCELERATOR,
    )  # fmt: skip
    if run.returncode:
        raise SystemExit(f"the peer failed:\n{run.stderr[-1000:]}")
    answer = json.loads(run.stdout.splitlines()[-1])
    chip = CHIPS[asked.topology.split(":")[0]]
    made = report(answer["text"], answer["memory"], chip, asked.kernel_fraction, {})
    return made | {name: answer[name] for name in ("compile_seconds", "versions")}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--platform", choices=tuple(TOPOLOGIES), default="tpu", help="what to compile for (tpu)")
    arguments.add_argument(
        "--topology",
        help=f"a chip and its layout, of {', '.join(CHIPS)}; one device of it is used (default "
        f"{', '.join(f'{topology} for {platform}' for platform, topology in TOPOLOGIES.items())})",
    )
    arguments.add_argument("--mesh", help="DATA,FSDP,TENSOR over all devices of the topology instead of one")
    add_model_arguments(arguments, batch=64, length=512)
    arguments.add_argument(
        "--kernel-fraction",
        type=float,
        help="of peak, at which attention kernels count (default "
        f"{', '.join(f'{chip.kernel_fraction} for {name}' for name, chip in CHIPS.items())})",
    )
    arguments.add_argument(
        "--products",
        choices=("cublas", "triton"),
        help="on a GPU, who makes the matrix products: a library, or the compiler with what surrounds them fused in; "
        "a run would time both for each (default cublas)",
    )
    arguments.add_argument(
        "--document", type=int, metavar="N", help="rows are packed with documents of N tokens (default: one a row)"
    )
    arguments.add_argument("--peer", choices=("flax", "none"), default="none")
    arguments.add_argument("--peer-python", help="the Python of the peer's environment")
    arguments.add_argument("--top", type=int, default=0, metavar="N", help="list the N costliest operations")
    arguments.add_argument("--text", type=pathlib.Path, help="write the compiled program's text to this file")
    asked = arguments.parse_args()
    if (asked.peer == "none") != (asked.peer_python is None):
        raise SystemExit("a peer runs in its own environment: give --peer and --peer-python together, or neither.")
    if asked.products and asked.platform != "gpu":
        raise SystemExit(f"--products is for GPUs, where there is a choice: got {asked.products} for {asked.platform}.")
    asked.products = asked.products or ("cublas" if asked.platform == "gpu" else None)
    asked.topology = asked.topology or TOPOLOGIES[asked.platform]
    own, config = configs(asked)
    dumped = tempfile.TemporaryDirectory()
    schedules = pathlib.Path(dumped.name)
    # Before libtpu is loaded, by the next line.
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {dump_schedules(schedules)}"
    try:
        found = devices(asked.platform, asked.topology)
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    chip_name = asked.topology.split(":")[0]
    chip = CHIPS[chip_name]
    asked.kernel_fraction = asked.kernel_fraction or chip.kernel_fraction
    sizes = [int(n) for n in asked.mesh.split(",")] if asked.mesh else [1, 1, 1]
    mesh = make_mesh(MeshConfig(*sizes), found if asked.mesh else found[:1])
    batch = masked_rows(own, asked.batch * sizes[0] * sizes[1], asked.length, asked.masked_rate, 0)
    if asked.document is not None:
        if asked.document < 1:
            raise SystemExit(f"--document must be a number of tokens: got {asked.document}.")
        batch["segment_ids"] += np.arange(asked.length, dtype=np.int32) // asked.document
    tokens = batch["tokens"].size / mesh.size
    flops = step_flops(own, batch["segment_ids"], batch["targets"].size) / mesh.size

    sides = {}
    if asked.peer != "none":  # first, since it is the one that may fail
        say("compiling the peer")
        sides["peer"] = compile_peer(asked, own)
    say(f"compiling {asked.model}, {asked.batch} x {asked.length}, {asked.dtype}, for {chip_name}")
    began = time.perf_counter()
    try:
        compiled = compile_step(config, batch, mesh, asked.platform, asked.products)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise SystemExit(f"the step does not fit the chip: {str(error).splitlines()[0]}") from None
        raise
    seconds = time.perf_counter() - began
    text = compiled.as_text()
    if asked.text:
        asked.text.write_text(text)
    segment_ids = batch["segment_ids"]
    memory = memory_of(compiled)
    made = report(text, memory, chip, asked.kernel_fraction, kernel_cycles(schedules, segment_ids), segment_ids)
    sides = {"ours": made | {"compile_seconds": seconds}} | sides
    for side in sides.values():
        side["tokens_per_second_per_chip"] = tokens / side["step_seconds"]
        side["mfu"] = flops / side["step_seconds"] / chip.peak_flops
    result: dict[str, Any] = {
        "header": header(**{k: v for k, v in vars(asked).items() if k not in ("json", "text", "top")}),
        **sides,
        "model_flops": flops,
    }
    if "peer" in sides:
        result["step_ratio"] = sides["ours"]["step_seconds"] / sides["peer"]["step_seconds"]
    if asked.top:
        result["costliest"] = costliest(text, chip, asked.top)
    show(result, _rows(sides, asked.platform), asked.json)
    if not asked.json:
        _print_notes(result, sides)


def _rows(sides: dict[str, dict[str, Any]], platform: str) -> list[dict[str, Any]]:
    lines = {
        "step ms, estimated": ("step_seconds", 1e3),
        "... the compiler's part": ("compiler_seconds", 1e3),
        "...... of it for memory alone": ("compiler_memory_seconds", 1e3, "gpu"),
        "... the products' part, at the fraction of peak": ("product_seconds", 1e3, "gpu"),
        "...... of it for bytes alone": ("product_memory_seconds", 1e3, "gpu"),
        "... the attention kernels' part": ("kernel_seconds", 1e3),
        "...... for products over the fraction of peak": ("kernel_product_seconds", 1e3),
        "...... for bytes": ("kernel_byte_seconds", 1e3),
        "...... for bundles of instructions": ("kernel_bundle_seconds", 1e3, "tpu"),
        "calls of attention kernels": ("kernel_calls", 1),
        "operations launched": ("launches", 1, "gpu"),
        "tokens/s/chip": ("tokens_per_second_per_chip", 1),
        "model FLOPs, of peak": ("mfu", 1),
        "arguments GB": ("argument_bytes", 1e-9),
        "temporaries GB": ("temporary_bytes", 1e-9),
        "outputs GB": ("output_bytes", 1e-9),
        "... in arguments' place GB": ("alias_bytes", 1e-9),
        "compile s": ("compile_seconds", 1),
    }
    return [
        {"": line} | {name: side[key] * factor for name, side in sides.items()}
        for line, (key, factor, *only) in lines.items()
        if platform in (only or (platform,))
    ]


def _print_notes(result: dict[str, Any], sides: dict[str, Any]) -> None:
    print(f"estimated, not measured; model {result['model_flops'] / 1e12:.2f} TFLOP a step a chip", end="")
    print(f"; step {result['step_ratio']:.2f} of the peer's" if "step_ratio" in result else "")
    asked = result["header"]
    print(f"fractions of peak: attention kernels {asked['kernel_fraction']}", end="")
    print(f", products {CHIPS[asked['topology'].split(':')[0]].product_fraction}" if asked["platform"] == "gpu" else "")
    for name, side in sides.items():
        if side["kernels_without_schedule"]:
            print(f"WARNING: {name}: {side['kernels_without_schedule']} kernels without a schedule that could be read")
        for what, (count, size) in side["unestimated"].items():
            print(f"WARNING: {name}: not in the step, as without estimate: {count} x {what}, {size / 1e9:.2f} GB made")
    for i, row in enumerate(result.get("costliest", ())):
        if i == 0:
            print("    ms  share  count  HBM ms products  shape (* in fast memory) | op_name | source | an example")
        times = f"{row['milliseconds']:6.2f} {row['share']:6.1%} {row['count']:6}"
        times += f" {row['hbm_milliseconds']:7.2f} {row['product_milliseconds']:8.2f}"
        print(f"{times}  {row['shape']} | {row['op_name']} | {row['source']} | {row['example']}")


if __name__ == "__main__":
    main()
