"""Which parameters are trained, and at what share of the learning rate: both go by names, and by layers of a stack.

A parameter's name is its path with dots. Layers lie in stacked arrays, and their names count them: what is at
`encoder.layers` in the tree is `encoder.layers.0`, `encoder.layers.1` and so on here, and a first layer that lies in a
stack of its own (`encoder.first`) is `encoder.layers.0`.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np

from flax_encoder.config import ConfigError, OptimizerConfig

Path = tuple[Any, ...]
_STACKS = ("first", "layers")


def layer_numbers(params: Any) -> dict[Path, tuple[range, int]]:
    """(numbers of the layers that lie in an array, from 0; how many layers there are in all) of every stacked array."""
    found = {}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
        at = next((i for i, key in enumerate(path) if key.key in _STACKS), None)
        if at is not None:
            found[path] = (path[:at], path[at].key, leaf.shape[0])
    sizes = {(root, name): size for root, name, size in found.values()}
    numbers = {}
    for path, (root, name, size) in found.items():
        first = sizes.get((root, "first"), 0)
        start = first if name == "layers" else 0
        numbers[path] = range(start, start + size), first + sizes.get((root, "layers"), 0)
    return numbers


def names_of(path: Path, layers: range | None) -> list[str]:
    """The names of the parameters that lie in an array: one a layer."""
    keys = [key.key for key in path]
    if layers is None:
        return [".".join(keys)]
    at = next(i for i, key in enumerate(keys) if key in _STACKS)
    return [".".join([*keys[:at], "layers", str(i), *keys[at + 1 :]]) for i in layers]


def trained(config: OptimizerConfig, params: Any) -> Any:
    """A tree like `params`: True where an array is trained, False where it is frozen, and an array of bool
    [L, 1, ...] where some of its layers are.

    Raises:
      ConfigError: a name in optimizer.freeze that no parameter has, or all are frozen.
    """
    patterns = (*config.freeze, *(("*embedding.token",) if config.freeze_embedding else ()))
    numbers, unused, names = layer_numbers(params), set(patterns), []

    def of(path: Path, leaf: Any) -> bool | np.ndarray:
        own = names_of(path, numbers[path][0] if path in numbers else None)
        names.extend(own)
        hits = [[p for p in patterns if fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*")] for name in own]
        unused.difference_update(*hits)
        is_trained = np.array([not hit for hit in hits])
        if is_trained.all() or not is_trained.any():
            return bool(is_trained[0])
        return is_trained.reshape(-1, *[1] * (leaf.ndim - 1))

    mask = jax.tree_util.tree_map_with_path(of, params)
    unknown = [p for p in patterns if p in unused]
    if unknown and unknown[0] in config.freeze:
        raise ConfigError(_unknown(unknown[0], names))
    if not any(np.any(m) for m in jax.tree.leaves(mask)):
        raise ConfigError(f"something must be trained: optimizer.freeze names all parameters, {' '.join(patterns)}.")
    return mask


def _unknown(pattern: str, names: Sequence[str]) -> str:
    beginnings = {".".join(name.split(".")[:k]) for name in names for k in range(1, name.count(".") + 2)}
    close = difflib.get_close_matches(pattern, sorted(beginnings), n=1, cutoff=0.6)
    hint = f" Did you mean {close[0]}?" if close else ""
    known = sorted({re.sub(r"\.layers\.\d+\.", ".layers.*.", name) for name in names})
    return f"optimizer.freeze must name parameters: {pattern!r} fits none.{hint} There are {', '.join(known)}."


def count_trained(mask: Any, params: Any) -> tuple[int, int]:
    """(all numbers of all parameters, those that are trained)."""
    sizes = [
        (p.size, int(np.mean(m) * p.size + 0.5))
        for p, m in zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True)
    ]
    return sum(size for size, _ in sizes), sum(size for _, size in sizes)


def rates(config: OptimizerConfig, params: Any, mask: Any) -> Any:
    """A tree like `params`: what each array's learning rate is multiplied by, a number, or an array [L, 1, ...] where
    its layers differ. What stands on the encoder has its own peak rate, and is None here."""
    numbers = layer_numbers(params)
    last = {path[0].key: count for path, (_, count) in numbers.items()}
    decay = config.layer_decay

    def of(path: Path, leaf: Any, is_trained: bool | np.ndarray) -> float | np.ndarray:
        if path in numbers:
            layers, count = numbers[path]
            share = np.array([decay ** (count - 1 - i) for i in layers], np.float32)
            if isinstance(is_trained, np.ndarray):
                share = share * is_trained.reshape(-1)
            return float(share[0]) if (share == share[0]).all() else share.reshape(-1, *[1] * (leaf.ndim - 1))
        is_below = path[0].key in last and not path[1].key.startswith("final")
        return decay ** last[path[0].key] if is_below else 1.0

    return jax.tree_util.tree_map_with_path(of, params, mask)


def is_head(path: Path) -> bool:
    """Whether a parameter stands on the encoder: it is of neither a stack of layers nor of adapters beside one."""
    return path[0].key not in ("encoder", "decoder", "lora")


def split(params: Any, mask: Any) -> tuple[Any, Any]:
    """(what is trained, what is frozen): two trees like `params`, with None for what is in the other."""
    is_any = jax.tree.map(lambda m: bool(np.any(m)), mask)
    return (
        jax.tree.map(lambda p, m: p if m else None, params, is_any),
        jax.tree.map(lambda p, m: None if m else p, params, is_any),
    )


def join(own: Any, rest: Any, mask: Any) -> Any:
    """The inverse of `split`, where the gradient of a frozen layer in a stack is 0."""

    def one(m: bool | np.ndarray, a: Any, b: Any) -> Any:
        if a is None:
            return b
        return a if m is True else jax.numpy.where(m, a, jax.lax.stop_gradient(a))

    return jax.tree.map(one, mask, own, rest, is_leaf=lambda x: x is None)


def filled(grads: Any, params: Any) -> Any:
    """Gradients with zeros where there are none."""
    missing: Iterator[Any] = (g for g in jax.tree.leaves(grads, is_leaf=lambda x: x is None))
    return jax.tree.map(lambda p: jax.numpy.zeros_like(p) if (g := next(missing)) is None else g, params)
