"""Show what tokens attend to."""

import argparse
import pathlib

from flax_encoder.commands.screen import add_folder_options, folder_options, positive_count

HELP = "show what each token of a text attends to, in every layer and head, as a page or a picture"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a run, one of its checkpoints, or a published folder")
    parser.add_argument("text")
    parser.add_argument("text_pair", nargs="?", help="a second text, which makes a pair with the first")
    parser.add_argument("--packed", action="store_true", help="treat the two texts not as a pair, but as two documents "
                        "in one row, which do not see each other")  # fmt: skip
    parser.add_argument("--layer", type=positive_count, help="show only this layer, counted from 1")
    parser.add_argument("--head", type=positive_count, help="show only this head, counted from 1")
    parser.add_argument("--out", default="attention.html", help="the page to write, or a picture if it ends with .png, "
                        ".svg or .pdf (default attention.html)")  # fmt: skip
    add_folder_options(parser)


def run(arguments: argparse.Namespace) -> None:
    import numpy as np

    from flax_encoder.config import ConfigError
    from flax_encoder.config.rules import counted
    from flax_encoder.pages.attention import MOST_TOKENS, attention_page, draw_attention
    from flax_encoder.runs.load import load
    from flax_encoder.training.run_log import write_atomically
    from flax_encoder.training.runtime import set_up_runtime

    out = pathlib.Path(arguments.out)
    if out.suffix not in (".html", ".png", ".svg", ".pdf"):
        raise ConfigError(f"--out ends with .html, .png, .svg or .pdf: got {out.name!r}.")
    if arguments.packed and arguments.text_pair is None:
        raise ConfigError("--packed takes two texts: got one. Give another after it.")
    set_up_runtime()
    loaded = load(arguments.folder, **folder_options(arguments))
    config = loaded.config.model
    if config.layer != "attention":
        raise ConfigError(f"attention needs a model with layers of attention: {arguments.folder} has {config.layer}.")
    for name, most in (("layer", config.num_layers), ("head", config.num_heads)):
        if (number := getattr(arguments, name) or 1) > most:
            raise ConfigError(f"--{name} is from 1 to {most}, as many as the model has: got {number}.")
    texts = [arguments.text, arguments.text_pair] if arguments.text_pair is not None else [arguments.text]
    row = loaded.packed_row(texts) if arguments.packed else loaded.row(*texts)
    count = int(np.count_nonzero(row["segment_ids"]))
    if count > MOST_TOKENS and out.suffix == ".html":
        raise ConfigError(f"a page of attention holds {MOST_TOKENS} tokens: got {count}. Give a shorter text.")
    found = loaded.token_vectors(row, output_attentions=True)
    weights, which = found.attentions, []
    for axis, (name, number) in enumerate((("layer", arguments.layer), ("head", arguments.head))):
        if number is not None:
            weights = np.take(weights, [number - 1], axis)
            which.append(f"{name} {number}")
    title = (" | " if arguments.packed else " / ").join(texts)
    sizes = zip((*weights.shape[:2], count), ("layer", "head", "token"), strict=True)
    about = f"{arguments.folder}: {', '.join(counted(*size) for size in sizes)}"
    if out.suffix == ".html":
        segments = row["segment_ids"][0, :count].tolist()
        write_atomically(out, attention_page(found.tokens, weights, segments, title, about))
    else:
        draw_attention(found.tokens, weights, out, ", ".join(filter(None, (title, *which))))
    print(f"wrote {out}")
