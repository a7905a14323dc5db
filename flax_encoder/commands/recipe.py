"""Recipes, Python files of settings, and an option of the command line for every setting."""

import argparse
import dataclasses
import importlib.util
import pathlib
import sys

import tyro

from flax_encoder.config import ConfigError, EncoderConfig, RunConfig, differences, from_dict, to_dict

_CHECKOUT, _PACKAGE = (pathlib.Path(__file__).parents[n] for n in (2, 1))
# Where configs/ stands: beside train.py in a checkout, in the package where that is installed from a wheel.
HOME = _CHECKOUT if (_CHECKOUT / "train.py").is_file() and (_CHECKOUT / "configs").is_dir() else _PACKAGE


def find_recipe(name: str, home: pathlib.Path = HOME) -> pathlib.Path:
    """The file that --config names: a path from here, else from `home`, else the name of one in its configs/.

    Raises:
      ConfigError: there is none.
    """
    candidates = [pathlib.Path(name), home / name, home / "configs" / f"{name}.py"]
    for file in candidates:
        if file.is_file():
            return file
    known = ", ".join(f"configs/{name}.py" for name in recipe_names(home)) or "none"
    where = "" if home.resolve() == pathlib.Path.cwd() else f", in {home}"
    raise ConfigError(f"no recipe at {name}; recipes in configs/ are: {known}{where}. Give a path, or the bare "
                      f"name of one of them.")  # fmt: skip


def recipe_names(home: pathlib.Path = HOME) -> list[str]:
    """The names of the recipes in configs/ of `home`, sorted."""
    return sorted(file.stem for file in home.glob("configs/*.py"))


def load_recipe(path: str | pathlib.Path) -> RunConfig:
    """The `config` of a recipe, a Python file of the user's own.

    Raises:
      ConfigError: no such file, settings in it that cannot be, or no RunConfig named `config`.
    """
    file = find_recipe(str(path))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.path[:0] = str(file.resolve().parent), str(HOME / "configs")  # it may build on its neighbours, and on ours
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except ConfigError as error:
        raise ConfigError(f"{error} This is the recipe {file} itself, which is read before any option: correct it in "
                          f"that file.") from None  # fmt: skip
    finally:
        del sys.path[:2]
    config = getattr(module, "config", None)
    if not isinstance(config, RunConfig):
        raise ConfigError(f"a recipe must define `config`, a RunConfig: {path} has {config!r}.")
    return config


def parse_run_config(argv: list[str], default: str, *, model: EncoderConfig | None = None) -> RunConfig:
    """--config PATH or NAME, then every setting of that recipe, with another model if one is given, as an option."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=default)
    known, rest = first.parse_known_args(argv)
    config = load_recipe(known.config)
    config = config if model is None else dataclasses.replace(config, model=model)
    if config.run_dir == RunConfig.run_dir:
        config = dataclasses.replace(config, run_dir=f"runs/{pathlib.Path(known.config).stem}")
    asked = tyro.cli(
        RunConfig,
        default=config,
        args=rest,
        prog="train.py",
        description=f"Train a text encoder. Defaults are those of the recipe {known.config}; --config takes the path "
        "of another recipe, or its name in configs/. The same command again resumes a run. --quiet hides progress.",
    )
    return without_unread(without_overruled(asked, config), config)


_OVERRULED_BY = {"steps": "epochs", "batch_size": "batch_texts"}


def without_overruled(asked: RunConfig, recipe: RunConfig) -> RunConfig:
    """`asked`, whose steps and batch size hold where they were asked for: the recipe's epochs and batch_texts, which
    they would follow, are None then."""
    changed = differences(recipe, asked)
    overruling = {by: None for name, by in _OVERRULED_BY.items() if name in changed and by not in changed}
    return dataclasses.replace(asked, **overruling)


def without_unread(asked: RunConfig, recipe: RunConfig) -> RunConfig:
    """`asked`, without the recipe's settings that only the recipe's own task reads (such as masking) if another
    objective was asked for; these are at their defaults then."""
    from flax_encoder.tasks import TASKS, is_setting_read  # which import JAX: --help does without

    if asked.objective == recipe.objective or asked.objective not in TASKS:
        return asked
    values, of_recipe = to_dict(asked), differences(asked, recipe)
    for setting, (default, _) in differences(RunConfig(objective=asked.objective), asked).items():
        if setting not in of_recipe and not is_setting_read(asked.objective, setting):
            section, _, name = setting.rpartition(".")
            (values[section] if section else values)[name] = default
    return from_dict(RunConfig, values)
