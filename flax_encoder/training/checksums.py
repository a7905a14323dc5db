"""What the files of a folder were when it was finished, and whether they still are: sizes and SHA-256 in a manifest.

FOLDER/manifest.json holds {"format": 1, "files": {PATH: {"bytes", "sha256"}}}. It is written last, after every file it
names has reached the disk.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

MANIFEST = "manifest.json"
_FORMAT = 1
_SMALL_BYTES = 2**20
_THREADS = 4  # hashlib releases the interpreter; more threads than cores keep a slow disk busy


class Damaged(ValueError):
    """A file is not what was written. The message names the file, what it is and what it was."""


Complaint = Callable[[str], Exception]
"""What to raise of a damage, given its description."""


def write_manifest(folder: pathlib.Path) -> None:
    """Bring every file of the folder to the disk, and write the manifest that names them all."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(_synced_digest, paths))
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(json.dumps({"format": _FORMAT, "files": files}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        sync_folder(path)


def sync_folder(folder: pathlib.Path) -> None:
    """Bring the names in a folder to the disk, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems sync no folders
        pass
    finally:
        os.close(descriptor)


class Verification:
    """Files of a folder compared with its manifest. Sizes and small files are compared at once, before anybody parses
    them; large files are hashed by threads while the caller reads them, until `finish`.

    Args:
      parts: the folder's entries to compare; None is all of them.
      complaint: makes the error to raise of a damage.

    Raises:
      Damaged, or what `complaint` makes: a file is missing, has another size or other contents, or the manifest is no
        manifest.
      FileNotFoundError: the folder has no manifest.
    """

    def __init__(
        self, folder: pathlib.Path, parts: Iterable[str] | None = None, complaint: Complaint = Damaged
    ):
        self._folder, self._complaint = folder, complaint
        wanted = None if parts is None else set(parts)
        self.files = {
            name: about
            for name, about in read_manifest(folder, complaint).items()
            if wanted is None or name.partition("/")[0] in wanted
        }
        for name, about in self.files.items():
            try:
                size = (folder / name).stat().st_size
            except OSError as error:
                reason = f"{name} cannot be found ({error.strerror}): {about['bytes']:,} bytes were written"
                raise complaint(reason) from None
            if size != about["bytes"]:
                raise complaint(f"{name} has {size:,} bytes, and {about['bytes']:,} were written")
        by_size = sorted(self.files, key=lambda name: -self.files[name]["bytes"])
        large = [name for name in by_size if self.files[name]["bytes"] > _SMALL_BYTES]
        for name in by_size[len(large) :]:
            self._compare(name)
        self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS) if large else None
        self._waiting = [self._pool.submit(self._compare, name) for name in large] if self._pool else []

    @property
    def num_bytes(self) -> int:
        return sum(about["bytes"] for about in self.files.values())

    def finish(self) -> None:
        """Return when every file has been compared.

        Raises:
          Damaged, or what `complaint` makes: one has other contents.
        """
        try:
            for future in self._waiting:
                future.result()
        finally:
            self.close()

    def close(self) -> None:
        """End the threads; what was not compared yet never is."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _compare(self, name: str) -> None:
        try:
            with (self._folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise self._complaint(f"{name} cannot be read: {error.strerror}") from None
        if digest != (written := self.files[name]["sha256"]):
            raise self._complaint(f"{name} has SHA-256 {digest[:16]}..., and {written[:16]}... was written")


def read_manifest(folder: pathlib.Path, complaint: Complaint = Damaged) -> dict[str, dict[str, Any]]:
    """{path in the folder: {"bytes", "sha256"}}.

    Raises:
      Damaged, or what `complaint` makes: the manifest is none. FileNotFoundError: there is no manifest.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = manifest["files"]
        if manifest["format"] != _FORMAT or not files:
            raise ValueError(f"format {manifest['format']}, {len(files)} files")
        return {str(name): {"bytes": int(f["bytes"]), "sha256": str(f["sha256"])} for name, f in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{MANIFEST} is no list of files and their checksums ({type(error).__name__}: {error})"
        raise complaint(reason) from None


def _synced_digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
