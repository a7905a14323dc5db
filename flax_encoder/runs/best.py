"""The evaluation that was best in a run. It is read from the run's metrics, which a kill leaves whole up to a line."""

import logging
import math
import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

from flax_encoder.config import ConfigError
from flax_encoder.runs.record import read_record
from flax_encoder.training.checkpoint import checkpoint_steps
from flax_encoder.training.run_log import read_metrics

logger = logging.getLogger(__name__)

# Words in the names of metrics of which less is better; of all others more is.
LESS_IS_BETTER = frozenset({"loss", "error", "perplexity", "mse", "mae", "rmse", "calibration", "distance"})


class Best(NamedTuple):
    step: int
    value: float
    since: int
    """Evaluations after it."""


def is_less_better(metric: str) -> bool:
    """Whether less of a metric, such as eval/calibration_error, is better: `LESS_IS_BETTER` has one of its words."""
    return not LESS_IS_BETTER.isdisjoint(re.split(r"[/_ ]", metric))


def check_metric(metric: str, metrics: Mapping[str, float] | None) -> None:
    """Raise ConfigError for a keep_best that evaluations, such as that which gave `metrics`, do not have."""
    if metrics is not None and metric not in metrics:
        raise ConfigError(f"keep_best names a metric of the evaluations: {metric!r} is none of {', '.join(metrics)}.")


def read_evaluations(run_dir: pathlib.Path, last_step: int | None = None) -> dict[int, dict[str, float]]:
    """The held-out metrics that a run has logged, by step, up to a step."""
    lines = [line for line in read_metrics(run_dir) if last_step is None or line["step"] <= last_step]
    return {
        line["step"]: {name: value for name, value in line.items() if name != "step"}
        for line in lines
        if any(name.startswith("eval/") for name in line)
    }


def best_evaluation(evaluations: Mapping[int, Mapping[str, float]], metric: str | None) -> Best | None:
    """The first of the best evaluations; None if there is none with this metric."""
    values = {step: found[metric] for step, found in sorted(evaluations.items()) if metric in found}
    values = {step: value for step, value in values.items() if math.isfinite(value)}
    if not values:
        return None
    step = (min if is_less_better(metric) else max)(values, key=values.__getitem__)
    return Best(step, values[step], sum(later > step for later in values))


def best_checkpoint(path: str | pathlib.Path) -> pathlib.Path:
    """The checkpoint of a run folder that stands for the run: of a run with keep_best the one whose evaluation was
    best, else the newest. A checkpoint stands for itself.

    Raises:
      CheckpointError: there is none, or it cannot be read.
    """
    path = pathlib.Path(path)
    steps = checkpoint_steps(path)
    metric = read_record(path).config.keep_best if steps else None
    if metric is None:
        return path
    evaluations = {step: found for step, found in read_evaluations(path).items() if step in steps}
    best = best_evaluation(evaluations, metric)
    if best is None:
        logger.warning("%s: no checkpoint has been evaluated by %s yet; the newest one is opened", path, metric)
        return path
    return path / "checkpoints" / str(best.step)
