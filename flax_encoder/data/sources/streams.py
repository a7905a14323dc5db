"""Files as lines of text: packed or not, in any of Unicode's encodings that begins with its mark."""

import codecs
import contextlib
import functools
import gzip
import io
import pathlib
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from flax_encoder.data.sources.records import DataError
from flax_encoder.data.sources.remote import AnyFile, RemoteFile, size_of

_PACKED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
# That of UTF-32 begins with that of UTF-16, so it is looked for first.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_PARAGRAPH_BYTES = 16 * 2**20  # a longer one is a file without blank lines


class Span(NamedTuple):
    """A stretch of a file: what starts in its bytes [begin, end)."""

    begin: int = 0
    end: int | None = None
    """None is the file's end."""
    first_line: int | None = 1
    """The number, from 1, of the first line that starts in the span; None if nobody counted."""


Line = tuple[int, int | None, str]
"""A line's first byte in the unpacked text, its number from 1 (None if nobody counted), and its text without its end. A
plain tuple: one is made for every line of a corpus."""


def name_without_packing(path: AnyFile) -> pathlib.PurePath:
    """The file's name, without .gz or .zst at its end."""
    name = pathlib.PurePath(path.name)
    return name.with_suffix("") if name.suffix.lower() in _PACKED.values() else name


def packing_of(path: AnyFile) -> str:
    """.gz or .zst by the name, or by what the file begins with; else nothing."""
    if path.suffix.lower() in _PACKED.values():
        return path.suffix.lower()
    head = _head(path)
    return next((packing for magic, packing in _PACKED.items() if head.startswith(magic)), "")


def is_whole(path: AnyFile) -> bool:
    """Whether the file can only be read from its start: packed, in an encoding that is not UTF-8, or at a place that
    gives whole files alone."""
    head = _head(path)
    is_packed, is_marked = bool(packing_of(path)), any(head.startswith(mark) for mark in _MARKS)
    return is_packed or is_marked or (isinstance(path, RemoteFile) and not path.has_ranges)


@functools.lru_cache(maxsize=1024)
def _remote_head(path: RemoteFile) -> bytes:
    """Asked for once: a place may give no less than a block."""
    with path.open() as f:
        return f.read(4)


def _head(path: AnyFile) -> bytes:
    try:
        if isinstance(path, RemoteFile):
            return _remote_head(path)
        with path.open("rb") as f:
            return f.read(4)
    except OSError as error:
        raise _unreadable(path, error) from error


@contextlib.contextmanager
def open_text(path: AnyFile) -> Iterator[io.BufferedIOBase]:
    """The file's text as UTF-8 bytes, unpacked.

    Raises:
      DataError: inside the `with` too, when the file turns out to be cut off or damaged.
    """
    try:
        with contextlib.ExitStack() as stack:
            f = stack.enter_context(_unpacked(path, stack))
            head = f.peek(4)[:4]  # type: ignore[attr-defined]
            encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
            yield io.BufferedReader(_AsUTF8(f, encoding, path)) if encoding else f
    except (EOFError, OSError, zlib.error) as error:  # a packed file that is cut off or damaged
        raise _unreadable(path, error) from error


def _unreadable(path: AnyFile, error: Exception) -> DataError:
    hint = ""
    if "too much memory" in str(error):  # zstd --long of 28 and more, past what pyarrow's reader allows
        hint = f" Its window is long: `pip install zstandard` reads it, `zstd -d --long=31 {path}` unpacks it."
    return DataError(f"a file cannot be read to its end: {path}: {error}.{hint}")


def _unpacked(path: AnyFile, stack: contextlib.ExitStack) -> io.BufferedIOBase:
    """The file's bytes, unpacked; the stack closes what lies below them."""
    packing = packing_of(path)
    if not packing:
        return path.open("rb")  # type: ignore[return-value]
    packed = stack.enter_context(path.open("rb"))
    if packing == ".gz":
        return gzip.open(packed, "rb")  # type: ignore[return-value]
    try:
        return _unzstd(path, packed)
    except OSError as error:
        if "too much memory" not in str(error):
            raise
        with contextlib.suppress(ImportError):
            return _unzstd_long(stack.enter_context(path.open("rb")))
        raise


def _unzstd(path: AnyFile, packed: io.BufferedIOBase) -> io.BufferedIOBase:
    import pyarrow as pa

    file = pa.PythonFile(packed, "r") if isinstance(path, RemoteFile) else pa.OSFile(str(path))
    f = io.BufferedReader(pa.CompressedInputStream(file, "zstd"))  # type: ignore[arg-type]
    f.peek(1)
    return f  # type: ignore[return-value]


def _unzstd_long(packed: io.BufferedIOBase) -> io.BufferedIOBase:
    import zstandard

    unpack = zstandard.ZstdDecompressor(max_window_size=2**31)
    return io.BufferedReader(unpack.stream_reader(packed, read_across_frames=True))


class _AsUTF8(io.RawIOBase):
    """A stream in another of Unicode's encodings as UTF-8, without its mark."""

    def __init__(self, stream: io.BufferedIOBase, encoding: str, path: AnyFile):
        self._stream, self._path = stream, path
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._ready, self._has_ended = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready and not self._has_ended:
            raw = self._stream.read(2**16)
            self._has_ended = not raw
            try:
                self._ready = self._decoder.decode(raw, final=not raw).encode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{self._path} begins as {error.encoding} and does not go on so: {error.reason}."
                ) from None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def read_text(path: AnyFile) -> str:
    with open_text(path) as f:
        return decode(f.read().removeprefix(codecs.BOM_UTF8), path, 0)


def decode(raw: bytes, path: AnyFile, offset: int) -> str:
    """Raises: DataError: the bytes, which begin at `offset`, are not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        unpacked = " of its unpacked text" if packing_of(path) else ""
        raise DataError(
            f"text must be UTF-8: {path} has byte 0x{raw[error.start]:02x} at offset {offset + error.start}{unpacked}. "
            f"`iconv -f latin1 -t utf-8` converts Latin-1."
        ) from None


def raw_lines(path: AnyFile, begin: int = 0) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its end), from the first line that starts at `begin` or later; a mark of UTF-8 is no text."""
    with open_text(path) as f:
        if begin:
            f.seek(begin - 1)
            begin += len(f.readline()) - 1
        for raw in f:
            yield begin, raw.removeprefix(codecs.BOM_UTF8) if not begin else raw
            begin += len(raw)


def lines(path: AnyFile, span: Span, *, at_blank: bool = False) -> Iterator[Line]:
    """The lines that start in the span.

    With `at_blank` both its ends move on to the next blank line, so that no paragraph is cut.
    """
    begin, end, number = span
    is_skipping, edge = at_blank and begin > 0, begin
    for offset, raw in raw_lines(path, begin):
        is_blank = at_blank and not raw.strip()
        if is_blank:
            edge = offset
        elif at_blank and offset - edge > _PARAGRAPH_BYTES:
            raise DataError(
                f"paragraphs are separated by blank lines: {path} has none from offset {edge:,} to {offset:,}. "
                f"--data.text-unit line takes each line for a document, file each file."
            )
        is_edge = not at_blank or is_blank
        if end is not None and offset >= end and is_edge:
            return
        if not is_skipping or is_edge:
            is_skipping = False
            yield offset, number, decode(raw, path, offset).rstrip("\r\n")
        number = None if number is None else number + 1


def spans(path: AnyFile, part_bytes: int, *, numbered: bool) -> list[tuple[int, Span]]:
    """(bytes, span) of a file that is cut into parts; with `numbered` the lines of each know their numbers."""
    size = size_of(path)
    if is_whole(path):
        return [(size, Span())]
    begins = range(0, max(size, 1), part_bytes)
    numbers = _first_lines(path, begins) if numbered and len(begins) > 1 else [1] + [None] * (len(begins) - 1)
    return [
        (min(part_bytes, size - begin), Span(begin, begin + part_bytes, number))
        for begin, number in zip(begins, numbers, strict=True)
    ]


def _first_lines(path: AnyFile, begins: range) -> list[int]:
    """The number of the first line that starts at each of these offsets or later: one pass over the file."""
    found, ends = [1], 0
    with path.open("rb") as f:
        for begin in begins[1:]:
            ends += f.read(begin - 1 - f.tell()).count(b"\n")
            found.append(ends + 2)  # the line that byte begin - 1 belongs to has number ends + 1
    return found


def line_where(path: AnyFile, line: Line) -> str:
    offset, number, _ = line
    return f"{path}, line {number or sum(1 for start, _ in raw_lines(path) if start <= offset)}"
