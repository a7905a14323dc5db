"""suite: fine-tune a model on every task of a suite."""

import argparse
import contextlib
import json
import pathlib
import sys

import tyro

from flax_encoder.commands.screen import failing_clearly, positive_count, show
from flax_encoder.config import ConfigError, RunConfig
from flax_encoder.config.rules import counted

HELP = "fine-tune a model on every task of glue, superglue, ner or qa, with several seeds, and print one table"
SETTINGS = RunConfig  # each is an option too, by a parser of their own


def own_parser() -> argparse.ArgumentParser:
    """The parser of the options that are no settings."""
    from flax_encoder.runs.suites import SUITES

    parser = argparse.ArgumentParser(
        prog="python -m flax_encoder suite", allow_abbrev=False, description=HELP + ". Every setting of train.py is an "
        "option too, such as --epochs 1 or --model.dtype bfloat16, and replaces the published setting in all tasks. "
        "The same command again continues where it stopped.",
    )  # fmt: skip
    parser.add_argument("suite", choices=tuple(SUITES))
    parser.add_argument("folder", help="the model that every task starts from: a run, one of its checkpoints, or a "
                        "published folder")  # fmt: skip
    parser.add_argument("--seeds", type=positive_count, default=1, help="times to train each task (default 1)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks of the suite, such as cola,rte")
    parser.add_argument("--data-dir", type=pathlib.Path, help="a folder with a folder for each task, which holds the "
                        "files of the data set's archive, or train, validation and test as .jsonl, .parquet, .csv or "
                        ".tsv (.tsv: without quoting)")  # fmt: skip
    parser.add_argument("--source", choices=("tfds", "hf"), default="tfds", help="where to get data sets by name, "
                        "if there is no --data-dir (default tfds)")  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, help="folder for runs and suite.json (default "
                        "runs/SUITE-FOLDER)")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the tasks, their settings and where their data is, "
                        "and train nothing")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON for programs; progress goes to standard error")
    return parser


def run(arguments: argparse.Namespace) -> None:
    from flax_encoder.runs.suite import Suite, choose_tasks, describe, run_suite, table_rows

    asked, settings = own_parser().parse_known_args(arguments.rest)
    names = None if asked.tasks is None else [name for word in asked.tasks for name in word.split(",") if name]
    out = asked.out or pathlib.Path("runs") / f"{asked.suite}-{pathlib.Path(asked.folder).resolve().name}"
    if asked.data_dir is not None and not asked.data_dir.is_dir():
        raise ConfigError(f"--data-dir must be a folder with a folder for each task: {asked.data_dir} is no folder.")
    suite = Suite(
        asked.suite, asked.folder, out, choose_tasks(asked.suite, names), asked.seeds, asked.data_dir, asked.source
    )

    def settle(config: RunConfig) -> RunConfig:
        if not settings:
            return config
        return tyro.cli(RunConfig, default=config, args=settings, prog="python -m flax_encoder suite")

    if asked.list:
        rows = describe(suite)
        print(json.dumps(rows)) if asked.json else show(rows, f"{asked.suite} from {asked.folder}")
        return
    from flax_encoder.runs.step_log import Diverged
    from flax_encoder.runs.train import train
    from flax_encoder.training.run_log import NotFinite

    with contextlib.ExitStack() as stack:
        stack.enter_context(failing_clearly(Diverged, NotFinite))
        if asked.json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        summary = run_suite(suite, train, settle, lambda message: print(message, file=sys.stderr, flush=True))
    if summary is None:
        print(f"stopped; the same command continues in {out}.", file=sys.stderr)
    elif asked.json:
        print(json.dumps(summary))
    else:
        show(table_rows(summary, suite.tasks), f"{asked.suite}, {asked.folder}, {counted(asked.seeds, 'seed')}")
        print(f"{out / 'suite.json'} has every run's values; each run is a folder in {out}.")
