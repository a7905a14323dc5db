"""JSON: an object a line (.jsonl, .ndjson, often .json too), or one list of objects (.json), as SQuAD's."""

import contextlib
import functools
import itertools
import json
from collections.abc import Iterator
from typing import Any

from flax_encoder.config import DataConfig
from flax_encoder.data.sources.columns import SAMPLED_ROWS, Columns, Row, Table, kinds_of_rows
from flax_encoder.data.sources.records import BadRow, BadRows, DataError
from flax_encoder.data.sources.remote import AnyFile, size_of
from flax_encoder.data.sources.streams import Line, Span, line_where, lines, raw_lines, read_text


def lines_table(path: AnyFile, config: DataConfig, wanted: Columns) -> Table | None:
    """The columns of the first rows, which decide for the file, wherever in it a part begins."""
    found = lines_rows(path, Span(), None, (), config, BadRows(config.skip_bad_rows))
    rows = [row for _, row in itertools.islice(found, SAMPLED_ROWS)]
    kinds = kinds_of_rows(rows)
    if rows and wanted.keeps_id and _has_ids(path, size_of(path)):
        kinds.setdefault("id", "null")
    return Table(kinds, str(path)) if rows else None


@functools.lru_cache(maxsize=64)  # each part of a file asks
def _has_ids(path: AnyFile, size: int) -> bool:
    """Whether any row has an id: all answers then have one. What reads the file for answers takes far longer."""
    for _, raw in raw_lines(path):
        if b'"id"' in raw:
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(row := json.loads(raw), dict) and "id" in row:
                    return True
    return False


def lines_rows(
    path: AnyFile, span: Span, table: Table | None, columns: tuple[str, ...], config: DataConfig, bad: BadRows
) -> Iterator[tuple[Line, Row]]:
    for line in lines(path, span):
        text = line[2]
        if not text.strip():
            continue
        try:
            row = json.loads(text)
            problem = None if isinstance(row, dict) else f"is {text[:60]!r}"
        except (ValueError, RecursionError) as error:
            problem = f"does not parse: {error}"
        if problem:
            bad.add(line_where(path, line), BadRow("every line of a .jsonl file must be a JSON object", problem))
        else:
            yield line, row


def is_lines(path: AnyFile) -> bool:
    """Whether a .json file is an object a line."""
    starts = (raw.lstrip()[:1] for _, raw in raw_lines(path) if raw.strip())
    return list(itertools.islice(starts, 2)) == [b"{", b"{"]


def list_rows(
    path: AnyFile, span: Span, table: Table | None, columns: tuple[str, ...], config: DataConfig, bad: BadRows
) -> Iterator[tuple[int, Row]]:
    for number, row in enumerate(_json_list(path, table is not None and table.dialect), 1):
        if isinstance(row, dict):
            yield number, row
        else:
            bad.add(item_where(path, number), BadRow("every item of a .json file must be an object", f"is {row!r:.60}"))


def _json_list(path: AnyFile, is_read_for_text: bool) -> Iterator[Any]:
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


def _squad_rows(path: AnyFile, articles: list, is_read_for_text: bool) -> Iterator[Row]:
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                if is_read_for_text:
                    yield {"context": paragraph["context"]}
                    continue
                for asked in paragraph["qas"]:
                    row = {"id": asked.get("id"), "question": asked["question"], "context": paragraph["context"]}
                    if "answers" in asked or asked.get("is_impossible"):  # else a test file that keeps its answers
                        row["answers"] = asked.get("answers")
                    yield row
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"SQuAD's files have data, paragraphs, context, qas, question and answers: {path} lacks {error}."
        ) from None


def list_table(path: AnyFile, config: DataConfig, wanted: Columns) -> Table | None:
    is_read_for_text = wanted.value == "none" and wanted.max_texts == 1
    items = list(itertools.islice(_json_list(path, is_read_for_text), None if wanted.keeps_id else SAMPLED_ROWS))
    rows = [row for row in items if isinstance(row, dict)]
    kinds = kinds_of_rows(rows[:SAMPLED_ROWS])
    if wanted.keeps_id and any("id" in row for row in rows):
        kinds.setdefault("id", "null")
    return Table(kinds, str(path), dialect=is_read_for_text) if items else None


def item_where(path: AnyFile, number: int) -> str:
    return f"{path}, item {number}"
