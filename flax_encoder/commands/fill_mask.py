"""Fill the masks of one text."""

import argparse
import json

from flax_encoder.commands.screen import add_folder_options, folder_options, positive_count, show

HELP = "print the likeliest words for each [MASK] of a text"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", help="a masked_lm run folder, one checkpoint in it, or a published folder")
    parser.add_argument("text", help='a text with masks, such as "Return the [MASK] of the list."')
    parser.add_argument("--top", type=positive_count, default=5, help="words to show for each mask (default 5)")
    add_folder_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON for programs instead of a table")


def run(arguments: argparse.Namespace) -> None:
    from flax_encoder.runs.load import load
    from flax_encoder.training.runtime import set_up_runtime

    set_up_runtime()
    masks = load(arguments.run_dir, **folder_options(arguments)).fill_mask(arguments.text, arguments.top)
    if arguments.json:
        # One mask, the usual case, is a plain list; several are a list of lists.
        print(json.dumps(masks[0] if len(masks) == 1 else masks))
        return
    for i, guesses in enumerate(masks, 1):
        show(guesses, arguments.text if len(masks) == 1 else f"mask {i} of: {arguments.text}")
