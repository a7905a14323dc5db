"""What a run will take on hardware that is not there: its own step compiled for each of its stages, and read."""

import dataclasses
import math
import pathlib
import re
import shutil
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from flax_encoder.data.rows.targets import HOST_FIELDS
from flax_encoder.nn.lora import assembled
from flax_encoder.nn.partition import abstract_model
from flax_encoder.ops.platform import platform_for_tracing
from flax_encoder.plan.collectives import collectives, exposed_seconds, summary
from flax_encoder.plan.estimate import COLLECTIVES, estimate, memory_of, report
from flax_encoder.plan.flops import forward_flops, product_flops, step_flops
from flax_encoder.plan.rows import Sample
from flax_encoder.plan.schedules import kernel_cycles
from flax_encoder.plan.targets import Chip, compiler_options
from flax_encoder.runs.opened import check_batches, make_learner
from flax_encoder.runs.programs import Programs
from flax_encoder.tasks import find_task
from flax_encoder.training.parameters import trained
from flax_encoder.training.sharding import BATCH_SPEC, make_mesh, rows_left_whole
from flax_encoder.training.step import TrainState, abstract_train_state


class DoesNotFit(Exception):
    """The compiler found no way to fit the step into the chip's memory; its words, and bytes where it says them."""

    def __init__(self, message: str, needed_bytes: float | None):
        super().__init__(message)
        self.needed_bytes = needed_bytes


class Compiled(NamedTuple):
    text: str
    memory: dict[str, int]
    seconds: float
    """That compiling took."""
    schedules: pathlib.Path | None = None
    """The folder of its kernels' schedules."""


def compile_step(state: TrainState, step_fn: Any, batch: dict[str, np.ndarray], mesh: Mesh, platform: str) -> Compiled:
    """A run's step, compiled for the devices of `mesh` from shapes alone.

    Raises:
      DoesNotFit: it does not.
    """
    rows = NamedSharding(mesh, BATCH_SPEC)
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=rows)
        for name, x in batch.items() if name not in HOST_FIELDS
    }  # fmt: skip
    began = time.perf_counter()
    try:
        with jax.set_mesh(mesh), platform_for_tracing(platform):
            compiled = step_fn.lower(state, shapes).compile(compiler_options(platform, "cublas"))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(*_exhausted(str(error))) from None
    return Compiled(compiled.as_text(), memory_of(compiled), time.perf_counter() - began)


def _exhausted(message: str) -> tuple[str, float | None]:
    """(the compiler's words, the bytes that it says the step would need)."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    needed = float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]] if found else None
    line = next((line for line in message.splitlines() if "Used" in line or "exceed" in line.lower()), message)
    return line.strip()[:300], needed


class StagePlan(NamedTuple):
    """A stage of a run: so many steps of one shape."""

    steps: int
    rows: int
    row_length: int
    fits: bool
    hbm_bytes: dict[str, float]
    """Of a device, by what for: parameters, optimizer, batch, activations (all that lives within the step), total; or
    total alone where the compiler gave up."""
    step_seconds: float | None = None
    """None where it does not fit: nothing was compiled to be estimated."""
    parts: dict[str, float] = {}  # noqa: RUF012
    """Of the step's seconds: compiler, products, attention_kernels, collectives (those that nothing hides)."""
    tokens_per_second: float | None = None
    """Of all devices, rows being full."""
    fraction_of_peak: float | None = None
    compile_seconds: float = 0.0
    collectives: list[dict[str, Any]] = []  # noqa: RUF012
    notes: tuple[str, ...] = ()
    phase: int | None = None
    """Of the run's phases, counted from 1, where it has any."""


def plan_stages(
    sample: Sample, devices: list[Any], chip: Chip, schedules: pathlib.Path, *, only_last: bool = False
) -> list[StagePlan]:
    """Every stage's step, or the last one's, compiled and read.

    Args:
      devices: to compile for; the mesh is the config's, over all of them.
      schedules: the folder that libtpu was told to write kernels' schedules to.

    Raises:
      ConfigError: a batch that the mesh cannot split.
    """
    config, platform = sample.config, chip.platform
    mesh = make_mesh(config.mesh, devices)
    check_batches(config, mesh)
    with platform_for_tracing(platform):
        make_model, tx = make_learner(config, sample.label_names)
        graphdef, state, shardings = abstract_train_state(make_model, tx, mesh)
        teacher = sample.teacher and sample.teacher.on_mesh(config, mesh, is_abstract=True)
    programs = Programs(
        config, sample.label_names, graphdef, tx, shardings, trained(config.trained_by, state.params), teacher
    )
    plans: list[StagePlan] = []
    made: dict[Any, Compiled | DoesNotFit] = {}
    for i, (stage, batch) in enumerate(zip(config.stages, sample.batches, strict=True)):
        if only_last and i < len(config.stages) - 1:
            continue
        held = {"parameters": held_bytes(state.params), "optimizer": held_bytes(state.opt_state)}
        held |= {} if teacher is None else {"teacher": held_bytes(teacher.params)}
        plan = StagePlan(
            stage.end_step - stage.start_step, stage.batch_size, stage.row_length, False, held,
            phase=stage.phase + 1 if config.phases else None,
        )  # fmt: skip
        with platform_for_tracing(platform):
            step_fn = programs.of(stage).step_fn
        key = id(step_fn), tuple((name, x.shape) for name, x in batch.items())
        if is_new := key not in made:  # as in the run, stages of one program and shape have one compilation
            made[key] = _compiled_or_not(state, step_fn, batch, mesh, platform, schedules, len(made))
        compiled = made[key]
        if isinstance(compiled, DoesNotFit):
            total = {"total": compiled.needed_bytes} if compiled.needed_bytes else {}
            plans.append(plan._replace(hbm_bytes=held | total, notes=(str(compiled),)))
            continue
        compiled = compiled if is_new else compiled._replace(seconds=0.0)
        plans.append(_read(plan, compiled, batch, model_flops(sample, batch), mesh, chip))
    return plans


def _compiled_or_not(
    state: TrainState, step_fn: Any, batch: dict[str, np.ndarray], mesh: Mesh, platform: str, schedules: pathlib.Path,
    number: int,
) -> Compiled | DoesNotFit:  # fmt: skip
    """The step, with its kernels' schedules in a folder of its own, of this number."""
    of_step = schedules / f"of step {number}"
    shutil.rmtree(of_step, ignore_errors=True)
    try:
        compiled = compile_step(state, step_fn, batch, mesh, platform)
    except DoesNotFit as error:
        compiled = error
    of_step.mkdir()
    for written in [path for path in schedules.iterdir() if not path.name.startswith("of step ")]:
        written.rename(of_step / written.name)
    return compiled if isinstance(compiled, DoesNotFit) else compiled._replace(schedules=of_step)


def _read(
    plan: StagePlan, compiled: Compiled, batch: dict[str, np.ndarray], flops: float, mesh: Mesh, chip: Chip
) -> StagePlan:
    segments = batch["segment_ids"]
    cycles = {} if compiled.schedules is None else kernel_cycles(compiled.schedules, segments)
    rows = segments[: -(-len(segments) // (mesh.shape["data"] * mesh.shape["fsdp"]))]  # those of a device
    rows = rows[:, : rows.shape[1] // mesh.shape["context"]]
    read = report(compiled.text, compiled.memory, chip, chip.kernel_fraction, cycles, rows)
    together = collectives(estimate(compiled.text, chip).collectives, mesh, chip)
    waited = exposed_seconds(together, read["step_seconds"])
    seconds = read["step_seconds"] + waited
    memory = compiled.memory
    total = memory["argument"] + memory["temp"] + memory["output"] - memory["alias"]
    held = plan.hbm_bytes
    by_use = held | {
        "batch": max(0.0, memory["argument"] - sum(held.values())),
        "activations": total - memory["argument"],
        "total": total,
    }
    whole = rows_left_whole(batch, mesh)
    unread = [name for name in read["unestimated"] if name.rpartition("(")[2][:-1] not in _TOGETHER]
    notes = [*([whole] if whole else []), *(f"not in the step, as nothing says how long it takes: {n}" for n in unread)]
    if read["kernels_without_schedule"]:
        notes.append(f"{read['kernels_without_schedule']} kernels without a schedule that could be read")
    return plan._replace(
        fits=total <= chip.memory_bytes,
        hbm_bytes=by_use,
        step_seconds=seconds,
        parts={
            "compiler": read["compiler_seconds"],
            "products": read["product_seconds"],
            "attention_kernels": read["kernel_seconds"],
            "collectives": waited,
        },
        tokens_per_second=plan.rows * plan.row_length / seconds,
        fraction_of_peak=flops / mesh.size / seconds / chip.peak_flops,
        compile_seconds=compiled.seconds,
        collectives=summary(together),
        notes=tuple(notes),
    )


_TOGETHER = tuple(kind + end for kind in COLLECTIVES for end in ("", "-start"))


def held_bytes(tree: Any) -> float:
    """Of abstract arrays that know how they are split, what lies on one device."""
    return float(sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    ))  # fmt: skip


def model_flops(sample: Sample, batch: dict[str, np.ndarray]) -> float:
    """FLOPs that the architecture asks for in one step: of attention layers exactly, of others by what their forward
    pass multiplies, three times."""
    config, labels = sample.config, sample.label_names
    plain = dataclasses.replace(config.model, remat="none")
    if config.model.layer == "attention":
        plain = dataclasses.replace(plain, attention_implementation="reference")
    make_model, _ = make_learner(dataclasses.replace(config, model=plain), labels)
    graphdef, params = abstract_model(make_model)
    params = nnx.to_pure_dict(params)
    if config.model.layer == "attention" and set(params) <= {"encoder", "head", "lora"}:
        classes = None if find_task(config.objective).head == "masked_lm" else len(labels or "x")
        targets = int(np.count_nonzero(batch["target_weights"]))
        rows = (batch["segment_ids"], targets, classes)
        of_teacher = 0 if sample.teacher is None else forward_flops(sample.teacher.run.config.model, *rows)
        return float(step_flops(config.model, *rows) + of_teacher)
    shapes = {name: x for name, x in batch.items() if name not in HOST_FIELDS}
    forward = jax.make_jaxpr(lambda params, batch: assembled(graphdef, params).loss(batch).sum)(params, shapes)
    return 3.0 * product_flops(forward.jaxpr)
