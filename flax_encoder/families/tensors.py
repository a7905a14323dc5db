"""Published tensors to our parameters and back, by the rows of a family."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from flax_encoder.config import ConfigError
from flax_encoder.families.configs import read_head
from flax_encoder.families.family import Family, Row


class Layout(NamedTuple):
    """How a parameter of some shape lies in a torch tensor."""

    read: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


def _pairs_to_halves(w: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    w = w.T.reshape(*shape[:-1], shape[-1] // 2, 2)
    return w.swapaxes(-1, -2).reshape(shape)


def _halves_to_pairs(w: np.ndarray) -> np.ndarray:
    halves = w.reshape(*w.shape[:-1], 2, w.shape[-1] // 2)
    return halves.swapaxes(-1, -2).reshape(w.shape[0], -1).T


LAYOUTS = {
    "as_is": Layout(lambda w, shape: w.reshape(shape), lambda w: w),
    "flat": Layout(lambda w, shape: w.reshape(shape), lambda w: w.reshape(-1)),
    # torch keeps [out, in]; our kernels have the inputs' axes first, and heads have an axis of their own.
    "linear": Layout(lambda w, shape: w.T.reshape(shape), lambda w: w.reshape(w.shape[0], -1).T),
    "from_heads": Layout(lambda w, shape: w.T.reshape(shape), lambda w: w.reshape(-1, w.shape[-1]).T),
    # Rotary features that turn as neighbours (2i, 2i + 1) there and as halves (i, i + H/2) here.
    "rotated_pairs": Layout(_pairs_to_halves, _halves_to_pairs),
    "conv": Layout(lambda w, shape: w.transpose(2, 1, 0).reshape(shape), lambda w: w.transpose(2, 1, 0)),
}


def _split(w: np.ndarray, count: int, split: str, heads: int) -> list[np.ndarray]:
    if split == "rows":
        return np.split(w, count)
    by_head = w.reshape(heads, count, -1, *w.shape[1:])
    return [by_head[:, k].reshape(-1, *w.shape[1:]) for k in range(count)]


def _join(parts: list[np.ndarray], split: str, heads: int) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    if split == "rows":
        return np.concatenate(parts)
    by_head = np.stack([p.reshape(heads, -1, *p.shape[1:]) for p in parts], axis=1)
    return by_head.reshape(-1, *parts[0].shape[1:])


Shapes = Mapping[str, tuple[int, ...]]


class _Tensor(NamedTuple):
    """One tensor of a folder: its names, and where its pieces go (path, index in the stack or None, layout)."""

    names: tuple[str, ...]
    pieces: tuple[tuple[str, int | None, str], ...]
    row: Row


def _tensors(family: Family, task: str | None, shapes: Shapes) -> Iterator[_Tensor]:
    """Every tensor that parameters of these shapes stand for, by full names."""
    head = family.heads[task] if task else None
    prefix = family.prefix if head is None or head.prefix is None else head.prefix
    rows = [(row, prefix, "encoder.") for row in family.rows]
    rows += [(row, prefix, "") for row in family.pooler]
    rows += [(row, "", "") for row in (head.rows if head else ())]
    for row, before, root in rows:
        if row.when is not None and (root + row.when[0] in shapes) != row.when[1]:
            continue
        paths = [(root + path, layout) for path, layout in row.ours]
        stack = paths[0][0].partition(".")[0]  # encoder, or decoder
        has_first = any(path.startswith(f"{stack}.first.") for path in shapes)
        count = 1
        if "{i}" in row.theirs[0]:
            count = has_first + max((shapes[p][0] for p in shapes if p.startswith(f"{stack}.layers.")), default=0)
        for i in range(count):
            pieces = []
            for path, layout in paths:
                index = 0 if path.startswith(f"{stack}.first.") else None
                if path.startswith(f"{stack}.layers."):
                    is_first = has_first and i == 0
                    path, index = path.replace(".layers.", ".first.") if is_first else path, i - has_first * (i > 0)
                if path in shapes:
                    pieces.append((path, index, layout))
            if len(pieces) == len(paths):
                yield _Tensor(tuple(before + name.replace("{i}", str(i)) for name in row.theirs), tuple(pieces), row)


def export_tensors(
    family: Family, task: str | None, params: Mapping[str, np.ndarray], num_heads: int
) -> dict[str, np.ndarray]:
    """A folder's tensors from parameters by path (`encoder.embedding.token`); also gradients, which lie alike."""
    shapes = {path: value.shape for path, value in params.items()}
    out: dict[str, np.ndarray] = {}
    written: set[str] = set()
    for tensor in _tensors(family, task, shapes):
        names = tensor.names if task else [name.removeprefix(family.prefix) for name in tensor.names]
        parts = []
        for path, index, layout in tensor.pieces:
            value = params[path] if index is None else params[path][index]
            parts.append(LAYOUTS[layout].write(value))
            written.add(path)
        whole = _join(parts, tensor.row.split, num_heads)
        out |= dict.fromkeys(names[: tensor.row.num_written], whole)
    if unwritten := sorted(set(params) - written):
        raise ConfigError(f"{family.model_type} has no tensor for {', '.join(unwritten)}.")
    return out


def wrapping(family: Family, names: Iterable[str]) -> str:
    """What some program put before the names of a family's tensors, such as DataParallel's `module.`; "" is nothing.

    It is told by the token embedding's name, which ends each such name.
    """
    token = family.rows[0].theirs
    found = {name.removesuffix(end) for name in names for end in token if name.endswith(end)}
    found = {before.removesuffix(family.prefix) for before in found}
    return found.pop() if len(found) == 1 else ""


def unwrapped(family: Family, tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], str]:
    """(tensors without what all of their names begin with, that beginning)."""
    before = wrapping(family, tensors)
    if not before or not all(name.startswith(before) for name in tensors):
        return dict(tensors), ""
    return {name.removeprefix(before): value for name, value in tensors.items()}, before


def _elsewhere(family: Family, tensors: Mapping[str, np.ndarray]) -> str:
    """Where some names begin with what others lack, nobody but the user knows what the others are."""
    if not (before := wrapping(family, tensors)):
        return ""
    others = sorted(name for name in tensors if not name.startswith(before))
    return (
        f" Names under {before!r} look like them, but {others[0]} is not there. Write the file again without it: "
        f"{{name.removeprefix({before!r}): tensor for name, tensor in tensors.items()}}."
    )


class Imported(NamedTuple):
    params: dict[str, np.ndarray]
    """By path, float32: all of the encoder's, and those of heads that the tensors had."""
    unused: list[str]
    """Names of tensors that no parameter needs."""


def plain_name(family: Family, name: str) -> str:
    """A tensor's name without the family's prefix, in today's spelling."""
    plain = name.removeprefix(family.prefix)
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", plain))


def with_table(
    family: Family, published: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The tensors with the token embedding, where a tied head's name for it is the only one that is there. Tables of
    encoder-decoders have several names, and logits often a table of their own: `arranged` has those."""
    if family.decoder is not None or published.get("tie_word_embeddings", True) is False:
        return dict(tensors)
    table, names = family.rows[0].theirs[0], {plain_name(family, name): name for name in tensors}
    for task, head in family.heads.items():
        if table not in names and head.tied in names and getattr(read_head(family, task, published)[0], "tied", False):
            return {**tensors, family.prefix + table: tensors[names[head.tied]]}
    return dict(tensors)


def import_tensors(
    family: Family, task: str | None, tensors: Mapping[str, np.ndarray], shapes: Shapes, num_heads: int
) -> Imported:
    """Parameters of these shapes from a folder's tensors. Names may have the family's prefix or not, and may be old.

    Raises:
      ConfigError: a tensor of the encoder that is missing, with the prefix under which it lies if it does; one of
        another shape than the config says, with its name and both; one of whole numbers; a copy that is none; two names
        of one tensor.
    """
    by_name: dict[str, str] = {}
    for name in tensors:
        plain = plain_name(family, name)
        if plain in by_name:
            raise ConfigError(f"tensors {by_name[plain]} and {name} are two of one meaning; leave one out.")
        by_name[plain] = name
    params: dict[str, np.ndarray] = {}
    missing: list[str] = []
    used: set[str] = set()
    for tensor in _tensors(family, task, shapes):
        found = [name for name in (n.removeprefix(family.prefix) for n in tensor.names) if name in by_name]
        used |= set(found)
        if not found:
            missing += [tensor.names[0]] if tensor.pieces[0][0].startswith(("encoder.", "decoder.")) else []
            continue
        value = np.asarray(tensors[by_name[found[0]]])
        if value.dtype.kind in "iub":
            raise ConfigError(
                f"tensor {by_name[found[0]]} must hold floating-point numbers: it holds {value.dtype}. Quantized "
                f"weights are not read: take the folder that they were made from."
            )
        # Of a bias that is written twice the first is used; tables and kernels that differ are two meanings.
        for other in found[1:] if tensor.row.num_written == 1 else ():
            if not np.array_equal(value, tensors[by_name[other]]):
                raise ConfigError(
                    f"tensors {by_name[found[0]]} and {by_name[other]} are two of one meaning, and differ; leave one "
                    f"out."
                )
        piece_shapes = [shapes[path] if index is None else shapes[path][1:] for path, index, _ in tensor.pieces]
        layouts = [LAYOUTS[layout] for _, _, layout in tensor.pieces]
        blanks = [lay.write(np.broadcast_to(np.int8(0), s)) for lay, s in zip(layouts, piece_shapes, strict=True)]
        expected = _join(blanks, tensor.row.split, num_heads).shape
        if value.shape != expected:
            raise ConfigError(
                f"tensor {by_name[found[0]]} must have shape {list(expected)}, says config.json: found "
                f"{list(value.shape)}."
            )
        parts = _split(value, len(layouts), tensor.row.split, num_heads)
        for part, layout, (path, index, _) in zip(parts, layouts, tensor.pieces, strict=True):
            shape = shapes[path] if index is None else shapes[path][1:]
            if index is None:
                params[path] = layout.read(part, shape).astype(np.float32)
            else:
                stack = params.setdefault(path, np.empty(shapes[path], np.float32))
                stack[index] = layout.read(part, shape)
    if missing:
        raise ConfigError(
            f"the encoder needs tensors that are missing: {', '.join(missing[:8])}.{_elsewhere(family, tensors)}"
        )
    tied = family.heads[task].tied if task else None
    if tied in by_name and tied not in used:
        if not np.array_equal(tensors[by_name[tied]], tensors[by_name[family.rows[0].theirs[0]]]):
            raise ConfigError(
                f"tensor {by_name[tied]} must equal the token embedding, for config.json ties them: it differs. "
                "Set tie_word_embeddings to false to use it."
            )
        used.add(tied)
    return Imported(params, sorted(by_name[name] for name in set(by_name) - used))
