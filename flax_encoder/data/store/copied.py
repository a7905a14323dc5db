"""Stores that are elsewhere: memory maps need files of this machine, so each is copied here once and compared."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

from filelock import FileLock

from flax_encoder.data.sources.files import KINDS, kind_of_name
from flax_encoder.data.sources.records import DataError, Say
from flax_encoder.data.sources.remote import has_pattern, is_remote, is_there, put_file, remote_files
from flax_encoder.data.store.store import FORMAT, MANIFEST, read_manifest

_BLOCK_BYTES = 2**22


def is_remote_store(name: str) -> bool:
    """Whether a URL is that of a prepared store or of a mixture of them."""
    if not is_remote(name) or has_pattern(name) or kind_of_name(name) in KINDS:  # `?` begins a query of http too
        return False
    return is_there(f"{name.rstrip('/')}/{MANIFEST}")


def local_store(url: str, cache_dir: pathlib.Path, progress: Say) -> pathlib.Path:
    """The folder in the cache that has the store's files, each compared with its SHA-256 as it came. A store that is
    there already is not copied again; an interrupted copy goes on from the files that it has.

    Raises:
      DataError: the store cannot be read, is not what its manifest says, or does not fit on the disk.
    """
    url = url.rstrip("/")
    raw = _read(f"{url}/{MANIFEST}")
    manifest = _parsed(raw, f"{url}/{MANIFEST}")
    members = [_plain(m["folder"], url) for m in manifest.get("members", [])]
    manifests = {f"{name}/": _read(f"{url}/{name}/{MANIFEST}") for name in members} or {"": raw}
    what = hashlib.sha256(raw + b"".join(manifests[name] for name in sorted(manifests))).hexdigest()
    folder = cache_dir / "copied" / what[:24]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if folder.exists():
            return folder
        work = folder.with_name(folder.name + ".part")
        files = {
            prefix + _plain(name, url): about
            for prefix, text in manifests.items()
            for name, about in _parsed(text, f"{url}/{prefix}{MANIFEST}")["files"].items()
        }
        left = {name: about for name, about in files.items() if not (work / name).exists()}
        try:
            work.mkdir(exist_ok=True)
            need, free = sum(about["bytes"] for about in left.values()), shutil.disk_usage(work).free
            if need > free:
                raise DataError(
                    f"a store elsewhere is copied to this machine: {url} needs {need:,} bytes, and {work} has {free:,}"
                    f" left. Free some, or give --data.cache-dir on a larger disk."
                )
            for number, (name, about) in enumerate(left.items(), 1):
                progress(f"copying {url}: file {number} of {len(left)}, {about['bytes']:,} bytes")
                _copy(f"{url}/{name}", work / name, about)
            for prefix, text in manifests.items():
                (work / prefix / MANIFEST).write_bytes(text)
            (work / MANIFEST).write_bytes(raw)
            os.rename(work, folder)
        except OSError as error:
            raise DataError(
                f"a store elsewhere is copied to this machine: {error.filename or work}: {error.strerror or error}. "
                f"The files that came are kept; the same command goes on."
            ) from error
    return folder


def upload_store(folder: pathlib.Path, url: str, progress: Say) -> None:
    """Copy a store, or a mixture of them, to a URL; the manifest that makes it one comes last.

    Raises:
      DataError: the place cannot be written to, or has another store.
    """
    url, members = url.rstrip("/"), read_manifest(folder).get("members", [])
    if is_there(f"{url}/{MANIFEST}") and _read(f"{url}/{MANIFEST}") != (folder / MANIFEST).read_bytes():
        raise DataError(f"a store is prepared into a new folder: {url} holds another. Name another --out.")
    for member in members:
        upload_store(folder / member["folder"], f"{url}/{member['folder']}", progress)
    names = [] if members else list(read_manifest(folder)["files"])
    for number, name in enumerate(names, 1):
        progress(f"copying to {url}: file {number} of {len(names)}")
        put_file(folder / name, f"{url}/{name}")
    put_file(folder / MANIFEST, f"{url}/{MANIFEST}")


def _read(url: str) -> bytes:
    found = remote_files(url)
    if not found:
        raise DataError(f"a store must be whole: there is no {url}.")
    try:
        with found[0].open() as file:
            return file.read()
    except OSError as error:
        raise DataError(f"{url} cannot be read: {error}.") from error


def _parsed(raw: bytes, where: str) -> dict[str, Any]:
    """A manifest, as far as copying needs it."""
    try:
        manifest = json.loads(raw)
        if manifest["format"] != FORMAT:
            raise DataError(f"a store must have format {FORMAT}: {where} has {manifest['format']}. Prepare it again.")
        for member in manifest.get("members", []):
            str(member["folder"]), float(member["weight"])
        for about in manifest.get("files", {} if "members" in manifest else None).values():
            if type(about["bytes"]) is not int or type(about["sha256"]) is not str:
                raise ValueError("a file without its size and SHA-256")
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"prepared text is damaged: {where}: {type(error).__name__}: {error}.") from error


def _plain(name: str, url: str) -> str:
    """The name of a file in a store, which stays in its folder when it is copied."""
    path = pathlib.PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name or name == MANIFEST:
        raise DataError(f"a store has files in its own folder: the manifest of {url} names {name!r}.")
    return path.as_posix()


def _copy(url: str, path: pathlib.Path, about: dict[str, Any]) -> None:
    """One file, which has its name when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, digest, size = path.with_name(path.name + ".part"), hashlib.sha256(), 0
    found = remote_files(url)
    if not found:
        raise DataError(f"a store must be whole: its manifest names {url}, which is not there.")
    with contextlib.closing(found[0].open()) as source, part.open("wb") as file:
        while block := source.read(_BLOCK_BYTES):
            file.write(block)
            digest.update(block)
            size += len(block)
    if size != about["bytes"] or digest.hexdigest() != about["sha256"]:
        part.unlink()
        raise DataError(
            f"a prepared file must be as it was written: {url} came with {size:,} bytes and SHA-256 "
            f"{digest.hexdigest()[:16]}..., and its manifest says {about['bytes']:,} and {about['sha256'][:16]}.... "
            f"Copy the store there again."
        )
    os.replace(part, path)
