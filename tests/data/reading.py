"""What tests of sources share: rows written to files, and read back as records."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from flax_encoder.config import DataConfig
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.opening import open_source

TEXT, CLASS, NUMBER, TAGS = Columns(), Columns("class", 1, 2), Columns("number", 1, 2), Columns("tags")
PAIR, ANSWERS, CHOICES = Columns("none", 2, 2), Columns("answers", 2, 2), Columns("class", 3, 27)


def read(source, tmp_path, columns=TEXT, **options):
    """The training records of a source."""
    config = DataConfig(source=str(source), **options)
    return list(open_named(config, tmp_path / "cache", columns).records("train"))


def open_named(config, cache_dir, columns=TEXT):
    return open_source(config.source, config, columns, cache_dir)


def texts(records):
    return [record.texts[0] for record in records]


def values(records):
    return [(record.texts[0], record.value) for record in records]


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def parquet(path, *rows):
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path
