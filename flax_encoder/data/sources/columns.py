"""What a run wants of every document of a source: how many texts, and what kind of value."""

from typing import Literal, NamedTuple

Value = Literal["none", "class", "classes", "number", "tags", "answers"]


class Columns(NamedTuple):
    """What is wanted of every document of a source.

    A value is, by its kind: `class` the name of a label, `classes` a tuple of names, `number` a float, `tags` a tuple
    of (start, end, tag) for every word of the text in characters, `answers` a tuple of (start, text) in the second of
    two texts, empty where there is none.
    """

    value: Value = "none"
    min_texts: int = 1
    max_texts: int = 1
    """2 is a text or a pair; a question and its passage are (2, 2), a context and its choices (3, 27)."""
