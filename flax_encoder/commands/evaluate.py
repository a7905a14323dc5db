"""The scores of a model on a file with the right values."""

import argparse
import dataclasses
import json
import time

import tyro
from rich.console import Console

from flax_encoder.commands.screen import saying, show
from flax_encoder.config import ConfigError, DataConfig, GenerationConfig
from flax_encoder.training.console import make_news_console

HELP = "score a model on a file with the right values: accuracy, F1, correlation, BLEU, loss ..."


@dataclasses.dataclass(frozen=True)
class EvaluateArguments:
    """Score a model on documents with their right values, by the metrics of its task."""

    folder: tyro.conf.Positional[str]
    """A run, one of its checkpoints, or a published folder with a head."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    generation: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)
    objective: str | None = None
    """The task to open a published folder for; None is the task of its head."""
    corpus: str | None = None
    """contrastive: a file of more texts, one per line or row, which are searched beside the right ones."""
    allow_unused: bool = False
    """Leave out tensors of a published folder that no part of the model reads."""
    details: bool = False
    """Also print the scores of each label."""
    json: bool = False
    """Print JSON for programs."""
    num_processes: int = 1
    """Number of processes that share the work; start each with the same command, as for training."""


SETTINGS = EvaluateArguments  # each is an option, by a parser of their own


def run(arguments: argparse.Namespace) -> None:
    from flax_encoder.runs.processes import together

    asked = tyro.cli(EvaluateArguments, args=arguments.rest, prog="python -m flax_encoder evaluate")
    if asked.data == DataConfig():
        raise ConfigError("evaluate needs documents with their right values: give --data.source FILE.")
    with together(asked.num_processes) as is_first:
        _run(asked, is_first)


def _run(asked: EvaluateArguments, is_first: bool) -> None:
    from flax_encoder.runs.load import load
    from flax_encoder.runs.score_file import score_source
    from flax_encoder.training.runtime import set_up_runtime

    set_up_runtime()
    loaded = load(asked.folder, objective=asked.objective, allow_unused=asked.allow_unused)
    data = asked.data
    if asked.generation != GenerationConfig() or data.prefix:
        loaded = loaded.with_settings(asked.generation, data.prefix or None)
        data = dataclasses.replace(data, prefix="")  # which the run puts before texts
    began = time.monotonic()
    tell = make_news_console(stderr=True, is_shown=is_first).print
    with saying() as say:
        scores, details, about = score_source(loaded, data, say if is_first else str, asked.corpus, tell)
    if not is_first:
        return
    if asked.json:
        print(json.dumps(scores | ({"details": details} if asked.details else {})))
        return
    rows = [{"metric": name.replace("_", " "), "value": value} for name, value in scores.items()]
    show(rows, f"{asked.folder} on {about}, {time.monotonic() - began:.0f} s")
    if asked.details and details:
        Console(highlight=False, markup=False, emoji=False).print_json(data=details)
