"""Files that are elsewhere, by any path that fsspec knows: gs://, s3://, https://, hf://, memory:// and others.

The drivers of these places are imported when a path asks for one. What they are told besides (accounts, endpoints)
comes from fsspec's own settings: the environment's FSSPEC_PROTOCOL_OPTION, or files in ~/.config/fsspec.
"""

import contextlib
import hashlib
import io
import os
import pathlib
import posixpath
import re
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flax_encoder.data.sources.records import DataError

_SCHEME = re.compile(r"(?:[a-z][a-z0-9+.-]*::)*([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3", "http": "http", "https": "http"}
_PATTERN = re.compile(r"[*?\[]")
_PAUSES_SECONDS = (0.2, 1.0, 5.0)  # before a read that failed is tried again
_BUFFER_BYTES = 2**20
# What places say of a file's contents, under the names that their drivers give it.
_VERSIONS = (
    "ETag", "etag", "Content-MD5", "Digest", "md5Hash", "content_md5", "generation", "VersionId", "checksum", "mtime",
    "LastModified", "Last-Modified", "last_modified", "updated", "created",
)  # fmt: skip


def is_remote(name: str | os.PathLike[str]) -> bool:
    """Whether it is written as a place and a path, such as gs://BUCKET/FILE, rather than a path of this machine."""
    return bool(_SCHEME.match(os.fspath(name)))


def has_pattern(name: str) -> bool:
    """Whether it may stand for several files, as `*.csv` does."""
    return bool(_PATTERN.search(name))


@dataclass(frozen=True)
class RemoteFile:
    """A file elsewhere. It has as much of a `pathlib.Path` as readers need, and can be sent to another process."""

    file_system: Any
    """fsspec's."""
    path: str
    """As the file system names it."""
    url: str
    """As people name it."""
    size: int | None
    """Bytes, where the place says how many."""
    version: str | None
    """Another where the contents may be; None where the place does not say."""
    has_ranges: bool
    """Whether reading can begin amid the file; else it begins at the start each time."""

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        path = urllib.parse.urlsplit(self.path).path if _is_http(self.path) else self.path
        return posixpath.basename(path)

    @property
    def suffix(self) -> str:
        return pathlib.PurePosixPath(self.name).suffix

    @property
    def is_in_memory(self) -> bool:
        """Whether other processes have no such file."""
        return "memory" in _protocols(self.file_system)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """The file's bytes. A read that fails is tried again, four times in all.

        Raises:
          OSError: on reading, where it still fails, or the file ends before its size.
        """
        if mode != "rb":
            raise ValueError(f"a file elsewhere is opened for reading bytes, rb: got {mode}.")
        return io.BufferedReader(_Stream(self), _BUFFER_BYTES)


AnyFile = pathlib.Path | RemoteFile


def size_of(file: AnyFile) -> int:
    """Bytes of a file, 0 where nobody knows."""
    return file.size or 0 if isinstance(file, RemoteFile) else file.stat().st_size


def remote_files(name: str) -> list[RemoteFile]:
    """The files that a URL, a folder's URL or a pattern stands for, by name; none if there are none. Files and folders
    that begin with a dot are left out of a folder.

    Raises:
      DataError: the place's driver is not installed, or the place cannot be asked.
    """
    file_system, path = open_file_system(name)
    with _asking(name):
        file_system.invalidate_cache()
        infos = _infos(file_system, path, name)
        found = []
        for path, info in sorted(infos.items()):
            if "size" not in info or (info["size"] is None and _is_http(path)):  # a listing of HTML has names alone
                info = file_system.info(path)
            found.append(_remote_file(file_system, path, info))
        return found


def open_file_system(name: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it) of a URL.

    Raises:
      DataError: no such kind of place, or its driver is not installed.
    """
    import fsspec

    match = _SCHEME.match(name)
    scheme = match[1].lower() if match else "file"
    try:
        return fsspec.core.url_to_fs(name, **(_http_options() if _is_http(name) else {}))
    except ImportError as error:
        way = f"pip install 'flax-encoder[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else "install that"
        raise DataError(f"{scheme}:// needs a driver that is not here: {error}: {way}.") from None
    except ValueError as error:
        raise DataError(f"a path is local or begins with a place that fsspec knows: got {name}: {error}.") from None


def is_there(name: str) -> bool:
    """Whether there is a file of this URL.

    Raises:
      DataError: as `remote_files`.
    """
    file_system, path = open_file_system(name)
    with _asking(name):
        return bool(file_system.exists(path))


def put_file(local: pathlib.Path, name: str) -> None:
    """Copy a local file to a URL, where it appears whole on object stores.

    Raises:
      DataError: the place cannot be written to.
    """
    file_system, path = open_file_system(name)
    if _is_http(path):  # fsspec would post the file
        raise DataError(f"{name} can be read and not written to. Give a local path, or a place such as gs:// or s3://.")
    try:
        with contextlib.suppress(Exception):  # object stores have no folders
            file_system.makedirs(posixpath.dirname(path), exist_ok=True)
        file_system.put_file(os.fspath(local), path)
    except Exception as error:  # drivers raise their own kinds
        raise DataError(f"{name} cannot be written: {_told(error)}. What was to be there is {local}.") from None


@contextlib.contextmanager
def _asking(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # drivers raise their own kinds
        raise DataError(f"{name} cannot be reached: {_told(error)}.") from error


def _told(error: BaseException) -> str:
    cause = f" ({_told(error.__cause__)})" if error.__cause__ else ""
    return f"{type(error).__name__}: {error}{cause}"


def _infos(file_system: Any, path: str, name: str) -> dict[str, dict[str, Any]]:
    """{path: what the place says of the file}; what there is is meant as it is written, and else is a pattern."""
    missing = None
    if not name.endswith("/"):
        try:
            info = file_system.info(path)
            if info["type"] == "file":
                return {path: info}
        except FileNotFoundError as error:  # of http:// this is every failure, with its cause
            missing = error
    if missing is not None and not has_pattern(path):
        if _is_http(path) and getattr(missing.__cause__, "status", None) not in (404, 410):
            raise missing.__cause__ or missing
        return {}
    try:
        if missing is not None:
            return _files(file_system.glob(path, detail=True))
        root = path.rstrip("/")
        return {p: info for p, info in _files(file_system.find(path, detail=True)).items()
                if not any(x.startswith(".") for x in p[len(root) :].split("/"))}  # fmt: skip
    except FileNotFoundError:
        return {}


def _files(infos: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {path: info for path, info in infos.items() if info["type"] == "file"}


def _remote_file(file_system: Any, path: str, info: dict[str, Any]) -> RemoteFile:
    said = [(key, str(info[key])) for key in _VERSIONS if info.get(key) is not None]
    version = hashlib.sha256(repr((info.get("size"), said)).encode()).hexdigest() if said else None
    size, url = info.get("size"), file_system.unstrip_protocol(path)
    has_ranges = not _is_http(path) or (info.get("partial", True) and _serves_ranges(file_system, path, size))
    return RemoteFile(file_system, path, url, size, version, bool(has_ranges))


def _serves_ranges(file_system: Any, path: str, size: int | None) -> bool:
    """Whether an HTTP server gives a part of a file where it is asked for one; many do not say."""
    if not size or size < 3:
        return False
    with file_system.open(path, "rb", cache_type="none", size=size) as file:
        file.seek(size // 2)
        try:
            return len(file.read(1)) == 1
        except ValueError:  # fsspec's, of a server that began to send all
            return False


def _is_http(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def _http_options() -> dict[str, Any]:
    """aiohttp's own limit of five minutes is for all of a file."""
    import aiohttp

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}}


def _protocols(file_system: Any) -> tuple[str, ...]:
    return (file_system.protocol,) if isinstance(file_system.protocol, str) else tuple(file_system.protocol)


class _Stream(io.RawIOBase):
    """A remote file's bytes; where reading fails it goes on from the same byte with a new connection."""

    def __init__(self, file: RemoteFile):
        self._file, self._at, self._inner = file, 0, None
        self._end = file.size  # or where it was found to be

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.has_ranges

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if not self.seekable():
            raise io.UnsupportedOperation(f"{self._file} is read from its start alone")
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        self._at = max(0, (begin or 0) + offset)
        if self._inner is not None:
            self._inner.seek(self._at)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        for pause in (*_PAUSES_SECONDS, None):
            try:
                data = self._read(len(buffer))
                break
            except Exception as error:  # drivers raise their own kinds
                self._drop()
                if pause is None or isinstance(error, FileNotFoundError | PermissionError):
                    raise OSError(_told(error)) from error
                time.sleep(pause)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _read(self, size: int) -> bytes:
        file = self._file
        if self._end is not None and self._at >= self._end:  # some drivers wait for more
            return b""
        if self._inner is None:
            options = {} if file.has_ranges else {"block_size": 0} if _is_http(file.path) else {}
            self._inner = file.file_system.open(file.path, "rb", **options)
            if file.has_ranges:
                self._inner.seek(self._at)
            else:
                self._pass_over(self._at)
        data = self._inner.read(size)
        if not data and size:
            if file.size is not None:
                raise OSError(f"it ends at byte {self._at:,}, and has {file.size:,}")
            self._end = self._at
        return data

    def _pass_over(self, left: int) -> None:
        while left:
            data = self._inner.read(min(left, _BUFFER_BYTES))
            if not data:
                raise OSError(f"it is shorter than before by {left:,} bytes")
            left -= len(data)

    def _drop(self) -> None:
        inner, self._inner = self._inner, None
        if inner is not None:
            with contextlib.suppress(Exception):
                inner.close()

    def close(self) -> None:
        self._drop()
        super().close()
