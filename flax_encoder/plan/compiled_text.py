"""The text of a program that XLA compiled: its computations, their instructions, sizes, products and loops."""

import json
import math
import re
from typing import NamedTuple

from flax_encoder.plan.targets import Chip

CUBLAS_TARGET = "__cublas"
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s64": 8, "u64": 8, "f64": 8}


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    """As written, with layout; S(1) in a layout is fast memory."""
    opcode: str
    operands: tuple[str, ...]
    rest: str
    """Everything after the operands."""

    def expected(self, chip: Chip) -> tuple[float, float] | None:
        """Seconds that the compiler expects of one run, and how many of them memory takes alone (0: it doesn't say)."""
        if found := re.search(r'"estimated_cycles":"(\d+)"', self.rest):
            return int(found[1]) / chip.clock_hertz, 0.0
        found = re.search(r'"reification_cost":(\[.*?\])', self.rest)
        costs = {cost["name"]: cost for cost in json.loads(found[1])} if found else {}
        cost = costs.get("indexing-cost-model" if '"kind":"__triton"' in self.rest else "")
        return (1e-6 * cost["exec_time_us"], 1e-6 * cost["memory_access_time_us"]) if cost else None

    @property
    def is_library_product(self) -> bool:
        """Whether it is a matrix product of cuBLAS or, with what surrounds it, of Triton; on TPUs all are fusions."""
        target = self.custom_call_target or ""
        return target.startswith(CUBLAS_TARGET) or re.search(r'"kind":"__triton\w*gemm', self.rest) is not None

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def custom_call_target(self) -> str | None:
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else None

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


Computation = dict[str, Instruction]


def computations(text: str) -> tuple[dict[str, Computation], str]:
    """The program's computations by name, each its instructions in order (the last is its root), and the entry's."""
    found: dict[str, Computation] = {}
    entry, own, pending = "", None, ""

    def finish():
        if pending and own is not None:
            instruction = _instruction(pending)
            own[instruction.name] = instruction

    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            own, pending = found.setdefault(head[2], {}), ""
            entry = head[2] if head[1] else entry
        elif re.match(r"\s+(ROOT )?%[\w.\-]+ = ", line):
            finish()
            pending = line
        elif line == "}" and own is not None and pending.count("{") == pending.count("}"):
            finish()
            own, pending = None, ""
        elif pending:  # some attributes of kernels are several lines long
            pending += " " + line
    if not entry:
        raise ValueError("the text of a compiled program must have an ENTRY computation: got none.")
    return found, entry


def _instruction(line: str) -> Instruction:
    # A kernel's code is most of the text.
    line = re.sub(r'"body":"[^"]*"', '"body":""', line)
    name, right = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)", line).groups()
    found = re.search(r"\s([a-z][\w\-]*)\(", right)
    depth, stop = 1, found.end()
    while depth:
        depth += {"(": 1, ")": -1}.get(right[stop], 0)
        stop += 1
    operands = tuple(re.findall(r"%([\w.\-]+)", right[found.end() : stop - 1]))
    if found[1] in ("constant", "parameter"):
        operands = (right[found.end() : stop - 1],)
    return Instruction(name, right[: found.start()], found[1], operands, right[stop:])


def arrays(shape: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(dtype, sizes, layout) of each array in a shape."""
    found = re.findall(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", shape)
    return [(dtype, tuple(int(n) for n in sizes.split(",") if n), layout) for dtype, sizes, layout in found]


def num_bytes(shape: str, hbm_only: bool = False) -> int:
    return sum(
        math.prod(sizes) * _BYTES.get(dtype, 4) for dtype, sizes, layout in arrays(shape)
        if not (hbm_only and re.search(r"S\([1-9]\)", layout))
    )  # fmt: skip


def flops_of_products(program: dict[str, Computation], own: Computation, x: Instruction) -> int:
    """FLOPs of the matrix products that an instruction is or has in it, of one run.

    Args:
      own: the computation that it stands in, which has its operands' shapes.
    """
    if x.opcode == "fusion":
        inner = program.get(x.attribute("calls") or "", {})
        return sum(flops_of_products(program, inner, i) for i in inner.values())
    if x.opcode not in ("convolution", "dot") and not x.is_library_product:
        return 0
    # A product [B M K] [B K N] -> [B M N]; B is what a convolution has as its window when it steps or is spread out.
    left, right, made = (arrays(shape)[0][1] for shape in (own[x.operands[0]].shape, own[x.operands[1]].shape, x.shape))
    if window := re.search(r"window=\{size=([\dx]+)[^}]*(?:stride|dilate)", x.rest):
        batch = ints(window[1])
    else:
        dims = re.search(r'lhs_batch_dim(?:ension)?s"?[=:][\[{]([^\]}]*)', x.rest)
        batch = [left[n] for n in ints(dims[1])] if dims else []
    return 2 * math.isqrt(math.prod(left) * math.prod(right) * math.prod(made) // math.prod(batch))


def ints(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def branches(x: Instruction) -> list[str]:
    if found := re.search(r"branch_computations=\{([^}]*)\}", x.rest):
        return re.findall(r"%?([\w.\-]+)", found[1])
    return [x.attribute("true_computation"), x.attribute("false_computation")]


def trip_count(program: dict[str, Computation], own: Computation, loop: Instruction) -> int:
    """How often a loop's body runs: as stated, or as its counter goes from constant to constant."""
    if stated := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(stated[1])
    condition, body = (program[loop.attribute(name)] for name in ("condition", "body"))
    try:
        test = _root(condition)
        counter, last = (_behind(condition, o) for o in test.operands)
        index = int(counter.attribute("index"))
        first = _behind(own, own[loop.operands[0]].operands[index])
        added = _behind(body, _root(body).operands[index])
        before, step = sorted((_behind(body, o) for o in added.operands), key=lambda x: x.opcode == "constant")
        is_counted = (
            (test.opcode, added.opcode, before.opcode) == ("compare", "add", "get-tuple-element")
            and "direction=LT" in test.rest
            and int(before.attribute("index")) == index
        )
        turns = -(-(_constant(last) - _constant(first)) // _constant(step))
    except (LookupError, TypeError, ValueError):
        is_counted = False
    if not is_counted:
        raise ValueError(
            f"the trip count of {loop.name} must be in the text: it states none, and its condition and body are not "
            f"seen to count from one constant to another ({loop.op_name}). Unroll the loop."
        )
    return max(0, turns)


def _root(computation: Computation) -> Instruction:
    return list(computation.values())[-1]


def _behind(computation: Computation, name: str) -> Instruction:
    """The instruction of that name, or what it is a copy of."""
    x = computation[name]
    while x.opcode == "copy":
        x = computation[x.operands[0]]
    return x


def _constant(x: Instruction) -> int:
    if x.opcode != "constant":
        raise LookupError
    return int(x.operands[0])
