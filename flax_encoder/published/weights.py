"""The tensors of a published weights folder, by name, as NumPy arrays; nothing that a file says is ever run.

A folder holds `model.safetensors`, or a pickled `pytorch_model.bin`, or shards of either and an index: a JSON file
whose `weight_map` names the file of each tensor. Whatever is wrong with them is a WeightsError that names the file.
"""

import json
import logging
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flax_encoder.published.pickled import DTYPES, WeightsError, read_pickled

logger = logging.getLogger(__name__)

# In the order in which they are looked for.
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Other files of weights, as a folder without those above can have them: what they are, and the way from each to those.
_TRANSFORMERS_4 = "transformers below version 5 converts it: AutoModel.from_pretrained(FOLDER, {}).save_pretrained(OUT)"
_OTHER_FILES = {
    "adapter_model.*": "an adapter without the model under it; PEFT merges them: merge_and_unload(), save_pretrained",
    "*.h5": "TensorFlow's; " + _TRANSFORMERS_4.format("from_tf=True"),
    "*.ckpt.index": "TensorFlow's first version's; take a folder with safetensors of the same model",
    "*.msgpack": "Flax's; " + _TRANSFORMERS_4.format("from_flax=True"),
    "*.onnx": "a compiled graph, not weights by name; take the folder that it was exported from",
    "*.gguf": "llama.cpp's; take the folder that it was converted from",
    "openvino_model.*": "OpenVINO's graph; take the folder that it was exported from",
    "*.ot": "Rust's; take a folder with safetensors of the same model",
    "*.tflite": "a compiled graph, not weights by name; take the folder that it was exported from",
    "*.mlmodel": "a compiled graph, not weights by name; take the folder that it was exported from",
    "*.pb": "TensorFlow's graph; take the folder that it was exported from",
    "*.keras": "Keras's; take a folder with safetensors of the same model",
    "*-?????-of-?????.*": "one of several shards, without the index of what each holds; fetch that from where it came, "
    "model.safetensors.index.json or pytorch_model.bin.index.json",
    "*.safetensors": "safetensors under another name; rename it to model.safetensors",
    "*.bin": "perhaps pickled weights under another name; if so, rename it to pytorch_model.bin",
    "*.pt": "perhaps pickled weights under another name; if so, rename it to pytorch_model.bin",
    "*.pth": "perhaps pickled weights under another name; if so, rename it to pytorch_model.bin",
    "*.ckpt": "perhaps a trainer's pickled checkpoint; if so, rename it to pytorch_model.bin",
}
# What safetensors' NumPy side has no name for.
_ML_DTYPES = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
_LFS_POINTER = b"version https://git-lfs"


def read_weights(folder: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Read every tensor of a folder, in the dtype in which it is stored (bfloat16 and float8 are those of ml_dtypes).

    If safetensors' metadata calls a name a copy of another, both names have the same array.

    Raises:
      WeightsError: there are no weights; a file is missing, truncated or corrupt; shards do not fit their index; or a
        pickle holds anything but tensors and plain containers.

    Example:
      >>> read_weights("bert")["bert.embeddings.word_embeddings.weight"].ndim
      2
    """
    folder = pathlib.Path(folder)
    found = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if found is None:
        raise WeightsError(f"no weights in {folder}: looked for {', '.join(FILES)}.{_others(folder)}")
    if found.suffix == ".json":
        return _read_shards(found)
    tensors, copies = _read_file(found)
    return copies | tensors


def _others(folder: pathlib.Path) -> str:
    """What files of weights there are instead, in the folder or one below, each with the way out."""
    told: dict[pathlib.Path, str] = {}
    for below in ("", "*/"):
        for pattern, what in _OTHER_FILES.items():
            for path in sorted(folder.glob(below + pattern))[:1]:
                told.setdefault(path, what)  # of two patterns the first says what a file is
    return "".join(f" {path.relative_to(folder)} is {what}." for path, what in told.items())


def write_weights(
    folder: str | pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `model.safetensors`, or shards and an index if the file would be larger than `max_shard_bytes`.

    The visible files are complete at any moment: they are first written under other names, the index last.

    Args:
      dtype: the dtype to which floating-point tensors are rounded; None keeps each tensor's own.

    Raises:
      WeightsError: the folder has weights already, or a number is too large for `dtype`.

    Example:
      >>> write_weights("two", {"a": np.ones((2, 3), np.float32)}, dtype="bfloat16")
      >>> read_weights("two")["a"].dtype
      dtype(bfloat16)
    """
    folder = pathlib.Path(folder)
    if there := [name for name in FILES if (folder / name).exists()]:
        raise WeightsError(f"{folder} has weights already ({there[0]}): give another folder, or remove them.")
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        tensor = np.asarray(tensor, order="C")  # the library writes memory as it lies, whatever the strides
        tensor = tensor if dtype is None else _rounded(name, tensor, DTYPES[dtype])
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        part = folder / f"{file}.part"
        save_file(shard, part, metadata={"format": "pt"})  # transformers opens no file without it
        os.replace(part, folder / file)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        part = folder / "model.safetensors.index.json.part"
        part.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1), "utf-8")
        os.replace(part, part.with_suffix(""))


def _rounded(name: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if tensor.dtype not in (*DTYPES.values(), np.float64):
        return tensor
    with np.errstate(over="ignore"):
        rounded = tensor.astype(dtype)
    if np.isfinite(tensor).all() and not np.isfinite(rounded).all():
        raise WeightsError(f"{name} does not fit {dtype.name}: it holds {np.abs(tensor).max()}; bfloat16 reaches more.")
    return rounded


_File = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]  # tensors, and copies of them under other names


def _read_file(path: pathlib.Path) -> _File:
    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise WeightsError(f"{path} is Git LFS's pointer to the weights: run `git lfs pull` in the folder.")
    return _read_safetensors(path) if path.suffix == ".safetensors" else (read_pickled(path), {})


def _read_shards(index: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        weight_map = {name: _beside(index, file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{index} is no index of weights: {type(error).__name__}: {error}.") from None
    files = sorted(set(weight_map.values()))
    if absent := [file for file in files if not (index.parent / file).is_file()]:
        raise WeightsError(
            f"{index} names {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not there: the folder is "
            f"incomplete. Fetch all of it again."
        )
    tensors: dict[str, np.ndarray] = {}
    all_copies: dict[str, np.ndarray] = {}
    for file in files:
        path = index.parent / file
        stored, copies = _read_file(path)
        shard = stored | copies
        if missing := sorted(name for name, where in weight_map.items() if where == file and name not in shard):
            raise WeightsError(f"{path} must hold {missing[0]}, says {index.name}: it does not.")
        if extra := sorted(name for name in stored if weight_map.get(name) != file):
            where = f"in {weight_map[extra[0]]}" if extra[0] in weight_map else "nowhere"
            raise WeightsError(f"{path} holds {extra[0]}, which {index.name} has {where}.")
        tensors |= stored
        all_copies |= copies
    return all_copies | tensors


def _beside(index: pathlib.Path, file: Any) -> str:
    """The shard's name. Some tools write where it lay on another machine: what counts is the file beside the index."""
    file = file if isinstance(file, str) else repr(file)
    is_absolute = pathlib.PurePosixPath(file).is_absolute() or pathlib.PureWindowsPath(file).is_absolute()
    name = pathlib.PureWindowsPath(file).name if is_absolute else file
    path = pathlib.PurePath(name)
    name = name.removeprefix("./")
    if path.name != name or path.suffix != pathlib.Path(index.stem.removesuffix(".index")).suffix:
        raise WeightsError(f"{index} must name weight files beside it: got {file!r}.")
    return name


def _read_safetensors(path: pathlib.Path) -> _File:
    try:
        with safe_open(path, framework="np") as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - it is no mapping
            tensors = {name: file.get_tensor(name) for name, dtype in dtypes.items() if dtype in _NUMPY_DTYPES}
            metadata = file.metadata() or {}
    except (SafetensorError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise WeightsError(f"{path} is truncated, corrupt or no safetensors file: {error}.") from None
    if others := {name: dtype for name, dtype in dtypes.items() if dtype not in _NUMPY_DTYPES}:
        if unread := next((name for name, dtype in others.items() if dtype not in _ML_DTYPES), None):
            raise WeightsError(
                f"{path}: tensor {unread} has dtype {others[unread]}, which is not read. Convert it in PyTorch to "
                f"float32 or bfloat16, and save the file again."
            )
        tensors |= _read_raw(path, others)
    # safetensors.torch.save_model keeps one name of tensors that share memory, and writes here which it stands for.
    copies = {name: tensors[kept] for name, kept in metadata.items() if kept in tensors and name not in tensors}
    return tensors, copies


_NUMPY_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64")


def _read_raw(path: pathlib.Path, dtypes: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Tensors of ml_dtypes' kinds, from where the header of a file, which is known to be sound, says that they lie."""
    tensors = {}
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        for name, dtype in dtypes.items():
            start, end = header[name]["data_offsets"]
            file.seek(8 + size + start)
            tensors[name] = np.frombuffer(file.read(end - start), _ML_DTYPES[dtype]).reshape(header[name]["shape"])
    return tensors
