"""Where documents come from: TensorFlow Datasets or Hugging Face `datasets` by name, or local files."""

import contextlib
import functools
import glob
import hashlib
import io
import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from filelock import FileLock

from flax_encoder.config import DataConfig
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.files import PART_BYTES, READERS, file_parts, kind_of
from flax_encoder.data.sources.records import DataError, Part, Record, make_record, no_column, text_column


@dataclass(frozen=True)
class Source:
    """Documents in parts, those of the split `train` first; what is in the split `test`, if it has one, is held out."""

    parts: list[Part]
    fingerprint: str
    """Changes when the documents may have changed; the cache's key."""
    label_names: list[str] | None = field(default=None)
    """Names of labels that are integers, where the source knows them."""
    name: str = ""
    """What it was opened by."""
    has_test_apart: bool = False
    """Whether its test documents were named for reporting alone: others are then held out to choose by."""

    @property
    def has_held_out(self) -> bool:
        """Whether it has documents to evaluate on of its own, so that none of its training documents are held out."""
        splits = {part.split for part in self.parts}
        return "validation" in splits or ("test" in splits and not self.has_test_apart)

    def records(self, split: str) -> Iterator[Record]:
        """The split's documents in order."""
        return itertools.chain.from_iterable(part.read() for part in self.parts if part.split == split)


def open_source(name: str, config: DataConfig, columns: Columns, cache_dir: pathlib.Path) -> Source:
    """The documents that `name`, one of `config.source`, stands for.

    Raises:
      DataError: no such file or data set, a kind of file that is not read here, or no such column (lists the columns).
    """
    label = config.label_column if columns.value != "none" else None
    for prefix, open_named in (("tfds:", _open_tfds), ("hf:", _open_hf)):
        if name.startswith(prefix):
            source = open_named(name.removeprefix(prefix), config.text_column, label, cache_dir)
            break
    else:
        source = _open_files(name, config, label)
    return replace(source, name=name)


def _open_files(name: str, config: DataConfig, label: str | None) -> Source:
    exact = pathlib.Path(name)  # a file whose name looks like a pattern is still a file
    paths = [exact] if exact.is_file() else [pathlib.Path(p) for p in sorted(glob.glob(name, recursive=True))]
    paths = [p for p in paths if p.is_file()]
    if not paths:
        raise DataError(
            f"no file matches data.source {name!r}. It is a path or quoted glob, a prepared store, tfds:NAME or "
            f"hf:NAME."
        )
    kinds = {kind_of(p) for p in paths}
    if len(kinds) > 1 or not kinds <= set(READERS):
        raise DataError(
            f"data.source must match files of one kind, {', '.join(READERS)} (the first two also .gz or .zst): "
            f"got {', '.join(sorted(kinds))}."
        )
    parts = [part for path in paths for part in file_parts(path, config, label)]
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    return Source(parts, _hash(stats, config.text_column, label, config.text_unit))


def _hash(*what: Any) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()


def _indexed(
    splits: dict[str, tuple[int, int]], read: Callable[..., Iterator[Record]], where: str
) -> list[Part]:
    """Parts of a data set with random access, its test set held out; `splits` gives each one's records and bytes."""
    if "train" not in splits:
        raise DataError(f"{where} must have a split named train: it has {', '.join(splits)}.")
    held_out = next((s for s in ("test", "validation") if s in splits), None)
    parts = []
    for role, split in (("train", "train"), ("test", held_out)):
        records, size = splits[split] if split else (0, 0)
        step = max(1, records * PART_BYTES // max(size, 1))
        for begin in range(0, records, step):
            end = min(begin + step, records)
            parts.append(Part(role, (end - begin) * size // records, functools.partial(read, split, begin, end)))
    return parts


def _open_tfds(name: str, text: str | None, label: str | None, cache_dir: pathlib.Path) -> Source:
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
    except (tfds.core.DatasetNotFoundError, NotImplementedError, ValueError, OSError) as error:
        raise DataError(f"TensorFlow Datasets cannot give {name!r}: {type(error).__name__}: {error}") from error
    features, where = builder.info.features, f"tfds:{name}"
    strings = [k for k, f in features.items() if isinstance(f, tfds.features.Text)]
    column = text_column(text, list(features), strings, where)
    if label is not None and label not in features:
        raise no_column(label, list(features), where)
    label_feature = features[label] if label else None
    names = list(label_feature.names) if isinstance(label_feature, tfds.features.ClassLabel) else None
    splits = {split: (info.num_examples, info.num_bytes) for split, info in builder.info.splits.items()}
    parts = _indexed(splits, functools.partial(_read_tfds, name, data_dir, column, label, names), where)
    return Source(parts, _hash(builder.info.full_name, python, column, label), names)


@functools.lru_cache(maxsize=8)
def _tfds_builder(name: str, data_dir: pathlib.Path):
    # Registered by import. On a machine without TensorFlow the data-source path needs none of it.
    import tensorflow_datasets as tfds

    import flax_encoder.data.sources.python_docs  # noqa: F401

    return tfds.builder(name, data_dir=os.fspath(data_dir), file_format="array_record")


def _read_tfds(
    name: str, data_dir: pathlib.Path, text: str, label: str | None, names: list[str] | None, split: str, begin: int,
    end: int,
) -> Iterator[Record]:  # fmt: skip
    rows = _tfds_builder(name, data_dir).as_data_source(split)
    return (make_record(rows[i], text, label, f"tfds:{name}", names) for i in range(begin, end))


@functools.lru_cache(maxsize=8)
def _load_hf(name: str, cache_dir: pathlib.Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError("hf: sources need the `datasets` library: pip install 'flax-encoder[hf]'.") from None
    datasets.disable_progress_bars()
    path, _, config = name.partition(":")
    return datasets.load_dataset(path, config or None, cache_dir=os.fspath(cache_dir / "hf"))


def _open_hf(name: str, text: str | None, label: str | None, cache_dir: pathlib.Path) -> Source:
    try:
        splits = _load_hf(name, cache_dir)
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds, for a name, a network or a file
        raise DataError(f"Hugging Face datasets cannot give {name!r}: {type(error).__name__}: {error}") from error
    features, where = next(iter(splits.values())).features, f"hf:{name}"
    strings = [k for k, f in features.items() if getattr(f, "dtype", None) in ("string", "large_string")]
    column = text_column(text, list(features), strings, where)
    if label is not None and label not in features:
        raise no_column(label, list(features), where)
    names = getattr(features[label], "names", None) if label else None
    sizes = {split: (len(rows), rows.data.nbytes) for split, rows in splits.items()}
    parts = _indexed(sizes, functools.partial(_read_hf, name, cache_dir, column, label, names), where)
    prints = sorted((split, rows._fingerprint) for split, rows in splits.items())
    return Source(parts, _hash(name, prints, column, label), names)


def _read_hf(
    name: str, cache_dir: pathlib.Path, text: str, label: str | None, names: list[str] | None, split: str, begin: int,
    end: int,
) -> Iterator[Record]:  # fmt: skip
    rows = _load_hf(name, cache_dir)[split].select_columns([text] if label is None else [text, label])
    for at in range(begin, end, 1000):
        columns = rows[at : min(at + 1000, end)]
        for values in zip(*columns.values(), strict=True):
            yield make_record(dict(zip(columns, values, strict=True)), text, label, f"hf:{name}", names)
