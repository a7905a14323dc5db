"""The panel that a terminal shows of a run under way."""

import itertools
from collections.abc import Sequence

from rich.console import Group
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int, blocks: str = _BLOCKS) -> str:
    """At most `width` characters, each as high as the mean of its share of the values, from the least to the most.

    Args:
      values: finite numbers, oldest first; as many as there are, each of at most `width` shares has one or more.
      blocks: characters, lowest first.
    """
    count = min(width, len(values))
    if count < 1:
        return ""
    edges = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    height = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((mean - low) * height)] for mean in means)


def run_panel(
    title: str, step: int, steps: int, losses: Sequence[float], facts: Sequence[str], left: str, width: int,
    is_plain: bool = False,
) -> Panel:  # fmt: skip
    """Of a run: how far it is, its loss so far as a curve, and facts in a line below.

    Args:
      losses: all that were logged, oldest first, at least one.
      left: how long it will take from here, as text.
      width: columns of the terminal.
      is_plain: the terminal has letters of ASCII alone: no curve is drawn.
    """
    first = Table.grid(expand=True, padding=(0, 1))
    first.add_column(no_wrap=True)
    first.add_column(ratio=1)
    first.add_column(no_wrap=True, justify="right")
    first.add_row(f"step {step:,} of {steps:,}", ProgressBar(total=max(steps, 1), completed=step), f"{left} left")
    curve = "" if is_plain else sparkline(losses, max(8, min(48, width - 24)))
    loss = Text.assemble("loss ", (f"{losses[-1]:.3f}", "bold"), "  ", (curve, "cyan"), overflow="ellipsis")
    return Panel(Group(first, loss, Text("  ".join(facts), overflow="ellipsis")), title=Text(title), title_align="left")
