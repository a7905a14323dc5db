"""Draw the loss curves of runs."""

import argparse
import pathlib

HELP = "draw the loss curves of one or more runs"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dirs", nargs="+", metavar="run_dir", help="a run folder")
    parser.add_argument("--out", default="curve.png", help="the picture to write (default curve.png)")


def run(arguments: argparse.Namespace) -> None:
    from flax_encoder.runs.report import plot_runs

    plot_runs([pathlib.Path(p) for p in arguments.run_dirs], pathlib.Path(arguments.out))
    print(f"wrote {arguments.out}")
