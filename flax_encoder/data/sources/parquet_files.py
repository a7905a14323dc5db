"""Parquet files: a part a row group, and of each row the columns that are read."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from flax_encoder.config import DataConfig
from flax_encoder.data.sources.columns import Columns, Row, Table
from flax_encoder.data.sources.records import BadRows, DataError
from flax_encoder.data.sources.remote import AnyFile, RemoteFile


@contextlib.contextmanager
def _open(path: AnyFile) -> Iterator[Any]:
    """The file, for a block in which whatever pyarrow finds wrong is a DataError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    what = "not a Parquet file"
    try:
        with contextlib.ExitStack() as stack:
            file = pq.ParquetFile(_seekable(path, stack) if isinstance(path, RemoteFile) else path)
            what = "a Parquet file cannot be read to its end"
            yield file
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:  # a damaged page; a column's name that is not UTF-8
        raise DataError(f"{what}: {path}: {str(error).rstrip('.')}.") from None


def _seekable(path: RemoteFile, stack: contextlib.ExitStack) -> Any:
    """The file's bytes; where the place gives whole files alone, of a copy. The stack closes them."""
    file = stack.enter_context(path.open())
    if path.has_ranges:
        return file
    copy = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    shutil.copyfileobj(file, copy, 2**20)
    copy.seek(0)
    return copy


def spans(path: AnyFile, config: DataConfig, wanted: Columns) -> list[tuple[int, Any]]:
    first, found = 1, []
    with _open(path) as file:
        metadata = file.metadata
    for i in range(metadata.num_row_groups):
        found.append((metadata.row_group(i).total_byte_size, ((i, first),)))
        first += metadata.row_group(i).num_rows
    if isinstance(path, RemoteFile) and not path.has_ranges:
        return [(sum(size for size, _ in found), sum((span for _, span in found), ()))]
    return found


def table(path: AnyFile, config: DataConfig, wanted: Columns) -> Table:
    with _open(path) as file:
        schema = file.schema_arrow
    kinds = {f.name: kind_of_type(f.type) for f in schema}
    return Table(kinds, str(path), doubled=frozenset(n for n in schema.names if schema.names.count(n) > 1))


def kind_of_type(type_: Any) -> str:
    import pyarrow as pa

    t = pa.types
    if t.is_dictionary(type_):
        return kind_of_type(type_.value_type)
    if t.is_list(type_) or t.is_large_list(type_) or t.is_fixed_size_list(type_):
        return f"list[{kind_of_type(type_.value_type).split('[')[0]}]"
    checks = {
        "str": (t.is_string, t.is_large_string, getattr(t, "is_string_view", t.is_string)),
        "int": (t.is_integer,), "float": (t.is_floating,), "bool": (t.is_boolean,), "dict": (t.is_struct,),
        "null": (t.is_null,),
    }  # fmt: skip
    return next((kind for kind, tests in checks.items() if any(test(type_) for test in tests)), "other")


def rows(
    path: AnyFile, span: tuple[tuple[int, int], ...], table: Table, columns: tuple[str, ...], config: DataConfig,
    bad: BadRows,
) -> Iterator[tuple[int, Row]]:  # fmt: skip
    """(number, row) of the span's row groups, each of which comes with its first row's number."""
    with _open(path) as file:
        for row_group, number in span:
            for batch in file.iter_batches(row_groups=[row_group], columns=list(dict.fromkeys(columns))):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1


def where(path: AnyFile, place: int) -> str:
    return f"{path}, row {place}"
