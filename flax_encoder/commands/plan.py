"""plan: whether a run fits on hardware that you do not have, how long it takes and what it costs."""

import argparse
import json
import sys
from typing import Any

from flax_encoder.commands.recipe import parse_run_config
from flax_encoder.commands.screen import failing_clearly, positive_count
from flax_encoder.config import RunConfig
from flax_encoder.config.mesh import MESH_AXES

HELP = "tell whether a run fits on some hardware, how fast it goes and what it costs, without the hardware"
SETTINGS = RunConfig  # each is an option too, by a parser of their own
_DAY = 86400


def run(arguments: argparse.Namespace) -> None:
    main(arguments.rest)


def own_parser() -> argparse.ArgumentParser:
    """The parser of the options that are no settings."""
    parser = argparse.ArgumentParser(
        prog="python -m flax_encoder plan", allow_abbrev=False, description=f"{HELP}. Any setting of the recipe is an "
        "option too, as for train: --batch-size 4096 --mesh.fsdp 8."
    )  # fmt: skip
    parser.add_argument("--config", default="configs/quickstart.py", help="a recipe: a path, or a name in configs/")
    parser.add_argument("--hardware", required=True, help="tpu-v5e:16x16, tpu-v6e:8x8, tpu-v5p:4x4x4 (chips along "
                        "each side of a slice), h100:8, h200:8, a100:8, or cpu:8 (this machine)")  # fmt: skip
    parser.add_argument("--preset", help="a published architecture, such as modernbert_base, in place of the recipe's "
                        "model")  # fmt: skip
    parser.add_argument("--texts", type=positive_count, help="number of training documents, which --epochs needs")
    parser.add_argument("--document-tokens", type=positive_count, help="tokens in a document (default: the row length)")
    parser.add_argument("--price-per-chip-hour", type=float, help="price in any currency, for the total")
    parser.add_argument("--search", action="store_true", help="try meshes, microbatches and model.remat, and rank them "
                        "by speed")  # fmt: skip
    parser.add_argument("--search-minutes", type=float, default=10.0, help="minutes after which no new trial begins "
                        "(default 10)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON for programs instead")
    return parser


def main(argv: list[str]) -> None:
    """Plan as the command line says, and print it."""
    asked, rest = own_parser().parse_known_args(argv)
    with failing_clearly():
        _plan(asked, rest)


def _plan(asked: argparse.Namespace, settings: list[str]) -> None:
    from flax_encoder.plan.targets import hide_accelerators, parse_hardware

    hardware = parse_hardware(asked.hardware)
    hide_accelerators(hardware.num_chips if hardware.platform == "cpu" else 1)
    from flax_encoder.families import preset
    from flax_encoder.plan.rows import sample_data
    from flax_encoder.plan.run import Planner
    from flax_encoder.runs.load import read_origin
    from flax_encoder.runs.start import like_origin, reaching
    from flax_encoder.tasks import check_task
    from flax_encoder.training.runtime import set_up_runtime

    model = preset(asked.preset) if asked.preset else None
    config = parse_run_config(settings, default=asked.config, model=model)
    if config.init_from:
        origin = read_origin(config.init_from, config.objective)[0]
        config = reaching(like_origin(config, origin, has_head=False), config.model)
    check_task(config)
    set_up_runtime()

    def say(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    sizes = config.mesh.sizes(hardware.num_chips)
    unit = sizes["data"] * sizes["fsdp"] * config.num_microbatches
    sample = sample_data(config, document_tokens=asked.document_tokens, texts=asked.texts, unit=unit)
    with Planner(hardware, config.model.dtype) as planner:
        if asked.search:
            rows = planner.search(sample, asked.search_minutes, say)
            print(json.dumps(rows) if asked.json else _search_table(rows))
            return
        say(f"compiling {len(sample.config.stages)} stage(s) for {hardware.name}")
        made = planner.plan(sample, asked.price_per_chip_hour)
    print(json.dumps(made) if asked.json else _report(made, sample.config.model.dtype, hardware.platform))


def _report(made: dict[str, Any], dtype: str, platform: str) -> str:
    used, spare = made["hbm_bytes_per_device"], made["hbm_bytes_spare"]
    axes = " x ".join(f"{name} {size}" for name, size in made["mesh"].items())
    lines = [f"{made['hardware']}: {made['chips']} chip(s), mesh {axes}"]
    if made["fits"]:
        lines.append(f"fits: {_gb(used)} of {_gb(made['chip']['hbm_bytes'])} a device, {_gb(spare)} to spare")
    elif used is None:
        lines.append("does not fit")
    else:
        lines.append(f"does not fit: {_gb(used)} a device, {_gb(-spare)} more than the {_gb(used + spare)} there are")
    uses = (f"{name} {_gb(size)}" for name, size in made["hbm_bytes_by_use"].items() if name != "total")
    lines.append(f"  {', '.join(uses)}")
    for i, stage in enumerate(made["stages"], 1):
        of_phase = f" (phase {stage['phase']})" if stage["phase"] else ""
        batches = f"{stage['rows']:,} rows of {stage['row_length']} tokens"
        lines.append(f"stage {i}{of_phase}: {stage['steps']:,} steps of {batches}")
        if stage["step_seconds"] is not None:
            parts = ", ".join(f"{name.replace('_', ' ')} {1e3 * s:,.1f}" for name, s in stage["parts"].items() if s)
            lines.append(
                f"  {1e3 * stage['step_seconds']:,.1f} ms a step (estimated; {parts}), "
                f"{stage['tokens_per_second']:,.0f} tokens/s, {stage['fraction_of_peak']:.0%} of peak; "
                f"{stage['steps'] * stage['step_seconds'] / _DAY:.3g} days; compiled in "
                f"{stage['compile_seconds']:.0f} s"
            )
        for one in stage["collectives"]:
            lines.append(
                f"  {one['count']} {one['kind']} over {' x '.join(one['axes'])}: {_gb(one['bytes'])}, "
                f"{1e3 * one['seconds']:,.1f} ms at the links' bandwidth"
            )
        lines += [f"  note: {note}" for note in stage["notes"]]
    if made["total_chip_hours"] is not None:
        price = f", {made['total_price']:,.2f} to pay" if made["total_price"] is not None else ""
        lines.append(f"in all: {made['total_days']:.3g} days, {made['total_chip_hours']:,.1f} chip-hours{price}")
    lines.append(_CAVEATS[platform])
    return "\n".join(lines)


_CAVEATS = {
    "tpu": "Times are the compiler's own cycles; evaluations, saves and compiling are not in them (docs/scale.md).",
    "gpu": "Times are the compiler's model and measured shares of peak; evaluations, saves and compiling are not in "
    "them. The memory limit is the 75% that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise "
    "(docs/scale.md).",
    "cpu": "Times are a lower bound: what products and bytes take at this machine's measured peak and bandwidth, since "
    "a CPU's compiler estimates none (docs/scale.md).",
}


def _search_table(rows: list[dict[str, Any]]) -> str:
    head = (" x ".join(MESH_AXES), "microbatches", "remat", "tokens/s", "of peak", "GB a device", "")
    table = [head] + [
        (
            row["mesh"], str(row["microbatches"]), row["remat"], f"{row['tokens_per_second']:,.0f}",
            f"{row['fraction_of_peak']:.0%}", f"{row['hbm_bytes_per_device'] / 1e9:.1f}", row["why"],
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in table) for i in range(len(head) - 1)]
    return "\n".join(
        "  ".join([*(cell.rjust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in table
    )


def _gb(size: float | int) -> str:
    return f"{size / 1e9:.2f} GB"
