"""Low-rank adapters as PEFT's folders name and hold them: for each torch Linear, lora_A [r, in] and lora_B [out, r]."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from flax_encoder.config import ConfigError, LoraConfig
from flax_encoder.families.family import Family
from flax_encoder.families.tensors import LAYOUTS, Shapes, _join, _tensors

PREFIX = "base_model.model."  # before all names in PEFT's files


class PublishedAdapters(NamedTuple):
    tensors: dict[str, np.ndarray]
    settings: dict[str, Any]
    """Of adapter_config.json."""


def export_adapters(
    family: Family,
    task: str | None,
    adapters: Mapping[str, tuple[np.ndarray, np.ndarray]],
    head: Mapping[str, np.ndarray],
    shapes: Shapes,
    config: LoraConfig,
    num_heads: int,
) -> PublishedAdapters:
    """The tensors and the config of adapters, and of the head that was trained whole.

    A Linear that makes several of our products at once has an adapter of all their ranks together, in which each has
    columns of its own.

    Args:
      adapters: (a [L, inputs, r], b [L, r, outputs]) by the path of the linear map they are beside.
      head, shapes: by path: parameters of the head, and shapes of all.

    Raises:
      ConfigError: the family has no linear map for an adapter's product.
    """
    tensors: dict[str, np.ndarray] = {}
    pieces_of: dict[str, int] = {}
    done: set[tuple[str, int | None]] = set()
    saved: dict[str, None] = {}
    for tensor in _tensors(family, task, shapes):
        module = tensor.names[0].rpartition(".")[0]
        if not tensor.pieces[0][0].startswith("encoder."):
            saved[_outermost(module, family.prefix)] = None
            parts = [LAYOUTS[layout].write(head[path]) for path, _, layout in tensor.pieces]
            tensors[PREFIX + tensor.names[0]] = _join(parts, tensor.row.split, num_heads)
            continue
        paths = [path.removesuffix(".kernel") for path, _, _ in tensor.pieces]
        own = [k for k, path in enumerate(paths) if path in adapters and tensor.pieces[k][0] == f"{path}.kernel"]
        if not own:
            continue
        r, a_rows, blocks = config.rank, [], []
        for k, (path, index, layout) in enumerate(tensor.pieces):
            at = slice(None) if index is None else index
            shape = shapes[path] if index is None else shapes[path][1:]
            num_outputs = LAYOUTS[layout].write(np.broadcast_to(np.int8(0), shape)).shape[0]
            block = np.zeros((num_outputs, r * len(own)), np.float32)
            if k in own:
                a, b = adapters[paths[k]]
                done.add((paths[k], index or 0))
                column = own.index(k) * r
                block[:, column : column + r] = LAYOUTS[layout].write(b[at])
                a_rows.append(a[at].reshape(-1, r).T)
            blocks.append(block)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.concatenate(a_rows)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = _join(blocks, tensor.row.split, num_heads)
        pieces_of[module] = len(own)
    wanted = {(path, index) for path, (a, _) in adapters.items() for index in range(a.shape[0])}
    if missing := sorted({path for path, _ in wanted - done}):
        raise ConfigError(f"{family.model_type} has no linear map for the adapters of {', '.join(missing)}.")
    several = {module: count for module, count in pieces_of.items() if count > 1}
    settings = {
        "peft_type": "LORA", "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "target_modules": sorted(pieces_of), "modules_to_save": sorted(saved) or None,
        "rank_pattern": {module: config.rank * count for module, count in several.items()},
        "alpha_pattern": {module: config.alpha * count for module, count in several.items()},
    }  # fmt: skip
    return PublishedAdapters(tensors, settings)


def _outermost(module: str, prefix: str) -> str:
    """The module that is wholly the head's: the first part of its name that the encoder does not share."""
    inner = module.removeprefix(prefix)
    return module[: len(module) - len(inner)] + inner.partition(".")[0]
