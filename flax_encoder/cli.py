"""The command line: a recipe plus typed overrides for training, and the commands that ask a trained model."""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from flax_encoder.config import ConfigError, RunConfig
from flax_encoder.data.sources import DataError


@contextmanager
def failing_clearly() -> Iterator[None]:
    """Turn the errors that a user can mend into one message and exit status 1; bugs keep their traceback."""
    from flax_encoder.training.checkpoint import CheckpointError
    from flax_encoder.weights import WeightsError

    try:
        yield
    except (ConfigError, DataError, CheckpointError, WeightsError, ValueError) as error:
        if type(error) is ValueError:
            raise
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
    fill.add_argument("--top", type=int, default=5, help="how many to show (default 5)")
    fill.set_defaults(run=_fill_mask)

    classify = commands.add_parser("classify", help="the likeliest labels of a text")
    classify.add_argument("run_dir", help="a classification run folder, one checkpoint in it, or a published folder")
    classify.add_argument("text")
    classify.add_argument("--top", type=int, default=None, help="how many to show (default all)")
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

    arguments = parser.parse_args(argv)
    with failing_clearly():
        arguments.run(arguments)


def _show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(v if isinstance(v, str) else f"{v:.4f}" for v in row.values()))
    Console(highlight=False).print(table)


def _fill_mask(arguments: argparse.Namespace) -> None:
    from flax_encoder.hub import open_model

    masks = open_model(arguments.run_dir).fill_mask(arguments.text, arguments.top)
    if arguments.json:
        # One mask, the usual case, is a plain list; several are a list of lists.
        print(json.dumps(masks[0] if len(masks) == 1 else masks))
        return
    for i, guesses in enumerate(masks, 1):
        _show(guesses, arguments.text if len(masks) == 1 else f"mask {i} of: {arguments.text}")


def _classify(arguments: argparse.Namespace) -> None:
    from flax_encoder.hub import open_model

    labels = open_model(arguments.run_dir).classify(arguments.text)[: arguments.top]
    if arguments.json:
        print(json.dumps(labels))
        return
    _show(labels, arguments.text[:80])


def _export(arguments: argparse.Namespace) -> None:
    from flax_encoder.embed import write_sentence_files
    from flax_encoder.hub import export_run

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
    from flax_encoder.hub import import_folder

    import_folder(arguments.folder, arguments.out)
    if (pathlib.Path(arguments.folder) / "modules.json").exists():
        write_sentence_files(arguments.folder, arguments.out)
    print(f"wrote {arguments.out}; --init-from {arguments.out} starts from it")


def _embed(arguments: argparse.Namespace) -> None:
    import numpy as np
    from rich.progress import Progress

    from flax_encoder.embed import load_embedder, read_texts

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
