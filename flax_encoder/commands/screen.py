"""What commands share: errors as one message, tables, news of long work, and types of options."""

import argparse
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.table import Table
from rich.text import Text

from flax_encoder.config import ConfigError, GenerationConfig, from_dict
from flax_encoder.data.sources.records import DataError
from flax_encoder.training.console import lasting_streams, make_console, make_news_console, print_table, without_news


@contextmanager
def failing_clearly(*more: type[Exception]) -> Iterator[None]:
    """Turn the errors that a user can mend into one message and exit status 1; bugs keep their traceback.

    Ctrl-C ends with exit status 130. Standard output and error may be closed, lose their reader or lack letters.
    """
    from flax_encoder.published.weights import WeightsError
    from flax_encoder.training.checkpoint import CheckpointError
    from flax_encoder.training.roll_call import await_verdict, tell_failure

    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as programs set it while they import
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with lasting_streams():
        try:
            yield
        except (ConfigError, DataError, CheckpointError, WeightsError, OSError, *more) as error:
            await_verdict(error)
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            tell_failure(error)
            sys.exit(1)
        except KeyboardInterrupt as error:
            print("interrupted.", file=sys.stderr)
            tell_failure(error, 130)
            sys.exit(130)
        except Exception as error:
            await_verdict(error)
            raise


def show(rows: list[dict[str, Any]], title: str) -> None:
    """Print a title, as it is, and a table under it: strings to the left, numbers with four digits to the right."""
    make_console().print(Text(title, "italic"))
    table = Table()
    for name in rows[0]:
        is_text = isinstance(rows[0][name], str)
        table.add_column(Text(name), justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for row in rows:
        table.add_row(*(Text(v if isinstance(v, str) else f"{v:.4f}") for v in row.values()))
    print_table(table)


def positive_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number from 1: got {text!r}")
    return int(text)


def add_processes_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-processes", type=positive_count, default=1, help="number of processes that share the "
                        "work; start each with the same command, as for training")  # fmt: skip


def add_folder_options(parser: argparse.ArgumentParser) -> None:
    """Options of commands that open published folders; `folder_options` reads them."""
    from flax_encoder.published.tasks import NO_HEAD, TASKS

    parser.add_argument("--task", choices=(*TASKS, NO_HEAD), help="the head to load from a published folder, or none "
                        "(default: the published one)")  # fmt: skip
    parser.add_argument("--allow-unused", action="store_true", help="leave out tensors of a published folder that no "
                        "part of the model reads")  # fmt: skip


def folder_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"head": arguments.task, "allow_unused": arguments.allow_unused}


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """--generation.NAME of every setting of writing; `generation_options` reads them."""
    group = parser.add_argument_group("text to text: how texts are written (default: as the run or folder says)")
    for field in dataclasses.fields(GenerationConfig):
        group.add_argument(f"--generation.{field.name.replace('_', '-')}", dest=f"generation.{field.name}",
                           metavar="VALUE")  # fmt: skip


def generation_options(arguments: argparse.Namespace) -> GenerationConfig:
    """What is given of the options that `add_generation_options` adds.

    Raises:
      ConfigError: a value of another type than its setting's, or one that breaks its rule.
    """
    words = {"true": True, "false": False}
    given = {}
    for field in dataclasses.fields(GenerationConfig):
        if (text := getattr(arguments, f"generation.{field.name}")) is not None:
            with suppress(ValueError):  # else it is a word
                text = words[text.lower()] if text.lower() in words else json.loads(text)
            given[field.name] = text
    return from_dict(GenerationConfig, given, "generation.")


def obey_quiet(arguments: list[str]) -> list[str]:
    """The command line without any --quiet before a `--`; if there was one, progress is not shown."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    without_news("--quiet" in arguments[:end])
    return [word for word in arguments[:end] if word != "--quiet"] + arguments[end:]


@contextmanager
def saying() -> Iterator[Callable[[str], None]]:
    """A function to call with news of the work. On a terminal it renews one line; elsewhere it prints a line at most
    every ten seconds."""
    console = make_news_console(stderr=True)
    if console.is_terminal:
        with console.status("starting") as status:
            yield lambda message: status.update(Text(message))
        return
    last = time.monotonic()

    def say(message: str) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            console.print(message)

    yield say
