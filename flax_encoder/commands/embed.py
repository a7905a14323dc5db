"""A vector for each line of a file."""

import argparse
import pathlib
import stat
from typing import get_args

from flax_encoder.config.model import PoolingMode
from flax_encoder.data.sources.records import DataError
from flax_encoder.training.console import make_news_console

HELP = "a vector for each line of a file"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a run, one of its checkpoints, a published or a sentence-transformers folder")
    parser.add_argument("--input", required=True, type=pathlib.Path, help="one text a line")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="a .npy file: float32, a row a line")
    parser.add_argument("--pooling", nargs="+", choices=get_args(PoolingMode), help="how a text's vectors become "
                        "one; several are concatenated (default: the folder's, or else mean)")  # fmt: skip
    parser.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, default=None, help="to length 1 (default: the folder's)"
    )
    parser.add_argument("--dimensions", type=int, help="features of each vector to keep, the first, of models that "
                        "learned such widths (default: all, or what the folder says)")  # fmt: skip
    parser.add_argument("--prompt-name", help="which of the folder's prompts to put before each text (default: the "
                        "folder's default)")  # fmt: skip
    parser.add_argument("--batch-size", type=int, help="rows of 64 tokens at a time, or their tokens in longer rows "
                        "(default: what suits the device)")  # fmt: skip
    parser.add_argument("--max-tokens", type=int, help="cut longer texts (default: what the model takes)")
    parser.add_argument("--allow-unused", action="store_true", help="of a published folder: leave out tensors that "
                        "nothing reads")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of matrix products (default: the model's)")


def run(arguments: argparse.Namespace) -> None:
    from rich.progress import MofNCompleteColumn, Progress

    from flax_encoder.runs.embed import load_embedder
    from flax_encoder.runs.vector_file import VectorFile, read_texts
    from flax_encoder.training.runtime import set_up_runtime

    set_up_runtime()
    if arguments.output.suffix != ".npy":
        raise DataError(f"--output must end in .npy: got {arguments.output}.")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise DataError(f"--batch-size must be above 0: got {arguments.batch_size}.")
    total = _num_lines(arguments.input)
    embedder = load_embedder(
        arguments.folder,
        pooling=arguments.pooling,
        normalize=arguments.normalize,
        max_tokens=arguments.max_tokens,
        dtype=arguments.dtype,
        allow_unused=arguments.allow_unused,
        dimensions=arguments.dimensions,
    )
    vectors = embedder.stream(read_texts(arguments.input), arguments.batch_size, prompt_name=arguments.prompt_name)
    num_texts = num_cut = 0
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=make_news_console(stderr=True)) as progress, VectorFile(
        arguments.output, embedder.embed_dim
    ) as file:
        task = progress.add_task("embedding", total=total)
        for some in vectors:
            file.write(some.numbers, some.vectors)
            num_texts, num_cut = num_texts + len(some.numbers), some.num_cut
            progress.update(task, completed=num_texts)
    cut = f"; {num_cut:,} texts were longer than {embedder.max_tokens} tokens and cut" if num_cut else ""
    print(f"wrote {arguments.output}: {num_texts:,} x {embedder.embed_dim}{cut}")


def _num_lines(path: pathlib.Path) -> int | None:
    """None of what can be read once only, such as a pipe."""
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
