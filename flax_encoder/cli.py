"""The command line: a recipe plus typed overrides for training, and the commands that ask a trained model."""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from flax_encoder.config import ConfigError, DataConfig, RunConfig, differences
from flax_encoder.data.records import DataError


@contextmanager
def failing_clearly(*more: type[Exception]) -> Iterator[None]:
    """Turn the errors that a user can mend into one message and exit status 1; bugs keep their traceback."""
    from flax_encoder.training.checkpoint import CheckpointError
    from flax_encoder.weights import WeightsError

    try:
        yield
    except (ConfigError, DataError, CheckpointError, WeightsError, OSError, *more) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        sys.exit(130)


def load_recipe(path: str) -> RunConfig:
    """The `config` of a recipe, a Python file of the user's own.

    Raises:
      ConfigError: no such file, or no RunConfig named `config` in it.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        known = ", ".join(sorted(map(str, pathlib.Path("configs").glob("*.py")))) or "none here"
        raise ConfigError(f"no recipe at {path}; recipes in configs/ are: {known}.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.path.insert(0, str(file.resolve().parent))  # a recipe may build on its neighbours
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    finally:
        sys.path.pop(0)
    config = getattr(module, "config", None)
    if not isinstance(config, RunConfig):
        raise ConfigError(f"a recipe must define `config`, a RunConfig: {path} has {config!r}.")
    return config


def parse_run_config(argv: list[str], default: str) -> RunConfig:
    """--config PATH, then every setting of that recipe as a typed option."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=default)
    known, rest = first.parse_known_args(argv)
    config = load_recipe(known.config)
    if config.run_dir == RunConfig.run_dir:
        config = dataclasses.replace(config, run_dir=f"runs/{pathlib.Path(known.config).stem}")
    return tyro.cli(
        RunConfig,
        default=config,
        args=rest,
        prog="train.py",
        description=f"Train a text encoder. Defaults are those of the recipe {known.config}; --config PATH picks "
        "another. The same command again resumes a run.",
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flax_encoder", description="Ask a trained encoder. To train one: "
                                     "python train.py --help")  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    fill = commands.add_parser("fill-mask", help="the likeliest words for each [MASK] of a text")
    fill.add_argument("run_dir", help="a masked_lm run folder, one checkpoint in it, or a published folder")
    fill.add_argument("text", help='such as "Return the [MASK] of the list."')
    fill.add_argument("--top", type=_count, default=5, help="how many to show (default 5)")
    fill.set_defaults(run=_fill_mask)

    classify = commands.add_parser("classify", help="the likeliest labels of a text")
    classify.add_argument("run_dir", help="a classification run folder, one checkpoint in it, or a published folder")
    classify.add_argument("text")
    classify.add_argument("--top", type=_count, default=None, help="how many to show (default all)")
    classify.set_defaults(run=_classify)

    for command in (fill, classify):
        command.add_argument("--json", action="store_true", help="print JSON for programs instead of a table")

    export = commands.add_parser("export", help="write a run as a folder that transformers opens")
    export.add_argument("run_dir", help="a run folder, or one checkpoint in it")
    export.add_argument("out", help="a folder that is empty or new")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    export.add_argument("--model-type", help="the family to write it as (default: the first that can say it)")
    export.add_argument("--pooling", choices=("cls", "mean"), help="make it a sentence-transformers folder; a run that "
                        "was imported from one has its own")  # fmt: skip
    export.add_argument("--normalize", action=argparse.BooleanOptionalAction, default=None, help="with --pooling")
    export.set_defaults(run=_export)

    bring = commands.add_parser("import", help="make a run folder of a published folder")
    bring.add_argument("folder", help="config.json, weights and a tokenizer")
    bring.add_argument("out", help="a folder that is empty or new")
    bring.set_defaults(run=_import)

    embed = commands.add_parser("embed", help="a vector for each line of a file")
    embed.add_argument("folder", help="a run, one of its checkpoints, a published or a sentence-transformers folder")
    embed.add_argument("--input", required=True, type=pathlib.Path, help="one text a line")
    embed.add_argument("--output", required=True, type=pathlib.Path, help="a .npy file: float32, a row a line")
    embed.add_argument("--pooling", choices=("cls", "mean"), help="first token, or mean of all (default: the folder's)")
    embed.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, default=None, help="to length 1 (default: the folder's)"
    )
    embed.add_argument("--batch-size", type=int, default=32, help="texts at a time (default 32)")
    embed.add_argument("--max-tokens", type=int, help="cut longer texts (default: what the model takes)")
    embed.add_argument("--dtype", choices=("float32", "bfloat16"), help="of matrix products (default: the model's)")
    embed.set_defaults(run=_embed)

    plot = commands.add_parser("plot", help="draw the loss curves of one or more runs")
    plot.add_argument("run_dirs", nargs="+", metavar="run_dir")
    plot.add_argument("--out", default="curve.png", help="where to write the picture (default curve.png)")
    plot.set_defaults(run=_plot)

    prepare = commands.add_parser("prepare", help="tokenize text once, into a store that runs read", add_help=False)
    prepare.set_defaults(run=_prepare)

    inspect = commands.add_parser("inspect", help="what is in a store: counts, lengths, rows as a model sees them")
    inspect.add_argument("store", help="a folder that prepare wrote")
    inspect.add_argument("--plot", metavar="PNG", help="draw lengths and fill rates here")
    inspect.add_argument("--verify", action="store_true", help="compare every file with its SHA-256")
    inspect.add_argument("--rows", type=int, default=2, help="rows to show (default 2)")
    inspect.add_argument("--row-length", type=int, default=128, help="their length in tokens (default 128)")
    inspect.add_argument("--kind", choices=("token", "whole_word", "span", "t5"), default="token", help="of masking")
    inspect.add_argument("--rate", type=float, default=0.15, help="share of tokens masked (default 0.15)")
    inspect.add_argument("--seed", type=int, default=0)
    inspect.add_argument("--json", action="store_true", help="print JSON for programs instead")
    inspect.set_defaults(run=_inspect)

    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "prepare":  # its options are settings, which have a parser of their own
        arguments.rest = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    with failing_clearly():
        arguments.run(arguments)


def _show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(v if isinstance(v, str) else f"{v:.4f}" for v in row.values()))
    Console(highlight=False).print(table)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number from 1: got {text!r}")
    return int(text)


def _fill_mask(arguments: argparse.Namespace) -> None:
    from flax_encoder.exchange import open_model

    masks = open_model(arguments.run_dir).fill_mask(arguments.text, arguments.top)
    if arguments.json:
        # One mask, the usual case, is a plain list; several are a list of lists.
        print(json.dumps(masks[0] if len(masks) == 1 else masks))
        return
    for i, guesses in enumerate(masks, 1):
        _show(guesses, arguments.text if len(masks) == 1 else f"mask {i} of: {arguments.text}")


def _classify(arguments: argparse.Namespace) -> None:
    from flax_encoder.exchange import open_model

    labels = open_model(arguments.run_dir).classify(arguments.text)[: arguments.top]
    if arguments.json:
        print(json.dumps(labels))
        return
    _show(labels, arguments.text[:80])


def _export(arguments: argparse.Namespace) -> None:
    from flax_encoder.embed import write_sentence_files
    from flax_encoder.exchange import export_run

    is_sentence = arguments.pooling is not None or (pathlib.Path(arguments.run_dir) / "modules.json").exists()
    if arguments.normalize is not None and not is_sentence:
        raise ConfigError("--normalize is of sentence-transformers folders: give --pooling too.")
    architecture = export_run(
        arguments.run_dir, arguments.out, arguments.dtype, arguments.model_type, encoder_only=is_sentence
    )
    if is_sentence:
        write_sentence_files(arguments.run_dir, arguments.out, arguments.pooling, arguments.normalize)
    print(f"wrote {arguments.out}, a {architecture}{' for sentence-transformers' if is_sentence else ''}")


def _import(arguments: argparse.Namespace) -> None:
    from flax_encoder.embed import write_sentence_files
    from flax_encoder.exchange import import_folder

    import_folder(arguments.folder, arguments.out)
    if (pathlib.Path(arguments.folder) / "modules.json").exists():
        write_sentence_files(arguments.folder, arguments.out)
    print(f"wrote {arguments.out}; --init-from {arguments.out} starts from it")


def _embed(arguments: argparse.Namespace) -> None:
    import numpy as np
    from rich.progress import Progress

    from flax_encoder.embed import load_embedder, read_texts
    from flax_encoder.training.runtime import set_up_runtime

    set_up_runtime()
    if arguments.output.suffix != ".npy":
        raise DataError(f"--output must end in .npy: got {arguments.output}.")
    if arguments.batch_size < 1:
        raise DataError(f"--batch-size must be above 0: got {arguments.batch_size}.")
    texts = list(read_texts(arguments.input))
    embedder = load_embedder(
        arguments.folder,
        pooling=arguments.pooling,
        normalize=arguments.normalize,
        max_tokens=arguments.max_tokens,
        dtype=arguments.dtype,
    )
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("embedding", total=len(texts))
        vectors, num_cut = embedder.embed(
            texts, arguments.batch_size, lambda done: progress.update(task, completed=done)
        )
    part = arguments.output.with_suffix(".part.npy")
    np.save(part, vectors)
    part.replace(arguments.output)
    cut = f"; {num_cut:,} texts were longer than {embedder.max_tokens} tokens and cut" if num_cut else ""
    print(f"wrote {arguments.output}: {vectors.shape[0]:,} x {vectors.shape[1]}{cut}")


def _plot(arguments: argparse.Namespace) -> None:
    from flax_encoder.report import plot_runs

    plot_runs([pathlib.Path(p) for p in arguments.run_dirs], pathlib.Path(arguments.out))
    print(f"wrote {arguments.out}")


@dataclasses.dataclass(frozen=True)
class PrepareArguments:
    """Tokenize text once, into a store; train with --data.source OUT. The same command again goes on after a stop."""

    out: str
    """The new folder."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    with_labels: bool = False
    """Keep data.label_column too, for classification."""
    workers: int | None = None
    """Processes that tokenize; None is one a core."""
    shard: str = "0/1"
    """i/n: of n machines that share the folder, this is number i from 0. Whoever is last finishes the store."""
    json: bool = False
    """Print JSON for programs."""


# What a store depends on; the other settings of data say how a run reads one.
_PREPARED = (
    "source", "weights", "text_column", "label_column", "text_unit", "held_out_rate", "tokenizer", "vocab_size",
    "cache_dir",
)  # fmt: skip


def _prepare(arguments: argparse.Namespace) -> None:
    from flax_encoder.data.pipeline import prepare_stores

    asked = tyro.cli(PrepareArguments, args=arguments.rest, prog="python -m flax_encoder prepare")
    if other := [n for n in differences(asked.data, DataConfig()) if n not in _PREPARED]:
        raise ConfigError(
            f"prepare stores whole documents, and --data.{other[0].replace('_', '-')} says how a run reads them: give "
            f"it to train.py."
        )
    index, _, count = asked.shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"--shard is i/n with i from 0 to below n: got {asked.shard}.")
    if asked.workers is not None and asked.workers < 1:
        raise ConfigError(f"--workers must be at least 1: got {asked.workers}.")
    with _saying() as say:
        stores = prepare_stores(
            asked.data, pathlib.Path(asked.out), with_labels=asked.with_labels, workers=asked.workers,
            shard=(int(index), int(count)), progress=say,
        )  # fmt: skip
    if stores is None:
        print(f"shard {asked.shard} is done; the store is finished when all are. The same command checks.")
        return
    if asked.json:
        print(json.dumps([{"folder": str(s.folder), "hash": s.hash, **s.manifest} for s in stores]))
        return
    for store in stores:
        train, test = (store.manifest["splits"][split] for split in ("train", "test"))
        dropped = ", ".join(f"{count:,} {kind}" for kind, count in store.manifest["dropped"].items())
        print(
            f"{store.folder}: {train['documents']:,} documents, {train['tokens']:,} tokens to train on; held out "
            f"{test['documents']:,} and {test['tokens']:,}; dropped {dropped}"
        )
    print(f"\nnext:\n  python -m flax_encoder inspect {stores[0].folder}\n  python train.py --data.source {asked.out}")


@contextmanager
def _saying() -> Iterator[Callable[[str], None]]:
    """What to call with news of the work: a line that renews itself on a terminal, else a line every ten seconds."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if console.is_terminal:
        with console.status("starting") as status:
            yield lambda message: status.update(message)
        return
    last = time.monotonic()

    def say(message: str) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            console.print(message, markup=False)

    yield say


def _inspect(arguments: argparse.Namespace) -> None:
    from flax_encoder.data import inspect
    from flax_encoder.data.store import open_store, read_manifest
    from flax_encoder.data.tokenizer import load_tokenizer

    if arguments.rows < 1 or arguments.row_length < 3:
        raise ConfigError(f"inspect shows at least one row of 3: got --rows {arguments.rows} --row-length "
                          f"{arguments.row_length}.")  # fmt: skip
    folder = pathlib.Path(arguments.store)
    if members := read_manifest(folder).get("members"):
        each = ", ".join(f"{folder / m['folder']} (weight {m['weight']:,.10g})" for m in members)
        raise DataError(f"inspect looks at one store; {folder} is a mixture of {each}.")
    store, tokenizer = open_store(folder), load_tokenizer(folder)
    with _saying() as say:
        if arguments.verify:
            store.verify(say)
        summary = inspect.summarize(store, tokenizer, say)
    if arguments.plot:
        inspect.plot(store, summary, pathlib.Path(arguments.plot))
    if arguments.json:
        print(json.dumps(summary))
        return
    console = Console(highlight=False, soft_wrap=True)
    train, test = summary["splits"]["train"], summary["splits"]["test"]
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
        console.print(line, markup=False)
    console.print()
    _show(
        [{"row length": f"{r['row_length']:,}", "rows an epoch": f"{r['rows_per_epoch']:,}",
          "filled": f"{r['fill_rate']:.2%}"} for r in summary["packing"]],
        "best-fit packing",
    )  # fmt: skip
    batch = inspect.sample_rows(
        store.train, tokenizer, kind=arguments.kind, rate=arguments.rate, rows=arguments.rows,
        row_length=arguments.row_length, seed=arguments.seed,
    )  # fmt: skip
    console.print(f"\nrows of {arguments.row_length}: a colour a document; ⟨what is right⟩ where a token is predicted")
    for row in range(arguments.rows):
        console.print()
        console.print(inspect.draw_row(batch, row, tokenizer), soft_wrap=False)
    if arguments.plot:
        console.print(f"\nwrote {arguments.plot}")
