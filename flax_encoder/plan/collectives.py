"""What devices send one another in a compiled program: how many bytes, over which axes of the mesh."""

import collections
import itertools
import math
import re
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from flax_encoder.plan.compiled_text import Instruction, num_bytes
from flax_encoder.plan.estimate import Line
from flax_encoder.plan.targets import GPUS_PER_HOST, NETWORK_BYTES_PER_SECOND, Chip

# Bytes that a device sends for each byte of the result, of n devices, where they pass it on around a ring.
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1.0,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}


class Collective(NamedTuple):
    """One operation of the schedule that devices do together."""

    kind: str
    axes: tuple[str, ...]
    """Of the mesh, along which its devices lie."""
    count: int
    """How often a step does it."""
    result_bytes: int
    """Of one, on a device."""
    seconds: float
    """Of one, at the links' bandwidth."""
    is_async: bool
    """Whether other work may run meanwhile."""


def collectives(lines: list[Line], mesh: Mesh, chip: Chip) -> list[Collective]:
    """Those of a schedule (`estimate.Estimate.collectives`), for the devices of a mesh."""
    found = []
    for line in lines:
        x, kind = line.instruction, line.instruction.opcode.removesuffix("-start")
        groups = _groups(x, mesh.size)
        n = 2 if kind == "collective-permute" else groups.shape[1]
        if n > 1:
            size = _result_bytes(kind, x)
            seconds = _SENT[kind](n) * size / _bandwidth(groups, chip)
            found.append(Collective(kind, _axes(groups, mesh), line.count, size, seconds, line.is_async))
    return found


def summary(found: list[Collective]) -> list[dict[str, Any]]:
    """Those of one kind and of the same axes together, the most bytes first."""
    groups: dict[tuple[str, tuple[str, ...]], list[Collective]] = collections.defaultdict(list)
    for one in found:
        groups[one.kind, one.axes].append(one)
    rows = [
        {
            "kind": kind,
            "axes": list(axes),
            "count": sum(one.count for one in alike),
            "bytes": sum(one.count * one.result_bytes for one in alike),
            "seconds": sum(one.count * one.seconds for one in alike),
        }
        for (kind, axes), alike in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def exposed_seconds(found: list[Collective], compute_seconds: float) -> float:
    """What a step takes longer for them: those that nothing else runs beside, and of the others what exceeds the
    computing."""
    waited = sum((one.count * one.seconds for one in found if not one.is_async), 0.0)
    beside = sum((one.count * one.seconds for one in found if one.is_async), 0.0)
    return waited + max(0.0, beside - compute_seconds)


def _result_bytes(kind: str, x: Instruction) -> int:
    # What a start gives is a tuple of its operand, its result and perhaps two counters.
    shape = x.shape
    if x.opcode.endswith("-start") and kind != "all-reduce":
        arrays = re.findall(r"[a-z]\w*\[[\d,]*\](?:\{[^}]*\})?", shape)
        data = [array for array in arrays if not array.startswith(("u32[]", "s32[]"))]
        shape = " ".join(data[len(data) // 2 :])
    return num_bytes(shape)


def _groups(x: Instruction, size: int) -> np.ndarray:
    """Devices that do it together, by their place in the mesh: [groups, devices]."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", x.rest):
        return np.array([[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])])
    if tiled := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", x.rest):
        shape, of, order = ([int(n) for n in (text or "").split(",") if n] for text in tiled.groups())
        ids = np.arange(math.prod(of)).reshape(of)
        return (ids.transpose(order) if order else ids).reshape(shape[0], -1)
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", x.rest):
        return _along(*named.groups())
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", x.rest)
    rows = [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", listed[1])] if listed else []
    return np.array(rows or [list(range(size))])


def _along(axes: str, order: str | None, chosen: str) -> np.ndarray:
    """Groups along `chosen` of the axes of a mesh as XLA writes it: 'a'=2,'b'=4 has eight devices, in the order
    [2,2,2]T(1,0,2) where it is given; 'b':(2)2 is the part of b that has two parts before it."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if order and (turned := re.search(r"\[([\d,]+)\]T\(([\d,]+)\)", order)):
        shape, axes_of = ([int(n) for n in text.split(",")] for text in turned.groups())
        ids = ids.reshape(shape).transpose(axes_of)
    spans: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", chosen):
        spans[name].append((int(before or 1), int(before or 1) * int(size or sizes[name])))
    pieces: list[tuple[int, bool]] = []  # sizes of the axes' parts, and whether each is along the groups
    for name, size in sizes.items():
        cuts = sorted({1, size, *itertools.chain(*spans[name])})
        for low, high in itertools.pairwise(cuts):
            pieces.append((high // low, any(a <= low and high <= b for a, b in spans[name])))
    within = [i for i, (_, is_along) in enumerate(pieces) if is_along]
    order_of = [i for i in range(len(pieces)) if i not in within] + within
    ids = ids.reshape([size for size, _ in pieces]).transpose(order_of)
    return ids.reshape(-1, math.prod(pieces[i][0] for i in within))


def _axes(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    places = np.stack(np.unravel_index(groups, mesh.devices.shape), -1)
    varies = (places != places[:, :1]).any((0, 1))
    return tuple(itertools.compress(mesh.axis_names, varies.tolist()))


def _bandwidth(groups: np.ndarray, chip: Chip) -> float:
    is_within_host = (groups // GPUS_PER_HOST == groups[:, :1] // GPUS_PER_HOST).all()
    return chip.link_bytes_per_second if chip.platform == "tpu" or is_within_host else NETWORK_BYTES_PER_SECOND
