"""The page of one or more runs: curves, scores, settings, examples, data, machine, and what to type next."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from flax_encoder.config import RunConfig, to_dict
from flax_encoder.pages import figures
from flax_encoder.pages.frame import escape, number, page, section, table
from flax_encoder.pages.story import Story, flattened

_POINTS = 1200  # of a curve, so that a page stays small
_STEPS = 10  # of a run, at which the same texts are shown
_LABELS = 40  # of a confusion matrix, so that it can be read


class _Chart(NamedTuple):
    title: str
    unit: str = ""
    learns: bool = False
    """What the model learns, rather than how the run goes."""
    log: bool = False
    zero: bool = False
    """The axis begins at 0."""
    percent: bool = False
    smooth: bool = False


_CHARTS = {
    "loss": _Chart("Loss", "nats a target", True, smooth=True),
    "accuracy": _Chart("Accuracy", "share of targets", True, smooth=True),
    "perplexity": _Chart("Perplexity", "exp of the loss, log scale", True, log=True, smooth=True),
    "tokens_per_second": _Chart("Throughput", "tokens a second", zero=True),
    "data_wait_fraction": _Chart("Waiting for data", "share of the time", zero=True, percent=True),
    "device_memory_gb": _Chart("Device memory", "GB, the most so far", zero=True),
    "process_memory_gb": _Chart("Memory of the process", "GB", zero=True),
    "learning_rate": _Chart("Learning rate", "peak rate times schedule", zero=True),
    "grad_norm": _Chart("Gradient norm", "before clipping, log scale", log=True, smooth=True),
    "skipped_updates": _Chart("Skipped updates", "so far", zero=True),
    "masking_overflow": _Chart("Masked tokens without a slot", "tokens between lines", zero=True),
}
_NO_CHARTS = {"step", "epoch", "spent_seconds"}  # axes, not curves


def report_page(stories: Sequence[Story]) -> str:
    """One HTML page of all that the folders of these runs tell."""
    several = len(stories) > 1
    names = ", ".join(story.name for story in stories)
    charts = _charts(stories)
    body = (
        f"<header><h1>{escape(names)}</h1>{_lead(stories)}</header>"
        + ("" if several else _tiles(stories[0]))
        + section("Held-out documents", _scores(stories), *(_seeds(s) for s in _families(stories)))
        + section("Curves", _controls(stories), _figures(charts))
        + section("Where the time went", *map(_time, stories))
        + "".join(_predictions(story, several) for story in stories)
        + section(
            "Settings that differ" if several else "Settings that are not the default", _settings(stories)
        )
        + "".join(_data(story, several) for story in stories)
        + section("Machine and versions", _machines(stories))
        + section("Go on", *(_commands(story) for story in stories))
    )
    runs = [{"name": story.name, "scale": _sparse(story.scale()), "bands": story.bands()} for story in stories]
    return page(names, body, scripts=["charts.js"], data={"runs": runs, "charts": charts})


def _lead(stories: Sequence[Story]) -> str:
    kinds = sorted({str(s.settings["objective"]) for s in stories if "objective" in s.settings})
    parts = [", ".join(kinds)] if kinds else []
    if len(stories) == 1:
        settings = stories[0].settings
        if "model.num_layers" in settings:
            parts.append(f"{settings['model.num_layers']} layers of width {settings.get('model.embed_dim')}")
        if origin := settings.get("init_from"):
            parts.append(f"started from {origin}")
        if source := settings.get("data.source"):
            parts.append(f"on {', '.join(source) if isinstance(source, list) else source}")
    else:
        parts.append(f"{len(stories)} runs")
    return f'<p class="lead">{escape(" · ".join(parts))}</p>'


def _tiles(story: Story) -> str:
    tiles: list[tuple[str, str]] = []
    steps = story.settings.get("steps")
    of_all = f"of {steps:,} steps" if isinstance(steps, int) and steps != story.last_step else "steps"
    tiles.append((f"{story.last_step:,}", of_all))
    held_out = story.last_of("eval/")
    for name in list(held_out)[:3]:
        tiles.append((number(held_out[name]), f"held-out {_words(name)}"))
    rates = [line["tokens_per_second"] for line in story.training if "tokens_per_second" in line]
    if rates:
        tiles.append((number(round(statistics.median(rates))), "tokens a second (median)"))
    if minutes := story.scale().get("minutes"):
        tiles.append((f"{minutes[-1]:.1f}", "minutes of training"))
    if parameters := story.summary.get("parameters"):
        tiles.append((_short(parameters), "parameters"))
    cells = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)
    return f'<div class="tiles">{cells}</div>'


def _words(metric: str) -> str:
    """A metric's name as people write it: macro F1 of macro_f1."""
    return " ".join({"f1": "F1"}.get(word, word) for word in metric.split("_"))


def _short(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _scores(stories: Sequence[Story]) -> str:
    """A row for each run, its baselines and its test documents; a column a metric."""
    rows: list[tuple[str, dict[str, float]]] = []
    for story in stories:
        before = f"{story.name}: " if len(stories) > 1 else ""
        own = story.summary.get("held_out") or {}
        rows += [(before + name, values) for name, values in own.items()]
        if not own and (last := story.last_of("eval/")):
            rows.append((before + "this model, last evaluation", last))
        if last := story.last_of("test/"):
            rows.append((before + "on the test documents", last))
    metrics = list(dict.fromkeys(name for _, values in rows for name in values))
    if not metrics:
        return '<p class="note">The log has no evaluation yet.</p>'
    cells = [[name, *(values.get(metric) for metric in metrics)] for name, values in rows]
    return _styled(table(["model", *(_words(m) for m in metrics)], cells, "scores on held-out documents"), "named")


def _families(stories: Sequence[Story]) -> list[Story]:
    """One story of each folder with several seeds."""
    return list({story.folder.parent: story for story in stories if story.seeds}.values())


def _seeds(story: Story) -> str:
    rows = []
    for name, row in (story.seeds.get("metrics") or {}).items():
        values = row.get("values", [])
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append([_words(name.removeprefix("eval/")), len(values), row.get("median"), row.get("min"),
                     row.get("max"), spread])  # fmt: skip
    title = f"<h3>Spread over seeds, {escape(story.folder.parent.name)}</h3>"
    columns = ["metric", "seeds", "median", "min", "max", "standard deviation"]
    return title + table(columns, rows, "spread over seeds") if rows else ""


def _charts(stories: Sequence[Story]) -> list[dict[str, Any]]:
    names = {name.removeprefix("eval/") for s in stories for line in s.lines for name in line} - _NO_CHARTS
    names = {name for name in names if not name.startswith(("test/", "goodput/"))}
    order = list(_CHARTS)

    def place(name: str) -> tuple[bool, int, str]:
        chart = _CHARTS.get(name)
        is_score = chart.learns if chart else any(f"eval/{name}" in line for s in stories for line in s.lines)
        return not is_score, order.index(name) if chart else len(order), name

    charts = []
    for name in sorted(names, key=place):
        chart = _CHARTS.get(name) or _Chart(_words(name)[:1].upper() + _words(name)[1:])
        series = []
        for i, story in enumerate(stories):
            for held_out, key in ((False, name), (True, f"eval/{name}")):
                points = [(line["step"], line[key]) for line in story.lines if _is_number(line.get(key))]
                if points := thinned(points):
                    steps, values = zip(*points, strict=True)
                    series.append({"run": i, "held_out": held_out, "steps": steps, "values": values})
        if series:
            both = len({s["held_out"] for s in series}) > 1
            charts.append({
                "title": chart.title, "unit": chart.unit, "log": chart.log, "zero": chart.zero,
                "percent": chart.percent, "smooth": chart.smooth, "both": both, "series": series,
            })  # fmt: skip
    return charts


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def thinned(points: list[tuple[int, Any]], most: int = _POINTS) -> list[tuple[int, Any]]:
    """At most so many points, in order: the first, the last, and of each stretch between the lowest and the highest,
    so that no spike is lost."""
    if len(points) <= most:
        return points
    stretches = most // 2 - 1
    kept = {0, len(points) - 1}
    for i in range(stretches):
        part = range(i * len(points) // stretches, (i + 1) * len(points) // stretches)
        kept |= {min(part, key=lambda j: points[j][1]), max(part, key=lambda j: points[j][1])}
    return [points[i] for i in sorted(kept)]


def _sparse(scale: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """At most `_POINTS` places of a scale, evenly spread, the last among them: the page draws straight between them."""
    count = len(scale["steps"])
    every = max(1, math.ceil(count / _POINTS))
    return {name: values[(count - 1) % every :: every] for name, values in scale.items()}


def _controls(stories: Sequence[Story]) -> str:
    axes = "".join(
        f'<label><input type="radio" name="axis" value="{value}"{" checked" * (value == "steps")}> {value}</label>'
        for value in ("steps", "tokens", "minutes")
    )
    shown = f'<fieldset><legend>Over</legend>{axes}</fieldset>'
    if len(stories) > 1:
        runs = "".join(
            f'<label><input type="checkbox" data-run="{i}" checked><span class="swatch" '
            f'style="background:var(--s{i % 8})"></span>{escape(story.name)}</label>'
            for i, story in enumerate(stories)
        )
        shown += f"<fieldset><legend>Runs</legend>{runs}</fieldset>"
    smooth = '<label><input type="checkbox" id="smooth" checked> running mean</label>'
    return f'<div class="controls">{shown}{smooth}</div>'


def _figures(charts: list[dict[str, Any]]) -> str:
    made = []
    for i, chart in enumerate(charts):
        is_held_out = all(series["held_out"] for series in chart["series"])
        dots = "dots are held out" if chart["both"] else "held out" if is_held_out else ""
        unit = " · ".join(filter(None, (chart["unit"], dots)))
        made.append(
            f'<figure class="card" data-chart="{i}"><figcaption><h3>{escape(chart["title"])}</h3><span class="unit">'
            f'{escape(unit)}</span></figcaption><div class="plot"></div><div class="readout" aria-live="polite"></div>'
            f"</figure>"
        )
    return f'<div class="grid">{"".join(made)}</div>' if made else '<p class="note">The log has no line yet.</p>'


def _time(story: Story) -> str:
    """A bar of the shares of wall time that the newest start of a run spent, the largest first."""
    shares = sorted(story.last_of("goodput/").items(), key=lambda pair: -pair[1])
    if not shares:
        return ""
    parts = "".join(
        f'<i style="flex:{share:.5f};background:var(--s{i % 8})" title="{escape(_words(name))} {share:.1%}"></i>'
        for i, (name, share) in enumerate(shares)
    )
    legend = "".join(
        f'<li><span class="swatch" style="background:var(--s{i % 8})"></span>{escape(_words(name))} {share:.1%}</li>'
        for i, (name, share) in enumerate(shares)
    )
    return (
        f'<div class="card time"><h3>{escape(story.name)}</h3><div class="stack" aria-hidden="true">{parts}</div>'
        f'<ul class="legend">{legend}</ul></div>'
    )


def _watched(story: Story) -> str:
    """What the model said of the same few texts over the run: a table each, a row a step."""
    cards = []
    for text, right, said in story.watched():
        if len(said) < 2:
            continue
        some = [said[i] for i in sorted({i * (len(said) - 1) // (_STEPS - 1) for i in range(_STEPS)})]
        heads = "".join(f'<th scope="col">{escape(word)}</th>' for word in right)
        rows = ""
        for step, words in some:
            cells = "".join(
                f'<td class="right">{escape(a)} ✓</td>' if a == b else f"<td>{escape(a)}</td>"
                for a, b in zip(words, right, strict=True)
            )
            rows += f'<tr><th scope="row">{step:,}</th>{cells}</tr>'
        cards.append(
            f'<figure class="card watched"><figcaption>{escape(text)}</figcaption><div class="scroll" tabindex="0" '
            f'role="region" aria-label="answers over the run"><table><thead><tr><th scope="col">step</th>{heads}'
            f"</tr></thead><tbody>{rows}</tbody></table></div></figure>"
        )
    if not cards:
        return ""
    return (
        '<h3>The same held-out texts over the run</h3><p class="note">The model\'s answers at each evaluation. A '
        f'column\'s head has the right answer.</p><div class="grid narrow">{"".join(cards)}</div>'
    )


def _predictions(story: Story, several: bool) -> str:
    """Examples, answers over the run, right and wrong answers, the confusion matrix, the reliability curve."""
    summary, parts = story.summary, []
    if examples := summary.get("examples"):
        parts.append("".join(
            f'<div class="command"><pre>{escape(line.strip())}</pre></div>' for line in examples
        ))  # fmt: skip
    parts.append(_watched(story))
    if answers := summary.get("answers"):
        rows = [
            ["✓" if a["is_right"] else "✗", a["text"], a["says"], a["right"], a.get("probability")] for a in answers
        ]
        columns = ["right", "text", "the model says", "the data has", "probability"]
        shown = table(columns, rows, "answers to held-out documents")
        parts.append("<h3>Wrong answers to held-out documents, the surest first, and some right ones</h3>")
        parts.append(_styled(shown, "tall", "answers"))
    pictures = []
    if confusion := summary.get("confusion"):
        pictures.append(_confusion(confusion["labels"], confusion["counts"]))
    if reliability := summary.get("reliability"):
        pictures.append(
            '<figure class="card"><figcaption><h3>Reliability</h3><span class="unit">share of right answers, by their '
            f"probability</span></figcaption>{figures.reliability(reliability)}</figure>"
        )
    if pairs := summary.get("scatter"):
        pictures.append(
            '<figure class="card"><figcaption><h3>Scores</h3><span class="unit">the model\'s against the data\'s</span>'
            f"</figcaption>{figures.scatter(pairs)}</figure>"
        )
    if pictures:
        parts.append(f'<div class="grid pictures">{"".join(pictures)}</div>')
    return section(f"Answers, {story.name}" if several else "Answers", *parts)


def _confusion(labels: list[str], counts: list[list[int]]) -> str:
    """The matrix of a few labels; of many the pairs that are taken for one another most."""
    head = '<figcaption><h3>Confusion</h3><span class="unit">rows: labels in the data; columns: answers</span>'
    if len(labels) > _LABELS:
        pairs = [(n, a, p) for a, row in zip(labels, counts, strict=True) for p, n in zip(labels, row, strict=True)
                 if n and a != p]  # fmt: skip
        rows = [[a, p, n] for n, a, p in sorted(pairs, reverse=True)[:_LABELS]]
        shown = table(["the data has", "the model says", "documents"], rows, "labels taken for one another")
        return f'<figure class="card">{head}</figcaption>{shown}</figure>'
    top = "".join(f'<th scope="col"><span>{escape(label)}</span></th>' for label in labels)
    body = ""
    for i, (label, row) in enumerate(zip(labels, counts, strict=True)):
        total = max(sum(row), 1)
        cells = "".join(
            f'<td style="background:color-mix(in srgb,var({"--good" if i == j else "--bad"}) {55 * n / total:.0f}%,'
            f'transparent)">{n or ""}</td>'
            for j, n in enumerate(row)
        )
        body += f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>'
    wide = " wide" * (len(labels) > 5)
    return (
        f'<figure class="card{wide}">{head}</figcaption><div class="scroll" tabindex="0" role="region" '
        f'aria-label="confusion matrix"><table class="matrix"><thead><tr><td></td>{top}</tr></thead><tbody>{body}'
        f"</tbody></table></div></figure>"
    )


def _settings(stories: Sequence[Story]) -> str:
    """Settings in which runs differ, or in which one differs from the default."""
    defaults = flattened(to_dict(RunConfig()))  # also what a setting was before there was a choice
    columns = [("default", defaults)] if len(stories) == 1 else []
    columns += [(story.name, story.settings) for story in stories if story.settings]
    if len(columns) < 2:
        return ""
    names = sorted({name for _, settings in columns for name in settings} - {"run_dir"})
    rows = []
    for name in names:
        values = [_plain(settings.get(name, defaults.get(name))) for _, settings in columns]
        if any(value != values[0] for value in values):
            rows.append([name, *values])
    if not rows:
        return '<p class="note">They are the same.</p>'
    shown = table(["setting", *(name for name, _ in columns)], rows, "settings")
    return _styled(shown, "tall")


def _styled(table: str, *styles: str) -> str:
    return table.replace('class="scroll"', f'class="{" ".join(("scroll", *styles))}"', 1)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _data(story: Story, several: bool) -> str:
    data = story.summary.get("data") or {}
    parts = []
    if said := data.get("text"):
        parts.append("".join(f"<p>{escape(line)}</p>" for line in said.split("\n")))
    pictures = []
    if lengths := data.get("lengths"):
        pictures.append(
            '<figure class="card"><figcaption><h3>Lengths</h3><span class="unit">training documents, by tokens</span>'
            f"</figcaption>{figures.bars(lengths, 'tokens of a document', 'documents')}</figure>"
        )
    if fill := data.get("fill"):
        pictures.append(
            '<figure class="card"><figcaption><h3>Row fill</h3><span class="unit">rows, by the share that is no padding'
            f"</span></figcaption>{figures.bars(fill, 'share of a row', 'rows')}</figure>"
        )
    if pictures:
        parts.append(f'<div class="grid pictures">{"".join(pictures)}</div>')
    return section(f"Data, {story.name}" if several else "Data", *parts)


def _machines(stories: Sequence[Story]) -> str:
    found = [(story.name, story.summary["machine"]) for story in stories if story.summary.get("machine")]
    if not found:
        return ""
    names = list(dict.fromkeys(name for _, machine in found for name in machine))
    rows = [[name.replace("_", " "), *(machine.get(name) for _, machine in found)] for name in names]
    return table(["what", *(name for name, _ in found)], rows, "machine and versions")


def _commands(story: Story) -> str:
    said = f"{story.name} has checkpoints of step " + ", ".join(map(str, story.checkpoints)) if story.checkpoints else (
        f"{story.name} has no checkpoint."
    )
    commands = "".join(
        f'<div class="command"><pre>{escape(command)}</pre><button type="button" class="copy">copy</button></div>'
        for command in story.summary.get("commands") or []
    )
    return f'<p class="note">{escape(said)}</p>{commands}'
