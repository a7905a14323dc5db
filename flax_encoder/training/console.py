"""What people see: streams that outlive their reader, and consoles that show texts, labels and paths as they are."""

import codecs
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.table import Table

_ERRORS = "flax_encoder.spell"
_is_quiet = False


def without_news(is_quiet: bool = True) -> None:
    """Leave out from now on what tells how far the work is. Results, warnings and errors are shown all the same."""
    global _is_quiet
    _is_quiet = is_quiet


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Make standard output and error such that no writing to them raises, for as long as the context lasts.

    A letter that a stream cannot encode is written as its escape. When a stream's reader goes away, or it was closed
    from the start, what is written to it is dropped: standard error is told once of standard output.
    """
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed: the next file to be opened would take its number, and other programs' messages
            with suppress(OSError):
                nothing = os.open(os.devnull, os.O_RDWR)
                if nothing != number:
                    os.dup2(nothing, number)
                    os.close(nothing)
            stream = open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Lasting(stream, name) for stream, name in zip(before, ("stdout", "stderr"), strict=True))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _spell(error: UnicodeError) -> tuple[bytes, int]:
    """A letter that the encoding lacks as its escape, and a byte of a path that was no text as that byte."""
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    spelled = [os.fsencode(x) if 0xDC80 <= ord(x) <= 0xDCFF else x.encode("ascii", "backslashreplace") for x in letters]
    return b"".join(spelled), error.end


codecs.register_error(_ERRORS, _spell)


class _Lasting:
    """A text stream whose writes never raise."""

    def __init__(self, stream: Any, name: str):
        self._stream, self._name = stream, name
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:
            self._drop(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        """Send what is written from now on, and what Python writes as it ends, nowhere."""
        with suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)
        if self._name == "stdout":
            print(f"standard output can no longer be written ({error}); the work continues.", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_console(*, stderr: bool = False, soft_wrap: bool = True, **options) -> Console:
    """A console that shows texts, labels and paths as they are: `[red]` and `:fire:` are no markup in it."""
    console = Console(
        stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=soft_wrap, **options
    )
    if console.width < 1:  # COLUMNS=0, as some terminals say before they know
        console.width = 80
    return console


def make_news_console(*, stderr: bool = False, is_shown: bool = True) -> Console:
    """A console for what tells how far the work is; it shows nothing after `without_news`."""
    return make_console(stderr=stderr, quiet=_is_quiet or not is_shown)


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal, or wider if words or numbers would be cut: those lines are wrapped."""
    console = make_console(soft_wrap=False)
    least = table.__rich_measure__(console, console.options.update_width(10_000)).minimum
    console.width = max(console.width, least)
    console.print(table)
