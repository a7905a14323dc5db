"""Small pictures that need no script: bars, a reliability curve, a scatter. Each is SVG of its own."""

import math
from collections.abc import Sequence
from typing import Any

from flax_encoder.pages.frame import escape, number

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _RIGHT = 420, 260, 54, 12, 46, 20


def bars(bins: Sequence[dict[str, Any]], x_label: str, y_label: str) -> str:
    """Bars from 0.

    Args:
      bins: [{"label", "count"}, ...], from left to right.
    """
    most = max(max(b["count"] for b in bins), 1)
    width = (_WIDTH - _LEFT - _RIGHT) / len(bins)
    shapes, every = "", math.ceil(len(bins) / 9)
    for i, b in enumerate(bins):
        height = (_HEIGHT - _TOP - _BOTTOM) * b["count"] / most
        x, y = _LEFT + i * width, _HEIGHT - _BOTTOM - height
        shapes += (
            f'<rect class="bar" x="{x + 1:.1f}" y="{y:.1f}" width="{max(width - 2, 0.5):.1f}" height="{height:.1f}">'
            f"<title>{escape(b['label'])}: {number(b['count'])}</title></rect>"
        )
        if i % every == 0:
            shapes += _text(x + width / 2, _HEIGHT - _BOTTOM + 16, b["label"], "middle")
    return _frame(shapes, [(0, "0"), (1, _short(most))], x_label, y_label)


def reliability(bins: Sequence[dict[str, Any]]) -> str:
    """How often a model is right, by how sure it is; on the diagonal it is as sure as it should be.

    Args:
      bins: [{"confidence", "accuracy", "count"}, ...]; a dot is as large as its share of the documents.
    """
    total = max(sum(b["count"] for b in bins), 1)
    shapes = f'<path class="diagonal" d="M{_x(0):.1f} {_y(0):.1f}L{_x(1):.1f} {_y(1):.1f}"/>'
    for b in bins:
        shapes += (
            f'<circle class="dot" cx="{_x(b["confidence"]):.1f}" cy="{_y(b["accuracy"]):.1f}" r="'
            f'{3 + 12 * math.sqrt(b["count"] / total):.1f}" opacity=".75"><title>{b["confidence"]:.0%} sure, '
            f"{b['accuracy']:.0%} right, {number(b['count'])} documents</title></circle>"
        )
    for share in (0, 0.25, 0.5, 0.75, 1):
        shapes += _text(_x(share), _HEIGHT - _BOTTOM + 16, f"{share:.0%}", "middle")
    return _frame(shapes, [(s, f"{s:.0%}") for s in (0, 0.25, 0.5, 0.75, 1)], "how sure it is", "right")


def scatter(pairs: Sequence[Sequence[int | float]]) -> str:
    """Numbers that a model says against those of the data, [(data's, model's), ...]."""
    values = [v for pair in pairs for v in pair]
    low, high = min(values), max(values)
    size = (high - low) or 1.0
    shapes = f'<path class="diagonal" d="M{_x(0):.1f} {_y(0):.1f}L{_x(1):.1f} {_y(1):.1f}"/>'
    for truth, said in pairs:
        shapes += (
            f'<circle class="dot" cx="{_x((truth - low) / size):.1f}" cy="{_y((said - low) / size):.1f}" r="3" '
            f'opacity=".5"><title>{number(truth)}: {number(said)}</title></circle>'
        )
    marks = [(s, number(round(low + s * size, 4))) for s in (0, 0.5, 1)]
    for share, label in marks:
        shapes += _text(_x(share), _HEIGHT - _BOTTOM + 16, label, "middle")
    return _frame(shapes, marks, "the data's", "the model's")


def _x(share: int | float) -> int | float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * share


def _y(share: int | float) -> int | float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share


def _frame(shapes: str, marks: Sequence[tuple[int | float, str]], x_label: str, y_label: str) -> str:
    lines = "".join(
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_y(at):.1f}" y2="{_y(at):.1f}"/>'
        + _text(_LEFT - 6, _y(at) + 4, label, "end")
        for at, label in marks
    )
    labels = _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x_label, "middle")
    middle = (_HEIGHT - _BOTTOM + _TOP) / 2
    labels += f'<text transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y_label)} by {escape(x_label)}">{lines}'
        f"{shapes}{labels}</svg>"
    )


def _text(x: int | float, y: int | float, text: object, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _short(value: int | float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e4 / 10)):
        if value >= size * (10 if unit == "k" else 1):
            return f"{value / size:.3g}{unit}"
    return number(value)
