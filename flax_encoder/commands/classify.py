"""Classify one text."""

import argparse
import json

from flax_encoder.commands.screen import add_folder_options, folder_options, positive_count, show

HELP = "print the likeliest labels of a text"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", help="a classification run folder, one checkpoint in it, or a published folder")
    parser.add_argument("text", help="the text to classify")
    parser.add_argument("--top", type=positive_count, default=None, help="labels to show (default all)")
    add_folder_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON for programs instead of a table")


def run(arguments: argparse.Namespace) -> None:
    from flax_encoder.runs.load import load
    from flax_encoder.training.runtime import set_up_runtime

    set_up_runtime()
    labels = load(arguments.run_dir, **folder_options(arguments)).classify(arguments.text)[: arguments.top]
    if arguments.json:
        print(json.dumps(labels))
        return
    show(labels, arguments.text[:80])
