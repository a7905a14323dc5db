"""A model fine-tuned on every task of a suite, several times each, and one table of what came out."""

import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

from flax_encoder.config import ConfigError, EncoderConfig, OptimizerConfig, RunConfig, differences, from_dict, to_dict
from flax_encoder.data.pipeline import cache_folder
from flax_encoder.data.sources.opening import open_source
from flax_encoder.data.sources.records import DataError, Say
from flax_encoder.runs.load import load
from flax_encoder.runs.score_file import score_answers
from flax_encoder.runs.start import FREE_ON_RESUME
from flax_encoder.runs.suite_data import Place, find_files, find_source, open_place
from flax_encoder.runs.suites import SUITES, SuiteTask
from flax_encoder.tasks import check_task, find_task
from flax_encoder.training.run_log import write_atomically

Train = Callable[[RunConfig], dict[str, float] | None]
Settle = Callable[[RunConfig], RunConfig]
_RESULT = "result.json"  # in the folder of a run that is trained and scored
# What the suite decides for each of its runs.
SETTLED = ("run_dir", "init_from", "objective", "seeds", "data.source", "data.validation", "data.test")


@dataclasses.dataclass(frozen=True)
class Suite:
    """What is asked for."""

    name: str
    folder: str
    """The model that every task starts from: a run, a checkpoint or a published folder."""
    out: pathlib.Path
    """Holds TASK/seed-N, a run folder each, and suite.json."""
    tasks: tuple[SuiteTask, ...]
    seeds: int = 1
    data_dir: pathlib.Path | None = None
    """A folder with one of each task's files; None takes sets by name, from `source`."""
    source: str = "tfds"


def choose_tasks(suite: str, names: Iterable[str] | None) -> tuple[SuiteTask, ...]:
    """The tasks of a suite, or those named, in its own order.

    Raises:
      ConfigError: a name that is none of its tasks.
    """
    known = {task.name: task for task in SUITES[suite]}
    names = list(known) if names is None else list(names)
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"the tasks of {suite} are {', '.join(known)}: got {', '.join(unknown)}.")
    return tuple(task for name, task in known.items() if name in names)


def describe(suite: Suite) -> list[dict[str, str]]:
    """A row a task: what would be trained, and from which files or set."""
    rows = []
    for task in suite.tasks:
        try:
            if task.not_served:
                raise DataError(task.not_served)
            if suite.data_dir is not None:
                files = find_files(task, suite.data_dir)
                where = ", ".join(str(path.relative_to(suite.data_dir)) for path in files.values())
            else:
                where = find_source(task, suite.source)
        except DataError as error:
            where = f"left out: {error}"
        rows.append({
            "task": task.name, "objective": task.objective, "metrics": ", ".join(task.metrics),
            "learning rate": f"{task.learning_rate:g}", "texts": str(task.batch_texts), "epochs": str(task.epochs),
            "starts from": task.start or "", "data": where,
        })  # fmt: skip
    return rows


def run_suite(suite: Suite, train: Train, settle: Settle, say: Say) -> dict[str, Any] | None:
    """Train and score every task's runs; those that are done are only read. A task whose data cannot be had is left out
    by name. Writes OUT/suite.json after each task.

    Args:
      train: trains one run to its end; None if a signal stopped it.
      settle: puts the user's settings in place of a task's own.

    Returns:
      `tasks` {name: {"score", "metrics"}}, each of them {"median", "min", "max", "values"} over the seeds; `missing`
      {name: reason}; `average` of the tasks' scores. None if a signal stopped a run.

    Raises:
      ConfigError: settings that a task cannot have, or other settings than a run in `out` was trained with.
    """
    missing: dict[str, str] = {}
    places: dict[str, Place] = {}
    configs: dict[str, RunConfig] = {}
    for task in suite.tasks:
        try:
            if task.not_served:
                raise DataError(task.not_served)
            place = open_place(task, suite.data_dir, suite.source, suite.out / "data" / task.name)
            config = _config(suite, task, place, settle)  # all are checked first
            if suite.data_dir is not None and task.objective == "token_classification":
                _check_tags(config)
        except DataError as error:
            missing[task.name] = str(error)
            say(f"{task.name} is left out: {error}")
        else:
            places[task.name], configs[task.name] = place, config
    tasks = [task for task in suite.tasks if task.name in places]
    results: dict[str, list[dict[str, Any]]] = {}
    for task in tasks:
        found: list[dict[str, Any]] = []
        for i in range(suite.seeds):
            say(f"{suite.name}: {task.name}, seed {i + 1} of {suite.seeds}")
            config = _of_seed(configs[task.name], suite, task, i, say)
            try:
                result = _result(task, config, places[task.name], train)
            except DataError as error:
                missing[task.name] = str(error)
                say(f"{task.name} is left out: {error}")
                break
            if result is None:
                return None
            found.append(result)
        else:
            results[task.name] = found
        summary = _summary(suite, results, missing)
        write_atomically(suite.out / "suite.json", json.dumps(summary, indent=1) + "\n")
    return _summary(suite, results, missing)


def _config(suite: Suite, task: SuiteTask, place: Place, settle: Settle) -> RunConfig:
    config = RunConfig(
        run_dir=str(suite.out / task.name), objective=task.objective, init_from=suite.folder, epochs=float(task.epochs),
        batch_texts=task.batch_texts, keep_checkpoints=1, model=EncoderConfig(dropout_rate=0.1), data=place.train,
        optimizer=OptimizerConfig(learning_rate=task.learning_rate),
    )  # fmt: skip
    asked = settle(config)
    if changed := [name for name in differences(config, asked) if name in SETTLED]:
        raise ConfigError(
            f"a suite settles {', '.join(SETTLED)} by itself: got {', '.join(changed)}. The model is FOLDER, the data "
            f"--data-dir or --source, the run folders --out, and --seeds how often each task is trained."
        )
    check_task(asked)
    return asked


def _check_tags(config: RunConfig) -> None:
    """Raises: DataError: the tags of a file's first words are numbers, which mark no entities."""
    columns = find_task(config.objective).reading.columns
    source = open_source(config.data.sources[0], config.data, columns, cache_folder(config.data))
    first = next(source.records("train"), None)
    numbers = sorted({tag for *_, tag in first.value if tag.isdecimal()}) if first else []
    if numbers:
        raise DataError(
            f"tags have names that mark entities: {first.where or source.name} has {', '.join(numbers)}. Name them in "
            f"their order, such as --data.label-names O B-PER I-PER"
        )


def _of_seed(config: RunConfig, suite: Suite, task: SuiteTask, i: int, say: Say) -> RunConfig:
    origin, run_dir = config.init_from, str(suite.out / task.name / f"seed-{i}")
    if task.start is not None:
        trained = suite.out / task.start / f"seed-{i}"
        if (trained / _RESULT).is_file():
            origin = str(trained)
        else:
            say(f"{task.name} starts from {origin}, not from {task.start}, which is not trained in {suite.out}")
    return dataclasses.replace(config, run_dir=run_dir, seed=config.seed + i, init_from=origin)


def _result(task: SuiteTask, config: RunConfig, place: Place, train: Train) -> dict[str, Any] | None:
    """Metrics and score of one run, read if it was finished before; None if a signal stopped it."""
    path = pathlib.Path(config.run_dir) / _RESULT
    if path.is_file():
        known = json.loads(path.read_text("utf-8"))
        changed = {
            name: values
            for name, values in differences(from_dict(RunConfig, known["config"]), config).items()
            if name == "init_from" or not name.startswith(FREE_ON_RESUME)
        }
        if changed:
            lines = "".join(f"\n  {name}: {was} before, {now} now" for name, (was, now) in changed.items())
            raise ConfigError(
                f"a suite goes on with the settings it began with; {config.run_dir} is trained, and these "
                f"differ:{lines}\nGive the same, or another --out."
            )
        return known
    began = time.monotonic()
    if train(config) is None:
        return None
    run = load(config.run_dir)
    metrics = {}
    for ending, (data, split) in place.reported.items():
        scored = {"source": data.source, "validation": None, "validation_split": data.validation_split}
        found = score_answers(run, dataclasses.replace(config.data, **scored), lambda message: None, split)
        metrics |= {f"{name}{ending}": metric(found) for name, metric in task.metrics.items()}
    score = metrics[task.score] if task.score else statistics.mean(metrics.values())
    result = {
        "metrics": metrics, "score": score, "seconds": round(time.monotonic() - began, 1), "config": to_dict(config),
    }  # fmt: skip
    write_atomically(path, json.dumps(result, indent=1) + "\n")
    return result


def _spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": values}


def _summary(suite: Suite, results: dict[str, list[dict[str, Any]]], missing: dict[str, str]) -> dict[str, Any]:
    """The average is of the tasks' medians; its spread is of the seeds' own averages."""
    tasks = {
        name: {
            "score": _spread([result["score"] for result in found]),
            "metrics": {m: _spread([result["metrics"][m] for result in found]) for m in found[0]["metrics"]},
        }
        for name, found in results.items()
    }
    average = None
    if tasks:
        of_seeds = [statistics.mean(t["score"]["values"][i] for t in tasks.values()) for i in range(suite.seeds)]
        mean = statistics.mean(t["score"]["median"] for t in tasks.values())
        average = _spread(of_seeds) | {"median": mean, "tasks": list(tasks)}
    return {
        "suite": suite.name, "folder": suite.folder, "seeds": suite.seeds, "tasks": tasks, "missing": missing,
        "average": average,
    }  # fmt: skip


def table_rows(summary: dict[str, Any], tasks: Iterable[SuiteTask]) -> list[dict[str, str]]:
    """A row a task, in the suite's order, and the average's."""
    rows = []
    for task in tasks:
        found = summary["tasks"].get(task.name)
        if found is None:
            what = f"left out: {summary['missing'].get(task.name, 'not trained yet')}"
            rows.append({"task": task.name, "median": "", "min": "", "max": "", "medians of": what})
            continue
        each = ", ".join(f"{name} {value['median']:.4f}" for name, value in found["metrics"].items())
        rows.append({"task": task.name, **_numbers(found["score"]), "medians of": each})
    if summary["average"]:
        count, among = len(summary["tasks"]), len(rows)
        rows.append({"task": "average", **_numbers(summary["average"]), "medians of": f"{count} of {among} tasks"})
    return rows


def _numbers(spread: dict[str, Any]) -> dict[str, str]:
    return {name: f"{spread[name]:.4f}" for name in ("median", "min", "max")}
