"""Weights as PyTorch pickles them, read without running anything that the file says.

torch.save writes a zip archive (PyTorch 1.6 on): NAME/data.pkl, and NAME/data/KEY for each storage; or before that
pickles in a row, then the storages. The pickles name storages by persistent ids. We let them make records only, and
turn those into arrays once every number in them is checked.
"""

import io
import logging
import math
import pathlib
import pickle
import pickletools
import re
import reprlib
import struct
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

logger = logging.getLogger(__name__)

DTYPES = {"float32": np.dtype("float32"), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("float16")}


class WeightsError(ValueError):
    """Weights that cannot be read or written. The message names the file, what is wrong, and a way out if there is."""


_STORAGES = {
    "FloatStorage": DTYPES["float32"],
    "BFloat16Storage": DTYPES["bfloat16"],
    "HalfStorage": DTYPES["float16"],
    "DoubleStorage": np.dtype("float64"),
    "LongStorage": np.dtype("int64"),
    "IntStorage": np.dtype("int32"),
    "ShortStorage": np.dtype("int16"),
    "CharStorage": np.dtype("int8"),
    "ByteStorage": np.dtype("uint8"),
    "BoolStorage": np.dtype("bool"),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_PICKLE_BYTES = 1 << 26  # a thousand times what the largest encoders take


class _Storage(NamedTuple):
    dtype: str
    key: str
    count: int


class _View(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Dict(dict):
    """Stands for collections.OrderedDict, whose pickled attributes (`_metadata`) are not read."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Makes numbers, strings, lists, tuples, dicts, and `_View`s of `_Storage`s. Any other name is refused.

    What stands for an allowed name is a fresh function or a string, so that a pickle that sets attributes on it
    changes nothing that outlives the reading.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return lambda items=(): _Dict(items)
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _view(storage, offset, shape, strides)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in _STORAGES:
            return name
        raise WeightsError(
            f"refuses {module}.{name}: weights are tensors and plain containers, and this pickle asks for more. If you "
            f"trust it, open it in PyTorch and save it as safetensors."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        is_storage = isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"
        if not is_storage or pid[1] not in _STORAGES or type(pid[2]) is not str or type(pid[4]) is not int:
            raise WeightsError(f"a persistent id must be a storage's: got {reprlib.repr(pid)}.")
        if len(pid) == 6 and pid[5] is not None:
            raise WeightsError("views of storages, which PyTorch 0.x wrote, are not read: save the weights anew.")
        return _Storage(pid[1], pid[2], pid[4])


def _view(storage: Any, offset: Any, shape: Any, strides: Any) -> _View:
    numbers = (offset, *shape, *strides)
    if type(storage) is not _Storage or any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers):
        raise WeightsError(f"a tensor must be a storage and sizes: got {reprlib.repr((storage, *numbers))}.")
    if len(shape) != len(strides):
        raise WeightsError(f"a tensor must have a stride an axis: got {strides} for {shape}.")
    return _View(storage, offset, tuple(shape), tuple(strides))


def read_pickled(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file that torch.save wrote: a dict of them, or the one that lies under a key.

    Raises:
      WeightsError: a file that is damaged, that asks for anything but tensors and plain containers, or that holds none
        or several dicts of tensors.
    """
    try:
        with open(path, "rb") as file:
            reader = _read_zip if zipfile.is_zipfile(file) else _read_legacy
            file.seek(0)
            views, storages = reader(file, path.stat().st_size)
            return {name: _array(name, view, storages) for name, view in _state(path, views).items()}
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle or archive can raise anything
        raise WeightsError(f"{path} is truncated, corrupt or no weights: {type(error).__name__}: {error}.") from None


def _state(path: pathlib.Path, content: Any) -> dict[str, Any]:
    """The dict of tensors that a pickle is, or that it holds under one key beside what else trainers save."""
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise WeightsError(f"it must hold a dict of named tensors: got {reprlib.repr(content)}.")
    if any(isinstance(value, _View) for value in content.values()):
        return content
    states = {
        key: value
        for key, value in content.items()
        if isinstance(value, dict) and value and all(type(n) is str and type(v) is _View for n, v in value.items())
    }
    if len(states) > 1:
        raise WeightsError(
            f"it holds a dict of tensors under each of {', '.join(states)}. Choose one in PyTorch: "
            f"torch.save(torch.load(FILE)[{next(iter(states))!r}], 'pytorch_model.bin')."
        )
    for key, state in states.items():
        logger.warning("%s: read only the tensors under the key %s", path, key)
        return state
    return content


def _views(content: Any) -> Iterator[_View]:
    """Every tensor, however deep it lies."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, _View):
            yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))  # a pickle can hold itself
            waiting += value.values() if isinstance(value, dict) else value


def _unpickle(file: io.BufferedIOBase) -> Any:
    """The next pickle of a file, whose opcodes are looked through first: some make room for what they only announce."""
    start = file.tell()
    for opcode, argument, position in pickletools.genops(file):
        if position is not None and position - start > _MAX_PICKLE_BYTES:
            raise WeightsError(f"a pickle of names and sizes has at most {_MAX_PICKLE_BYTES} bytes: this has more.")
        if opcode.name in ("PUT", "LONG_BINPUT") and argument > position - start:
            raise WeightsError(f"a pickle's memo grows by one at a time: got entry {argument} at byte {position}.")
    file.seek(start)
    return _Unpickler(file, encoding="utf-8").load()


def _read_zip(file: io.BufferedIOBase, size: int) -> tuple[Any, dict[str, np.ndarray]]:
    with zipfile.ZipFile(file) as archive:
        members = {m.filename: m for m in archive.infolist()}
        if any(m.compress_type != zipfile.ZIP_STORED for m in members.values()):
            raise WeightsError("a member is compressed, which PyTorch never does.")
        if (total := sum(m.file_size for m in members.values())) > size:
            raise WeightsError(f"its members claim {total} bytes: the file has {size}.")
        pickles = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise WeightsError(f"an archive of weights has one NAME/data.pkl: got {len(pickles)}.")
        folder = pickles[0].removesuffix("data.pkl")
        order = archive.read(f"{folder}byteorder").strip() if f"{folder}byteorder" in members else b"little"
        if order != b"little":
            raise WeightsError(f"the bytes must be in little-endian order: got {order.decode('ascii', 'replace')!r}.")
        views = _unpickle(io.BytesIO(archive.read(pickles[0])))  # reading a member checks its CRC
        raw = {
            name.removeprefix(f"{folder}data/"): archive.read(name)
            for name in members
            if name.startswith(f"{folder}data/")
        }
    return views, {key: np.frombuffer(data, np.uint8) for key, data in raw.items()}


def _read_legacy(file: io.BufferedIOBase, size: int) -> tuple[Any, dict[str, np.ndarray]]:
    if _unpickle(file) != _LEGACY_MAGIC:
        raise WeightsError("neither a zip archive nor an older file of PyTorch's: it does not begin like one.")
    if (version := _unpickle(file)) != 1001:
        raise WeightsError(f"the protocol must be 1001: got {reprlib.repr(version)}.")
    if (system := _unpickle(file)).get("little_endian") is not True:
        raise WeightsError(f"the bytes must be in little-endian order: got {reprlib.repr(system)}.")
    views = _unpickle(file)
    keys = _unpickle(file)
    widths = {view.storage.key: _STORAGES[view.storage.dtype].itemsize for view in _views(views)}
    storages = {}
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        if key not in widths:
            raise WeightsError(f"storage {key!r} belongs to no tensor.")
        if not 0 <= count * widths[key] <= size - file.tell():
            raise WeightsError(f"it is truncated: storage {key} claims {count} numbers.")
        storages[key] = np.frombuffer(file.read(count * widths[key]), np.uint8)
    return views, storages


def _array(name: str, view: Any, storages: dict[str, np.ndarray]) -> np.ndarray:
    """What a view stands for, once it is sure to lie within its storage."""
    if not isinstance(view, _View):
        raise WeightsError(f"{name} must be a tensor: it is a {type(view).__name__}.")
    storage, dtype = view.storage, _STORAGES[view.storage.dtype]
    if storage.key not in storages:
        raise WeightsError(f"{name} lies in storage {storage.key}, which is not there.")
    raw = storages[storage.key]
    if raw.size != storage.count * dtype.itemsize:
        raise WeightsError(
            f"{name} lies in a storage of {storage.count} {dtype.name}: it has {raw.size} bytes, not "
            f"{storage.count * dtype.itemsize}."
        )
    count = math.prod(view.shape)
    last = view.offset + sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
    # No tensor is larger than its storage either: strides of 0 could make terabytes out of one number.
    if count > storage.count or (count and last >= storage.count) or view.offset > storage.count:
        raise WeightsError(
            f"{name} reaches outside its storage of {storage.count}: shape {view.shape}, strides {view.strides}, "
            f"offset {view.offset}."
        )
    flat = raw.view(dtype)[view.offset :]
    strides = [stride * dtype.itemsize for stride in view.strides]
    return np.array(np.lib.stride_tricks.as_strided(flat, view.shape, strides, writeable=False))
