"""Answers for a whole file of texts, in order; they are written as they come, so a kill loses little."""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from flax_encoder.config import ConfigError, DataConfig
from flax_encoder.data.pipeline import cache_folder
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.opening import Source, open_source
from flax_encoder.data.sources.records import DataError, LabelError, Record, Say
from flax_encoder.data.sources.remote import is_remote, put_file
from flax_encoder.runs.loaded import LoadedRun
from flax_encoder.tasks.task import Answer

OUTPUT_KINDS = (".jsonl", ".csv")
_KEPT_EVERY = 512  # answers between two writes
_MOST_EMPTY = 100_000  # texts, held in memory, before the first that has an answer, which tells a table's columns
# The labels in a value of each kind that has any.
_LISTED: dict[str, Callable[[Any], tuple[str, ...]]] = {
    "class": lambda value: (value,),
    "classes": lambda value: value,
    "tags": lambda value: tuple(tag for *_, tag in value),
}


def _hear(message: str) -> None: ...


def open_records(source: Source, split: str | None = None, tell: Say = _hear) -> tuple[str, Iterator[Record]]:
    """(split, its records): the one asked for, or what a source is evaluated on, its test split, else its validation
    split, else all. `tell` hears what the source has to say, and of rows that are left out."""
    splits = {part.split for part in source.parts}
    split = split or next(name for name in ("test", "validation", "train") if name in splits)
    for note in source.notes:
        tell(note)
    return split, source.records(split, tell)


def open_input(path: str, config: DataConfig, columns: Columns, tell: Say = _hear) -> Iterator[Record]:
    """The records of a file without values: a line of a .txt file or of standard input (-) is a text each. `tell` hears
    which columns were guessed, and of rows that are left out."""
    if path == "-":
        return (Record((line.rstrip("\r\n"),), where=f"line {n}") for n, line in enumerate(sys.stdin, 1))
    wanted = columns._replace(value="none", keeps_words=columns.value == "tags", keeps_id=True)
    source = open_source(path, config, wanted, cache_folder(config))
    for note in source.notes:
        tell(note)
    return source.records(tell=tell)


def check_golds(run: LoadedRun, records: list[Record]) -> list[Any]:
    """The right values of records, in the model's labels.

    Numbers from 0 that name no label are taken as indices of the model's labels, as published sets number them.

    Raises:
      LabelError: a label that the model does not have, or of tags, none that it has; names the record.
    """
    kind, names = run.task.reading.columns.value, run.label_names
    if kind not in _LISTED or names is None:
        return [record.value for record in records]
    listed = [_LISTED[kind](record.value) for record in records]
    found = {name for some in listed for name in some}
    if found.isdisjoint(names) and all(name.isdecimal() and int(name) < len(names) for name in found):
        listed = [tuple(names[int(name)] for name in some) for some in listed]
    is_wrong = kind != "tags" or {name for some in listed for name in some}.isdisjoint(names)
    for record, some in zip(records, listed, strict=True):
        if is_wrong and (unknown := [name for name in some if name not in names]):
            raise LabelError(
                f"the data's labels must be the model's: {record.where or 'a record'} has {unknown[0]!r}, the model "
                f"{', '.join(map(repr, names[:12]))}{' ...' if len(names) > 12 else ''}."
            )
    return [some[0] for some in listed] if kind == "class" else listed


def shown(answer: Answer, top: int | None, probabilities: bool) -> Answer:
    """An answer as it is written: without arrays, and `probabilities` and the `top` labels only where asked for.

    Raises:
      DataError: it is arrays alone.
    """
    every = answer.get("probabilities")
    rest = {name: x for name, x in answer.items() if name != "probabilities" and not isinstance(x, np.ndarray)}
    if not rest:
        raise DataError("two texts are compared by a number, and one has a vector: give pairs, or `embed` the texts.")
    if isinstance(every, dict) and top is not None:
        ranked = sorted(every.items(), key=lambda item: -item[1])[:top]
        rest["top"] = [{"label": label, "probability": p} for label, p in ranked]
    return rest | ({"probabilities": every} if probabilities and every is not None else {})


class AnswerFile:
    """The output of `predict`: whole lines are kept while it is made, and a second start goes on after them. A .csv has
    a column `error` for texts that have no answer.

    Args:
      identity: what the answers are made from; answers of something else are not gone on with.
    """

    def __init__(self, path: pathlib.Path, identity: str):
        if path.suffix not in OUTPUT_KINDS:
            raise ConfigError(f"--output must end in {' or '.join(OUTPUT_KINDS)}: got {path}.")
        self._path, self._part = path, path.with_name(path.name + ".part")
        self._note, self._identity = path.with_name(path.name + ".part.json"), identity
        self._columns: list[str] | None = None

    def num_done(self) -> int:
        """Answers that an interrupted start with the same identity left; anything else of it is removed."""
        try:
            note = json.loads(self._note.read_text("utf-8"))
            is_same = note["identity"] == self._identity and type(note["answers"]) is int and note["answers"] >= 0
            if is_same and self._part.stat().st_size >= note["bytes"]:
                with self._part.open("r+b") as file:
                    file.truncate(note["bytes"])
                self._columns = note["columns"]
                return note["answers"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        for path in (self._part, self._note):
            path.unlink(missing_ok=True)
        return 0

    def write(self, answers: Iterable[Answer], done: int, say: Callable[[int], None]) -> int:
        """Append answers and put the file in its place; returns how many there are in all."""
        answers = iter(answers)
        header = ""
        if self._path.suffix == ".csv" and self._columns is None and (first := _up_to_an_answer(answers)):
            self._columns = [*(name for name in first[-1] if name != "error"), "error"]
            header, answers = self._fields(self._columns), itertools.chain(first, answers)
        with self._part.open("ab") as file:
            file.write(header.encode())
            while some := list(itertools.islice(answers, _KEPT_EVERY)):
                file.write("".join(map(self._line, some)).encode())
                file.flush()
                os.fsync(file.fileno())
                done += len(some)
                note = {"identity": self._identity, "answers": done, "bytes": file.tell(), "columns": self._columns}
                new = self._note.with_name(self._note.name + ".new")
                new.write_text(json.dumps(note), "utf-8")
                os.replace(new, self._note)
                say(done)
        os.replace(self._part, self._path)
        self._note.unlink(missing_ok=True)
        return done

    def _line(self, answer: Answer) -> str:
        if self._path.suffix == ".jsonl":
            return json.dumps(answer, ensure_ascii=False) + "\n"
        columns = self._columns or []
        if unknown := answer.keys() - set(columns):
            raise DataError(
                f"a .csv file has the columns of its first answer, {', '.join(columns)}: {', '.join(unknown)} came "
                f"later. Give --output FILE.jsonl."
            )
        return self._fields([answer.get(name, "") for name in columns])

    @staticmethod
    def _fields(values: Sequence[Any]) -> str:
        text = io.StringIO()
        values = [json.dumps(v, ensure_ascii=False) if isinstance(v, (list, dict)) else v for v in values]
        csv.writer(text).writerow(values)
        return text.getvalue()


def _up_to_an_answer(answers: Iterator[Answer]) -> list[Answer]:
    """The first answers, up to one that is none of an empty text: all have its columns.

    Raises:
      DataError: too many empty texts.
    """
    first = []
    for answer in answers:
        first.append(answer)
        if "error" not in answer:
            break
        if len(first) == _MOST_EMPTY:
            raise DataError(
                f"a .csv file has the columns of its first answer: the first {_MOST_EMPTY:,} texts are empty. Name "
                f"another --text-column, or give --output FILE.jsonl."
            )
    return first


@contextlib.contextmanager
def output_file(name: str) -> Iterator[pathlib.Path]:
    """The path to write what a command gives, which no other process writes meanwhile. That of a URL is in the cache,
    and is copied to its place when it is whole; an interrupted one stays for the next start.

    Raises:
      ConfigError: another process is at work on it. DataError: the place cannot be written to.
    """
    path = pathlib.Path(name)
    if is_remote(name):
        place = hashlib.sha256(name.encode()).hexdigest()[:24]
        path = cache_folder(DataConfig()) / "outputs" / f"{place}-{name.rpartition('/')[2]}"
        path.parent.mkdir(exist_ok=True)
    if not path.parent.is_dir():
        raise ConfigError(f"an output is written into a folder that is there: {path.parent} is not. Make it first.")
    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"one command writes an output at a time: another is at work on {name}. Give another --output, or "
            f"--num-processes for several that share the work."
        ) from None
    except (NotImplementedError, OSError):  # without locks, or where nothing can be written, as the work will say
        pass
    try:
        yield path
        if is_remote(name):
            put_file(path, name)
            path.unlink()
    finally:
        if lock.is_locked:
            pathlib.Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def identity_of(*what: Any) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()


def answers_by_id(path: str | pathlib.Path) -> dict[str, str]:
    """Of a .jsonl file of answers to questions, each one's text by its question's id; "" for no answer.

    Raises:
      DataError: an answer without an id.
    """
    found = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            answer = json.loads(line)
            if not answer.get("id"):
                raise DataError(f"SQuAD's predictions are by id: the question of {path}, line {number}, has none.")
            found[answer["id"]] = answer.get("answer", "")
    return found
