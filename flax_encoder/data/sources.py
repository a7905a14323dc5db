"""Where documents come from: TensorFlow Datasets by name, or local text, JSONL and Parquet files."""

import contextlib
import glob
import hashlib
import io
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from filelock import FileLock

from flax_encoder.config import DataConfig

Record = dict[str, Any]


class DataError(ValueError):
    """The data cannot be used as asked. The message gives the rule, what was found and a way out."""


@dataclass(frozen=True)
class Source:
    """Documents by split; `splits["test"]`, if there is one, is held out. A record has `text`, and `label` if asked."""

    splits: dict[str, Callable[[], Iterator[Record]]]
    fingerprint: str
    """Changes when the documents may have changed; the cache's key."""
    label_names: list[str] | None = field(default=None)
    """Names of labels that are integers, where the source knows them."""


def open_source(config: DataConfig, *, with_labels: bool, cache_dir: pathlib.Path) -> Source:
    """The documents that `config.source` names.

    Raises:
      DataError: no such file or data set, a kind of file that is not read here, or no such column (lists the columns).
    """
    label = config.label_column if with_labels else None
    if config.source.startswith("tfds:"):
        return _open_tfds(config.source.removeprefix("tfds:"), config.text_column, label, cache_dir)
    exact = pathlib.Path(config.source)  # a file whose name looks like a pattern is still a file
    paths = [exact] if exact.is_file() else [pathlib.Path(p) for p in sorted(glob.glob(config.source, recursive=True))]
    paths = [p for p in paths if p.is_file()]
    if not paths:
        raise DataError(f"no file matches data.source {config.source!r}. It is a path or quoted glob, or tfds:NAME.")
    kinds = {p.suffix for p in paths}
    if len(kinds) > 1 or not kinds <= set(_READERS):
        raise DataError(
            f"data.source must match files of one kind, {', '.join(_READERS)}: got {', '.join(sorted(kinds))}."
        )
    read = _READERS[kinds.pop()]

    def documents() -> Iterator[Record]:
        for path in paths:
            yield from read(path, config, label)

    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    options = (config.text_column, label, config.text_unit)
    return Source({"train": documents}, hashlib.sha256(repr((stats, options)).encode()).hexdigest())


def _decode(raw: bytes, path: pathlib.Path, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"text must be UTF-8: {path} has byte 0x{raw[error.start]:02x} at offset {offset + error.start}. "
            f"`iconv -f latin1 -t utf-8` converts Latin-1."
        ) from None


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end)."""
    offset = 0
    with path.open("rb") as f:
        for number, raw in enumerate(f, 1):
            yield number, _decode(raw, path, offset).rstrip("\r\n")
            offset += len(raw)


def _read_txt(path: pathlib.Path, config: DataConfig, label: str | None) -> Iterator[Record]:
    if label:
        raise DataError(f"a .txt file has no labels: {path}. Use .jsonl or .parquet with columns for text and label.")
    if config.text_unit == "file":
        yield {"text": _decode(path.read_bytes(), path, 0)}
    elif config.text_unit == "line":
        yield from ({"text": line} for _, line in _lines(path))
    else:
        for blank, group in itertools.groupby(_lines(path), key=lambda line: not line[1].strip()):
            if not blank:
                yield {"text": "\n".join(line for _, line in group)}


def _read_jsonl(path: pathlib.Path, config: DataConfig, label: str | None) -> Iterator[Record]:
    text = None
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"every line of a .jsonl file must be a JSON object: {path}, line {number}: {error}."
            ) from None
        if not isinstance(row, dict):
            raise DataError(
                f"every line of a .jsonl file must be a JSON object: {path}, line {number} is {line[:60]!r}."
            )
        strings = [name for name, value in row.items() if isinstance(value, str)]
        if text is None:  # the first row decides for the file
            text = _text_column(config.text_column, list(row), strings, f"{path}, line {number}")
        yield _record(row, text, label, f"{path}, line {number}")


def _read_parquet(path: pathlib.Path, config: DataConfig, label: str | None) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"not a Parquet file: {path}: {error}.") from None
    schema = file.schema_arrow
    strings = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    text = _text_column(config.text_column, schema.names, strings, str(path))
    if label is not None and label not in schema.names:
        raise _no_column(label, schema.names, str(path))
    try:
        for batch in file.iter_batches(columns=[text] if label is None else [text, label]):
            for row in batch.to_pylist():
                yield _record(row, text, label, str(path))
    except OSError as error:  # a damaged page
        raise DataError(f"a Parquet file cannot be read to its end: {path}: {error}.") from None


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _no_column(name: str, columns: list[str], where: str) -> DataError:
    return DataError(
        f"there is no column {name!r} in {where}; the columns are {', '.join(columns)}. "
        f"Name one with --data.text-column or --data.label-column."
    )


def _text_column(asked: str | None, columns: list[str], strings: list[str], where: str) -> str:
    if asked is not None:
        if asked not in columns:
            raise _no_column(asked, columns, where)
        return asked
    if "text" in columns:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise DataError(f"which column is the text? {where} has {', '.join(columns)}. Name one with --data.text-column.")


def _record(row: Record, text: str, label: str | None, where: str) -> Record:
    for column in (text, label) if label else (text,):
        if column not in row:
            raise _no_column(column, list(row), where)
    record: Record = {
        "text": _string(row[text], "text", f"column {text!r} of {where}") if row[text] is not None else ""
    }
    if label is not None:
        named = row[label]
        record["label"] = (
            named
            if named is None or isinstance(named, int)
            else _string(named, "label", f"column {label!r} of {where}")
        )
    return record


def _string(value: Any, role: str, where: str) -> str:
    try:
        value = value.decode("utf-8") if isinstance(value, bytes) else value
        if isinstance(value, str):
            value.encode("utf-8")  # JSON can spell half a surrogate pair
            return value
    except UnicodeError as error:
        raise DataError(f"the {role} column must hold Unicode text: {where} holds {value[:40]!r}: {error}.") from None
    raise DataError(
        f"the {role} column must hold strings{' or integers' * (role == 'label')}: {where} holds {value!r}."
    )


def _open_tfds(name: str, text: str | None, label: str | None, cache_dir: pathlib.Path) -> Source:
    # Registered by import. On a machine without TensorFlow the data-source path needs none of it.
    import tensorflow_datasets as tfds

    import flax_encoder.data.python_docs  # noqa: F401

    # The python_docs corpus is the running interpreter's, so each interpreter version has a folder.
    python = "{}.{}.{}".format(*sys.version_info[:3])
    data_dir = cache_dir / "tfds" / (f"python-{python}" if name.split("/")[0] == "python_docs" else "any")
    tfds.disable_progress_bar()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        # One process builds, others wait and find it built. Its own notices are dropped; ours say what is going on.
        with FileLock(data_dir / ".lock"), contextlib.redirect_stdout(io.StringIO()):
            builder = tfds.builder(name, data_dir=os.fspath(data_dir), file_format="array_record")
            builder.download_and_prepare()
            splits = builder.as_data_source()
    except (tfds.core.DatasetNotFoundError, NotImplementedError, ValueError, OSError) as error:
        raise DataError(f"TensorFlow Datasets cannot give {name!r}: {type(error).__name__}: {error}") from error
    features = builder.info.features
    strings = [k for k, f in features.items() if isinstance(f, tfds.features.Text)]
    column = _text_column(text, list(features), strings, f"tfds:{name}")
    if label is not None and label not in features:
        raise _no_column(label, list(features), f"tfds:{name}")
    label_feature = features[label] if label else None
    names = list(label_feature.names) if isinstance(label_feature, tfds.features.ClassLabel) else None

    def reader(split: str) -> Callable[[], Iterator[Record]]:
        return lambda: (_record(row, column, label, f"tfds:{name}") for row in splits[split])

    held_out = next((s for s in ("test", "validation") if s in splits), None)
    if "train" not in splits:
        raise DataError(f"tfds:{name} must have a split named train: it has {', '.join(splits)}.")
    readers = {"train": reader("train")} | ({"test": reader(held_out)} if held_out else {})
    fingerprint = repr((builder.info.full_name, python, column, label))
    return Source(readers, hashlib.sha256(fingerprint.encode()).hexdigest(), names)
