"""Draw texts as points: near each other where their vectors are."""

import argparse
import pathlib
import random
from collections.abc import Iterator
from typing import Any

from flax_encoder.commands.screen import positive_count, saying

HELP = "draw the texts of a file as points, near each other where their vectors are, coloured by label"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a run, one of its checkpoints, a published or a sentence-transformers folder")
    parser.add_argument("--input", required=True, help="file of texts: .csv, .tsv, .jsonl, .parquet or .txt")
    parser.add_argument("--text-column", help="the column of the text (default: guessed by its name)")
    parser.add_argument("--label-column", help="the column to colour by (default: guessed by its name, or none)")
    parser.add_argument("--limit", type=positive_count, default=5000, help="draw at most this many texts, chosen at "
                        "random (default 5000)")  # fmt: skip
    parser.add_argument("--method", choices=("pca", "umap"), default="pca", help="how to project vectors onto the "
                        "plane; umap needs umap-learn (default pca)")  # fmt: skip
    parser.add_argument("--out", default="map.html", help="the page to write, or a picture if it ends with .png, .svg "
                        "or .pdf (default map.html)")  # fmt: skip
    parser.add_argument("--allow-unused", action="store_true", help="leave out tensors of a published folder that no "
                        "part of the model reads")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    from flax_encoder.config import ConfigError
    from flax_encoder.config.rules import counted
    from flax_encoder.data.sources.records import DataError
    from flax_encoder.pages.map import draw_map, map_page, project
    from flax_encoder.runs.embed import load_embedder
    from flax_encoder.training.run_log import write_atomically
    from flax_encoder.training.runtime import set_up_runtime

    out = pathlib.Path(arguments.out)
    if out.suffix not in (".html", ".png", ".svg", ".pdf"):
        raise ConfigError(f"--out ends with .html, .png, .svg or .pdf: got {out.name!r}.")
    set_up_runtime()
    records = _drawn(_records(arguments), arguments.limit)
    if not records:
        raise DataError(f"a map needs at least 3 texts: {arguments.input} has none.")
    texts = [record.texts[0] for record in records]
    labels = None if records[0].value is None else [str(record.value) for record in records]
    embedder = load_embedder(arguments.folder, allow_unused=arguments.allow_unused)
    with saying() as say:
        vectors, _ = embedder.embed(texts, progress=lambda done: say(f"{done:,} of {len(texts):,} texts"))
    points, axes = project(vectors, arguments.method)
    title = f"{pathlib.Path(arguments.input).name} by {pathlib.Path(arguments.folder).resolve().name}"
    if out.suffix == ".html":
        about = f"{counted(len(texts), 'text')}, vectors of {vectors.shape[1]}, {arguments.method.upper()}"
        write_atomically(out, map_page(points, texts, labels, axes, title, about))
    else:
        draw_map(points, labels, axes, title, out)
    print(f"wrote {out}: {counted(len(texts), 'text')}")


def _drawn(records: Iterator[Any], count: int) -> list[Any]:
    """`count` of the records in their order, drawn at random with equal chances; the same each time."""
    generator, kept = random.Random(0), []
    for number, record in enumerate(records):
        if number < count:
            kept.append((number, record))
        elif (at := generator.randrange(number + 1)) < count:
            kept[at] = number, record
    return [record for _, record in sorted(kept, key=lambda pair: pair[0])]


def _records(arguments: argparse.Namespace) -> Iterator[Any]:
    """The file's records, with a class each if a label column is given or recognized by its name."""
    from flax_encoder.config import DataConfig
    from flax_encoder.data.pipeline import cache_folder
    from flax_encoder.data.sources.columns import Columns
    from flax_encoder.data.sources.opening import open_source
    from flax_encoder.data.sources.records import DataError

    config = DataConfig(
        source=arguments.input, text_column=arguments.text_column, label_column=arguments.label_column, text_unit="line"
    )

    def read(value: str) -> Iterator[Any]:
        source = open_source(arguments.input, config, Columns(value), cache_folder(config))
        for part in source.parts:
            yield from part.read()

    if arguments.label_column is not None:
        return read("class")
    try:
        source = open_source(arguments.input, config, Columns("class"), cache_folder(config))
        next(iter(source.parts[0].read()), None)
    except DataError:  # it has no labels, or none that can be guessed; what else is wrong is heard now
        return read("none")
    return read("class")
