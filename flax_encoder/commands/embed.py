"""A vector for each line of a file."""

import argparse
import pathlib

from flax_encoder.data.sources.records import DataError
from flax_encoder.training.console import make_console

HELP = "a vector for each line of a file"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a run, one of its checkpoints, a published or a sentence-transformers folder")
    parser.add_argument("--input", required=True, type=pathlib.Path, help="one text a line")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="a .npy file: float32, a row a line")
    parser.add_argument("--pooling", choices=("cls", "mean"), help="first token or mean of all (default: the folder's)")
    parser.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, default=None, help="to length 1 (default: the folder's)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="texts at a time (default 32)")
    parser.add_argument("--max-tokens", type=int, help="cut longer texts (default: what the model takes)")
    parser.add_argument("--allow-unused", action="store_true", help="of a published folder: leave out tensors that "
                        "nothing reads")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of matrix products (default: the model's)")


def run(arguments: argparse.Namespace) -> None:
    import numpy as np
    from rich.progress import Progress

    from flax_encoder.runs.embed import load_embedder, read_texts
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
        allow_unused=arguments.allow_unused,
    )
    with Progress(console=make_console(stderr=True)) as progress:
        task = progress.add_task("embedding", total=len(texts))
        vectors, num_cut = embedder.embed(
            texts, arguments.batch_size, lambda done: progress.update(task, completed=done)
        )
    part = arguments.output.with_suffix(".part.npy")
    np.save(part, vectors)
    part.replace(arguments.output)
    cut = f"; {num_cut:,} texts were longer than {embedder.max_tokens} tokens and cut" if num_cut else ""
    print(f"wrote {arguments.output}: {vectors.shape[0]:,} x {vectors.shape[1]}{cut}")
