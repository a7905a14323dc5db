"""Files of tagged sentences, a word a line: .conll, .bio, .iob, .iob2, and .conllu of Universal Dependencies."""

from collections.abc import Iterator

from flax_encoder.config import DataConfig
from flax_encoder.data.sources.columns import Columns, Row, Table
from flax_encoder.data.sources.records import BadRow, BadRows, DataError
from flax_encoder.data.sources.remote import AnyFile
from flax_encoder.data.sources.streams import Line, Span, line_where, lines, name_without_packing


def table(path: AnyFile, config: DataConfig, wanted: Columns) -> Table | None:
    """The word and the tag of a line by their columns' numbers.

    Raises:
      DataError: a value other than tags is wanted, or a column's number is not among those of the first line.
    """
    if wanted.value not in ("none", "tags"):
        raise DataError(f"a file of tagged words has no other labels: {path}. Use .jsonl with columns for them.")
    words = (text for _, _, text in lines(path, Span()) if text.strip() and not text.startswith(("#", _START)))
    first = next(words, None)
    if first is None:
        return None
    width, is_ud = len(_split(first)), name_without_packing(path).suffix.lower() == ".conllu"
    word = _place(config.text_column, 2 if is_ud else 1, width, path, "text")
    tag = _place(config.label_column, 4 if is_ud else -1, width, path, "label") if wanted.value == "tags" else word
    kinds = {"tokens": "list[str]", "tags": "list[str]"}
    return Table(kinds, str(path), is_fixed=True, dialect=(width, word, tag, is_ud))


_START = "-DOCSTART-"


def _split(line: str) -> list[str]:
    return line.split("\t") if "\t" in line else line.split()


def _place(asked: str | tuple[str, ...] | None, usual: int, width: int, path: AnyFile, role: str) -> int:
    try:
        number = usual if asked is None else int(str(asked))
    except ValueError:
        number = 0
    place = number - 1 if number > 0 else width + number
    if not number or not 0 <= place < width:
        raise DataError(
            f"columns of a file of tagged words are numbers from 1, or from -1 for the last: {path} has {width}, got "
            f"--data.{role}-column {usual if asked is None else asked}."
        )
    return place


def rows(
    path: AnyFile, span: Span, table: Table, columns: tuple[str, ...], config: DataConfig, bad: BadRows
) -> Iterator[tuple[Line, Row]]:
    """(first line, tokens and tags) of each sentence; blank lines end them."""
    width, word, tag, is_ud = table.dialect
    tokens: list[str] = []
    tags: list[str] = []
    first: Line | None = None
    is_bad = False
    for line in lines(path, span, at_blank=True):
        text = line[2]
        fields = _split(text)
        if not fields or not text.strip():
            if tokens and first and not is_bad:
                yield first, {"tokens": tokens, "tags": tags}
            tokens, tags, first, is_bad = [], [], None, False
        elif text.startswith(_START) or (text.startswith("#") and not tokens and len(fields) != width):
            continue  # a document's start, or a comment before a sentence
        elif len(fields) != width:
            rule = f"every line has a word and its tag in {width} columns, as the first has"
            if not is_bad:
                bad.add(line_where(path, line), BadRow(rule, f"has {len(fields)}"))
            is_bad = True
        elif not is_ud or fields[0].isdecimal():  # else a part of a word, or a word that is not written
            first = first or line
            tokens.append(fields[word].strip())
            tags.append(fields[tag].strip())
    if tokens and first and not is_bad:
        yield first, {"tokens": tokens, "tags": tags}
