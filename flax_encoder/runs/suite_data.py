"""Where the data of a suite's task stands: a set by name, or files of a folder in the set's own layout."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flax_encoder.config import DataConfig
from flax_encoder.data.pipeline import cache_folder
from flax_encoder.data.sources.files import KINDS, file_columns, file_rows, kind_of
from flax_encoder.data.sources.named import named_columns, read_named
from flax_encoder.data.sources.records import BadRow, DataError
from flax_encoder.data.sources.streams import name_without_packing
from flax_encoder.data.sources.values import Row
from flax_encoder.runs.suites import ColumnNames, SuiteTask
from flax_encoder.training.run_log import write_atomically

_SUFFIXES = tuple(f"{kind}{packing}" for kind in (*KINDS, ".txt") for packing in ("", ".gz", ".zst"))


class Place(NamedTuple):
    """What a task reads."""

    train: DataConfig
    """With the validation documents, by which nothing is chosen."""
    reported: dict[str, tuple[DataConfig, str | None]]
    """By what the names of metrics end in: what is scored, and its split if it has several."""


def find_files(task: SuiteTask, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The file of each split that is trained on or reported.

    Raises:
      DataError: no folder of the task in `folder`, or no such file in it.
    """
    names = (task.name, *task.folders)
    homes = [folder / name for name in names if (folder / name).is_dir()]
    if not homes:
        raise DataError(f"{folder} has no folder {' or '.join(names)}")
    found = {}
    for split in ("train", *_splits(task)):
        stems = task.files[split]
        paths = (home / f"{stem}{suffix}" for home in homes for stem in stems for suffix in (*_SUFFIXES, ""))
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise DataError(f"{homes[0]} has no {split} file: {' or '.join(stems)}, of the kinds {', '.join(KINDS)}")
        found[split] = path
    return found


def _splits(task: SuiteTask) -> tuple[str, ...]:
    """Those beside train: what is evaluated during training first."""
    validation = next(name for name in task.files if name.startswith("validation"))
    return tuple(dict.fromkeys((validation, *task.reported.values())))


def find_source(task: SuiteTask, source: str) -> str:
    """The set's name in `tfds` or `hf`.

    Raises:
      DataError: it has none there.
    """
    name = {"tfds": task.tfds, "hf": task.hf}[source]
    if name is None:
        raise DataError(f"{task.name} is no set of {source}: give --data-dir, or another --source")
    return name


def open_place(task: SuiteTask, data_dir: pathlib.Path | None, source: str, out: pathlib.Path) -> Place:
    """Find the task's data; what is not in a form that is read is written to `out` in one that is.

    Raises:
      DataError: it is not there, or its rows or columns are not the set's.
    """
    own = DataConfig(row_length=task.row_length, skip_bad_rows=task.skip_bad_rows)
    if data_dir is not None:
        files = find_files(task, data_dir)
        if task.flatten:
            rows = {split: file_rows(path, own) for split, path in files.items()}
    else:
        name = find_source(task, source)
        if not task.flatten:
            return _by_name(task, own, name)
        rows = {split: read_named(name, split, cache_folder(own)) for split in ("train", *_splits(task))}
    if task.flatten:
        files = {split: _write_flat(task, of_split, out / f"{split}.jsonl") for split, of_split in rows.items()}
    else:
        files = {split: _as_known_kind(task, path, out) for split, path in files.items()}
    configs = {split: _with_columns(task, own, path) for split, path in files.items()}
    validation = _splits(task)[0]
    if dataclasses.replace(configs[validation], source="") != dataclasses.replace(configs["train"], source=""):
        raise DataError(f"the files of a set have the same columns: {files['train']} and {files[validation]} differ")
    train = dataclasses.replace(configs["train"], validation=str(files[validation]))
    return Place(train, {end: (configs[split], None) for end, split in task.reported.items()})


def _by_name(task: SuiteTask, own: DataConfig, name: str) -> Place:
    own = dataclasses.replace(own, source=name)
    if task.columns:
        own = _named_columns(own, _find_columns(task, named_columns(name, cache_folder(own)), name))
    places = {}
    for end, split in task.reported.items():
        is_test = split == "test"
        usual = None if split in ("validation", "test") else split
        places[end] = dataclasses.replace(own, validation_split=usual), "test" if is_test else "validation"
    return Place(next(iter(places.values()))[0], places)


def _named_columns(config: DataConfig, names: ColumnNames) -> DataConfig:
    return dataclasses.replace(config, text_column=names.text, text_pair_column=names.pair, label_column=names.label)


def _with_columns(task: SuiteTask, own: DataConfig, path: pathlib.Path) -> DataConfig:
    """How a file is read. The .tsv files of these sets were written without quoting."""
    config = dataclasses.replace(own, source=str(path))
    kind = kind_of(path)
    if not task.columns or kind in (".conll", ".bio", ".iob", ".iob2", ".conllu"):
        return config
    if kind == ".tsv":
        config = dataclasses.replace(config, csv_quotes=False)
    header = file_columns(path, config)
    count = len(header) if kind in (".tsv", ".csv") else 0
    names = _find_columns(task, (*header, *map(str, range(1, count + 1))), str(path), header)
    if not set(names.all) <= set(header):
        config = dataclasses.replace(config, has_header=False)
    return _named_columns(config, names)


def _find_columns(
    task: SuiteTask, columns: Sequence[str], where: str, shown: Sequence[str] | None = None
) -> ColumnNames:
    """The first of the task's names that are all among `columns`.

    Raises:
      DataError: none are; the message has those that are there, or `shown`.
    """
    found = next((names for names in task.columns if set(names.all) <= set(columns)), None)
    if found is None:
        listed = ", ".join(columns if shown is None else shown) or "none"
        wanted = ", or ".join(" ".join(names.all) for names in task.columns)
        raise DataError(f"{where} has the columns {listed}: {task.name} has {wanted}")
    return found


def _as_known_kind(task: SuiteTask, path: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """The file, or of tagged words in a file of another name a copy whose name says so."""
    kind = kind_of(path)
    if kind in KINDS and not (kind == ".txt" and task.objective == "token_classification"):
        return path
    packing = path.name.removeprefix(name_without_packing(path).name)
    copy = out / f"{path.name.removesuffix(packing)}.conll{packing}"
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(path, copy)
    return copy


def _write_flat(task: SuiteTask, rows: Iterator[Row], path: pathlib.Path) -> pathlib.Path:
    lines = []
    for number, row in enumerate(rows, 1):
        try:
            lines += [json.dumps(flat, ensure_ascii=False) + "\n" for flat in task.flatten(row)]  # type: ignore[misc]
        except BadRow as error:
            place = f"column {error.column!r} of row {number}" if error.column else f"row {number}"
            raise DataError(f"{error.rule}: {place} of {task.name}'s {path.stem} {error.found}") from None
        except (TypeError, AttributeError) as error:  # something else where an object or a list should be
            raise DataError(f"row {number} of {task.name}'s {path.stem} is not as the set's are: {error}") from None
    text = "".join(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text("utf-8") != text:
        write_atomically(path, text)
    return path
