"""What libtpu's dumped schedules say of Pallas kernels: the bundles of instructions that one runs, one a cycle."""

import pathlib
import re
from typing import Any

import numpy as np

from flax_encoder.ops.attention.flash_kernel import tiles_met
from flax_encoder.ops.attention.rows_kernel import reach

# A Pallas kernel's name, and how many products of queries by keys by head dim it makes: the backward pass of `rows`
# makes the logits again (5), those of `splash` and `flash` make them in each of their two kernels (3 and 4), and that
# of a learned bias once more.
KERNEL_PRODUCTS = {
    "forward_kernel": 2,
    "backward_kernel": 5,
    "query_gradient_kernel": 3,
    "key_gradient_kernel": 4,
    "bias_gradient_kernel": 2,
    "splash_mha_fwd": 2,
    "splash_mha_dq": 3,
    "splash_mha_dkv": 4,
}


def stretch_shares(name: str, segment_ids: Any) -> dict[int, float]:
    """Keys that a part of a row's queries meets, as the name of `rows`' kernel states them, and the share of parts."""
    found = re.search(r"_of_(\d+)_by_([\d_]+)_pairs", name)
    if not found:
        return {}
    sizes = tuple(int(n) for n in found[2].split("_"))
    which = np.asarray(reach(segment_ids, segment_ids, int(found[1]), sizes))[..., 1]
    return dict(zip(sizes, (np.bincount(which.ravel(), minlength=len(sizes)) / which.size).tolist(), strict=True))


def tile_pairs(name: str, segment_ids: Any, lengths: tuple[int, int]) -> int | None:
    """Pairs of a query and a key in all tiles of a row that meet, on average, as the name of `flash`' kernel states
    them; None for another's.

    Args:
      segment_ids: [B T] of the rows that the plan is of, or None. Of others, such as a decoder's, all tiles count.
      lengths: of (queries, keys).
    """
    found = re.search(r"_of_(\d+)_by_(\d+)_tiles(?:_within_(\d+)_(\d+))?", name)
    if not found:
        return None
    own, met, *window = (int(n) for n in found.groups() if n)
    if segment_ids is not None and lengths != segment_ids.shape[1:] * 2:
        segment_ids = None
    shape = (1 if segment_ids is None else len(segment_ids), *lengths[:: -1 if "key_gradient" in name else 1])
    met_by_each = tiles_met(segment_ids, segment_ids, tuple(window) or None, own, met, shape)
    first, stop = np.moveaxis(np.asarray(met_by_each), 2, 0)
    return own * met * int(np.maximum(stop - first, 0).sum()) // shape[0]


def dump_schedules(folder: pathlib.Path) -> str:
    """The LIBTPU_INIT_ARGS with which the compiler writes what `kernel_cycles` reads."""
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"


def kernel_cycles(folder: pathlib.Path, segment_ids: Any = None) -> dict[str, int]:
    """By instruction, the bundles that it runs through, where it has no more than one loop (a kernel's is its grid).

    Waits for memory are not in it. What a kernel skips but for the first or the last of a row's blocks counts once in
    as many turns as its name states blocks ("in_8_blocks_of_6_groups"), what it does for the first group of heads alone
    once in as many groups too, and what it does by a row's documents (`stretch_shares`) as often as those of
    `segment_ids` [B T] ask for it; other regions that are skipped in some turns count in all.
    """
    found = {}
    for path in folder.glob("*-final_bundles.txt"):
        name = re.match(r"\d+-(.*)-\d+-", path.name)[1]
        if any(kernel in name for kernel in KERNEL_PRODUCTS) and "schedule-analysis" not in path.name:
            cut = re.search(r"_in_(\d+)_blocks_of_(\d+)_groups", name)
            shares = tuple(stretch_shares(name, segment_ids).values())
            found[name] = bundle_cycles(path.read_text(), *map(int, cut.groups() if cut else (1, 1)), shares)
    return {name: cycles for name, cycles in found.items() if cycles is not None}


def bundle_cycles(schedule: str, blocks: int = 1, groups: int = 1, shares: tuple[float, ...] = ()) -> int | None:
    """Of a schedule as text; None if it has loops within loops.

    Branches around a part of what the kernel itself does, the longest stretch that a branch goes around, are taken but
    once in `blocks` turns, the first in `blocks` x `groups`. With `shares` those after the first, or the first two
    where there are groups, are alternatives up to perhaps the last, as many for each part of the queries as there are
    shares, of which each is taken in its share of all turns.
    """
    # `0x1f LB: > { ... }` is a bundle within one loop; what follows it may go on for lines.
    bundles = re.findall(r"^ *(?:0x[0-9a-f]+|0) +(?:\w\w)?: (?:(?!^ *0x).*\n?)*", schedule, re.M)
    depths = [bundle.split(": ", 1)[1].split("{")[0].count(">") for bundle in bundles]
    turns = [int(n) for n in re.findall(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test", schedule)]
    if max(depths) > 1 or len(turns) > 1:
        return None
    stretches = []
    for i, bundle in enumerate(bundles):
        if branch := re.search(r"sbr\.rel [^;]*target = \$region(\d+)", bundle):
            ends = (j for j in range(i + 1, len(bundles)) if re.search(rf"region {branch[1]}\b", bundles[j]))
            stretches.append(range(i + 1, next(ends, i + 1)))
    body = max(stretches, key=len, default=range(0))
    branches: list[range] = []  # without those within others; `stretches` are in order
    for s in stretches:
        if s is not body and s and s[0] in body and s[-1] in body and not (branches and s[0] in branches[-1]):
            branches.append(s)
    taken = [1 / blocks] * len(branches)
    taken[:1] = [1 / (blocks * groups)] * len(taken[:1])
    if shares:
        alternatives = (len(branches) - 1) // len(shares) * len(shares)
        others = len(branches) - alternatives
        if others > (2 if groups == 1 else 3):
            return None
        first = 1 if groups == 1 else min(others, 2)
        taken[first : first + alternatives] = shares * (alternatives // len(shares))
    skipped = sum((1 - often) * sum(depths[i] == 1 for i in s) for s, often in zip(branches, taken, strict=True))
    return depths.count(0) + round((depths.count(1) - skipped) * (turns[0] if turns else 0))
