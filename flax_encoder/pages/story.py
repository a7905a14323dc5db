"""What the files of a run tell: its log, its settings, its checkpoints, and what it found out at its end."""

import json
import logging
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from flax_encoder.config import ConfigError, OptimizerConfig, RunConfig, from_dict
from flax_encoder.training.checkpoint import checkpoint_steps
from flax_encoder.training.run_log import SAMPLES, read_metrics

logger = logging.getLogger(__name__)

SUMMARY = "report.json"
"""In a run folder: what the end of the run found out, as `runs.summary.summarize` gives it."""

FORMAT = 1
"""Of that file; one of another format is left out."""


@dataclass(frozen=True)
class Story:
    """A run as its folder tells it. Every part may be missing."""

    name: str
    folder: pathlib.Path
    lines: list[dict[str, Any]]
    """Of metrics.jsonl."""
    settings: dict[str, Any]
    """config.json, by dotted names."""
    config: RunConfig | None
    """None where config.json is missing, damaged, or another version's."""
    checkpoints: list[int]
    """Steps."""
    summary: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Lines of samples.jsonl: {"step", "samples": [{"text", "says", "right"}, ...]}."""
    seeds: dict[str, Any] = field(default_factory=dict)
    """seeds.json of the folder that holds the run and its sisters."""

    @property
    def training(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "loss" in line]

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.lines), default=max(self.checkpoints, default=0))

    def last_of(self, prefix: str) -> dict[str, Any]:
        """The newest line of metrics that begin so, such as "eval/", without that beginning."""
        for line in reversed(self.lines):
            if found := {name.removeprefix(prefix): x for name, x in line.items() if name.startswith(prefix)}:
                return found
        return {}

    def watched(self) -> list[tuple[str, list[str], list[tuple[int, list[str]]]]]:
        """(text, what is right, [(step, what the model said), ...]) of each sample; those that are damaged are left
        out."""
        found: dict[tuple[str, tuple[str, ...]], dict[int, list[str]]] = {}
        for line in self.samples:
            samples = line.get("samples")
            for sample in samples if isinstance(samples, list) else ():
                if not isinstance(sample, dict):
                    continue
                text, says, right = (sample.get(name) for name in ("text", "says", "right"))
                if isinstance(text, str) and _are_texts(says) and _are_texts(right) and len(says) == len(right):
                    found.setdefault((text, tuple(right)), {})[line["step"]] = says
        return [(text, list(right), sorted(said.items())) for (text, right), said in found.items()]

    def scale(self) -> dict[str, list[Any]]:
        """Steps of the log's training lines, and the tokens and minutes of training that were behind them.

        Tokens are the logged rate times the seconds between lines; a log without `spent_seconds` has steps alone.
        """
        lines = self.training
        steps = [line["step"] for line in lines]
        if not lines or any("spent_seconds" not in line for line in lines):
            return {"steps": steps}
        tokens, total, before = [], 0.0, 0.0
        for line in lines:
            total += line.get("tokens_per_second", 0.0) * max(line["spent_seconds"] - before, 0.0)
            before = line["spent_seconds"]
            tokens.append(round(total))
        return {"steps": steps, "tokens": tokens, "minutes": [line["spent_seconds"] / 60 for line in lines]}

    def bands(self) -> list[dict[str, Any]]:
        """[{"end": step, "label"}, ...]: the run's stages, and of a run of one stage its schedule's parts."""
        if self.config is None:
            return []
        stages = self.config.stages
        if len(self.config.phases) > 1:
            ends = self.config.timeline.phase_ends
            return [{"end": end, "label": f"phase {number}"} for number, end in enumerate(ends, 1)]
        if len(stages) > 1:
            return [{"end": s.end_step, "label": f"{s.batch_size} x {s.row_length}"} for s in stages]
        return list(_parts_of_schedule(self.config.optimizer, self.config.schedule_began, self.config.steps))


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(text, str) for text in value)


def _parts_of_schedule(optimizer: OptimizerConfig, began: int, steps: int) -> Iterator[dict[str, Any]]:
    whole = steps - began
    if began:
        yield {"end": began, "label": "before"}
    if optimizer.warmup_rate:
        yield {"end": began + round(whole * optimizer.warmup_rate), "label": "warm-up"}
    if optimizer.peak_end is not None:
        yield {"end": began + round(whole * optimizer.peak_end), "label": "constant"}
    if optimizer.peak_end != 1:
        yield {"end": steps, "label": "decay"}


def read_stories(folders: list[pathlib.Path]) -> list[Story]:
    """The runs of these folders; one that holds runs of several seeds gives each of them.

    Raises:
      ConfigError: a folder that is no run: it has neither metrics.jsonl nor config.json.
    """
    stories = []
    for folder in folders:
        seeds = sorted(folder.glob("seed-*"), key=lambda p: (len(p.name), p.name))
        of_seeds = _read_object(folder / "seeds.json")
        own = seeds if seeds and not _is_run(folder) else [folder]
        for run_dir in own:
            if not _is_run(run_dir):
                raise ConfigError(
                    f"a run folder has a metrics.jsonl and a config.json: {run_dir} has neither. Give a folder that "
                    f"--run-dir named."
                )
            stories.append(_read(run_dir, of_seeds))
    names = [story.folder.name for story in stories]
    if len(set(names)) < len(names):  # then they are told apart by their whole paths
        names = [str(story.folder) for story in stories]
    return [Story(**{**vars(story), "name": name}) for story, name in zip(stories, names, strict=True)]


def _is_run(folder: pathlib.Path) -> bool:
    return any((folder / name).is_file() for name in ("metrics.jsonl", "config.json"))


def _read(folder: pathlib.Path, seeds: dict[str, Any]) -> Story:
    values, config = _read_object(folder / "config.json"), None
    try:
        config = from_dict(RunConfig, values) if values else None
    except ConfigError as error:
        logger.warning("%s: the settings are of another version, so phases are not shown: %s", folder, error)
    summary = _read_object(folder / SUMMARY)
    if summary.get("format") != FORMAT:
        summary = {}
    return Story(
        folder.resolve().name, folder, read_metrics(folder), flattened(values), config,
        sorted(checkpoint_steps(folder)), summary, read_metrics(folder, SAMPLES), seeds,
    )  # fmt: skip


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object of a file; {} where there is none, or, with a warning, one that is damaged."""
    try:
        values = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        logger.warning("%s is damaged and left out: %s", path, error)
        return {}
    if not isinstance(values, dict):
        logger.warning("%s is damaged and left out: it must be an object", path)
        return {}
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"numbers must be finite: {name}")


def flattened(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested settings by dotted names, such as model.num_layers."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flattened(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
    return found
