"""Local files as documents: text, tables and tagged sentences; each but Parquet also packed (.gz, .zst)."""

import csv
import dataclasses
import functools
import io
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from flax_encoder.config import DataConfig
from flax_encoder.data.sources import conll
from flax_encoder.data.sources.columns import Columns, Layout, Row, Table, choose_columns, kinds_of_rows
from flax_encoder.data.sources.records import BadRow, BadRows, DataError, Part
from flax_encoder.data.sources.streams import (
    Line,
    Span,
    decode,
    line_number,
    lines,
    name_without_packing,
    open_text,
    raw_lines,
    read_text,
    spans,
)

PART_BYTES = 8 * 2**20  # seconds of tokenizing: what a killed worker loses
_SAMPLED_ROWS = 100
_SAMPLED_BYTES = 2**20
_FIELD_CHARACTERS = 2**27  # of a .csv file; Python's own limit is 2**17


class Kind(NamedTuple):
    """How files of a kind are read: in spans, each a stretch of rows."""

    spans: Callable[[pathlib.Path, DataConfig, Columns], list[tuple[int, Any]]]
    """(size, span) of the parts."""
    table: Callable[[pathlib.Path, DataConfig, Columns], Table | None]
    """The columns; None if there is no row."""
    rows: Callable[[pathlib.Path, Any, Table, tuple[str, ...], DataConfig, BadRows], Iterator[tuple[Any, Row]]]
    """(place, row) of a span, with at least the columns asked for."""
    where: Callable[[pathlib.Path, Any], str]
    """Names a row by its place."""


def kind_of(path: pathlib.Path) -> str:
    """A file's kind by its name, whether packed or not."""
    return name_without_packing(path).suffix.lower()


def file_parts(path: pathlib.Path, config: DataConfig, wanted: Columns) -> list[Part]:
    """A file cut into parts of about PART_BYTES, where its kind allows to start in the middle."""
    return [
        Part("train", size, functools.partial(read_span, path, span, config, wanted))
        for size, span in _kind(path).spans(path, config, wanted)
    ]


def file_layout(path: pathlib.Path, config: DataConfig, wanted: Columns) -> Layout | None:
    """The columns that are read of a file; None if it has no row.

    Raises:
      DataError: as `choose_columns`; or the file cannot be read.
    """
    table = _kind(path).table(path, config, wanted)
    return None if table is None else choose_columns(table, config, wanted)


def read_span(path: pathlib.Path, span: Any, config: DataConfig, wanted: Columns):
    """The records of a stretch of a file. A generator, whose result is the number of rows left out."""
    kind, bad = _kind(path), BadRows(config.skip_bad_rows)
    table = kind.table(path, config, wanted)
    if table is None:
        return 0
    layout = choose_columns(table, config, wanted)
    make, has_value = layout.make, wanted.value != "none"
    for place, row in kind.rows(path, span, table, layout.columns, config, bad):
        try:
            record = make(row)
        except BadRow as error:
            bad.add(kind.where(path, place), error)
            continue
        yield record._replace(where=kind.where(path, place)) if has_value else record
    return bad.count


def _kind(path: pathlib.Path) -> Kind:
    kind = kind_of(path)
    return KINDS[".jsonl" if kind == ".json" and _is_lines(path) else kind]


def _one_span(path: pathlib.Path, config: DataConfig, wanted: Columns) -> list[tuple[int, Any]]:
    return [(path.stat().st_size, Span())]


def _no_rows_lost(rows: Iterator[tuple[Any, Row]]) -> list[Row]:
    return [row for _, row in itertools.islice(rows, _SAMPLED_ROWS)]


# --- .txt


def _txt_spans(path: pathlib.Path, config: DataConfig, wanted: Columns) -> list[tuple[int, Any]]:
    return _one_span(path, config, wanted) if config.text_unit == "file" else spans(path, PART_BYTES, numbered=False)


def _txt_table(path: pathlib.Path, config: DataConfig, wanted: Columns) -> Table:
    if wanted.value != "none":
        raise DataError(
            f"a .txt file has no labels: {path}. Use .csv, .tsv, .jsonl or .parquet with columns for text and label."
        )
    return Table({"text": "str"}, str(path), is_fixed=True)


def _txt_rows(path, span: Span, table: Table, columns, config: DataConfig, bad: BadRows):
    if config.text_unit == "file":
        yield None, {"text": read_text(path)}
    elif config.text_unit == "line":
        yield from ((None, {"text": line.text}) for line in lines(path, span))
    else:
        paragraph: list[str] = []
        for line in lines(path, span, at_blank=True):
            if line.text.strip():
                paragraph.append(line.text)
            elif paragraph:
                yield None, {"text": "\n".join(paragraph)}
                paragraph = []
        if paragraph:
            yield None, {"text": "\n".join(paragraph)}


# --- .jsonl, .json


def _line_spans(path: pathlib.Path, config: DataConfig, wanted: Columns) -> list[tuple[int, Any]]:
    return spans(path, PART_BYTES, numbered=wanted.value != "none")


def _sampled(rows: Callable[..., Iterator[tuple[Any, Row]]], path: pathlib.Path, config: DataConfig) -> list[Row]:
    """The first rows, which decide for the file, wherever in it a part begins."""
    found = rows(path, Span(), None, (), config, BadRows(config.skip_bad_rows))
    return [row for _, row in itertools.islice(found, _SAMPLED_ROWS)]


def _jsonl_table(path: pathlib.Path, config: DataConfig, wanted: Columns) -> Table | None:
    rows = _sampled(_jsonl_rows, path, config)
    return Table(kinds_of_rows(rows), str(path)) if rows else None


def _jsonl_rows(path, span: Span, table, columns, config: DataConfig, bad: BadRows):
    for line in lines(path, span):
        if not line.text.strip():
            continue
        try:
            row = json.loads(line.text)
            problem = None if isinstance(row, dict) else f"is {line.text[:60]!r}"
        except (ValueError, RecursionError) as error:
            problem = f"does not parse: {error}"
        if problem:
            bad.add(_line_where(path, line), BadRow("every line of a .jsonl file must be a JSON object", problem))
        else:
            yield line, row


def _line_where(path: pathlib.Path, line: Line) -> str:
    return f"{path}, line {line_number(path, line)}"


def _is_lines(path: pathlib.Path) -> bool:
    """Whether a .json file is an object a line."""
    starts = (raw.lstrip()[:1] for _, raw in raw_lines(path) if raw.strip())
    return list(itertools.islice(starts, 2)) == [b"{", b"{"]


def _json_rows(path, span, table, columns, config: DataConfig, bad: BadRows):
    for number, row in enumerate(_json_list(path, table is not None and table.dialect), 1):
        if isinstance(row, dict):
            yield number, row
        else:
            bad.add(f"{path}, item {number}", BadRow("every item of a .json file must be an object", f"is {row!r:.60}"))


def _json_list(path: pathlib.Path, is_read_for_text: bool) -> Iterator[Any]:
    """The items of a list, of {"data": [...]}, or of SQuAD's articles; an object that is none of these is one item."""
    try:
        content = json.loads(read_text(path) or "[]")
    except (ValueError, RecursionError) as error:
        raise DataError(f"a .json file must parse: {path} does not: {error}.") from None
    items = content.get("data", [content]) if isinstance(content, dict) else content
    if not isinstance(items, list):
        raise DataError(
            f"a .json file is a list of objects, or an object with a list of them in `data`: {path} is "
            f"{str(content)[:60]!r}."
        )
    if any(isinstance(item, dict) and isinstance(item.get("paragraphs"), list) for item in items):
        return _squad_rows(path, items, is_read_for_text)
    return iter(items)


def _squad_rows(path: pathlib.Path, articles: list, is_read_for_text: bool) -> Iterator[Row]:
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                if is_read_for_text:
                    yield {"context": paragraph["context"]}
                    continue
                for asked in paragraph["qas"]:
                    yield {
                        "id": asked.get("id"), "question": asked["question"], "context": paragraph["context"],
                        "answers": asked.get("answers"),
                    }  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"SQuAD's files have data, paragraphs, context, qas, question and answers: {path} lacks {error}."
        ) from None


def _json_table(path: pathlib.Path, config: DataConfig, wanted: Columns) -> Table | None:
    is_read_for_text = wanted.value == "none" and wanted.max_texts == 1
    items = list(itertools.islice(_json_list(path, is_read_for_text), _SAMPLED_ROWS))
    rows = [row for row in items if isinstance(row, dict)]
    return Table(kinds_of_rows(rows), str(path), dialect=is_read_for_text) if items else None


# --- .csv, .tsv


class Dialect(NamedTuple):
    delimiter: str
    quotes: bool
    """Whether quotes enclose fields, and do not belong to them."""
    columns: tuple[str, ...]
    skipped_lines: int


def _csv_reader(text_lines: Iterator[str], delimiter: str, quotes: bool):
    csv.field_size_limit(max(csv.field_size_limit(), _FIELD_CHARACTERS))
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    return csv.reader(text_lines, delimiter=delimiter, quoting=quoting, strict=True)


def _csv_lines(path: pathlib.Path) -> Iterator[str]:
    return (decode(raw, path, offset) for offset, raw in raw_lines(path))


def _csv_table(path: pathlib.Path, config: DataConfig, wanted: Columns) -> Table | None:
    delimiter, quotes = "\t" if kind_of(path) == ".tsv" else ",", config.csv_quotes
    if delimiter == "\t" and quotes:
        quotes = _quotes_pair(path, delimiter)
    if delimiter == ",":
        delimiter = _delimiter(path, quotes)
    reader = _csv_reader(_csv_lines(path), delimiter, quotes)
    try:
        first = next((row for row in reader if row), None)
    except csv.Error as error:
        raise DataError(f"{_QUOTES_RULE}: the first row of {path} does not parse: {error}.") from None
    if first is None:
        return None
    names = [name.strip() for name in first] if config.has_header else [str(i) for i in range(1, len(first) + 1)]
    dialect = Dialect(delimiter, quotes, tuple(names), reader.line_num if config.has_header else 0)
    doubled = frozenset(name for name in names if names.count(name) > 1)
    notes = []
    if delimiter != "," and kind_of(path) == ".csv":
        notes.append(f"{path}: its columns are separated by {delimiter!r}, for its first row has no comma.")
    if config.csv_quotes and not quotes:
        notes.append(f"{path}: quotes are text, for they do not pair.")
    table = Table(dict.fromkeys(names, "str"), str(path), doubled=doubled, dialect=dialect, notes=tuple(notes))
    rows = _csv_rows(path, Span(), table, tuple(names), config, BadRows(config.skip_bad_rows))
    sample = _no_rows_lost(rows)
    return dataclasses.replace(table, kinds=_kinds_of_strings(names, sample)) if sample else None


_QUOTES_RULE = "quotes enclose whole fields (--data.no-csv-quotes takes them as text)"


def _delimiter(path: pathlib.Path, quotes: bool) -> str:
    """The comma, unless the header has none but has another one of those that .csv files have."""
    header = next((line for line in _csv_lines(path) if line.strip()), "")
    for delimiter in (",", ";", "\t", "|"):
        try:
            if len(next(_csv_reader(iter([header]), delimiter, quotes), [])) > 1:
                return delimiter
        except csv.Error:  # a name with a line break in quotes
            return ","
    return ","


def _quotes_pair(path: pathlib.Path, delimiter: str) -> bool:
    """Whether the start of a .tsv file reads as one whose quotes enclose fields: every one is closed before a
    delimiter, and all rows have as many fields. Many such files were written without quoting."""
    with open_text(path) as f:
        start = f.read(_SAMPLED_BYTES)
        is_all = not f.read(1)
    text = start.decode("utf-8", "ignore")
    reader = _csv_reader(io.StringIO(text, newline=""), delimiter, True)
    try:
        counts = [len(row) for row in reader if row]
    except csv.Error as error:
        return "unexpected end" in str(error) and not is_all and '"' in text.rsplit("\n", 2)[-1]
    return len(set(counts if is_all else counts[:-1])) <= 1


def _csv_rows(path, span: Span, table: Table, columns: tuple[str, ...], config: DataConfig, bad: BadRows):
    delimiter, quotes, names, skipped = table.dialect
    reader = _csv_reader(itertools.islice(_csv_lines(path), skipped, None), delimiter, quotes)
    places = [(name, names.index(name)) for name in columns]
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
            bad.add(_csv_where(path, place), BadRow(_QUOTES_RULE, f"does not parse: {error}"))
            continue
        if len(fields) != len(names):
            bad.add(
                _csv_where(path, place),
                BadRow(f"every row must have a field for each of the {len(names)} columns", f"has {len(fields)}"),
            )
            continue
        yield place, {name: fields[i] for name, i in places}


def _csv_where(path: pathlib.Path, place: tuple[int, int]) -> str:
    return f"{path}, row {place[0]} (line {place[1]})"


def _kinds_of_strings(names: list[str], rows: list[Row]) -> dict[str, str]:
    """float for columns all of whose values spell numbers, which are hardly texts; a guess, and for guessing alone."""
    kinds = {}
    for name in names:
        cells = [row[name].strip() for row in rows if row[name].strip()]
        kinds[name] = "float" if cells and all(map(_spells_number, cells)) else "str" if cells else "null"
    return kinds


def _spells_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


# --- .parquet


def _parquet_file(path: pathlib.Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"not a Parquet file: {path}: {error}.") from None


def _parquet_spans(path: pathlib.Path, config: DataConfig, wanted: Columns) -> list[tuple[int, Any]]:
    metadata, first, found = _parquet_file(path).metadata, 1, []
    for i in range(metadata.num_row_groups):
        found.append((metadata.row_group(i).total_byte_size, (i, first)))
        first += metadata.row_group(i).num_rows
    return found


def _parquet_table(path: pathlib.Path, config: DataConfig, wanted: Columns) -> Table:
    schema = _parquet_file(path).schema_arrow
    kinds = {f.name: kind_of_arrow(f.type) for f in schema}
    return Table(kinds, str(path), doubled=frozenset(n for n in schema.names if schema.names.count(n) > 1))


def kind_of_arrow(type_: Any) -> str:
    import pyarrow as pa

    t = pa.types
    if t.is_dictionary(type_):
        return kind_of_arrow(type_.value_type)
    if t.is_list(type_) or t.is_large_list(type_) or t.is_fixed_size_list(type_):
        return f"list[{kind_of_arrow(type_.value_type).split('[')[0]}]"
    checks = {
        "str": (t.is_string, t.is_large_string, getattr(t, "is_string_view", t.is_string)),
        "int": (t.is_integer,), "float": (t.is_floating,), "bool": (t.is_boolean,), "dict": (t.is_struct,),
        "null": (t.is_null,),
    }  # fmt: skip
    return next((kind for kind, tests in checks.items() if any(test(type_) for test in tests)), "other")


def _parquet_rows(path, span: tuple[int, int], table, columns: tuple[str, ...], config: DataConfig, bad: BadRows):
    import pyarrow as pa

    row_group, number = span
    try:
        for batch in _parquet_file(path).iter_batches(row_groups=[row_group], columns=list(dict.fromkeys(columns))):
            for row in batch.to_pylist():
                yield number, row
                number += 1
    except DataError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:  # a damaged page
        raise DataError(f"a Parquet file cannot be read to its end: {path}: {error}.") from None


KINDS = {
    ".txt": Kind(_txt_spans, _txt_table, _txt_rows, lambda path, place: str(path)),
    ".jsonl": Kind(_line_spans, _jsonl_table, _jsonl_rows, _line_where),
    ".json": Kind(_one_span, _json_table, _json_rows, lambda path, place: f"{path}, item {place}"),
    ".csv": Kind(_one_span, _csv_table, _csv_rows, _csv_where),
    ".parquet": Kind(_parquet_spans, _parquet_table, _parquet_rows, lambda path, place: f"{path}, row {place}"),
    ".conll": Kind(_line_spans, conll.table, conll.rows, _line_where),
}
KINDS |= {".ndjson": KINDS[".jsonl"], ".tsv": KINDS[".csv"]}
KINDS |= dict.fromkeys((".bio", ".iob", ".iob2", ".conllu"), KINDS[".conll"])
