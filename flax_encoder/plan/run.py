"""A whole run on hardware that is not there: whether it fits, how long it takes and what it costs; and a search."""

import dataclasses
import itertools
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from flax_encoder.config import ConfigError, MeshConfig, RunConfig
from flax_encoder.plan.host import measured_cpu
from flax_encoder.plan.rows import Sample
from flax_encoder.plan.schedules import dump_schedules
from flax_encoder.plan.step import plan_stages
from flax_encoder.plan.targets import CHIPS, Chip, Hardware, devices

_LONG = 4096  # tokens of a row for which meshes that cut rows are tried
_REMATS = ("none", "feed_forward", "dots", "full")


class Planner:
    """Compiles for some hardware, within a `with`. Made before any other program of this process is compiled for a TPU.

    Raises:
      ConfigError: the platform's compiler is not installed, or there is no such slice.
    """

    def __init__(self, hardware: Hardware, dtype: str):
        self.hardware = hardware
        self._folder = tempfile.TemporaryDirectory()
        self._schedules = pathlib.Path(self._folder.name)
        if hardware.platform == "cpu":
            self._devices: list[Any] = jax.devices("cpu")[: hardware.num_chips]
            if len(self._devices) < hardware.num_chips:
                raise ConfigError(
                    f"XLA makes a CPU's virtual devices when it starts: there are {len(self._devices)}. Set "
                    f"XLA_FLAGS=--xla_force_host_platform_device_count={hardware.num_chips} first."
                )
            self.chip: Chip = measured_cpu(dtype, hardware.num_chips)
        else:
            if hardware.platform == "tpu":  # read as libtpu is loaded, by the next line
                told = os.environ.get("LIBTPU_INIT_ARGS", "")
                os.environ["LIBTPU_INIT_ARGS"] = f"{told} {dump_schedules(self._schedules)}".strip()
            self._devices, self.chip = devices(hardware.platform, hardware.topology), CHIPS[hardware.kind]

    def __enter__(self) -> "Planner":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._folder.cleanup()

    def plan(self, sample: Sample, price_per_chip_hour: float | None = None) -> dict[str, Any]:
        """The plan of a run, ready for JSON.

        Evaluations, saves, compiling and waiting for data are not in its times.
        """
        chips = self.hardware.num_chips
        stages = plan_stages(sample, self._devices, self.chip, self._schedules)
        fits, last = all(stage.fits for stage in stages), stages[-1]
        is_timed = all(stage.step_seconds is not None for stage in stages)
        seconds = sum(stage.steps * stage.step_seconds for stage in stages) if is_timed else None  # type: ignore[operator]
        budget = sample.config.budget_minutes
        if seconds is not None and budget is not None:
            seconds = min(seconds, 60 * budget)
        hours = None if seconds is None else seconds / 3600 * chips
        largest = max((stage.hbm_bytes for stage in stages), key=lambda held: held.get("total", 0.0))
        return {
            "hardware": self.hardware.name,
            "chips": chips,
            "chip": {"peak_flops": self.chip.peak_flops, "hbm_bytes": self.chip.memory_bytes},
            "mesh": sample.config.mesh.sizes(chips),
            "fits": fits,
            "hbm_bytes_per_device": largest.get("total"),
            "hbm_bytes_spare": self.chip.memory_bytes - largest["total"] if "total" in largest else None,
            "hbm_bytes_by_use": largest,
            "estimated_step_seconds": last.step_seconds,
            "tokens_per_second": last.tokens_per_second,
            "fraction_of_peak": last.fraction_of_peak,
            "total_days": None if seconds is None else seconds / 86400,
            "total_chip_hours": hours,
            "total_price": None if hours is None or price_per_chip_hour is None else hours * price_per_chip_hour,
            "compile_seconds": sum(stage.compile_seconds for stage in stages),
            "stages": [stage._asdict() for stage in stages],
        }

    def search(
        self, sample: Sample, minutes: float, say: Callable[[str], None] = lambda message: None
    ) -> list[dict[str, Any]]:
        """Meshes, then microbatches and rematerialisation with the best of them, of the run's last stage; those that
        fit first, by tokens a second. No trial begins after so many minutes."""
        stop, rows = time.monotonic() + 60 * minutes, []
        config = sample.config
        tried: dict[str, RunConfig] = {}
        for candidates in (_meshes, _microbatches, _remats):
            for each in list(candidates(config, self.hardware.num_chips)):
                row = _settings(each, self.hardware.num_chips)
                if repr(row) in tried:
                    continue
                if rows and time.monotonic() > stop:
                    say("the time is up: trials that did not begin are not in the table")
                    return _ranked(rows)
                say(f"compiling {', '.join(f'{name} {value}' for name, value in row.items())}")
                tried[repr(row)] = each
                rows.append(row | self._trial(sample._replace(config=each)))
            best = {name: value for name, value in _ranked(rows)[0].items() if name in row}
            config = tried[repr(best)]
        return _ranked(rows)

    def _trial(self, sample: Sample) -> dict[str, Any]:
        try:
            [stage] = plan_stages(sample, self._devices, self.chip, self._schedules, only_last=True)
        except ConfigError as error:
            return {"fits": False, "tokens_per_second": 0.0, "fraction_of_peak": 0.0, "hbm_bytes_per_device": 0.0,
                    "why": str(error)}  # fmt: skip
        return {
            "fits": stage.fits,
            "tokens_per_second": stage.tokens_per_second or 0.0,
            "fraction_of_peak": stage.fraction_of_peak or 0.0,
            "hbm_bytes_per_device": stage.hbm_bytes.get("total", 0.0),
            "why": "" if stage.fits else "does not fit",
        }


def _ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (not row["fits"], -row["tokens_per_second"]))


def _settings(config: RunConfig, chips: int) -> dict[str, Any]:
    mesh = " x ".join(map(str, config.mesh.sizes(chips).values()))
    return {"mesh": mesh, "microbatches": config.num_microbatches, "remat": config.model.remat}


def _meshes(config: RunConfig, chips: int) -> Iterator[RunConfig]:
    """The config's own first, then others whose axes divide the chips; rows are cut where they are long."""
    yield config
    longest = max(config.row_lengths)
    contexts = (1, 2, 4, 8) if longest >= _LONG and config.model.layer == "attention" else (1,)
    for tensor, context in itertools.product((1, 2, 4, 8), contexts):
        rows = chips // (tensor * context)
        if chips % (tensor * context) or config.model.num_heads % tensor or longest % context:
            continue
        for fsdp in sorted({1, 8, rows}):
            if rows % fsdp == 0 and chips > 1:
                yield dataclasses.replace(config, mesh=MeshConfig(rows // fsdp, fsdp, tensor, context))


def _microbatches(config: RunConfig, chips: int) -> Iterator[RunConfig]:
    split = config.mesh.sizes(chips)
    parts = split["data"] * split["fsdp"]
    for number in (1, 2, 4, 8):
        if all(stage.batch_size % (parts * number) == 0 for stage in config.stages):
            phases = tuple(dataclasses.replace(phase, num_microbatches=None) for phase in config.phases)
            yield dataclasses.replace(config, num_microbatches=number, phases=phases)


def _remats(config: RunConfig, chips: int) -> Iterator[RunConfig]:
    for remat in _REMATS:
        yield dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
