"""What every source gives: documents as records, in parts that can be read apart from one another."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

Say = Callable[[str], None]
"""Passes on a line that says how far long work has come."""


class Record(NamedTuple):
    """A document as its source has it; `Columns` says what `value` is."""

    texts: tuple[str, ...]
    """Exactly the source's characters, nothing stripped, so that offsets of characters hold."""
    value: Any = None
    where: str = ""
    """Names the record in errors, such as "reviews.jsonl, line 17"; empty where records have no value."""
    id: str | None = None
    """Its name in the source, where answers are given by it; empty for a row without one in a source of names."""
    history: tuple[str, ...] | None = None
    """The turns of a conversation before the text, oldest first; None: the text is no turn of any."""
    group: str | None = None
    """Records of one group are held out together; None: by their texts."""


class SoftLabel(str):
    """A label that stands for shares of several: it is the name of the one with the largest.

    Args:
      shares: of each label that has any, by name; they add up to 1.
    """

    shares: dict[str, float]

    def __new__(cls, shares: dict[str, float]) -> "SoftLabel":
        label = super().__new__(cls, max(shares, key=lambda name: shares[name]))
        label.shares = shares
        return label

    def __reduce__(self):
        return SoftLabel, (self.shares,)

    def __repr__(self) -> str:
        return repr(self.shares)


def shares_of(label: str) -> dict[str, float]:
    """Those of a label, which a plain one has all of."""
    return label.shares if isinstance(label, SoftLabel) else {label: 1.0}


class DataError(ValueError):
    """The data cannot be used as asked. The message gives the rule, what was found and a way out."""


class LabelError(DataError):
    """Labels are not those that a model was made for."""


class BadRow(Exception):
    """One row cannot be used; its reader names the row and raises a DataError, or leaves the row out.

    Args:
      rule: what every row must be.
      found: what this one is, with a verb: "holds 5".
      column: where in the row.
    """

    def __init__(self, rule: str, found: str, column: str | None = None):
        super().__init__(rule, found, column)
        self.rule, self.found, self.column = rule, found, column


class BadRows:
    """What a reader does about rows that cannot be used: it raises a DataError, or with `skip` counts them."""

    def __init__(self, skip: bool):
        self._skip = skip
        self.count = 0

    def add(self, where: str, row: BadRow) -> None:
        """Raises: DataError: rows are not to be skipped; the message names the row."""
        if not self._skip:
            place = where if row.column is None else f"column {row.column!r} of {where}"
            raise DataError(
                f"{row.rule}: {place} {row.found}. --data.skip-bad-rows leaves such rows out and counts them."
            )
        self.count += 1


@dataclass(frozen=True)
class Part:
    """A stretch of a source, read from its start to its end by one worker; it can be sent to another process."""

    split: str
    """`train`, `validation` or `test`."""
    size: int
    """About how much of the whole it is; the sizes of a source's parts have one unit."""
    read: Callable[[], Iterator[Record]]
    """Gives the records in order. A generator's own result (`count = yield from part.read()`) is the number of rows
    that were left out as `skip_bad_rows` asks."""
    is_local: bool = False
    """Whether it can be read in this process alone, as what lies in its memory."""
