"""Write a page of one or more runs."""

import argparse
import pathlib

HELP = "write one HTML page about one or more runs: curves, scores, settings, examples"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dirs", nargs="+", metavar="run_dir",
                        help="a run folder, or one that holds runs of several seeds")  # fmt: skip
    parser.add_argument("--out", default="report.html", help="the page to write (default report.html)")


def run(arguments: argparse.Namespace) -> None:
    from flax_encoder.pages.report import report_page
    from flax_encoder.pages.story import read_stories
    from flax_encoder.training.run_log import write_atomically

    stories = read_stories([pathlib.Path(p) for p in arguments.run_dirs])
    write_atomically(pathlib.Path(arguments.out), report_page(stories))
    print(f"wrote {arguments.out}")
