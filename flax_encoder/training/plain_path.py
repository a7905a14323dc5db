"""Any folder by a path that Orbax can write to and read from."""

import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_PATTERNS = frozenset("[]*?\\")


class PathError(ValueError):
    """No such path can be made. The message says why, and what to do."""


@contextmanager
def plain_path(folder: pathlib.Path, num_processes: int = 1) -> Iterator[pathlib.Path]:
    """The folder's own path if Orbax can read from it, else a link to the folder, for as long as the context lasts.

    Orbax takes `[`, `*`, `?` and `\\` in a path for patterns when it reads, though not when it writes, and every path
    for UTF-8. The link stands in a temporary folder.

    Raises:
      PathError: a link is needed, and several processes, which must name the folder alike, train together; or there is
        no temporary folder whose own path will do.
    """
    if _is_plain(folder):
        yield folder
        return
    rule = f"a path with any of [ ] * ? \\, or that is not UTF-8, is reached by a temporary link: {folder!r}"
    if num_processes > 1:
        raise PathError(f"{rule}; {num_processes} processes have no link in common. Give another --run-dir.")
    try:
        temporary = pathlib.Path(tempfile.mkdtemp(prefix="flax_encoder-"))
    except OSError as error:
        raise PathError(f"{rule}; there is none ({error}). Give another --run-dir, or set TMPDIR.") from None
    try:
        link = temporary / "link"
        if not _is_plain(link):
            raise PathError(f"{rule}; {temporary!r} has them too. Set TMPDIR to another folder.")
        link.symlink_to(folder, target_is_directory=True)
        yield link
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # the link, not what it leads to


def _is_plain(path: pathlib.Path) -> bool:
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return not _PATTERNS & set(os.fspath(path))
