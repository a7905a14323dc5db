"""The frame of a page: one HTML file with its style, scripts and data inside, safe against what texts hold."""

import html
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

_HERE = pathlib.Path(__file__).parent
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def escape(text: object) -> str:
    """A text as HTML that shows it: no part of it is markup. Lone surrogates become U+FFFD."""
    return html.escape(str(text).encode("utf-8", "replace").decode("utf-8"))


def page(title: str, body: str, *, scripts: Sequence[str] = (), data: Any = None) -> str:
    """A whole HTML page.

    Args:
      title: plain text.
      body: HTML; what is not the house's own in it has gone through `escape`.
      scripts: names of files in this folder, such as "charts.js", which run in this order.
      data: JSON that the scripts find in the element `data`.
    """
    data_text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":  # so that no text in it ends the element
        data_text = data_text.replace(letter, f"\\u{ord(letter):04x}")
    code = "".join(f"<script>\n{_asset(name)}</script>\n" for name in ("tables.js", *scripts))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n<meta name="color-scheme" '
        f'content="light dark">\n<link rel="icon" href="data:,">\n<style>\n{_asset("style.css")}</style>\n</head>\n'
        f'<body>\n<main>\n{body}\n</main>\n<script type="application/json" id="data">{data_text}</script>\n'
        f"{code}</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return (_HERE / name).read_text("utf-8")


def section(title: str, *parts: str, note: str = "") -> str:
    """A heading with what stands under it; empty where all parts are."""
    if not any(parts):
        return ""
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}{''.join(parts)}</section>\n"


def number(value: object) -> str:
    """A number for people, to four digits or so; other values as they are."""
    if not _is_number(value):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    digits = next(n for n, least in ((0, 1000), (1, 100), (2, 10), (4, 0)) if abs(value) >= least)
    return f"{value:,.{digits}f}"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], label: str) -> str:
    """A table that sorts by the column that is pressed; texts in it are escaped, None is an empty cell.

    Args:
      label: what the table is, for those who hear the page.
    """
    rows = [list(row) for row in rows]
    kinds = [' class="number"' * any(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    heads = "".join(
        f'<th scope="col"{kind}><button type="button">{escape(c)}</button></th>'
        for c, kind in zip(columns, kinds, strict=True)
    )
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table class="sortable"><thead>'
        f"<tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: object) -> str:
    if value is None:
        return "<td></td>"
    if _is_number(value):
        return f'<td class="number" data-value="{value!r}">{escape(number(value))}</td>'
    return f"<td>{escape(value)}</td>"
