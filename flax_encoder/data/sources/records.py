"""What every source gives: documents as records, in parts that can be read apart from one another."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

Say = Callable[[str], None]
"""Passes on a line that says how far long work has come."""


class Record(NamedTuple):
    """A document as its source has it; `Columns` says what `value` is."""

    texts: tuple[str, ...]
    value: Any = None
    where: str = ""
    """Names the record in errors."""
    id: str | None = None
    """Its name in the source, where answers are given by it."""


class DataError(ValueError):
    """The data cannot be used as asked. The message gives the rule, what was found and a way out."""


class LabelError(DataError):
    """Labels are not those that a model was made for."""


@dataclass(frozen=True)
class Part:
    """A stretch of a source, read from its start to its end by one worker; it can be sent to another process."""

    split: str
    size: int
    """About how much of the whole it is; the sizes of a source's parts have one unit."""
    read: Callable[[], Iterator[Record]]


def text_column(asked: str | None, columns: list[str], strings: list[str], where: str) -> str:
    """The column that is the text: the one asked for, else `text`, else the only one of strings."""
    if asked is not None:
        if asked not in columns:
            raise no_column(asked, columns, where)
        return asked
    if "text" in columns:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise DataError(f"which column is the text? {where} has {', '.join(columns)}. Name one with --data.text-column.")


def no_column(name: str, columns: list[str], where: str) -> DataError:
    return DataError(
        f"there is no column {name!r} in {where}; the columns are {', '.join(columns)}. "
        f"Name one with --data.text-column or --data.label-column."
    )


def make_record(
    row: dict[str, Any], text: str, label: str | None, where: str, names: list[str] | None = None
) -> Record:
    """`text`, and `label` if asked, of a source's row, with their types checked."""
    for column in (text, label) if label else (text,):
        if column not in row:
            raise no_column(column, list(row), where)
    value = "" if row[text] is None else _string(row[text], "text", f"column {text!r} of {where}")
    if label is None:
        return Record((value,))
    named = row[label]
    if named is not None and not isinstance(named, int):
        named = _string(named, "label", f"column {label!r} of {where}")
    if names is not None and isinstance(named, int) and 0 <= named < len(names):
        named = names[named]
    return Record((value,), None if named is None else str(named), where)


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
