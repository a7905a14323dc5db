"""What commands share: errors as one message, tables, news of long work, and types of options."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from flax_encoder.config import ConfigError
from flax_encoder.data.sources.records import DataError


@contextmanager
def failing_clearly(*more: type[Exception]) -> Iterator[None]:
    """Turn the errors that a user can mend into one message and exit status 1; bugs keep their traceback."""
    from flax_encoder.published.weights import WeightsError
    from flax_encoder.training.checkpoint import CheckpointError

    try:
        yield
    except (ConfigError, DataError, CheckpointError, WeightsError, OSError, *more) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        sys.exit(130)


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(v if isinstance(v, str) else f"{v:.4f}" for v in row.values()))
    Console(highlight=False).print(table)


def positive_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number from 1: got {text!r}")
    return int(text)


def add_folder_options(parser: argparse.ArgumentParser) -> None:
    """Options of commands that open published folders; `folder_options` reads them."""
    from flax_encoder.published.tasks import NO_HEAD, TASKS

    parser.add_argument("--task", choices=(*TASKS, NO_HEAD), help="of a published folder: the head to load, or none "
                        "(default: the one that it is published with)")  # fmt: skip
    parser.add_argument("--allow-unused", action="store_true", help="of a published folder: leave out tensors that "
                        "nothing reads")  # fmt: skip


def folder_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"head": arguments.task, "allow_unused": arguments.allow_unused}


@contextmanager
def saying() -> Iterator[Callable[[str], None]]:
    """What to call with news of the work: a line that renews itself on a terminal, else a line every ten seconds."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if console.is_terminal:
        with console.status("starting") as status:
            yield lambda message: status.update(message)
        return
    last = time.monotonic()

    def say(message: str) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            console.print(message, markup=False)

    yield say
