"""What is in a store."""

import argparse
import json
import pathlib

from flax_encoder.commands.screen import saying, show
from flax_encoder.config import ConfigError
from flax_encoder.data.sources.records import DataError
from flax_encoder.training.console import make_console

HELP = "show what is in a store: counts, lengths, rows as a model sees them"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="a folder that prepare wrote")
    parser.add_argument("--plot", metavar="PNG", help="draw lengths and fill rates into this file")
    parser.add_argument("--verify", action="store_true", help="compare every file with its SHA-256")
    parser.add_argument("--rows", type=int, default=2, help="rows to show (default 2)")
    parser.add_argument("--row-length", type=int, default=128, help="tokens in a row (default 128)")
    parser.add_argument("--kind", choices=("token", "whole_word", "span", "t5", "ul2", "written"),
                        help="kind of masking to show; written shows sources and targets (default: written if "
                        "the store has targets, else token)")  # fmt: skip
    parser.add_argument("--rate", type=float, help="share of masked tokens (default 0.15)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order and the masks (default 0)")
    parser.add_argument("--json", action="store_true", help="print JSON for programs instead")


def run(arguments: argparse.Namespace) -> None:
    from flax_encoder.data import inspect
    from flax_encoder.data.store.store import open_store, read_manifest
    from flax_encoder.data.tokens.tokenizer import load_tokenizer

    if arguments.rows < 1 or arguments.row_length < 3:
        raise ConfigError(f"inspect shows at least one row of 3: got --rows {arguments.rows} --row-length "
                          f"{arguments.row_length}.")  # fmt: skip
    if arguments.kind == "ul2" and arguments.rate is not None:
        raise ConfigError(f"ul2's denoisers have rates of their own: leave out --rate, or give another --kind; got "
                          f"--rate {arguments.rate}.")  # fmt: skip
    folder = pathlib.Path(arguments.store)
    if members := read_manifest(folder).get("members"):
        each = ", ".join(f"{folder / m['folder']} (weight {m['weight']:,.10g})" for m in members)
        raise DataError(f"inspect looks at one store; {folder} is a mixture of {each}.")
    store, tokenizer = open_store(folder), load_tokenizer(folder)
    kind = arguments.kind or ("written" if store.value == "text" else "token")
    if kind == "written" and store.value != "text":
        raise ConfigError(f"--kind written needs a store with targets, of --objective text_to_text: {folder} has "
                          f"documents with a value of the kind {store.value}. Give another --kind.")  # fmt: skip
    with saying() as say:
        if arguments.verify:
            store.verify(say)
        summary = inspect.summarize(store, tokenizer, say)
    if arguments.plot:
        inspect.plot(store, summary, pathlib.Path(arguments.plot))
    if arguments.json:
        print(json.dumps(summary))
        return
    console = make_console()
    splits = summary["splits"]
    train, test = splits["train"], splits.get("validation", splits.get("test"))
    dropped = ", ".join(f"{count:,} {kind}" for kind, count in summary["dropped"].items())
    console.print(
        f"{train['documents']:,} documents, {train['tokens']:,} tokens to train on; held out {test['documents']:,} and "
        f"{test['tokens']:,}; dropped {dropped}\nvocabulary {summary['vocab_size']:,}; store {summary['hash'][:16]}"
        + ("; every file is as it was written" if arguments.verify else "")
    )
    lengths = summary["length_tokens"]
    console.print(f"\ntokens in a document: mean {lengths['mean']:,.1f}, " + ", ".join(
        f"{name} {value:,}" for name, value in lengths.items() if name != "mean"))  # fmt: skip
    for line in inspect.histogram_lines(summary):
        console.print(line)
    console.print()
    show(
        [{"row length": f"{r['row_length']:,}", "rows an epoch": f"{r['rows_per_epoch']:,}",
          "filled": f"{r['fill_rate']:.2%}"} for r in summary["packing"]],
        "best-fit packing",
    )  # fmt: skip
    rate = 0.15 if arguments.rate is None else arguments.rate
    batch = inspect.sample_rows(
        store.train, tokenizer, kind=kind, rate=rate, rows=arguments.rows, row_length=arguments.row_length,
        seed=arguments.seed,
    )  # fmt: skip
    console.print(f"\nrows of {arguments.row_length}: each document has a colour; ⟨right token⟩ of a prediction")
    for row in range(arguments.rows):
        console.print()
        console.print(inspect.draw_row(batch, row, tokenizer), soft_wrap=False)
    if arguments.plot:
        console.print(f"\nwrote {arguments.plot}")
