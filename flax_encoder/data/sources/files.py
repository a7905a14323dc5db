"""Local files as documents: .txt, .jsonl, each also compressed (.gz, .zst), and .parquet."""

import contextlib
import functools
import gzip
import io
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from flax_encoder.config import DataConfig
from flax_encoder.data.sources.records import DataError, Part, Record, make_record, no_column, text_column

PART_BYTES = 8 * 2**20  # seconds of tokenizing: what a killed worker loses
_COMPRESSED = (".gz", ".zst")
_PARAGRAPH_BYTES = 16 * 2**20  # a longer one is a file without blank lines


def kind_of(path: pathlib.Path) -> str:
    """A file's kind by its name, whether compressed or not."""
    return path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix


def file_parts(path: pathlib.Path, config: DataConfig, label: str | None) -> list[Part]:
    """A file cut into parts of about PART_BYTES, where its kind allows to start in the middle."""
    size = path.stat().st_size
    if (kind := kind_of(path)) == ".parquet":
        return _parquet_parts(path, config, label)
    is_whole = path.suffix in _COMPRESSED or (kind == ".txt" and config.text_unit == "file")
    begins = [0] if is_whole else range(0, max(size, 1), PART_BYTES)
    return [
        Part(
            "train",
            size if is_whole else min(PART_BYTES, size - begin),
            functools.partial(READERS[kind], path, begin, None if is_whole else begin + PART_BYTES, config, label),
        )
        for begin in begins
    ]


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[io.BufferedIOBase]:
    try:
        with _unpacked(path) as f:
            yield f
    except (EOFError, OSError, zlib.error) as error:  # a compressed file that is cut off or damaged
        raise DataError(f"a file cannot be read to its end: {path}: {error}.") from error


def _unpacked(path: pathlib.Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))  # type: ignore[arg-type]
    return path.open("rb")


def _decode(raw: bytes, path: pathlib.Path, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        unpacked = " of its unpacked text" if path.suffix in _COMPRESSED else ""
        raise DataError(
            f"text must be UTF-8: {path} has byte 0x{raw[error.start]:02x} at offset {offset + error.start}{unpacked}. "
            f"`iconv -f latin1 -t utf-8` converts Latin-1."
        ) from None


def _raw_lines(path: pathlib.Path, begin: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its end), from the first line that starts at `begin` or later."""
    with _open(path) as f:
        if begin:
            f.seek(begin - 1)
            begin += len(f.readline()) - 1
        for raw in f:
            yield begin, raw
            begin += len(raw)


def _lines(path: pathlib.Path, begin: int, end: int | None, *, at_blank: bool = False) -> Iterator[tuple[int, str]]:
    """(offset, line without its end) of those lines that start in [begin, end).

    With `at_blank` both ends move on to the next blank line, so that no paragraph is cut.
    """
    is_skipping = at_blank and begin > 0
    edge = begin
    for offset, raw in _raw_lines(path, begin):
        if at_blank and not raw.strip():
            edge = offset
        elif at_blank and offset - edge > _PARAGRAPH_BYTES:
            raise DataError(
                f"paragraphs are separated by blank lines: {path} has none from offset {edge:,} to {offset:,}. "
                f"--data.text-unit line takes each line for a document, file each file."
            )
        is_edge = not at_blank or not raw.strip()
        if end is not None and offset >= end and is_edge:
            return
        if is_skipping and not is_edge:
            continue
        is_skipping = False
        yield offset, _decode(raw, path, offset).rstrip("\r\n")


def _read_txt(
    path: pathlib.Path, begin: int, end: int | None, config: DataConfig, label: str | None
) -> Iterator[Record]:
    if label:
        raise DataError(f"a .txt file has no labels: {path}. Use .jsonl or .parquet with columns for text and label.")
    if config.text_unit == "file":
        with _open(path) as f:
            yield Record((_decode(f.read(), path, 0),))
    elif config.text_unit == "line":
        yield from (Record((line,)) for _, line in _lines(path, begin, end))
    else:
        paragraph: list[str] = []
        for _, line in _lines(path, begin, end, at_blank=True):
            if line.strip():
                paragraph.append(line)
            elif paragraph:
                yield Record(("\n".join(paragraph),))
                paragraph = []
        if paragraph:
            yield Record(("\n".join(paragraph),))


def _read_jsonl(
    path: pathlib.Path, begin: int, end: int | None, config: DataConfig, label: str | None
) -> Iterator[Record]:
    text = None
    for offset, line in _lines(path, begin, end):
        if not line.strip():
            continue
        if text is None:
            text = _jsonl_text_column(path, config)
        yield make_record(_json_object(path, offset, line), text, label, f"{path}, byte {offset}")


def _jsonl_text_column(path: pathlib.Path, config: DataConfig) -> str:
    """The first row decides for the file, wherever in it a part begins."""
    offset, line = next((offset, line) for offset, line in _lines(path, 0, None) if line.strip())
    row = _json_object(path, offset, line)
    strings = [name for name, value in row.items() if isinstance(value, str)]
    return text_column(config.text_column, list(row), strings, str(path))


def _json_object(path: pathlib.Path, offset: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        problem = None if isinstance(row, dict) else f"is {line[:60]!r}"
    except (ValueError, RecursionError) as error:
        row, problem = {}, f"does not parse: {error}"
    if problem:
        number = sum(1 for start, _ in _raw_lines(path, 0) if start <= offset)
        raise DataError(f"every line of a .jsonl file must be a JSON object: {path}, line {number} {problem}.")
    return row


def _parquet_parts(path: pathlib.Path, config: DataConfig, label: str | None) -> list[Part]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"not a Parquet file: {path}: {error}.") from None
    schema = file.schema_arrow
    strings = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    text = text_column(config.text_column, schema.names, strings, str(path))
    if label is not None and label not in schema.names:
        raise no_column(label, schema.names, str(path))
    sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
    return [Part("train", size, functools.partial(_read_parquet, path, i, text, label)) for i, size in enumerate(sizes)]


def _read_parquet(path: pathlib.Path, row_group: int, text: str, label: str | None) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [text] if label is None else [text, label]
    try:
        for batch in pq.ParquetFile(path).iter_batches(row_groups=[row_group], columns=columns):
            for row in batch.to_pylist():
                yield make_record(row, text, label, str(path))
    except DataError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:  # a damaged page
        raise DataError(f"a Parquet file cannot be read to its end: {path}: {error}.") from None


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
