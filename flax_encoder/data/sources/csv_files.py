"""Tables of separated fields: .csv and .tsv. Every field is text, as it is written, but in columns of lists or objects,
spelled as JSON or as Python's own."""

import ast
import contextlib
import csv
import dataclasses
import io
import itertools
import json
import re
import tokenize
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from flax_encoder.config import DataConfig
from flax_encoder.data.sources.columns import SAMPLED_ROWS, Columns, Row, Table, kinds_of_rows
from flax_encoder.data.sources.records import BadRow, BadRows, DataError
from flax_encoder.data.sources.remote import AnyFile
from flax_encoder.data.sources.streams import Span, decode, name_without_packing, open_text, raw_lines

_SAMPLED_BYTES, _SAMPLED_LINES = 2**20, 100
_FIELD_CHARACTERS = 2**27  # Python's own limit is 2**17
_WITHOUT_COMMA = re.compile(r"""['"\d]\s+['"\d-]""")
_TEXTUAL = ("str", "float", "null")  # kinds of columns whose fields are what is written


class Dialect(NamedTuple):
    delimiter: str
    quotes: bool
    """Whether quotes enclose fields, and do not belong to them."""
    columns: tuple[str, ...]
    skipped_lines: int


def _suffix(path: AnyFile) -> str:
    return name_without_packing(path).suffix.lower()


def _reader(text_lines: Iterator[str], delimiter: str, quotes: bool):
    csv.field_size_limit(max(csv.field_size_limit(), _FIELD_CHARACTERS))  # of the process: it has no other
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    return csv.reader(text_lines, delimiter=delimiter, quoting=quoting, strict=True)


def _text_lines(path: AnyFile) -> Iterator[str]:
    return (decode(raw, path, offset) for offset, raw in raw_lines(path))


def table(path: AnyFile, config: DataConfig, wanted: Columns) -> Table | None:
    """The columns, and how rows are split.

    Raises:
      DataError: the first row does not parse.
    """
    notes = []
    delimiter = "\t" if _suffix(path) == ".tsv" else _delimiter(path, config.csv_quotes)
    if delimiter != "," and _suffix(path) == ".csv":
        notes.append(f"{path}: its columns are separated by {delimiter!r}, in which its first rows agree.")
    quotes = config.csv_quotes and (_suffix(path) != ".tsv" or _quotes_enclose(path, delimiter))
    if config.csv_quotes and not quotes:
        notes.append(f"{path}: quotes are text, for more of its first rows have all their fields so.")
    reader = _reader(_text_lines(path), delimiter, quotes)
    try:
        first = next((row for row in reader if row), None)
    except csv.Error as error:
        rule, found = _problem(error)
        raise DataError(f"{rule}: the first row of {path} {found}.") from None
    if first is None:
        return None
    names = [name.strip() for name in first] if config.has_header else [str(i) for i in range(1, len(first) + 1)]
    dialect = Dialect(delimiter, quotes, tuple(names), reader.line_num if config.has_header else 0)
    doubled = frozenset(name for name in names if names.count(name) > 1)
    found = Table(dict.fromkeys(names, "str"), str(path), doubled=doubled, dialect=dialect, notes=tuple(notes))
    sampled = rows(path, Span(), found, tuple(names), config, BadRows(config.skip_bad_rows))
    sample = [row for _, row in itertools.islice(sampled, SAMPLED_ROWS)]
    return dataclasses.replace(found, kinds=_kinds_of_strings(names, sample)) if sample else None


def _problem(error: csv.Error) -> tuple[str, str]:
    """(rule, what was found)."""
    if "new-line" in str(error):
        return (
            "rows end in \\n or \\r\\n (`tr '\\r' '\\n' < OLD > NEW` mends a file whose rows end in \\r)",
            "has a \\r alone, outside quotes",
        )
    return "quotes enclose whole fields (--data.no-csv-quotes takes them as text)", f"does not parse: {error}"


def _delimiter(path: AnyFile, quotes: bool) -> str:
    """The sign that such files have and in which the first two rows agree, commas first; else the comma."""
    head = list(itertools.islice(_text_lines(path), _SAMPLED_LINES))
    for delimiter in (",", ";", "\t", "|"):
        try:
            widths = {len(row) for row in itertools.islice(filter(None, _reader(iter(head), delimiter, quotes)), 2)}
        except csv.Error:
            continue
        if len(widths) == 1 and max(widths) > 1:
            return delimiter
    return ","


def _quotes_enclose(path: AnyFile, delimiter: str) -> bool:
    """Whether the quotes at the start of a .tsv file enclose fields. Many such files were written without quoting:
    read with it, a quote that begins a sentence swallows the rows up to the next."""
    with open_text(path) as f:
        start, is_all = f.read(_SAMPLED_BYTES), not f.read(1)
    text = start.decode("utf-8-sig", "ignore")
    whole, others = _count_rows(text, delimiter, True)
    cut_off = 0 if is_all else 1  # the last row
    return others <= cut_off or whole + cut_off >= _count_rows(text, delimiter, False)[0]


def _count_rows(text: str, delimiter: str, quotes: bool) -> tuple[int, int]:
    """How many rows have as many fields as the first, and how many have not or do not parse."""
    reader, widths = _reader(io.StringIO(text, newline="\n"), delimiter, quotes), []
    while True:
        try:
            widths.append(len(next(reader)))
        except StopIteration:
            whole = sum(width == widths[0] for width in widths)
            return whole, len(widths) - whole
        except csv.Error:
            widths.append(-1)


def rows(
    path: AnyFile, span: Span, table: Table, columns: tuple[str, ...], config: DataConfig, bad: BadRows
) -> Iterator[tuple[tuple[int, int], Row]]:
    delimiter, quotes, names, skipped = table.dialect
    reader = _reader(itertools.islice(_text_lines(path), skipped, None), delimiter, quotes)
    places = [(name, names.index(name), table.kinds[name] in _TEXTUAL) for name in columns]
    for number in itertools.count(1):
        place = number, skipped + reader.line_num + 1
        try:
            fields = next(reader)
            while not fields:  # a blank line
                place = number, skipped + reader.line_num + 1
                fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            bad.add(where(path, place), BadRow(*_problem(error)))
            continue
        if len(fields) != len(names):
            bad.add(
                where(path, place),
                BadRow(f"every row must have a field for each of the {len(names)} columns", f"has {len(fields)}"),
            )
            continue
        yield place, {name: fields[i] if is_text else _value(fields[i]) for name, i, is_text in places}


def where(path: AnyFile, place: tuple[int, int]) -> str:
    return f"{path}, row {place[0]} (line {place[1]})"


def _kinds_of_strings(names: list[str], rows: list[Row]) -> dict[str, str]:
    """float for columns all of whose values spell numbers, which are hardly texts: a guess, and for guessing alone. Of
    columns all of whose values spell lists or objects, the kind of these."""
    kinds = {}
    for name in names:
        cells = [row[name].strip() for row in rows if row[name].strip()]
        spelled = [_value(cell) for cell in cells]
        if cells and not any(isinstance(value, str) for value in spelled):
            kinds |= kinds_of_rows([{name: value} for value in spelled])
        else:
            kinds[name] = "float" if cells and all(map(_spells_number, cells)) else "str" if cells else "null"
    return kinds


def _value(cell: str) -> Any:
    """The list or object that a cell spells, or the cell."""
    if cell.lstrip()[:1] in ("[", "{"):
        for parse in (json.loads, _python_literal):
            # Both are bounded: they refuse what is nested some hundred deep (RecursionError, SyntaxError, MemoryError).
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                if isinstance(value := parse(cell.strip()), list | dict):
                    return value
    return cell


def _python_literal(text: str) -> Any:
    """Raises: whatever `ast.literal_eval` does, TypeError for a set or keys of lists among it."""
    text = _with_commas(text) if _WITHOUT_COMMA.search(text) else text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of "\d" as if the cell were somebody's program
        return ast.literal_eval(text)


def _with_commas(text: str) -> str:
    """NumPy, whose arrays are what `datasets` and pandas write into tables, puts no commas between elements: Python
    would read ['a' 'b'] as ['ab'].

    Raises:
      ValueError: these are no words of Python.
    """
    parts, is_element = [], False
    try:
        for word in tokenize.generate_tokens(io.StringIO(text).readline):
            is_next = word.type in (tokenize.STRING, tokenize.NUMBER)
            if is_element and (is_next or word.string == "-"):
                parts.append(",")
            parts.append(word.string)
            is_element = is_next or (is_element and not word.string.strip())
    except tokenize.TokenError as error:
        raise ValueError(str(error)) from None
    return " ".join(parts)


def _spells_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


