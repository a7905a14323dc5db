"""A vector for each text of a file."""

import argparse
import pathlib
import stat
from collections.abc import Iterator
from typing import get_args

from flax_encoder.commands.screen import add_processes_option
from flax_encoder.config.model import PoolingMode
from flax_encoder.data.sources.records import DataError, Say
from flax_encoder.training.console import make_news_console

HELP = "write a vector for each text of a file"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a run, one of its checkpoints, a published or a sentence-transformers folder")
    parser.add_argument("--input", required=True, help="a file with one text per line, or a .jsonl, .csv, "
                        ".parquet ... file with one per row; or its URL")  # fmt: skip
    parser.add_argument("--text-column", "--data.text-column", dest="text_column", help="the column of the text "
                        "(default: guessed by its name)")  # fmt: skip
    parser.add_argument("--skip-bad-rows", "--data.skip-bad-rows", dest="skip_bad_rows", action="store_true",
                        help="leave out rows that cannot be read, and count them")  # fmt: skip
    parser.add_argument("--output", required=True, help="a .npy file, float32, one row per text; or its URL (gs://, "
                        "s3://)")  # fmt: skip
    parser.add_argument("--pooling", nargs="+", choices=get_args(PoolingMode), help="how the vectors of a text's "
                        "tokens become one; several results are concatenated (default: the folder's, or else "
                        "mean)")  # fmt: skip
    parser.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, default=None, help="scale vectors to length 1 (default: "
        "as the folder says)",
    )  # fmt: skip
    parser.add_argument("--dimensions", type=int, help="keep this many first features of each vector, for a model "
                        "that learned such widths (default: all, or as the folder says)")  # fmt: skip
    parser.add_argument("--prompt-name", help="the folder's prompt to put before each text (default: the folder's "
                        "default)")  # fmt: skip
    parser.add_argument("--batch-size", type=int, help="rows of 64 tokens in a batch; longer rows have as many tokens "
                        "together (default: by the device)")  # fmt: skip
    parser.add_argument("--max-tokens", type=int, help="cut longer texts to this many tokens (default: what the model "
                        "takes)")  # fmt: skip
    parser.add_argument("--allow-unused", action="store_true", help="leave out tensors of a published folder that no "
                        "part of the model reads")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of matrix products (default: the "
                        "model's)")  # fmt: skip
    add_processes_option(parser)


def run(arguments: argparse.Namespace) -> None:
    from flax_encoder.runs.processes import together

    with together(arguments.num_processes) as is_first:
        _run(arguments, is_first)


def _run(arguments: argparse.Namespace, is_first: bool) -> None:
    from rich.progress import MofNCompleteColumn, Progress

    from flax_encoder.runs.ask_file import output_file
    from flax_encoder.runs.ask_together import embed_together
    from flax_encoder.runs.embed import load_embedder
    from flax_encoder.runs.vector_file import VectorFile
    from flax_encoder.training.runtime import set_up_runtime

    set_up_runtime()
    if not arguments.output.endswith(".npy"):
        raise DataError(f"--output must end in .npy: got {arguments.output}.")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise DataError(f"--batch-size must be above 0: got {arguments.batch_size}.")
    tell = make_news_console(stderr=True, is_shown=is_first).print
    texts, total = _open(arguments, tell)
    embedder = load_embedder(
        arguments.folder,
        pooling=arguments.pooling,
        normalize=arguments.normalize,
        max_tokens=arguments.max_tokens,
        dtype=arguments.dtype,
        allow_unused=arguments.allow_unused,
        dimensions=arguments.dimensions,
    )
    vectors = embed_together(embedder, texts, arguments.batch_size, prompt_name=arguments.prompt_name)
    if not is_first:
        for _ in vectors:
            pass  # the first process writes it
        return
    num_texts = num_cut = 0
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with (
        Progress(*columns, console=make_news_console(stderr=True)) as progress,
        output_file(arguments.output) as path,
        VectorFile(path, embedder.embed_dim) as file,
    ):
        task = progress.add_task("embedding", total=total)
        for some in vectors:
            file.write(some.numbers, some.vectors)
            num_texts, num_cut = num_texts + len(some.numbers), some.num_cut
            progress.update(task, completed=num_texts)
    cut = f"; {num_cut:,} texts were longer than {embedder.max_tokens} tokens and cut" if num_cut else ""
    print(f"wrote {arguments.output}: {num_texts:,} x {embedder.embed_dim}{cut}")


def _open(arguments: argparse.Namespace, tell: Say) -> tuple[Iterator[str], int | None]:
    """(the texts of a file, their number or None): its lines, or the values of a column."""
    from flax_encoder.config import ConfigError, DataConfig
    from flax_encoder.data.sources.columns import Columns
    from flax_encoder.data.sources.files import KINDS, kind_of
    from flax_encoder.data.sources.remote import is_remote
    from flax_encoder.data.sources.streams import is_whole
    from flax_encoder.runs.ask_file import open_input
    from flax_encoder.runs.vector_file import read_texts

    name, column, num_processes = arguments.input, arguments.text_column, arguments.num_processes
    if not is_remote(name):
        path = pathlib.Path(name).expanduser()
        name, total = str(path), _num_lines(path)
        if total is None and num_processes > 1:
            raise ConfigError(
                f"several processes must read the same input, but {path} can be read only once: give a file."
            )
        if total is None or kind_of(path) not in KINDS or (kind_of(path) == ".txt" and not is_whole(path)):
            if column is not None:
                raise ConfigError(
                    f"--text-column needs a file with columns, such as .jsonl or .csv: got {path}. Leave it out."
                )
            return read_texts(path), total
    config = DataConfig(
        source=name, text_unit="line", text_column=column, skip_bad_rows=arguments.skip_bad_rows
    )  # fmt: skip
    return (record.texts[0] for record in open_input(name, config, Columns(), tell)), None


def _num_lines(path: pathlib.Path) -> int | None:
    """The number of lines; None for a path that can be read only once, such as a pipe."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return None
        ends, last = 0, b"\n"
        with path.open("rb") as file:
            while block := file.read(2**20):
                ends, last = ends + block.count(b"\n"), block[-1:]
    except OSError as error:
        raise DataError(f"no texts at {path}: {error.strerror}.") from None
    return ends + (last != b"\n")
