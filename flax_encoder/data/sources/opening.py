"""Where documents come from: TensorFlow Datasets or Hugging Face `datasets` by name, or files, here or elsewhere."""

import contextlib
import glob
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from flax_encoder.config import DataConfig
from flax_encoder.config.rules import counted
from flax_encoder.data.sources.columns import Columns, Layout
from flax_encoder.data.sources.files import KINDS, file_layout, file_parts, kind_of
from flax_encoder.data.sources.named import open_hf, open_tfds
from flax_encoder.data.sources.records import DataError, Part, Record, Say
from flax_encoder.data.sources.remote import (
    AnyFile,
    RemoteFile,
    has_pattern,
    is_remote,
    open_file_system,
    remote_files,
    size_of,
)

_COMPARED_BYTES = 2**26  # of a source's files, to tell one that was replaced by another of its size and time
_PIECES = 16


@dataclass(frozen=True)
class Source:
    """Documents in parts, those of the split `train` first."""

    parts: list[Part]
    fingerprint: str
    """Changes when the documents may have changed; the cache's key."""
    label_names: list[str] | None = field(default=None)
    """The names of labels, in the order of their integers, where the source knows them."""
    name: str = ""
    """What it was opened by."""
    notes: tuple[str, ...] = ()
    """Sentences for the user: which columns were guessed, which splits are left out."""
    pair: tuple[str, str] | None = None
    """The columns of its two texts, if it has two columns of them."""
    has_test_apart: bool = False
    """Whether its test documents were named for reporting alone: others are then held out to choose by."""

    @property
    def has_held_out(self) -> bool:
        """Whether it has documents to evaluate on of its own, so that none of its training documents are held out."""
        splits = {part.split for part in self.parts}
        return "validation" in splits or ("test" in splits and not self.has_test_apart)

    def records(self, split: str | None = None, tell: Say = lambda message: None) -> Iterator[Record]:
        """The documents of a split, or all, in order. `tell` hears at the end of rows that were left out."""
        left_out = 0
        for part in self.parts:
            if split in (None, part.split):
                left_out += (yield from part.read()) or 0
        if left_out:
            tell(f"{self.name}: {counted(left_out, 'row')} cannot be used, and left out")


def open_source(name: str, config: DataConfig, columns: Columns, cache_dir: pathlib.Path) -> Source:
    """The documents that `name`, one of `config.source`, stands for.

    Args:
      columns: what every record has.
      cache_dir: where data sets by name are kept, and a note of each source's contents.

    Raises:
      DataError: no such file or data set, a kind of file that is not read here, or no such column (lists the columns).
    """
    for prefix, open_named in (("tfds:", open_tfds), ("hf:", open_hf)):
        if name.startswith(prefix) and not is_remote(name):
            found = open_named(name.removeprefix(prefix), config, columns, cache_dir)
            layout = found.layout
            what = (*found.identity, layout.columns[0], layout.label, *_unusual(config, columns, layout))
            return Source(found.parts, _hash(*what), layout.label_names, name, found.notes, layout.pair)
    return _open_files(name, config, columns, cache_dir)


def _open_files(name: str, config: DataConfig, columns: Columns, cache_dir: pathlib.Path) -> Source:
    if config.validation_split is not None and name in config.sources:
        raise DataError(
            f"--data.validation-split needs a tfds: or hf: source: got it for {name}. Give the files to evaluate on "
            f"with --data.validation."
        )
    paths = _matching(name)
    kinds = {kind_of(p) for p in paths}
    if len(kinds) > 1 or not kinds <= set(KINDS):
        raise DataError(
            f"data.source must match files of one kind, {', '.join(KINDS)} (all but .parquet also .gz or .zst): got "
            f"{', '.join(sorted(kinds))}."
        )
    layout = next((found for path in paths if (found := file_layout(path, config, columns))), None)
    parts = [part for path in paths for part in file_parts(path, config, columns)]
    stats = [_identity(path) for path in paths]
    label = None if layout is None else layout.label
    fingerprint = _hash(stats, config.text_column, label, config.text_unit, *_unusual(config, columns, layout))
    names, notes = (None, ()) if layout is None else (layout.label_names, layout.notes)
    pair = None if layout is None else layout.pair
    return Source(parts, _of_contents(fingerprint, paths, cache_dir), names, name, notes, pair)


def _matching(name: str) -> list[AnyFile]:
    """The files that a path, a folder, a pattern or a URL of one of these stands for."""
    if is_remote(name):
        paths: list[AnyFile] = [*remote_files(name)]
        is_folder = not has_pattern(name) and [p.path for p in paths] != [open_file_system(name)[1]]
    else:
        paths, is_folder = [*_local_files(name)], pathlib.Path(name).expanduser().is_dir()
    if not paths:
        hint = ""
        if "[" in name:
            hint = f" In a pattern [ab] stands for a or b; for a name that has brackets write {glob.escape(name)!r}."
        raise DataError(
            f"no file matches data.source {name!r}. It is a path, a folder or a quoted glob, a URL of these, a "
            f"prepared store, tfds:NAME or hf:NAME.{hint}"
        )
    stems = {p.name.split(".")[0].lower() for p in paths} & {"validation", "valid", "dev", "test"}
    if is_folder and stems:
        raise DataError(
            f"a folder is training text, all of it: {name} has files named {', '.join(sorted(stems))}. Name the "
            f"training files with --data.source, the others with --data.validation and --data.test, or take "
            f"hf:{name}, which reads splits by the files' names."
        )
    return paths


def _local_files(name: str) -> list[pathlib.Path]:
    """What exists is meant as it is written: a pattern begins after the last folder that does."""
    path = pathlib.Path(name).expanduser()
    there = next((p for p in (path, *path.parents) if p.exists()), pathlib.Path())
    if there == path and path.is_dir():
        paths = [p for p in sorted(path.rglob("*")) if not any(x.startswith(".") for x in p.relative_to(path).parts)]
    else:
        rest = path.parts[len(there.parts) :]
        pattern = os.path.join(glob.escape(str(there)), *rest)
        paths = [pathlib.Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
    return [p for p in paths if p.is_file()]


def _identity(path: AnyFile) -> tuple[Any, ...]:
    """Another where the file is, or may be, another."""
    if isinstance(path, RemoteFile):
        return path.url, path.size, path.version
    return str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns


def files_identity(name: str) -> tuple[Any, ...]:
    """Another where the files that a path, a folder, a pattern or a URL stands for are others, as far as their places
    and times tell; the name alone where there are none."""
    with contextlib.suppress(OSError):
        return name, *(_identity(path) for path in (remote_files(name) if is_remote(name) else _local_files(name)))
    return (name,)


def _unusual(config: DataConfig, columns: Columns, layout: Layout | None) -> tuple[Any, ...]:
    """What else decides what is read; nothing for one text with a class or without, so that the caches, stores and
    runs of before there was anything else are found."""
    shape = () if layout is None or layout.is_plain else (columns, layout.columns)
    shape += () if config.target_turns == "every" else (config.target_turns,)
    settings = (config.label_names, config.skip_bad_rows, config.has_header, config.csv_quotes, config.validation_split)
    return shape if settings == (None, False, True, True, None) else (*shape, settings)


def _hash(*what: Any) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()


def _of_contents(fingerprint: str, paths: list[AnyFile], cache_dir: pathlib.Path) -> str:
    """The fingerprint, or another if other contents had it before: files may be replaced by others of their size and
    time. A note in the cache remembers when the files last changed, and a hash of their contents or pieces of them."""
    note = cache_dir / "sources" / f"{fingerprint[:24]}.json"
    remote = [path for path in paths if isinstance(path, RemoteFile)]
    if remote and all(path.version for path in remote):
        return fingerprint  # which has what their place says of their contents
    changed = None if remote else _hash([(p.stat().st_ino, p.stat().st_ctime_ns) for p in paths])
    try:
        known = json.loads(note.read_text("utf-8"))
        if changed is not None and known["changed"] == changed:
            return fingerprint
        contents = _hash_of_pieces(paths)
        if known["contents"] != contents:
            return _hash(fingerprint, contents)
    except (OSError, ValueError, KeyError, TypeError):
        contents = _hash_of_pieces(paths)
    with contextlib.suppress(OSError):  # without a cache that can be written to there is no store in it to mistake
        note.parent.mkdir(parents=True, exist_ok=True)
        new = note.with_name(f"{note.name}.{os.getpid()}")
        new.write_text(json.dumps({"changed": changed, "contents": contents}), "utf-8")
        os.replace(new, note)
    return fingerprint


def _hash_of_pieces(paths: list[AnyFile]) -> str:
    """Of the files' bytes, or of large ones' pieces from all over."""
    digest, room = hashlib.sha256(), max(_PIECES, _COMPARED_BYTES // len(paths))
    for path in paths:
        size, can_seek = size_of(path), not isinstance(path, RemoteFile) or path.has_ranges
        pieces = 1 if size <= room or not can_seek else _PIECES
        with path.open("rb") as f:
            for i in range(pieces):
                if pieces > 1:
                    f.seek(i * (size - room // pieces) // (_PIECES - 1))
                digest.update(f.read(room // pieces))
    return digest.hexdigest()
