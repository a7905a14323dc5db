"""Tokenized documents on disk: flat tokens plus offsets, read by memory map. `prepare.py` writes them.

STORE/manifest.json               counts, hashes, label names, every other file's size and SHA-256
STORE/tokenizer.json              what made the tokens
STORE/SPLIT/tokens-N.bin          uint16 or uint32, the split's documents end to end, none across two files
STORE/SPLIT/words-N.bin           a bit a token: whether it begins a word
STORE/SPLIT/offsets.npy           int64 [documents + 1], in tokens over all the split's files
STORE/SPLIT/histogram.npy         uint32 [3, entries], see `packing.length_histogram`
STORE/SPLIT/text_lengths.npy      int32 [documents, texts], where a document is several texts end to end,
                                  or a text and the one that is written for it
STORE/SPLIT/text_keys.npy         uint64 [documents, texts]                  a hash of each, where texts are compared
STORE/SPLIT/labels.npy            int32 [documents]                          values that are one class of several,
STORE/SPLIT/shares.npy            float32 [documents, labels]                shares of labels, where any is soft,
STORE/SPLIT/classes.npy           uint8 [documents, labels]                  any of several,
STORE/SPLIT/number.npy            float32 [documents]                        a number,
STORE/SPLIT/tags-N.bin            int16, an entry a token                    a tag a word,
STORE/SPLIT/answers.npy           int32 [documents, 2]                       or a span of the last text (`encoding.py`)

SPLIT is train, validation (what a run evaluates on meanwhile) and, where the source has both, test. Stores from before
there were three have the one that is held out as test.

A folder whose manifest has `members` is a mixture: folders of stores, and their weights.
"""

import functools
import hashlib
import json
import pathlib
import tokenize
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from flax_encoder.data.sources.records import DataError

FORMAT = 2
MANIFEST = "manifest.json"
_SMALL_BYTES = 2**20
_CHECKED_AT_ONCE = 2**24  # offsets
VALUES = ("labels", "shares", "classes", "number", "answers", "text_lengths", "text_keys")


@dataclass(frozen=True)
class Split:
    """Documents [offsets[i], offsets[i + 1]) of the shards end to end, without special tokens."""

    tokens: Sequence[np.ndarray]
    words: Sequence[np.ndarray]
    """Bits, packed from the low end of each byte."""
    offsets: np.ndarray
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    """`labels` (and `shares`, if any label is soft), `classes`, `number` (NaN where there is none) or `answers`,
    [N, ...], and `text_lengths` and `text_keys` [N, texts]."""
    histogram: np.ndarray | None = None
    """Of the documents' lengths, as `packing.length_histogram` counts them."""
    tags: Sequence[np.ndarray] | None = None
    """Like tokens: an entry a token, as `encoding.Encoded` writes them."""
    shard_starts: np.ndarray = field(init=False)

    def __post_init__(self):
        starts = np.cumsum([0, *(len(shard) for shard in self.tokens)])
        object.__setattr__(self, "shard_starts", starts)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """The document's tokens."""
        return self._of_document(self.tokens, index)

    def document_tags(self, index: int) -> np.ndarray:
        """Its `tags`, an entry a token."""
        assert self.tags is not None
        return self._of_document(self.tags, index)

    def word_starts(self, index: int) -> np.ndarray:
        """Whether each of the document's tokens begins a word, bool [tokens]."""
        shard, begin, end = self._place(index)
        bits = np.unpackbits(self.words[shard][begin >> 3 : -(-end // 8)], bitorder="little")
        return bits[begin & 7 :][: end - begin].astype(bool)

    def _of_document(self, shards: Sequence[np.ndarray], index: int) -> np.ndarray:
        shard, begin, end = self._place(index)
        return shards[shard][begin:end]

    def _place(self, index: int) -> tuple[int, int, int]:
        """(shard, where the document begins and ends in it)."""
        begin, end = self.offsets[index : index + 2].tolist()
        shard = int(np.searchsorted(self.shard_starts, begin, side="right")) - 1
        first = int(self.shard_starts[shard])
        return shard, begin - first, end - first


@dataclass(frozen=True)
class StoredSplit(Split):
    """A split of a store on disk; sent to another process it goes as its folder's name."""

    folder: pathlib.Path = pathlib.Path()

    def __reduce__(self):
        return _open_split, (self.folder,)


@dataclass(frozen=True)
class Store:
    train: Split
    validation: Split
    separate_test: Split | None
    """Documents that nothing is chosen by; None where one split is held out for both."""
    manifest: dict
    folder: pathlib.Path

    @property
    def test(self) -> Split:
        """The documents that a result is reported on: the test split, or where there is none, the validation split."""
        return self.validation if self.separate_test is None else self.separate_test

    @property
    def label_names(self) -> list[str] | None:
        return self.manifest["label_names"]

    @property
    def value(self) -> str:
        """The kind of its documents' values, as `Columns` names them."""
        return self.manifest.get("value", "none" if self.label_names is None else "class")

    @property
    def pair(self) -> tuple[str, str] | None:
        """The columns of its two texts, where they were read from two, by a version that notes it."""
        return None if (pair := self.manifest.get("pair")) is None else (pair[0], pair[1])

    @functools.cached_property
    def hash(self) -> str:
        """Of the contents: the same text by the same tokenizer has the same hash wherever it is prepared."""
        # Where one split is held out its files count under the name that they had when there were two.
        old = {"validation": "test"} if self.separate_test is None else {}
        files = {}
        for name, about in self.manifest["files"].items():
            split, _, file = name.rpartition("/")
            files[f"{old.get(split, split)}/{file}".removeprefix("/")] = about["sha256"]
        what = (FORMAT, self.manifest["tokenizer"], self.manifest["label_names"], sorted(files.items()))
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def verify(self, progress: Callable[[str], None] = lambda message: None) -> None:
        """Read every file and compare its SHA-256.

        Raises:
          DataError: a file is not what was written; names it and both hashes.
        """
        for name, about in self.manifest["files"].items():
            progress(f"verifying {name}")
            _compare(self.folder, name, about)


def _compare(folder: pathlib.Path, name: str, about: dict) -> None:
    """Raises: DataError: a file of the folder is not what was written."""
    with (folder / name).open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != about["sha256"]:
        raise DataError(
            f"a prepared file must be as it was written: {folder / name} has SHA-256 {digest}, expected "
            f"{about['sha256']}. Delete {folder} and prepare it again."
        )


def is_store(folder: pathlib.Path) -> bool:
    """Whether it is a store or the beginnings of one, rather than a file or a data set's name."""
    return (folder / MANIFEST).exists() or (not folder.is_file() and partial_folder(folder).is_dir())


def partial_folder(folder: pathlib.Path) -> pathlib.Path:
    """Where a store stands while it is being prepared."""
    folder = folder.absolute()
    return folder.with_name(folder.name + ".partial")


def read_manifest(folder: pathlib.Path) -> dict:
    """A store's manifest, or a mixture's.

    Raises:
      DataError: there is none, it is only half prepared, or it is of another format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        if manifest["format"] != FORMAT:
            raise DataError(
                f"a store must have format {FORMAT}: {folder} has {manifest['format']}, of another version of this "
                f"library. Prepare it again."
            )
        _check_fields(manifest)
        return manifest
    except FileNotFoundError:
        if partial_folder(folder).is_dir():
            raise DataError(
                f"a store must be whole: the one at {folder} was interrupted. The same prepare command finishes it."
            ) from None
        raise DataError(f"no prepared store at {folder}: it has no {MANIFEST}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"prepared text is damaged: {folder / MANIFEST}: {error}. Prepare it again.") from error


def _check_fields(manifest: dict) -> None:
    """Raises: ValueError, KeyError, TypeError or AttributeError: a manifest without what is read of it."""
    if "members" in manifest:
        for member in manifest["members"]:
            if type(member["folder"]) is not str or not 0 < float(member["weight"]) < float("inf"):
                raise ValueError(f"a member is a folder and its weight: got {member!r}")
        return
    kinds = {"tokenizer": (str,), "source": (str,), "label_names": (list, type(None)), "dropped": (dict,)}
    for name, kind in kinds.items():
        if not isinstance(manifest[name], kind):
            raise ValueError(f"{name} is {manifest[name]!r:.60}")
    listed = {"label_names": manifest["label_names"] or [], "prompts": manifest.get("prompts", [])}
    if odd := [(n, x) for n, texts in listed.items() for x in texts if type(x) is not str]:
        raise ValueError(f"{odd[0][0]} has {odd[0][1]!r:.60}")
    if manifest["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"dtype is {manifest['dtype']!r:.60}")
    if not {"train"} <= manifest["splits"].keys() <= {"train", "validation", "test"}:
        raise ValueError(f"splits are {', '.join(manifest['splits'])}")
    counts = [(name, about[n]) for name, about in manifest["splits"].items() for n in ("documents", "tokens", "shards")]
    counts += [("unknown", about.get("unknown", 0)) for about in manifest["splits"].values()]
    counts += [*manifest["dropped"].items(), *((n, about["bytes"]) for n, about in manifest["files"].items())]
    if odd := [(name, n) for name, n in counts if type(n) is not int or n < 0]:
        raise ValueError(f"{odd[0][0]} has a count of {odd[0][1]!r:.60}")
    if any(about.get("unknown", 0) > about["tokens"] for about in manifest["splits"].values()):
        raise ValueError("more tokens are unknown than there are")


def open_store(folder: pathlib.Path) -> Store:
    """Map a store's files. Small ones are compared with their SHA-256, of large ones the sizes, and that the documents
    lie one after the other in the tokens.

    Raises:
      DataError: a file is missing, damaged, or does not fit the manifest.
    """
    manifest = read_manifest(folder)
    try:
        for name, about in manifest["files"].items():
            if type(about["sha256"]) is not str:
                raise ValueError(f"{MANIFEST} has no checksum of {name}")
            if (size := (folder / name).stat().st_size) != about["bytes"]:
                raise DataError(
                    f"a prepared file does not fit its manifest: {folder / name} has {size} bytes, expected "
                    f"{about['bytes']}. Delete {folder} and prepare it again."
                )
            if size <= _SMALL_BYTES:
                _compare(folder, name, about)
        splits = {name: _open_split(folder / name) for name in manifest["splits"]}
        for split in splits.values():
            _check_split(split)
        held_out = splits.pop("test", None)
        validation = splits.get("validation", held_out)
        return Store(splits["train"], validation, held_out if "validation" in splits else None, manifest, folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"prepared text is damaged: {error}. Delete {folder} and prepare it again.") from error


def _open_split(folder: pathlib.Path) -> StoredSplit:
    manifest = read_manifest(folder.parent)
    shards = range(manifest["splits"][folder.name]["shards"])
    tokens = [np.memmap(folder / f"tokens-{i:05}.bin", manifest["dtype"], "r") for i in shards]
    words = [np.memmap(folder / f"words-{i:05}.bin", np.uint8, "r") for i in shards]
    offsets = _load(folder / "offsets.npy", mmap_mode="r")
    values = {name: _load(folder / f"{name}.npy") for name in VALUES if (folder / f"{name}.npy").exists()}
    has_tags = (folder / "tags-00000.bin").exists()
    tags = [np.memmap(folder / f"tags-{i:05}.bin", np.int16, "r") for i in shards] if has_tags else None
    return StoredSplit(tokens, words, offsets, values, _load(folder / "histogram.npy"), tags, folder)


def _check_split(split: StoredSplit) -> None:
    """Raises: ValueError: its arrays do not belong together."""
    offsets, num_tokens = split.offsets, int(split.shard_starts[-1])
    if offsets.dtype != np.int64 or offsets.ndim != 1 or not len(offsets):
        raise ValueError(f"{split.folder}: offsets are {offsets.dtype} of shape {offsets.shape}")
    is_rising = all(
        (np.diff(offsets[i : i + _CHECKED_AT_ONCE + 1]) >= 0).all() for i in range(0, len(split), _CHECKED_AT_ONCE)
    )
    if offsets[0] != 0 or offsets[-1] != num_tokens or not is_rising:
        raise ValueError(f"{split.folder}: the documents do not lie one after the other in its {num_tokens:,} tokens")
    if odd := [name for name, x in split.values.items() if len(x) != len(split)]:
        raise ValueError(f"{split.folder}: {odd[0]} are not one of each document")


def _load(path: pathlib.Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """Raises: ValueError: a damaged header, which NumPy reads by Python's tokenizer and parser."""
    try:
        return np.load(path, mmap_mode=mmap_mode)
    except (tokenize.TokenError, SyntaxError, EOFError, MemoryError, OverflowError) as error:
        raise ValueError(f"{path.name}: {error}") from error
