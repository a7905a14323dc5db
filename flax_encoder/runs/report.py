"""The lines that a run prints about its data and model, and its last report: scores, baselines, examples, commands."""

import dataclasses
import pathlib
import shlex
from collections.abc import Callable

import jax
from rich.table import Table

from flax_encoder.config import ConfigError, RunConfig
from flax_encoder.config.phases import describe_phase
from flax_encoder.config.rules import counted
from flax_encoder.data.pipeline import RunData, open_data
from flax_encoder.runs.before import scores_before_training
from flax_encoder.runs.load import load_run
from flax_encoder.runs.record import read_record
from flax_encoder.runs.summary import write_summary
from flax_encoder.tasks import find_task
from flax_encoder.training.console import make_console, print_table
from flax_encoder.training.run_log import read_metrics


def describe_data(data: RunData) -> str:
    manifests = [store.manifest for store in data.stores]
    train, held_out, test = (
        {what: sum(m["splits"].get(split, {}).get(what, 0) for m in manifests) for what in ("documents", "tokens")}
        for split in ("train", "validation", "test")
    )
    if not held_out["documents"]:  # stores from before have one held-out split, named test
        held_out, test = test, held_out
    kinds = {kind: None for m in manifests for kind in m["dropped"]}
    counts = {kind: sum(m["dropped"].get(kind, 0) for m in manifests) for kind in kinds}
    dropped = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    rows = sum(plan.rows_per_epoch for plan in data.train_plans)
    fill = sum(plan.rows_per_epoch * plan.fill_rate for plan in data.train_plans) / rows
    apart = f"; for the test {test['documents']:,} and {test['tokens']:,}" if test["documents"] else ""
    contradictory = sum(m.get("contradictory", 0) for m in manifests)
    length = data.config.data.target_length
    of_target, beside = (" or --data.target-length", f", beside {length} of the decoder") if length else ("", "")
    notes = [
        ("documents cut to the length of a row", data.num_cut, f"a larger --data.row-length{of_target} keeps more"),
        ("documents left out for a target longer than a decoder's row", data.num_left_out,
         "a larger --data.target-length keeps more"),
        ("texts with more than one value", contradictory, ""),
        ("words without a token, whose tags are not learned", sum(m.get("unread_words", 0) for m in manifests), ""),
    ]
    return (
        f"data: {counted(train['documents'], 'document')}, {counted(train['tokens'], 'token')}; held out "
        f"{held_out['documents']:,} and {held_out['tokens']:,}{apart}{'; dropped ' + dropped if dropped else ''}; "
        f"vocabulary {data.tokenizer.vocab_size:,}; {counted(rows, 'row')} an epoch{beside}, {fill:.1%} full"
        + "".join(f"\ndata: {what}: {count:,}{'; ' * bool(hint)}{hint}" for what, count, hint in notes if count)
        + _about_pairs(data)
    )


def _about_pairs(data: RunData) -> str:
    """A line for a model without token types that reads the two texts of a pair one after the other."""
    layout = find_task(data.config.objective).reading.layout(data.config)
    is_read_together = layout.segments != "apart" and layout.written is None
    has_pairs = any("text_lengths" in store.train.values for store in data.stores)
    if data.config.model.num_token_types > 1 or not is_read_together or not has_pairs:
        return ""
    return "\ndata: the model has no token types; only the tokens between the texts of a pair tell them apart"


def describe_stages(config: RunConfig) -> str:
    ahead = [s for s in config.timeline.stages if config.phases and config.phases[s.phase].is_open]
    shapes = {
        (s.batch_size, T, s.row_length, s.num_microbatches, s.rope_theta, s.objective)
        for s in (*config.stages, *ahead) for T in (*config.data.buckets, s.row_length)
    }
    compiled = f"the step is compiled for {counted(len(shapes), 'shape')}, each when a batch first has it"
    if config.phases:
        parts = [describe_phase(config.phases, config.timeline, number) for number in range(len(config.phases))]
        return "\n".join([*parts, compiled])
    parts = [f"{counted(s.batch_size, 'row')} of {s.row_length} up to step {s.end_step}" for s in config.stages]
    return f"batches: {', '.join(parts)}; {compiled}"


def describe_mesh(mesh) -> str:
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    return f"{counted(mesh.size, f'{jax.devices()[0].device_kind} device')}{': ' + axes if axes else ''}"


def describe_parameters(count: int, trained: int) -> str:
    return f"{count:,} parameters{'' if count == trained else f', {trained:,} of them trained'}"


def show_report(
    config: RunConfig, metrics: dict[str, float], train: Callable[[RunConfig], dict[str, float] | None]
) -> None:
    """Print the report of a finished run; `train` is called for the run from scratch, if the config asks for it."""
    run = load_run(config.run_dir)
    data = open_data(run.config, run.task.reading, tokenizer=run.tokenizer, label_names=run.label_names)
    console = make_console()
    rows = run.task.baselines(run, data) if run.task.baselines else {}
    if run.task.compares_start and (before := scores_before_training(run, data)) is not None:
        rows["before training"] = before
    if config.compare_with_scratch and run.config.init_from:
        run_dir = pathlib.Path(config.run_dir)
        scratch = train(dataclasses.replace(
            read_record(run_dir).config, init_from=None, compare_with_scratch=False, schedule_began=0,
            run_dir=str(run_dir / "from_scratch"),
            data=dataclasses.replace(run.config.data, tokenizer=str(run_dir / "tokenizer.json")),
        ))  # fmt: skip
        if scratch is not None:
            rows["same model from scratch"] = _plain(scratch)
    model = "fine-tuned" if run.config.init_from else "this model"
    rows[model] = _plain(metrics)
    table = Table(title="held-out documents", title_justify="left")
    table.add_column("")
    for name in rows:
        table.add_column(name, justify="right", overflow="fold")
    tests = {name.removeprefix("test/"): value for name, value in metrics.items() if name.startswith("test/")}
    if tests:
        rows["the test documents"] = tests
        table.add_column("... on the test documents", justify="right", overflow="fold")
    for metric in rows[model]:
        values = (f"{row[metric]:,.4f}" if metric in row else "" for row in rows.values())
        table.add_row(metric.replace("_", " "), *values)
    console.print()
    print_table(table)
    examples = run.task.examples(run, data) if run.task.examples else []
    for line in examples:
        console.print(line)
    console.print("\nnext:")
    commands = run.task.commands(run, data) if run.task.commands else []
    commands = [*commands, f"python -m flax_encoder plot {shlex.quote(run.config.run_dir)} --out curve.png"]
    for command in commands:
        console.print(f"  {command}")
    page = write_summary(run, data, held_out=rows, examples=examples, commands=commands, text=describe_data(data))
    console.print(f"\nreport of the whole run: {page}")


def _plain(metrics: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("eval/"): value for name, value in metrics.items() if name.startswith("eval/")}


def plot_runs(run_dirs: list[pathlib.Path], out: pathlib.Path) -> None:
    """Draw loss and accuracy against steps: training as lines, held-out as points.

    Raises:
      ConfigError: matplotlib is not installed, or a folder has no metrics.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install -e '.[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for color, run_dir in zip(
        plt.rcParams["axes.prop_cycle"].by_key()["color"] * len(run_dirs), run_dirs, strict=False
    ):
        lines = read_metrics(run_dir)
        if not lines:
            raise ConfigError(f"no metrics in {run_dir}: a run folder has a metrics.jsonl.")
        for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
            training = [(line["step"], line[name]) for line in lines if name in line]
            held_out = [(line["step"], line[f"eval/{name}"]) for line in lines if f"eval/{name}" in line]
            axis.plot(*zip(*training, strict=True), color=color, linewidth=1, label=f"{run_dir.name}, training")
            axis.plot(*zip(*held_out, strict=True), "o", color=color, label=f"{run_dir.name}, held out")
    for axis, name in zip(axes, ("loss (nats a target)", "accuracy"), strict=True):
        axis.set_xlabel("step")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(out, dpi=120)
    plt.close(figure)
