"""Local files as documents: text, tables and tagged sentences; each but Parquet also packed (.gz, .zst)."""

import functools
import pathlib
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

from flax_encoder.config import DataConfig
from flax_encoder.data.sources import conll, csv_files, json_files, parquet_files
from flax_encoder.data.sources.choosing import choose_columns
from flax_encoder.data.sources.columns import Columns, Layout, Row, Table
from flax_encoder.data.sources.records import BadRow, BadRows, DataError, Part, Record
from flax_encoder.data.sources.remote import AnyFile, RemoteFile, size_of
from flax_encoder.data.sources.streams import Span, line_where, lines, name_without_packing, read_text, spans

PART_BYTES = 8 * 2**20  # seconds of tokenizing: what a killed worker loses


class Kind(NamedTuple):
    """How files of a kind are read: in spans, each a stretch of rows."""

    spans: Callable[[AnyFile, DataConfig, Columns], list[tuple[int, Any]]]
    """(size, span) of the parts."""
    table: Callable[[AnyFile, DataConfig, Columns], Table | None]
    """The columns; None if there is no row."""
    rows: Callable[[AnyFile, Any, Table, tuple[str, ...], DataConfig, BadRows], Iterator[tuple[Any, Row]]]
    """(place, row) of a span, with at least the columns asked for."""
    where: Callable[[AnyFile, Any], str]
    """Names a row by its place."""


def kind_of(path: AnyFile) -> str:
    """A file's kind by its name, whether packed or not."""
    return name_without_packing(path).suffix.lower()


def kind_of_name(name: str) -> str:
    """The same of a path or a URL."""
    return kind_of(pathlib.Path(name))


def file_parts(path: AnyFile, config: DataConfig, wanted: Columns) -> list[Part]:
    """A file cut into parts of about PART_BYTES, where its kind allows to start in the middle."""
    is_local = isinstance(path, RemoteFile) and path.is_in_memory
    return [
        Part("train", size, functools.partial(read_span, path, span, config, wanted), is_local)
        for size, span in _kind(path).spans(path, config, wanted)
    ]


def file_layout(path: AnyFile, config: DataConfig, wanted: Columns) -> Layout | None:
    """The columns that are read of a file; None if it has no row.

    Raises:
      DataError: as `choose_columns`; or the file cannot be read.
    """
    table = _kind(path).table(path, config, wanted)
    return None if table is None else choose_columns(table, config, wanted)


def file_columns(path: AnyFile, config: DataConfig) -> list[str]:
    """The names of a file's columns, none of a file without rows."""
    table = _kind(path).table(path, config, Columns())
    return [] if table is None else list(table.kinds)


def file_rows(path: AnyFile, config: DataConfig) -> Iterator[Row]:
    """A file's rows with all their columns.

    Raises:
      DataError: a row cannot be read, and none are to be skipped.
    """
    kind, bad = _kind(path), BadRows(config.skip_bad_rows)
    table = kind.table(path, config, Columns())
    if table is not None:
        for _, span in kind.spans(path, config, Columns()):
            yield from (row for _, row in kind.rows(path, span, table, tuple(table.kinds), config, bad))


def read_span(path: AnyFile, span: Any, config: DataConfig, wanted: Columns) -> Generator[Record, None, int]:
    """The records of a stretch of a file; the generator's result is the number of rows left out.

    Raises:
      DataError: as `choose_columns`; the file cannot be read to its end; a row cannot, and none are to be skipped.
    """
    kind, bad = _kind(path), BadRows(config.skip_bad_rows)
    table = kind.table(path, config, wanted)
    if table is None:
        return 0
    layout = choose_columns(table, config, wanted)
    make, has_value, is_several = layout.make, wanted.value != "none", layout.makes_several
    for place, row in kind.rows(path, span, table, layout.columns, config, bad):
        try:
            record = make(row)
        except BadRow as error:
            bad.add(kind.where(path, place), error)
            continue
        for one in record if is_several else (record,):
            yield Record(*one[:2], kind.where(path, place), *one[3:]) if has_value else one
    return bad.count


def _kind(path: AnyFile) -> Kind:
    kind = kind_of(path)
    return KINDS[".jsonl" if kind == ".json" and json_files.is_lines(path) else kind]


def _one_span(path: AnyFile, config: DataConfig, wanted: Columns) -> list[tuple[int, Any]]:
    return [(size_of(path), Span())]


def _txt_spans(path: AnyFile, config: DataConfig, wanted: Columns) -> list[tuple[int, Any]]:
    return _one_span(path, config, wanted) if config.text_unit == "file" else spans(path, PART_BYTES, numbered=False)


def _txt_table(path: AnyFile, config: DataConfig, wanted: Columns) -> Table:
    if (wanted.value != "none" and not wanted.is_optional) or wanted.min_texts > 1:
        way = "If it has a word and its tag a line, call it .conll; else u" if wanted.value == "tags" else "U"
        raise DataError(
            f"a .txt file has no labels and no pairs: {path}. {way}se .csv, .tsv, .jsonl or .parquet, which have "
            f"columns."
        )
    return Table({"text": "str"}, str(path), is_fixed=True)


def _txt_rows(path, span: Span, table: Table, columns, config: DataConfig, bad: BadRows):
    if config.text_unit == "file":
        yield None, {"text": read_text(path)}
    elif config.text_unit == "line":
        yield from ((None, {"text": text}) for _, _, text in lines(path, span))
    else:
        paragraph: list[str] = []
        for _, _, text in lines(path, span, at_blank=True):
            if text.strip():
                paragraph.append(text)
            elif paragraph:
                yield None, {"text": "\n".join(paragraph)}
                paragraph = []
        if paragraph:
            yield None, {"text": "\n".join(paragraph)}


def _line_spans(path: AnyFile, config: DataConfig, wanted: Columns) -> list[tuple[int, Any]]:
    return spans(path, PART_BYTES, numbered=wanted.value != "none")


KINDS = {
    ".txt": Kind(_txt_spans, _txt_table, _txt_rows, lambda path, place: str(path)),
    ".jsonl": Kind(_line_spans, json_files.lines_table, json_files.lines_rows, line_where),
    ".json": Kind(_one_span, json_files.list_table, json_files.list_rows, json_files.item_where),
    ".csv": Kind(_one_span, csv_files.table, csv_files.rows, csv_files.where),
    ".parquet": Kind(parquet_files.spans, parquet_files.table, parquet_files.rows, parquet_files.where),
    ".conll": Kind(_line_spans, conll.table, conll.rows, line_where),
}
KINDS |= {".ndjson": KINDS[".jsonl"], ".tsv": KINDS[".csv"]}
KINDS |= dict.fromkeys((".bio", ".iob", ".iob2", ".conllu"), KINDS[".conll"])
