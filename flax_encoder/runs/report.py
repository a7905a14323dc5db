"""What a person sees at the end of a run: the numbers beside baselines, examples, and what to type next."""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from flax_encoder.config import ConfigError, RunConfig
from flax_encoder.data.baselines import NeighbourCounts, majority_class
from flax_encoder.data.pipeline import RunData, open_data
from flax_encoder.runs.loaded import LoadedRun, load_run
from flax_encoder.training.run_log import read_metrics


def show_report(
    config: RunConfig, metrics: dict[str, float], train: Callable[[RunConfig], dict[str, float] | None]
) -> None:
    """Print the report of a finished run; `train` is called for the run from scratch, if the config asks for it."""
    run = load_run(config.run_dir)
    data = open_data(run.config, tokenizer=run.tokenizer, label_names=run.label_names)
    console = Console(highlight=False, soft_wrap=True)
    rows = _masked_lm_rows if run.config.objective == "masked_lm" else _classification_rows
    table = Table(title="held-out text", title_justify="left")
    columns = [name.removeprefix("eval/") for name in metrics]
    table.add_column("")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for name, values in rows(config, run, data, metrics, train).items():
        table.add_row(name, *(f"{values[c]:,.4f}" if c in values else "" for c in columns))
    console.print()
    console.print(table)
    if run.config.objective == "masked_lm":
        for line in _examples(run, data):
            console.print(line, markup=False)
    console.print("\nnext:")
    for command in _next_commands(run, data):
        console.print(f"  {command}", markup=False)


def _masked_lm_rows(config, run: LoadedRun, data: RunData, metrics, train) -> dict[str, dict[str, float]]:
    counts = NeighbourCounts([s.train for s in data.stores], data.tokenizer, run.config.data.row_length)
    scores = counts.score(data.evaluation)
    return {
        "most frequent token": scores["most_frequent"],
        "guess from two neighbours": scores["neighbours"],
        "this model": _plain(metrics),
    }


def _classification_rows(config, run: LoadedRun, data: RunData, metrics, train) -> dict[str, dict[str, float]]:
    train_labels, test_labels = data.stores[0].train.labels, data.stores[0].test.labels
    rows = {"majority class": majority_class(train_labels, test_labels, len(run.label_names or []))}
    if config.compare_with_scratch and run.config.init_from:
        run_dir = pathlib.Path(config.run_dir)
        scratch = train(dataclasses.replace(
            run.config, init_from=None, compare_with_scratch=False, run_dir=str(run_dir / "from_scratch"),
            data=dataclasses.replace(run.config.data, tokenizer=str(run_dir / "tokenizer.json")),
        ))  # fmt: skip
        if scratch is not None:
            rows["same model from scratch"] = _plain(scratch)
    rows["fine-tuned" if run.config.init_from else "this model"] = _plain(metrics)
    return rows


def _plain(metrics: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("eval/"): value for name, value in metrics.items()}


def _held_out_sentences(run: LoadedRun, data: RunData, count: int) -> list[tuple[str, str]]:
    """(text with one word masked, that word) from short held-out documents, evenly spread over them."""
    test = data.stores[0].test
    mask_id = run.tokenizer.special("mask")
    candidates = np.flatnonzero((test.lengths >= 8) & (test.lengths <= 24))
    found = []
    for document in np.roll(candidates, len(candidates) // 3):
        ids = np.array(test.document(document))
        words = [run.tokenizer.token(i) for i in ids] + [""]
        whole = [i for i in range(3, len(ids)) if words[i].isalpha() and len(words[i]) > 2 and words[i + 1][:2] != "##"]
        if whole and sum(w.isalpha() for w in words) > 0.7 * len(ids):
            at = whole[len(whole) // 2]
            ids[at] = mask_id
            found.append((run.tokenizer.decode(ids), words[at]))
    return [found[i * len(found) // count] for i in range(count)] if len(found) >= count else found


def _examples(run: LoadedRun, data: RunData) -> list[str]:
    lines = []
    for text, truth in _held_out_sentences(run, data, 3):
        guesses = "  ".join(f"{g['token']} {g['probability']:.0%}" for g in run.fill_mask(text, 4)[0])
        lines.append(f"\n{text}\n  it says {guesses}; the text has {truth!r}")
    return lines


def _next_commands(run: LoadedRun, data: RunData) -> list[str]:
    run_dir = run.config.run_dir
    if run.config.objective == "masked_lm":
        mask = run.tokenizer.token(run.tokenizer.special("mask"))
        commands = [f'python -m flax_encoder fill-mask {run_dir} "Return the {mask} of the list."']
        if run.config.data.source == "tfds:python_docs":
            commands.append(f"python train.py --config configs/quickstart_classify.py --init-from {run_dir}")
    else:
        commands = [f'python -m flax_encoder classify {run_dir} "Send a message to the server and wait for its reply."']
    return [*commands, f"python -m flax_encoder plot {run_dir} --out curve.png"]


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
