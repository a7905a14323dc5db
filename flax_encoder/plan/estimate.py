"""What XLA's compilers say a program will cost, read from the text of the compiled program.

It is summed over the schedule: the body of a loop times its trip count, a conditional at its dearest branch. Copies
between memories that run beside the schedule (copy-start, slice-start) count nothing.

For TPUs the compiler writes "estimated_cycles" beside most instructions, matrix products among them.

For GPUs it writes "reification_cost" beside fusions, one entry a model. Its model of a fusion's tiles
("indexing-cost-model") is read for those that Triton makes, which the general one, without a name, gives hours; the
general one for all others. Both are chiefly the bytes at HBM's bandwidth, plus arithmetic that they hide but in part,
and which they put high: the part that is memory's is shown beside. A matrix product counts at the longer of
its arithmetic over the chip's `product_fraction` of peak and its bytes over the bandwidth: the compiler's own estimate
of it ("sol") is from a table of measurements, but some fifty times too long where a result of bfloat16 operands is
float32, whose sizes it counts in bytes. Between kernels nothing is counted.

Attention kernels (Pallas, cuDNN) carry no estimate and are counted at the longest of: their products
over a stated fraction of the chip's peak, the bytes they move, and on TPUs the bundles of instructions that the
compiler made of them, one a cycle (schedules.py); nothing else knows of the work that is no product, such as dropout.
What carries no estimate and is not free either (gathers, collectives) is listed in `unestimated`, so that a sum never
looks more whole than it is.
"""

import collections
import math
import re
from typing import Any, NamedTuple

from flax_encoder.ops.attention.flash_kernel import BIAS_SAID
from flax_encoder.plan.compiled_text import (
    Computation,
    Instruction,
    arrays,
    branches,
    computations,
    flops_of_products,
    ints,
    num_bytes,
    trip_count,
)
from flax_encoder.plan.schedules import KERNEL_PRODUCTS, stretch_shares, tile_pairs
from flax_encoder.plan.targets import Chip

KERNEL_TARGETS = ("tpu_custom_call", "__cudnn$fmha", "__gpu$xla.gpu.triton")
# Names for what is there already, or work that runs beside the schedule.
FREE = frozenset((
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "copy-start", "copy-done", "slice-start", "slice-done", "async-done", "async-update",
    "all-reduce-done", "all-gather-done", "collective-permute-done",
))  # fmt: skip
COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
)  # fmt: skip
FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast")
_FLOATS = ("bf16", "f16", "f32")
NEGLIGIBLE_BYTES = 64 * 1024  # scalars and small vectors, which the compiler does not estimate


class Line(NamedTuple):
    """An instruction of the schedule, and how often it runs."""

    instruction: Instruction
    count: int
    hbm_bytes: int
    """What one run reads and writes outside fast memory."""
    product_flops: int
    """Of one run's matrix products."""
    seconds: float = 0.0
    """Of one run; a kernel's are `kernel_times`."""
    memory_seconds: float = 0.0
    is_async: bool = False
    """Whether other work may run beside it."""


class Estimate(NamedTuple):
    lines: list[Line]
    """With the compiler's estimate."""
    products: list[Line]
    """Of a library."""
    kernels: list[Line]
    unestimated: list[Line]
    collectives: list[Line]
    """What devices do together, whose time is their links' (collectives.py)."""

    @property
    def seconds(self) -> float:
        """Without kernels."""
        return total(self.lines) + total(self.products)


def total(lines: list[Line]) -> float:
    return sum((line.count * line.seconds for line in lines), 0.0)


def estimate(text: str, chip: Chip) -> Estimate:
    """Read a compiled program.

    Raises:
      ValueError: a loop whose trip count is not in the text, with the loop's name.
    """
    program, entry = computations(text)
    made = Estimate([], [], [], [], [])
    _walk(program, entry, 1, chip, made)
    return made


def _walk(
    program: dict[str, Computation], name: str, count: int, chip: Chip, into: Estimate, is_async: bool = False
) -> None:
    own = program[name]
    for x in own.values():
        if x.opcode == "while":
            _walk(program, x.attribute("body"), count * trip_count(program, own, x), chip, into)
        elif x.opcode == "conditional":
            into_each = []
            for branch in branches(x):
                into_each.append(Estimate([], [], [], [], []))
                _walk(program, branch, count, chip, into_each[-1])
            # What a kernel takes is known only later; a branch that has one is the dearer.
            dearest = max(into_each, key=lambda one: (bool(one.kernels), one.seconds))
            for all_lines, lines in zip(into, dearest, strict=True):
                all_lines += lines
        elif x.opcode in ("call", "async-start"):
            inner = x.attribute("to_apply") or x.attribute("calls")
            _walk(program, inner, count, chip, into, is_async or x.opcode == "async-start")
        elif x.opcode not in FREE:
            line = _line(program, own, x, count)
            if inner := _collectives_of(program, x):
                into.collectives.extend(
                    line._replace(instruction=each, is_async=is_async or each.opcode.endswith("-start"))
                    for each in inner
                )
            elif x.is_library_product:
                into.products.append(_at_the_longest(line, chip, chip.product_fraction * _share_of_peak(own, x, chip)))
            elif (x.custom_call_target or "").startswith(KERNEL_TARGETS):
                into.kernels.append(line)
            elif chip.platform == "cpu":  # whose compiler expects nothing; the peak is of what its products reach
                into.lines.append(_at_the_longest(line, chip, 1.0))
            elif expected := x.expected(chip):
                into.lines.append(line._replace(seconds=expected[0], memory_seconds=expected[1]))
            elif x.custom_call_target not in FREE_TARGETS and num_bytes(x.shape) > NEGLIGIBLE_BYTES:
                into.unestimated.append(line)


def _at_the_longest(line: Line, chip: Chip, fraction: float) -> Line:
    """As long as its products take at a fraction of the peak, or its bytes, whichever is longer."""
    moved = line.hbm_bytes / chip.bytes_per_second
    return line._replace(
        seconds=max(line.product_flops / (fraction * chip.peak_flops), moved), memory_seconds=moved
    )  # fmt: skip


def _share_of_peak(own: Computation, x: Instruction, chip: Chip) -> float:
    kinds = {dtype for operand in x.operands[:2] if operand in own for dtype, *_ in arrays(own[operand].shape)[:1]}
    return chip.float32_share if kinds == {"f32"} else 1.0


def _collectives_of(program: dict[str, Computation], x: Instruction) -> list[Instruction]:
    """What devices do together in an instruction: itself, or what was fused into it."""
    if x.opcode == "fusion":
        inner = program.get(x.attribute("calls") or "", {})
        return [found for each in inner.values() for found in _collectives_of(program, each)]
    return [x] if x.opcode.removesuffix("-start") in COLLECTIVES else []


def _line(program, own: Computation, x: Instruction, count: int) -> Line:
    # The last result of a call of cuBLAS is room to work in.
    shape = re.sub(r", s8\[\d+\]\{0\}\)$", ")", x.shape) if x.is_library_product else x.shape
    moved = num_bytes(shape, True) + sum(num_bytes(own[o].shape, True) for o in x.operands if o in own)
    return Line(x, count, moved, flops_of_products(program, own, x))


def kernel_flops(line: Line, segment_ids: Any = None) -> int:
    """FLOPs of one run of an attention kernel: its products, of all the pairs of tokens whose blocks it visits.

    Raises:
      ValueError: a kernel that KERNEL_PRODUCTS does not know.
    """
    x = line.instruction
    if (x.custom_call_target or "").startswith("__cudnn$fmha"):
        # B N T S, masked or not.
        pairs = re.search(r'"intermediate_tensor_shape":.*?"dimensions": ?\[([^\]]*)\]', x.rest)[1]
        head_dim = arrays(re.search(r"operand_layout_constraints=\{(.*)", x.rest)[1])[0][1][-1]
        return (5 if "Backward" in x.custom_call_target else 2) * 2 * math.prod(ints(pairs)) * head_dim
    names = [name for name in KERNEL_PRODUCTS if name in x.op_name or name in x.name]
    if not names:
        raise ValueError(
            f"a Pallas kernel's arithmetic must be known: got {x.name} ({x.op_name}), known are "
            f"{', '.join(KERNEL_PRODUCTS)}. Add it to KERNEL_PRODUCTS."
        )
    layouts = re.search(r"operand_layout_constraints=\{(.*?\})\}", x.rest)[1]
    operands = arrays(layouts)
    name = f"{x.name} {x.op_name}"
    floats = [sizes for dtype, sizes, _ in operands if dtype in _FLOATS and len(sizes) >= 3]
    if len(floats[0]) == 4:
        (B, T, N, H), (_, S, *_) = floats[BIAS_SAID in name :][:2]
        if (of_tiles := tile_pairs(name, segment_ids, (T, S))) is not None:
            return KERNEL_PRODUCTS[names[0]] * 2 * B * of_tiles * N * H
    # The widest, as RoPE's tables are narrower than all heads side by side.
    *_, length, width = sizes = max(floats, key=math.prod)
    of_a_row = re.search(r"_of_(\d+)_pairs", name)  # `rows` says how many its window leaves
    met = length * sum(keys * share for keys, share in stretch_shares(name, segment_ids).items())
    pairs = math.prod(sizes[:-2]) * (int(of_a_row[1]) if of_a_row else round(met) or length * length)
    # splash has first, for each block of queries, which blocks of keys it visits.
    grid = next((s for dtype, s, _ in operands if dtype in ("s8", "s16", "s32") and len(s) >= 3), None)
    if names[0].startswith("splash") and grid is not None:
        pairs = pairs * math.prod(grid[-2:]) // max(grid[-2:]) ** 2
    return KERNEL_PRODUCTS[names[0]] * 2 * pairs * width


class KernelTimes(NamedTuple):
    """Seconds of one run."""

    products: float
    bytes_moved: float
    bundles: float | None


def kernel_times(
    line: Line, chip: Chip, fraction: float, cycles: dict[str, int], segment_ids: Any = None
) -> KernelTimes:
    # Of kernels that are alike the compiler writes one.
    name = line.instruction.name
    alike = [n for other, n in cycles.items() if re.sub(r"\.\d+$", "", other) == re.sub(r"\.\d+$", "", name)]
    own = cycles.get(name, max(alike, default=None))
    layouts = re.search(r"operand_layout_constraints=\{(.*?\})\}", line.instruction.rest)
    kinds = {dtype for dtype, *_ in arrays(layouts[1])} if layouts else set()
    share = 1.0 if kinds & {"bf16", "f16"} else chip.float32_share
    return KernelTimes(
        kernel_flops(line, segment_ids) / (fraction * share * chip.peak_flops),
        line.hbm_bytes / chip.bytes_per_second,
        None if own is None else own / chip.clock_hertz,
    )


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes that a compiled program (`jax.stages.Compiled`) needs on a device, by what for."""
    memory = compiled.memory_analysis()
    return {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "temp", "output", "alias")}


def report(
    text: str, memory: dict[str, int], chip: Chip, fraction: float, cycles: dict[str, int], segment_ids: Any = None
) -> dict[str, Any]:
    """Of a compiled program's text and its `memory_of`: seconds in parts, memory, and what is not in them.

    `cycles` is from `schedules.kernel_cycles`, for the same `segment_ids`; kernels that it lacks are counted in
    "kernels_without_schedule".
    """
    made = estimate(text, chip)
    compiler, products = total(made.lines), total(made.products)
    times = [(line.count, kernel_times(line, chip, fraction, cycles, segment_ids)) for line in made.kernels]
    kernels = sum(count * max(t for t in each if t is not None) for count, each in times)
    unestimated: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for line in made.unestimated + made.collectives:
        x = line.instruction
        of = unestimated[re.sub(r"[.\d]+$", "", x.name) + f" ({x.custom_call_target or x.opcode})"]
        of[0] += line.count
        of[1] += line.count * num_bytes(x.shape)
    return {
        "step_seconds": compiler + products + kernels,
        "compiler_seconds": compiler,
        "compiler_memory_seconds": sum(line.count * line.memory_seconds for line in made.lines),
        "product_seconds": products,
        "product_memory_seconds": sum(line.count * line.memory_seconds for line in made.products),
        "launches": sum(line.count for lines in made for line in lines),
        "kernel_seconds": kernels,
        "kernel_product_seconds": sum(count * each.products for count, each in times),
        "kernel_byte_seconds": sum(count * each.bytes_moved for count, each in times),
        "kernel_bundle_seconds": sum(count * (each.bundles or 0.0) for count, each in times),
        "kernel_calls": sum(count for count, _ in times),
        "kernels_without_schedule": sum(
            line.count
            for line, (_, each) in zip(made.kernels, times, strict=True)
            if each.bundles is None and line.instruction.custom_call_target == "tpu_custom_call"
        ),
        "argument_bytes": memory["argument"],
        "temporary_bytes": memory["temp"],
        "output_bytes": memory["output"],
        "alias_bytes": memory["alias"],
        "unestimated": dict(unestimated),
    }


def costliest(text: str, chip: Chip, number: int) -> list[dict[str, Any]]:
    """The costliest instructions with an estimate; those alike but for numbers in their names are one row.

    "hbm_milliseconds" is what their operands and results in HBM take at its bandwidth, "product_milliseconds" what
    their matrix products take at peak: where both are far below "milliseconds", elementwise work or the layout is what
    costs. "source" is where they were traced, in the project's own files.
    """
    groups: dict[tuple[str, ...], list[Line]] = collections.defaultdict(list)
    made, frames = estimate(text, chip), _source_lines(text)
    for line in made.lines + made.products:
        x = line.instruction
        frame = re.search(r"stack_frame_id=(\d+)", x.rest)
        source = frames.get(int(frame[1]), "") if frame else ""
        groups[_without_numbers(x.op_name or x.name), _plain(x.shape), source].append(line)
    rows = []
    for (op_name, shape, source), lines in groups.items():
        seconds = total(lines)
        moved = sum(line.count * line.hbm_bytes for line in lines)
        rows.append(
            {
                "milliseconds": 1e3 * seconds,
                "share": seconds / made.seconds,
                "count": sum(line.count for line in lines),
                "hbm_milliseconds": 1e3 * moved / chip.bytes_per_second,
                "product_milliseconds": 1e3 * sum(line.count * line.product_flops for line in lines) / chip.peak_flops,
                "shape": shape,
                "op_name": op_name,
                "source": source,
                "example": lines[0].instruction.name,
            }
        )
    return sorted(rows, key=lambda row: -row["milliseconds"])[:number]


def _source_lines(text: str, depth: int = 3) -> dict[int, str]:
    """By stack frame, the innermost `depth` places outside installed packages, innermost last."""
    tables = {}
    for name in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
        block = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
        entries = (line.split(" ", 1) for line in block[1].splitlines()) if block else ()
        tables[name] = {int(number): entry for number, entry in entries}
    frames = {n: _numbers(entry) for n, entry in tables["StackFrames"].items()}
    places = {n: _numbers(entry) for n, entry in tables["FileLocations"].items()}

    def chain(frame: int) -> list[str]:
        found: list[str] = []
        while frame in frames and len(found) < depth:
            place = places[frames[frame]["file_location_id"]]
            path = tables["FileNames"][place["file_name_id"]].strip('"')
            file = path.rsplit("/", 1)[-1]
            # Of a file's helpers that call one another the innermost says most.
            if "site-packages" not in path and not (found and found[0].startswith(f"{file}:")):
                found.insert(0, f"{file}:{place['line']}")
            frame = frames[frame]["parent_frame_id"] - 1  # written one too high: the outermost frame's is 1
        return found

    return {n: " > ".join(chain(n)) for n in frames}


def _numbers(entry: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", entry)}


def _without_numbers(op_name: str) -> str:
    return re.sub(r"(?<=[_./(])\d+(?=[/.)]|$)", "N", op_name)


def _plain(shape: str) -> str:
    """Without layouts; fast memory is marked by *."""
    return re.sub(r"\{[^}]*\}", lambda layout: "*" if "S(1)" in layout[0] else "", shape).replace("/*index=5*/", "")
