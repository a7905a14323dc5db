"""train: train an encoder by a recipe; `python train.py` is the same command."""

import argparse
import sys

from flax_encoder.commands.recipe import parse_run_config
from flax_encoder.commands.screen import failing_clearly, obey_quiet
from flax_encoder.config import RunConfig

HELP = "train a model by a recipe: --config configs/NAME.py, and any of its settings as options (train --help)"
SETTINGS = RunConfig  # each is an option, by a parser of their own


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says, and show the results."""
    from flax_encoder.runs.step_log import Diverged
    from flax_encoder.training.run_log import NotFinite

    with failing_clearly(Diverged, NotFinite):
        arguments = obey_quiet(sys.argv[1:]) if argv is None else argv
        _train(parse_run_config(arguments, default="configs/quickstart.py"))


def run(arguments: argparse.Namespace) -> None:
    main(arguments.rest)


def _train(config) -> None:
    import jax

    from flax_encoder.runs.elsewhere import working_folder
    from flax_encoder.runs.report import show_report
    from flax_encoder.runs.seeds import train_seeds
    from flax_encoder.runs.train import train

    with working_folder(config, print) as config:
        if config.seeds > 1:
            train_seeds(config, train)
            return
        metrics = train(config)
        if metrics is not None and jax.process_count() == 1:
            show_report(config, metrics, train)
        elif metrics is not None and jax.process_index() == 0:
            print("held-out text:", ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
