"""One run several times, each with a seed of its own: how far a result is chance."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from flax_encoder.config import RunConfig
from flax_encoder.pages.report import report_page
from flax_encoder.pages.story import read_stories
from flax_encoder.training.run_log import write_atomically


def train_seeds(config: RunConfig, train: Callable[[RunConfig], dict[str, float] | None]) -> dict[str, dict] | None:
    """Train config.seeds runs in RUN_DIR/seed-0, seed-1 ..., with seeds from config.seed on; a run that is done only
    reports again. Writes RUN_DIR/seeds.json and prints it as a table.

    Returns:
      {metric: {"median", "min", "max", "values": of each run}}; None if a signal stopped one of the runs.
    """
    run_dir, found = pathlib.Path(config.run_dir), []
    for i in range(config.seeds):
        own = run_dir / f"seed-{i}"
        metrics = train(dataclasses.replace(config, run_dir=str(own), seed=config.seed + i, seeds=1))
        if metrics is None:
            return None
        found.append(metrics)
    summary = {}
    for name in found[0]:
        values = [metrics[name] for metrics in found]
        summary[name] = {
            "median": statistics.median(values), "min": min(values), "max": max(values), "values": values
        }  # fmt: skip
    seeds = [config.seed + i for i in range(config.seeds)]
    write_atomically(run_dir / "seeds.json", json.dumps({"seeds": seeds, "metrics": summary}, indent=1) + "\n")
    table = Table(title=f"{config.seeds} seeds, held-out documents", title_justify="left")
    for column in ("", "median", "min", "max"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, row in summary.items():
        numbers = (f"{row[c]:,.4f}" for c in ("median", "min", "max"))
        table.add_row(name.removeprefix("eval/").replace("_", " "), *numbers)
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    console.print()
    console.print(table)
    write_atomically(run_dir / "report.html", report_page(read_stories([run_dir])))
    console.print(f"\n{run_dir / 'seeds.json'} has the values of every run, {run_dir / 'report.html'} the curves.")
    return summary
