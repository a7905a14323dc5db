"""What a run wants of every document, what is known of a source's columns, and how records are read from them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from flax_encoder.data.sources.values import Row

Value = Literal["none", "class", "classes", "number", "tags", "answers", "text"]
SAMPLED_ROWS = 100  # that tell the kinds of columns, where a format does not


class Columns(NamedTuple):
    """What is wanted of every document of a source.

    A value is, by its kind: `class` the name of a label, `classes` a tuple of names, `number` a float, `tags` a tuple
    of (start, end, tag) for every word of the text in characters, a tag being None where it is to be predicted,
    `answers` a tuple of (start, text) in the second of two texts, empty where there is none, `text` a text that is
    written for the first, such as its translation.
    """

    value: Value = "none"
    min_texts: int = 1
    max_texts: int = 1
    """2 is a text or a pair; a question and its passage are (2, 2), a context and its choices (3, 27); more from one on
    are an anchor, what belongs to it, and what does not."""
    keeps_words: bool = False
    """Without a value: where the source has words rather than a text, name them, as tags that are None."""
    is_optional: bool = False
    """A value is read of pairs and triples alone, and a source without a column of that name has none: it is None."""
    has_keys: bool = False
    """Keep a hash of every text, by which equal texts are known."""
    prompts: tuple[str, ...] = ()
    """Two: what is put before a document's first text, and before each other, as it is tokenized."""
    keeps_id: bool = False
    """Without a value: where the source has a column `id`, name the record by it."""
    writes: bool = False
    """A model writes texts: a tokenizer that is made here gives back every text as it was, and has sentinels."""
    special_tokens: tuple[str, ...] = ()
    """What such a tokenizer has as tokens of its own besides."""
    has_turns: bool = False
    """A text may be the newest turn of a conversation, those before it being the record's history."""
    turn_separator: str | None = None
    """What stands after every turn of a history; None is the tokenizer's token between two texts."""

    @property
    def is_choice(self) -> bool:
        """Whether a class is the number of one of the document's texts, counted from 0 after the first."""
        return self.value == "class" and self.min_texts > 2


@dataclass(frozen=True)
class Table:
    """What is known of a source's columns before its rows are read."""

    kinds: dict[str, str]
    """Of each column: str, int, float, bool, list[KIND], dict, null (nothing in it so far) or other."""
    where: str
    names: dict[str, list[str]] = field(default_factory=dict)
    """What the integers of a column stand for, where the source says so."""
    doubled: frozenset[str] = frozenset()
    """Names that more than one column has."""
    is_fixed: bool = False
    """The columns are ours, made from a format without named columns, so settings of columns do not mean them."""
    dialect: Any = None
    """How the reader of the format splits its rows."""
    notes: tuple[str, ...] = ()
    """What the reader found out by itself, in sentences for the user."""


@dataclass(frozen=True)
class Layout:
    """The columns to read of every row, and the record that they make. It can be sent to another process."""

    columns: tuple[str, ...]
    make: Callable[[Row], Any]
    """A row's `Record`, or with `makes_several` a tuple of them. Raises: BadRow: the row does not hold what its columns
    promise."""
    label: str | tuple[str, ...] | None = None
    label_names: list[str] | None = None
    is_plain: bool = False
    """One text, and no value or a class in one column."""
    notes: tuple[str, ...] = ()
    pair: tuple[str, str] | None = None
    """The columns of two texts, as --data.text-column and --data.text-pair-column would name them."""
    makes_several: bool = False
    """A row may hold several documents, such as the answers of a conversation."""


def kind_of_value(value: Any) -> str:
    """The kind of a value as JSON has it."""
    if value is None:
        return "null"
    if isinstance(value, list):
        kinds = [kind for item in value if (kind := kind_of_value(item)) != "null"]
        return f"list[{kinds[0].split('[')[0] if kinds else 'null'}]"
    name = type(value).__name__
    return name if name in ("str", "int", "float", "bool", "dict") else "other"


def kinds_of_rows(rows: list[Row]) -> dict[str, str]:
    """Each column with the kind of its first value that tells one."""
    kinds: dict[str, str] = {}
    for row in rows:
        for name, value in row.items():
            if kinds.get(name, "null") in ("null", "list[null]"):
                kinds[name] = kind_of_value(value)
    return kinds
