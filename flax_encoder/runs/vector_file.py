"""Files of texts, and of their vectors."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from flax_encoder.data.sources.records import DataError


class VectorFile:
    """A .npy file of float32 vectors whose number is known at its end, written in any order.

    It has its name once it is whole; a block that ends in an error leaves nothing.
    """

    def __init__(self, path: pathlib.Path, embed_dim: int):
        self._path, self._dim, self._count = path, embed_dim, 0
        self._part = path.with_name(path.name + ".part")

    def __enter__(self) -> "VectorFile":
        self._file = open(self._part, "wb")
        self._write_header(0)
        self._start = self._file.tell()
        return self

    def _write_header(self, count: int) -> None:
        self._file.seek(0)
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, self._dim)}
        np.lib.format.write_array_header_1_0(self._file, header)  # with room for a shape that grows

    def write(self, numbers: Int[np.ndarray, "N"], vectors: Float[np.ndarray, "N E"]) -> None:
        """Vectors and their rows."""
        for number, vector in zip(numbers.tolist(), vectors.astype("<f4"), strict=True):
            self._file.seek(self._start + number * self._dim * 4)
            self._file.write(vector.tobytes())
        self._count = max(self._count, int(numbers.max(initial=-1)) + 1)

    def __exit__(self, kind: type | None, *error: Any) -> None:
        try:
            if kind is None:
                self._write_header(self._count)
                self._file.close()
                os.replace(self._part, self._path)
        finally:
            with contextlib.suppress(OSError):  # where the disk is full, closing fails once more
                self._file.close()
            self._part.unlink(missing_ok=True)


def read_texts(path: pathlib.Path) -> Iterator[str]:
    """One text a line, empty ones too, so that row i of the vectors is line i of the file. A byte order mark at the
    file's beginning belongs to no text.

    Raises:
      DataError: no such file, or a line that is not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}: line {number} must be UTF-8: {error.reason}.") from None
    except OSError as error:
        raise DataError(f"no texts at {path}: {error.strerror}.") from None
