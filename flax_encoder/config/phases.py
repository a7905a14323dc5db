"""Phases, which change settings during a run, and the stages that follow from them, whose batches have one shape."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from flax_encoder.config.rules import ConfigError, ShortRepr, counted, require, require_finite

Shape = Literal["linear", "cosine", "one_minus_sqrt", "inverse_sqrt"]
EXTENTS = ("share", "steps", "tokens", "minutes")  # a phase's first fields


@dataclass(frozen=True, repr=False)
class Phase(ShortRepr):
    """A part of a run and the settings that it changes. A setting at None keeps the value of the phase before; until a
    phase changes it, the run's own setting holds, also one that is a ramp over the whole run. A setting of two values
    goes from the first, where the phase begins, to the second, where it ends."""

    share: float | None = None
    """The phase's share of the run's steps; the shares of all phases add up to 1. A phase has a share, steps, tokens or
    minutes."""
    steps: int | None = None
    """The phase's steps."""
    tokens: float | None = None
    """The tokens of the rows that the phase reads, padding included; it has the steps that come nearest."""
    minutes: float | None = None
    """The phase's minutes of training, compiling and evaluations not counted. The run's clock ends the phase, and its
    checkpoints then keep the steps that it had, beside the minutes. The run's budget_minutes are those of all phases.
    """
    row_length: int | None = None
    """data.row_length from here on; a batch keeps its number of tokens, unless batch_size changes too."""
    batch_size: int | tuple[int, int] | None = None
    """batch_size from here on; of two values, batches double from the first to the second. Each size is compiled once.
    """
    num_microbatches: int | None = None
    """num_microbatches from here on."""
    masking_rate: float | tuple[float, float] | None = None
    """masking.rate from here on."""
    rope_theta: float | None = None
    """model.rope_theta from here on, in all layers, or in those without a window if model.local_rope_theta is set."""
    weights: tuple[float, ...] | None = None
    """data.weights from here on; a source with 0 is not read."""
    objective: str | None = None
    """The task from here on. Its model must have the same parameters, such as causal_lm before masked_lm. The last
    phase has the run's own objective, which all evaluations use."""
    learning_rate: float | tuple[float, float] | None = None
    """optimizer.learning_rate from here on, in place of optimizer.schedule. Other peak learning rates are multiplied by
    the same factor."""
    learning_rate_shape: Shape = "linear"
    """How the learning rate goes from the first of two values to the second: linear; cosine, half a cosine;
    one_minus_sqrt, one minus the root of the phase's progress (arXiv 2405.18392); inverse_sqrt, one over the root of
    the step (T5's)."""

    def __new__(cls, *_: Any, **settings: Any) -> "Phase":
        cls.check_names(settings)
        return super().__new__(cls)

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Raise ConfigError for settings that no phase changes."""
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = [name for name in names if name not in known]
        require(
            not unknown,
            f"a phase has one of {', '.join(EXTENTS)}, and changes only {', '.join(known[len(EXTENTS) :])}: got "
            f"{', '.join(unknown)}. Set it for the whole run, or start another run from this one's model with "
            f"--init-from.",
        )

    def __post_init__(self):
        extents = {name: getattr(self, name) for name in EXTENTS}
        given = {name: value for name, value in extents.items() if value is not None}
        require(
            (len(given) == 1 or given.keys() == {"steps", "minutes"}) and min(given.values()) >= 0,
            f"a phase has one of {', '.join(EXTENTS)}, at least 0: got {given or 'none'}.",
        )
        ramps = [name for name in ("batch_size", "masking_rate") if isinstance(getattr(self, name), tuple)]
        require(
            self.minutes is None or (self.minutes > 0 and not ramps),
            f"a phase in minutes is above 0 and has one value of each setting, since its steps are not known before it "
            f"ends: got minutes {self.minutes}{', and two of ' + ' and '.join(ramps) if ramps else ''}.",
        )
        require(
            self.row_length is None or self.row_length >= 3,
            f"a row holds [CLS], one token and [SEP] at least: got row_length {self.row_length} of a phase.",
        )
        for name in ("batch_size", "num_microbatches", "rope_theta", "masking_rate"):
            require(
                min(_pair(getattr(self, name)) or (1,)) > 0, f"a phase's {name} is above 0: got {getattr(self, name)}."
            )
        for name in ("batch_size", "masking_rate", "learning_rate"):
            value = getattr(self, name)
            require(
                not isinstance(value, tuple) or len(value) == 2,
                f"a phase's {name} is one value, or the first and the last: got {value}.",
            )
        sizes, rates = _pair(self.batch_size) or (1, 1), _pair(self.learning_rate) or (0.0, 0.0)
        require(sizes[0] <= sizes[1], f"batches grow within a phase: got batch_size {self.batch_size}.")
        require(
            max(_pair(self.masking_rate) or (0.0,)) <= 1,
            f"a phase's masking_rate is a probability above 0, at most 1: got {self.masking_rate}.",
        )
        require(
            min(rates) >= 0 and (self.learning_rate_shape != "inverse_sqrt" or min(rates) > 0),
            f"a phase's learning_rate is at least 0, and above 0 where it falls as inverse_sqrt: got "
            f"{self.learning_rate}.",
        )
        require(
            self.learning_rate_shape == "linear" or rates[0] != rates[1],
            f"learning_rate_shape needs two learning rates: got {self.learning_rate_shape} with learning_rate "
            f"{self.learning_rate}. Give two, such as 5e-4 0.0, or leave the shape out.",
        )
        require(
            self.weights is None or (min(self.weights, default=-1) >= 0 and sum(self.weights) > 0),
            f"a phase's weights are at least 0, one of them above: got {self.weights}.",
        )
        require_finite(self)

    @property
    def changes(self) -> tuple[str, ...]:
        """The names of the settings that it changes."""
        names = [f.name for f in dataclasses.fields(self)][len(EXTENTS) : -1]
        return tuple(name for name in names if getattr(self, name) is not None)

    @property
    def is_open(self) -> bool:
        """Whether the run's clock is still to end it."""
        return self.minutes is not None and self.steps is None


# The setting of a run that each of a phase's stands for, by which a task says that it reads it.
SETTINGS = {
    "row_length": "data.last_row_length", "batch_size": "batch_size", "num_microbatches": "num_microbatches",
    "masking_rate": "masking.last_rate", "rope_theta": "model.rope_theta", "weights": "data.weights",
    "objective": "objective", "learning_rate": "optimizer.learning_rate",
}  # fmt: skip


class Ramp(NamedTuple):
    """A number that goes from `first` at step `start` to `last` at step `end`; steps are counted from 0."""

    start: int
    end: int
    first: float
    last: float
    shape: Shape = "linear"


class Stage(NamedTuple):
    """Steps `start_step` (from 0) up to `end_step`, this one not, whose batches are [batch_size, row_length]."""

    end_step: int
    batch_size: int
    row_length: int
    start_step: int = 0
    phase: int = 0
    """Its number, from 0."""
    num_microbatches: int = 1
    masking_rate: Ramp = Ramp(0, 1, 0.15, 0.15)
    """The share of masked tokens, of which a stage may be a part."""
    rope_theta: float = 10_000.0
    weights: tuple[float, ...] | None = None
    """Of the sources; None reads all equally often."""
    objective: str = "masked_lm"


class Timeline(NamedTuple):
    """What a run's phases come to."""

    stages: tuple[Stage, ...]
    """Those without a step are among them."""
    phase_ends: tuple[int, ...]
    learning_rates: tuple[Ramp, ...]
    """Each holds from its start on, until the next one's."""

    def stage_of(self, number: int) -> Stage:
        """The stage of a step, counted from 0; before the first step and after the last that of its neighbour."""
        with_steps = [stage for stage in self.stages if stage.start_step < stage.end_step]
        return next((stage for stage in with_steps if number < stage.end_step), with_steps[-1])


def make_timeline(phases: Sequence[Phase], steps: int, own: Stage) -> Timeline:
    """The stages of phases, and the learning rates that they set. A phase in minutes that is under way has all steps
    that are left, and those after it have none until it has ended.

    Args:
      steps: of the run, which shares are of.
      own: what holds before any phase changes it.

    Raises:
      ConfigError: rows of another length that a batch's tokens do not fill.
    """
    stages, ends, rates, start, share = [], [], [], 0, 0.0
    whole = sum(phase.share or 0.0 for phase in phases)
    now = own
    for number, phase in enumerate(phases):
        now = _changed(now, phase, number)
        first, full = _pair(phase.batch_size) or (now.batch_size, now.batch_size)
        if phase.share is not None:
            share += phase.share
            end = round(steps * share / whole) if whole else start
        elif phase.steps is not None:
            end = start + phase.steps
        elif phase.tokens is not None:
            end = start + round(phase.tokens / (_mean(first, full) * now.row_length))
        else:  # the clock will end it, so that no step is known to be after it
            end = max(start, steps)
        if phase.masking_rate is not None:
            now = now._replace(masking_rate=Ramp(start, end, *_pair(phase.masking_rate)))  # type: ignore[misc]
        if phase.learning_rate is not None:
            rates.append(Ramp(start, end, *_pair(phase.learning_rate), phase.learning_rate_shape))  # type: ignore[misc]
        at = start
        for stop, size in grown(first, full, float(end - start)) or [(end - start, full)]:
            stages.append(now._replace(start_step=at, end_step=start + stop, batch_size=size))
            at = start + stop
        if phase.masking_rate is not None:
            now = now._replace(masking_rate=Ramp(end, end, now.masking_rate.last, now.masking_rate.last))
        now, start = now._replace(batch_size=full), end
        ends.append(end)
    return Timeline(tuple(stages), tuple(ends), tuple(rates))


def describe_phase(phases: Sequence[Phase], timeline: Timeline, number: int) -> str:
    """A phase in words: its place, its steps and its batches, and what else it changes."""
    start, end = (0, *timeline.phase_ends)[number : number + 2]
    stages = [stage for stage in timeline.stages if stage.phase == number]
    first, last = stages[0].batch_size, stages[-1].batch_size
    said = [f"{first} to " * (first != last) + f"{counted(last, 'row')} of {stages[0].row_length}"]
    for name in phases[number].changes:
        values = _pair(getattr(phases[number], name))
        if name not in ("row_length", "batch_size") and values is not None:
            words = [value if isinstance(value, str) else f"{value:g}" for value in values]
            shown = " ".join(words) if name == "weights" else " to ".join(dict.fromkeys(words))
            said.append(f"{name.replace('_', ' ')} {shown}")
    steps = f"steps {start + 1:,} to {end:,}" if start < end else "no step of so few"
    extent = counted(phases[number].minutes, "minute") if phases[number].is_open else steps  # type: ignore[arg-type]
    return f"phase {number + 1} of {len(phases)}, {extent}: {', '.join(said)}"


def turn_of(phases: Sequence[Phase]) -> float | None:
    """The share of the run's budget at which the phase under way ends and another begins; None if its steps say so."""
    minutes = [phase.minutes or 0.0 for phase in phases]
    under_way = _under_way(phases)
    return None if under_way in (None, len(phases) - 1) else sum(minutes[: under_way + 1]) / sum(minutes)  # type: ignore[operator]


def with_ended(phases: Sequence[Phase], step: int) -> tuple[Phase, ...]:
    """`phases` in minutes, of which the one under way ended with update `step` of the run."""
    number = _under_way(phases)
    assert number is not None
    ended = dataclasses.replace(phases[number], steps=step - sum(phase.steps or 0 for phase in phases[:number]))
    return (*phases[:number], ended, *phases[number + 1 :])


def in_shares(phases: Sequence[Phase]) -> tuple[Phase, ...]:
    """`phases`, with minutes as shares of the run: what is known of them before it runs."""
    minutes = sum(phase.minutes or 0.0 for phase in phases)
    return tuple(
        phase if phase.minutes is None
        else dataclasses.replace(phase, minutes=None, steps=None, share=phase.minutes / minutes) for phase in phases
    )  # fmt: skip


def _under_way(phases: Sequence[Phase]) -> int | None:
    return next((number for number, phase in enumerate(phases) if phase.is_open), None)


def grown(first: int, full: int, steps: float) -> list[tuple[int, int]]:
    """(the step that it ends with, batch size) of each size below `full` through which batches double from `first`:
    they grow straight over so many steps, and sizes are rounded down."""
    sizes = _sizes(first, full)
    ends = [round(steps * (size - first) / max(full - first, 1)) for size in sizes[1:]]
    return list(zip(ends, sizes, strict=False))


def _sizes(first: int, full: int) -> list[int]:
    sizes = [first]
    while sizes[-1] < full:
        sizes.append(min(2 * sizes[-1], full))
    return sizes


def _mean(first: int, full: int) -> float:
    """Rows of a batch, on average over a phase whose batches grow."""
    sizes = _sizes(first, full)
    rises = [(size, above - size) for size, above in itertools.pairwise(sizes)]
    return sum(size * rise for size, rise in rises) / (full - first) if rises else float(full)


def _changed(now: Stage, phase: Phase, number: int) -> Stage:
    fields: dict[str, Any] = {
        name: value for name in ("row_length", "num_microbatches", "rope_theta", "weights", "objective")
        if (value := getattr(phase, name)) is not None
    }  # fmt: skip
    if phase.row_length is not None and phase.batch_size is None:
        tokens = now.batch_size * now.row_length
        require(
            tokens % phase.row_length == 0,
            f"a batch keeps its tokens when rows change length: {now.batch_size} rows of {now.row_length} are {tokens} "
            f"tokens, not a multiple of phases.{number}.row_length {phase.row_length}. Give the phase a batch_size.",
        )
        fields["batch_size"] = tokens // phase.row_length
    return now._replace(phase=number, **fields)


def _pair(value: Any) -> tuple[Any, Any] | None:
    """(first, last) of a setting that is one value or two; None where it has none."""
    return None if value is None else value if isinstance(value, tuple) else (value, value)


def phases_of_ramps(
    steps: int, batch_size: int, first_batch_size: int | None, batch_warmup_rate: float, last_row_length: int | None,
    last_rate: float,
) -> tuple[Phase, ...]:  # fmt: skip
    """What first_batch_size, batch_warmup_rate, data.last_row_length and data.last_rate come to: a phase for each batch
    size, one of full batches and one of rows of another length. The boundaries are those of every version."""
    phases, start = [], 0
    for end, size in grown(first_batch_size or batch_size, batch_size, steps * batch_warmup_rate):
        phases.append(Phase(steps=end - start, batch_size=size))
        start = end
    last = max(start, steps - round(steps * last_rate)) if last_row_length is not None else steps
    phases.append(Phase(steps=last - start, batch_size=batch_size))
    if last_row_length is not None:
        phases.append(Phase(steps=steps - last, row_length=last_row_length))
    return tuple(phases)


def check_phases(
    phases: tuple[Phase, ...], num_sources: int, old_ramps: dict[str, Any], budget_minutes: float | None
) -> None:
    """Raise ConfigError for phases that do not add up to the run, or beside settings that say the same.

    Args:
      old_ramps: the run's settings that change by themselves, and their values.
    """
    shares, minutes = [phase.share for phase in phases], [phase.minutes for phase in phases]
    for name, values in (("share", shares), ("minutes", minutes)):
        require(
            all(value is None for value in values) or None not in values,
            f"all phases have {name}, or none has: got {name} {values}. Give every phase {name}, or every phase steps "
            f"or tokens.",
        )
    spent = sum(value or 0.0 for value in minutes)
    require(
        None in minutes or (budget_minutes is not None and math.isclose(spent, budget_minutes, rel_tol=1e-6)),
        f"phases in minutes add up to the run's budget_minutes: got {' + '.join(map(str, minutes))} = {spent:g} for "
        f"budget_minutes {budget_minutes}. Give --budget-minutes {spent:g}.",
    )
    whole = sum(share or 0.0 for share in shares)
    require(
        None in shares or math.isclose(whole, 1.0, abs_tol=1e-6),
        f"the shares of phases add up to 1: got {' + '.join(map(str, shares))} = {whole:g}. Give the last one "
        f"{1 - whole + (shares[-1] or 0.0):g}, if that is above 0.",
    )
    given = {name: value for name, value in old_ramps.items() if value is not None}
    require(
        not given,
        f"a run with phases changes settings by its phases alone: got "
        f"{', '.join(f'{name} {value}' for name, value in given.items())} beside them. Leave that out, or make it a "
        f"phase.",
    )
    for number, phase in enumerate(phases):
        require(
            phase.weights is None or len(phase.weights) == num_sources,
            f"weights are one number for each source: got phases.{number}.weights {phase.weights} for {num_sources} "
            f"of data.source.",
        )


def check_objective(timeline: Timeline, objective: str) -> None:
    """Raise ConfigError for phases that end with another objective than the run's."""
    last = timeline.stages[-1].objective
    require(
        last == objective,
        f"a run's last phase has the run's own objective, by which it is evaluated and opened: got {last} in the last "
        f"phase of a run of {objective}. Give --objective {last}, or {objective} to the last phase.",
    )


def check_steps(timeline: Timeline, steps: int) -> None:
    """Raise ConfigError for phases in steps or tokens that are not as long as the run."""
    if (end := timeline.phase_ends[-1]) != steps:
        lengths = [b - a for a, b in itertools.pairwise((0, *timeline.phase_ends))]
        raise ConfigError(
            f"phases in steps or tokens must add up to the run's steps: got {' + '.join(f'{n:,}' for n in lengths)} = "
            f"{end:,} steps for steps {steps:,}. Give --steps {end}, or phases by share, which fit a run of any length."
        )
