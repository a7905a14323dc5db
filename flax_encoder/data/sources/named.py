"""Data sets by name: TensorFlow Datasets (tfds:) and Hugging Face datasets (hf:)."""

import contextlib
import difflib
import functools
import importlib
import io
import os
import pathlib
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

from filelock import FileLock

from flax_encoder.config import DataConfig
from flax_encoder.data.sources.choosing import choose_columns
from flax_encoder.data.sources.columns import Columns, Layout, Row, Table
from flax_encoder.data.sources.files import PART_BYTES
from flax_encoder.data.sources.records import BadRow, BadRows, DataError, Part, Record
from flax_encoder.data.sources.values import is_no_label

_VALIDATION = ("validation", "validation_matched", "dev", "valid", "val")
_TEST = ("test", "test_matched")
_EVALUATED = ("validation", "dev", "valid", "test")  # how the names of splits for evaluation begin
# TensorFlow Datasets imports its packages of builders one after another, and stops where one needs a library that is
# not there: all that come after it are unknown to it then. These have texts.
_TFDS_PACKAGES = ("question_answering", "summarization", "text", "text_simplification", "translate")


class NamedSet(NamedTuple):
    parts: list[Part]
    layout: Layout
    identity: tuple[Any, ...]
    """Changes when the documents may have changed."""
    notes: tuple[str, ...]


class _Rows(NamedTuple):
    """A set before it is known which of its columns are read."""

    table: Table
    splits: dict[str, tuple[int, int]]
    """Each split's records and bytes."""
    rows: Callable[..., Iterator[Row]]
    """(columns, split, begin, end) -> rows."""
    identity: tuple[Any, ...]


def open_tfds(name: str, config: DataConfig, wanted: Columns, cache_dir: pathlib.Path) -> NamedSet:
    return _named_set(_find_tfds(name, cache_dir), config, wanted)


def open_hf(name: str, config: DataConfig, wanted: Columns, cache_dir: pathlib.Path) -> NamedSet:
    return _named_set(_find_hf(name, cache_dir), config, wanted)


def named_columns(name: str, cache_dir: pathlib.Path) -> tuple[str, ...]:
    """The columns of a set by name, `tfds:NAME` or `hf:NAME`.

    Raises:
      DataError: as `open_tfds` and `open_hf`.
    """
    return tuple(_find(name, cache_dir).table.kinds)


def read_named(name: str, split: str, cache_dir: pathlib.Path) -> Iterator[Row]:
    """The rows of a split of a set by name, with all their columns.

    Raises:
      DataError: as `open_tfds` and `open_hf`; or no such split.
    """
    found = _find(name, cache_dir)
    if split not in found.splits:
        raise DataError(f"there is no split {split!r} in {name}; the splits are {', '.join(found.splits)}.")
    yield from found.rows(tuple(found.table.kinds), split, 0, found.splits[split][0])


def _find(name: str, cache_dir: pathlib.Path) -> _Rows:
    kind, _, rest = name.partition(":")
    return {"tfds": _find_tfds, "hf": _find_hf}[kind](rest, cache_dir)


def _find_tfds(name: str, cache_dir: pathlib.Path) -> _Rows:
    import tensorflow_datasets as tfds

    # The python_docs corpus is the running interpreter's, so each interpreter version has a folder.
    python = "{}.{}.{}".format(*sys.version_info[:3])
    data_dir = cache_dir / "tfds" / (f"python-{python}" if name.split("/")[0] == "python_docs" else "any")
    tfds.disable_progress_bar()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        # One process builds, others wait and find it built. Its own notices are dropped; ours say what is going on.
        with FileLock(data_dir / ".lock"), contextlib.redirect_stdout(io.StringIO()):
            builder = _tfds_builder(name, data_dir)
            builder.download_and_prepare()
    except tfds.core.DatasetNotFoundError:  # its message lists all that there are
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name.split("/")[0], known, 5)
        hint = f" Names like it: {', '.join(near)}." if near else ""
        raise DataError(f"TensorFlow Datasets cannot give {name!r}: it has no set of this name.{hint}") from None
    except ImportError as error:  # wrapped, with the library's name in its text alone
        library = str(error).rpartition("No module named ")[2].strip("'")
        raise DataError(
            f"TensorFlow Datasets cannot give {name!r}: the set's own code needs {library}. pip install {library}, "
            f"or take the set from hf: or from files."
        ) from error
    except Exception as error:  # a set's own code raises many kinds, for a name, a network or a file
        raise DataError(f"TensorFlow Datasets cannot give {name!r}: {type(error).__name__}: {error}") from error
    kinds, names = {}, {}
    for column, feature in builder.info.features.items():
        kinds[column] = _kind_of_tfds(feature)
        inner = getattr(feature, "feature", feature)  # of a sequence
        if isinstance(inner, tfds.features.ClassLabel) and inner.names:
            names[column] = list(inner.names)
    table = Table(kinds, f"tfds:{name}", names)
    splits = {split: (info.num_examples, info.num_bytes) for split, info in builder.info.splits.items()}
    rows = functools.partial(_tfds_rows, name, data_dir)
    return _Rows(table, splits, rows, (builder.info.full_name, python))


@functools.lru_cache(maxsize=8)
def _tfds_builder(name: str, data_dir: pathlib.Path):
    # Registered by import. On a machine without TensorFlow the data-source path needs none of it.
    import tensorflow_datasets as tfds

    import flax_encoder.data.sources.python_docs  # noqa: F401

    for package in _TFDS_PACKAGES:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"tensorflow_datasets.{package}")
    return tfds.builder(name, data_dir=os.fspath(data_dir), file_format="array_record")


def _kind_of_tfds(feature: Any) -> str:
    import numpy as np
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Text):
        return "str"
    if isinstance(feature, tfds.features.FeaturesDict):
        return "dict"
    if isinstance(feature, tfds.features.Sequence):
        inner = _kind_of_tfds(feature.feature)
        return "dict" if inner == "dict" else f"list[{inner.split('[')[0]}]"
    if getattr(feature, "shape", None) != ():
        return "other"
    kind = np.dtype(getattr(feature, "np_dtype", object)).kind
    return {"b": "bool", "i": "int", "u": "int", "f": "float", "O": "str", "S": "str", "U": "str"}.get(kind, "other")


def _tfds_rows(
    name: str, data_dir: pathlib.Path, columns: tuple[str, ...], split: str, begin: int, end: int
) -> Iterator[Row]:
    rows = _tfds_builder(name, data_dir).as_data_source(split)
    for i in range(begin, end):
        row = rows[i]
        yield {column: _plain(row[column]) for column in columns}


def _plain(value: Any) -> Any:
    """NumPy's values as Python's."""
    import numpy as np

    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _find_hf(name: str, cache_dir: pathlib.Path) -> _Rows:
    try:
        splits = _load_hf(name, cache_dir)
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds, for a name, a network or a file
        raise DataError(f"Hugging Face datasets cannot give {name!r}: {type(error).__name__}: {error}") from error
    features = next(iter(splits.values())).features
    names = {}
    for column, feature in features.items():
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
        if found := getattr(inner, "names", None):
            names[column] = list(found)
    table = Table({column: _kind_of_hf(feature) for column, feature in features.items()}, f"hf:{name}", names)
    sizes = {split: (len(rows), rows.data.nbytes) for split, rows in splits.items()}
    prints = sorted((split, rows._fingerprint) for split, rows in splits.items())
    rows = functools.partial(_hf_rows, name, cache_dir)
    return _Rows(table, sizes, rows, (name, prints))


@functools.lru_cache(maxsize=8)
def _load_hf(name: str, cache_dir: pathlib.Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError("hf: sources need the `datasets` library: pip install 'flax-encoder[hf]'.") from None
    datasets.disable_progress_bars()
    path, _, config = name.partition(":")
    return datasets.load_dataset(path, config or None, cache_dir=os.fspath(cache_dir / "hf"))


def _kind_of_hf(feature: Any) -> str:
    if isinstance(feature, dict):
        return "dict"
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if inner is not None:
        kind = _kind_of_hf(inner)
        # A list of objects comes as an object of lists where it is a `Sequence`.
        return "dict" if kind == "dict" and type(feature).__name__ == "Sequence" else f"list[{kind.split('[')[0]}]"
    dtype = str(getattr(feature, "dtype", ""))
    prefixes = {"string": "str", "large_string": "str", "int": "int", "uint": "int", "float": "float", "bool": "bool",
                "null": "null"}  # fmt: skip
    return next((kind for prefix, kind in prefixes.items() if dtype.startswith(prefix)), "other")


def _hf_rows(
    name: str, cache_dir: pathlib.Path, columns: tuple[str, ...], split: str, begin: int, end: int
) -> Iterator[Row]:
    rows = _load_hf(name, cache_dir)[split].select_columns(list(dict.fromkeys(columns)))
    for at in range(begin, end, 1000):
        batch = rows[at : min(at + 1000, end)]
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _named_set(found: _Rows, config: DataConfig, wanted: Columns) -> NamedSet:
    """The set's training, validation and test text as parts."""
    table, splits, rows, identity = found
    where = table.where
    if "train" not in splits:
        raise DataError(f"{where} must have a split named train: it has {', '.join(splits)}.")
    layout = choose_columns(table, config, wanted)
    unlabelled = {s for s, (count, _) in splits.items() if s != "train" and _is_unlabelled(
        table, layout, wanted, rows(layout.columns, s, 0, count))}  # fmt: skip
    asked = config.validation_split
    if asked is not None and (asked not in splits or asked == "train" or asked in unlabelled):
        usable = ", ".join(s for s in splits if s != "train" and s not in unlabelled) or "none"
        raise DataError(
            f"--data.validation-split names a split to evaluate on, with labels if these are learned: got {asked}, and "
            f"of {where} these are {usable}."
        )
    usable = [s for s in splits if s not in unlabelled]
    validation = asked or next((s for s in _VALIDATION if s in usable), None)
    test = next((s for s in _TEST if s in usable and s != validation), None)
    roles = {"train": "train"} | ({"validation": validation} if validation else {}) | ({"test": test} if test else {})
    notes = list(layout.notes)
    others = [s for s in splits if s not in roles.values() and (s in unlabelled or s.startswith(_EVALUATED))]
    if others:
        told = ", ".join(f"{s} (has no labels)" if s in unlabelled else s for s in others)
        evaluated = " and ".join(s for s in (validation, test) if s) or "none"
        notes.append(f"{where}: evaluates on {evaluated}; leaves out {told}.")
    parts = []
    for role, split in roles.items():
        records, size = splits[split]
        step = max(1, records * PART_BYTES // max(size, 1))
        for begin in range(0, records, step):
            end = min(begin + step, records)
            read = functools.partial(_read_named, where, layout, wanted, config.skip_bad_rows, rows, split, begin, end)
            parts.append(Part(role, (end - begin) * size // records, read))
    return NamedSet(parts, layout, identity, tuple(notes))


def _is_unlabelled(table: Table, layout: Layout, wanted: Columns, rows: Iterator[Row]) -> bool:
    """Whether a split has rows, and none with a label: the published test sets of benchmarks that keep theirs."""
    label = layout.label
    if wanted.value not in ("class", "number") or not isinstance(label, str):
        return False
    hidden = table.names.get(label, ["-1"] if wanted.value == "number" or wanted.min_texts > 2 else None)
    found = [is_no_label(row[label], hidden) for row in _until(rows, lambda row: not is_no_label(row[label], hidden))]
    return bool(found) and all(found)


def _until(rows: Iterator[Row], is_last: Callable[[Row], bool]) -> Iterator[Row]:
    for row in rows:
        yield row
        if is_last(row):
            return


def _read_named(
    where: str, layout: Layout, wanted: Columns, skip: bool, rows: Callable[..., Iterator[Row]], split: str, begin: int,
    end: int,
) -> Generator[Record, None, int]:  # fmt: skip
    """The records of a stretch of a split; the generator's result is the number of rows left out."""
    bad = BadRows(skip)
    for i, row in enumerate(rows(layout.columns, split, begin, end), begin):
        try:
            record = layout.make(row)
        except BadRow as error:
            bad.add(f"{where}, {split}[{i}]", error)
            continue
        for one in record if layout.makes_several else (record,):
            yield one if wanted.value == "none" else one._replace(where=f"{where}, {split}[{i}]")
    return bad.count
