"""The page of runs: what it shows, what it must not run, and how it is in a browser."""

import dataclasses
import html.parser
import json
import math
import pathlib
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from flax_encoder.commands import main
from flax_encoder.commands.screen import obey_quiet
from flax_encoder.config import ConfigError, DataConfig, OptimizerConfig, RunConfig, to_dict
from flax_encoder.data.pipeline import open_data
from flax_encoder.pages.frame import escape, number, page, table
from flax_encoder.pages.report import report_page, thinned
from flax_encoder.pages.story import read_stories
from flax_encoder.runs.load import load
from flax_encoder.runs.summary import confusion, held_out_answers, reliability, write_summary
from flax_encoder.training.console import make_console, make_news_console
from tests.browser import open_page

NASTY = '</script><script>document.title = "taken"</script><b onclick=x>&amp;\u2028'


def write_run(folder, config=None, lines=None, summary=None):
    folder.mkdir(parents=True)
    config = config or RunConfig(run_dir=str(folder), steps=40, batch_size=8)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    lines = lines or [
        {"step": s, "loss": 4.0 / s + 1, "accuracy": s / 50, "grad_norm": 1.0 + s % 3, "learning_rate": 1e-3,
         "tokens_per_second": 1000.0, "data_wait_fraction": 0.01, "spent_seconds": s * 2.0}
        for s in range(1, 41)
    ] + [{"step": 40, "eval/loss": 1.5, "eval/accuracy": 0.5}]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if summary:
        (folder / "report.json").write_text(json.dumps(summary))
    return folder


SUMMARY = {
    "format": 1,
    "held_out": {"majority": {"accuracy": 0.25}, "this model": {"accuracy": 0.5, "loss": 1.5}},
    "examples": [f"{NASTY}\n  it says so"],
    "answers": [{"text": NASTY, "says": "a", "right": NASTY, "is_right": False, "probability": 0.9}],
    "confusion": {"labels": ["a", NASTY], "counts": [[3, 1], [0, 5]]},
    "reliability": [{"confidence": 0.75, "accuracy": 0.5, "count": 8}],
    "data": {"text": f"data: {NASTY}", "lengths": [{"label": "8", "count": 3}], "fill": [{"label": "90%", "count": 9}]},
    "machine": {"devices": "1 x cpu", "jax": "0.10.1"},
    "commands": [f"python -m flax_encoder classify 'runs/{NASTY}'"],
    "parameters": 1_234_567,
}


class Tags(html.parser.HTMLParser):
    """What elements a page has, and the text of each."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text, self.attributes = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text.append(data)


def test_no_text_of_a_run_is_markup(tmp_path):
    folder = write_run(tmp_path / "a <b> & c", RunConfig(run_dir=NASTY, steps=40), summary=SUMMARY)
    made = report_page(read_stories([folder]))
    tags = Tags(made)
    assert tags.found.count("script") == 3  # tables, charts, and the data, which is none that runs
    headings = tags.found.count("h1")
    assert headings == 1 and made.count("taken") > 3
    assert not {name for name, _ in tags.attributes} & {"onclick", "onload", "onerror"}
    assert NASTY in "".join(tags.text)


def write_samples(folder, lines):
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def sample(text, says, right):
    return {"text": text, "says": says, "right": right}


def test_a_page_shows_what_was_said_of_the_same_texts_at_every_step(tmp_path):
    lines = [
        {"step": step, "samples": [sample("a ____ of", [said], ["list"]), sample(NASTY, [NASTY], ["b"])]}
        for step, said in ((40, "list"), (8, "the"), (16, "value"))
    ]
    damaged = [3, sample("a", [], []), sample("a ____ of", ["x", "y"], ["list"])]
    lines += [{"step": 48}, {"step": 48, "samples": damaged}]
    folder = write_samples(write_run(tmp_path / "run"), lines)
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"step": 56, "samp')  # a kill cut it short
    made = report_page(read_stories([folder]))
    first, second = made.split('class="card watched"')[1:]
    steps = [int(part.split("<")[0]) for part in first.split('<th scope="row">')[1:]]
    assert steps == [8, 16, 40] and first.index("value") < first.index('<td class="right">list ✓</td>')
    assert NASTY not in made and "taken" in second
    once = write_samples(write_run(tmp_path / "once"), lines[:1])
    assert "card watched" not in report_page(read_stories([once]))


def test_a_long_run_shows_ten_of_its_evaluations(tmp_path):
    lines = [{"step": step, "samples": [sample("a ____", ["b"], ["c"])]} for step in range(100)]
    made = report_page(read_stories([write_samples(write_run(tmp_path / "run"), lines)]))
    steps = [int(part.split("<")[0]) for part in made.split('class="card watched"')[1].split('<th scope="row">')[1:]]
    assert len(steps) == 10 and steps[0] == 0 and steps[-1] == 99


def test_a_page_asks_the_network_for_nothing(tmp_path):
    made = report_page(read_stories([write_run(tmp_path / "run", summary=SUMMARY)]))
    sources = [v for name, v in Tags(made).attributes if name in ("src", "href") and not str(v).startswith("data:")]
    assert not sources and "@import" not in made and "url(" not in made


def test_every_number_of_the_log_is_in_a_chart_and_the_last_scores_in_a_table(tmp_path):
    lines = [{"step": 1, "loss": 2.0, "skipped_updates": 1.0, "a_new_figure": 3.25, "spent_seconds": 1.0},
             {"step": 1, "eval/loss": 1.25, "eval/exact_match": 0.125}]  # fmt: skip
    made = report_page(read_stories([write_run(tmp_path / "run", lines=lines)]))
    data = json.loads(made.split('id="data">')[1].split("</script>")[0])
    assert [c["title"] for c in data["charts"]] == ["Loss", "Exact match", "Skipped updates", "A new figure"]
    loss = data["charts"][0]["series"]
    assert [(s["held_out"], s["values"]) for s in loss] == [(False, [2.0]), (True, [1.25])]
    assert ">1.2500<" in made and ">0.1250<" in made


def test_where_the_time_went_is_a_bar_and_no_chart(tmp_path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 1, "goodput/step": 0.75, "goodput/data_wait": 0.25}]
    made = report_page(read_stories([write_run(tmp_path / "run", lines=lines)]))
    assert "step 75.0%" in made and "data wait 25.0%" in made and "Goodput" not in made


def test_tokens_and_minutes_follow_from_the_log(tmp_path):
    [story] = read_stories([write_run(tmp_path / "run")])
    scale = story.scale()
    assert scale["steps"] == list(range(1, 41))
    assert scale["minutes"][-1] == pytest.approx(80 / 60) and scale["tokens"][-1] == 80_000
    old = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    [story] = read_stories([write_run(tmp_path / "old", lines=old)])
    assert story.scale() == {"steps": [1, 2]}


@pytest.mark.parametrize("damage", [b'{"step": 41, "loss": 1', b"\xff\xfe\n", b'{"step": 41, "loss": NaN}\n', b"[]\n"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "report.json", "config.json"])
def test_damaged_files_cost_their_own_part_alone(tmp_path, name, damage):
    folder = write_run(tmp_path / "run", summary=SUMMARY)
    path = folder / name
    path.write_bytes(path.read_bytes() + damage if name == "metrics.jsonl" else damage)
    made = report_page(read_stories([folder]))
    assert '"title":"Loss"' in made and (">1.23 M<" in made) == (name != "report.json")
    assert ("Settings that are not" in made) == (name != "config.json")


def test_the_phases_of_a_run_end_with_it(tmp_path):
    staged = RunConfig(steps=100, batch_size=8, first_batch_size=2, data=DataConfig(row_length=128, last_row_length=64))
    wsd = RunConfig(steps=100, optimizer=OptimizerConfig(schedule="wsd", warmup_rate=0.1, decay_rate=0.2))
    bands = [read_stories([write_run(tmp_path / n, c)])[0].bands() for n, c in (("staged", staged), ("wsd", wsd))]
    assert [b["label"] for b in bands[0]] == ["2 x 128", "4 x 128", "8 x 128", "16 x 64"]
    assert [(b["end"], b["label"]) for b in bands[1]] == [(10, "warm-up"), (80, "constant"), (100, "decay")]
    assert all(b[-1]["end"] == 100 for b in bands)


def test_runs_are_compared_by_what_differs(tmp_path):
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", RunConfig(steps=40, batch_size=8, seed=7, optimizer=OptimizerConfig(b2=0.95)))
    made = report_page(read_stories([a, b]))
    rows = made.split("Settings that differ")[1].split("</table>")[0]
    assert "optimizer.b2" in rows and "seed" in rows and "batch_size" not in rows and "run_dir" not in rows


def test_a_folder_of_seeds_shows_each_and_their_spread(tmp_path):
    for i in range(3):
        write_run(tmp_path / f"many/seed-{i}")
    values = [0.5, 0.6, 0.7]
    row = {"median": 0.6, "min": 0.5, "max": 0.7, "values": values}
    (tmp_path / "many/seeds.json").write_text(json.dumps({"seeds": [0, 1, 2], "metrics": {"eval/accuracy": row}}))
    stories = read_stories([tmp_path / "many"])
    assert [s.name for s in stories] == ["seed-0", "seed-1", "seed-2"]
    assert f">{np.std(values, ddof=1):.4f}<" in report_page(stories)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="metrics"):
        read_stories([tmp_path])


def test_thinning_keeps_ends_order_and_extremes():
    points = [(i, math.sin(i / 50)) for i in range(10_000)]
    points[4321] = (4321, 99.0)
    kept = thinned(points, 200)
    assert len(kept) <= 200 and kept == sorted(kept)
    assert kept[0] == points[0] and kept[-1] == points[-1] and (4321, 99.0) in kept
    assert thinned(points[:150], 200) == points[:150]


def test_confusion_and_reliability_count_every_answer():
    right, said = ["a", "b", "b", "c"], ["a", "b", "c", "b"]
    assert confusion(right, said, ["a", "b", "c"]) == [[1, 0, 0], [0, 1, 1], [0, 1, 0]]
    bins = reliability(np.array([0.05, 0.95, 1.0, 0.91]), np.array([0.0, 1.0, 1.0, 0.0]))
    assert [b["count"] for b in bins] == [1, 3] and bins[1]["accuracy"] == pytest.approx(2 / 3)


def test_numbers_are_short():
    shown = {0.5: "0.5000", 123456.7: "123,457", 12: "12", 254.8199: "254.8", 1e-5: "1.00e-05", True: "True", 0.0: "0"}
    assert {value: number(value) for value in shown} == shown


def test_a_page_holds_surrogates_and_empty_tables():
    made = page("a\ud800b", table(["x"], [], "none") + escape("\udfff"), data="\ud800</script>")
    made.encode("utf-8")
    assert Tags(made).found.count("script") == 2


def test_the_command_writes_a_page(tmp_path, capsys):
    main(["report", str(write_run(tmp_path / "run")), "--out", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").read_text("utf-8").startswith("<!doctype html>")
    assert "page.html" in capsys.readouterr().out


@pytest.mark.parametrize("width", [400, 900, 1600])
def test_a_browser_shows_the_page_without_error_or_overflow(tmp_path, width):
    runs = [write_run(tmp_path / "one", summary=SUMMARY), write_run(tmp_path / "two", summary=SUMMARY)]
    long = "word" * 60
    write_samples(runs[0], [{"step": s, "samples": [sample(long, [long, "a"], ["a", long])] * 4} for s in (1, 2)])
    (tmp_path / "page.html").write_text(report_page(read_stories(runs)), "utf-8")
    with open_page(tmp_path / "page.html", width) as (browser, errors):
        assert browser.title() == "one, two"
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        charts = browser.locator("figure[data-chart]")
        assert charts.count() == browser.locator("figure[data-chart] svg path").evaluate_all(
            "paths => new Set(paths.map(p => p.closest('figure'))).size"
        )
        chart = charts.first
        path = chart.locator("svg path").first
        over_steps = path.get_attribute("d")
        browser.get_by_label("minutes").check()
        assert "training minutes" in chart.locator("svg").text_content()
        browser.get_by_label("steps").check()
        assert path.get_attribute("d") == over_steps
        chart.locator("svg").focus()
        browser.keyboard.press("End")
        browser.keyboard.press("ArrowLeft")
        assert chart.locator(".readout").text_content().startswith("step 39: one training")
        head = browser.locator("table.sortable").first.locator("th button", has_text="accuracy")
        head.focus()
        browser.keyboard.press("Enter")
        browser.keyboard.press("Enter")
        cells = browser.locator("table.sortable").first.locator("tbody tr td:nth-child(2)").all_text_contents()
        assert cells == sorted(cells, reverse=True) and len(cells) == 4
        browser.get_by_label("two").uncheck()
        browser.get_by_label("one").uncheck()
        assert "no run is chosen" in chart.locator("svg").text_content()
        assert errors == []


GOLDEN = pathlib.Path(__file__).parents[1] / "golden/runs"


@pytest.fixture(scope="module")
def classification(tmp_path_factory):
    """(a loaded run, its data)."""
    folder = tmp_path_factory.mktemp("run")
    run = load(GOLDEN / "classification")
    data = dataclasses.replace(run.config.data, source=str(GOLDEN / "rows.jsonl"), cache_dir=str(folder / "cache"))
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, run_dir=str(folder), data=data))
    return run, open_data(run.config, run.task.reading, tokenizer=run.tokenizer, label_names=run.label_names)


def test_the_end_of_a_run_is_in_its_page(classification):
    """What is counted is all held-out documents, and a number that is not finite costs itself alone."""
    run, data = classification
    folder = pathlib.Path(run.config.run_dir)
    shutil.copy(GOLDEN / "classification/metrics.jsonl", folder)
    rows = {"constant": {"accuracy": float("nan")}, "this model": {"accuracy": 0.5}}
    page = write_summary(run, data, held_out=rows, examples=[NASTY], commands=["type this"], text="some text")
    summary = json.loads((folder / "report.json").read_text())
    count = len(data.stores[0].validation)
    counts = np.array(summary["confusion"]["counts"])
    answers = [a["label"] for a in run.predict([
        run.tokenizer.decode(data.stores[0].validation.document(i)) for i in range(count)])]  # fmt: skip
    assert counts.sum() == sum(b["count"] for b in summary["reliability"]) == count
    assert counts.sum(0).tolist() == [answers.count(label) for label in run.label_names]
    is_right = [a["is_right"] for a in summary["answers"]]
    assert is_right == sorted(is_right) and is_right.count(False) == min(20, count - int(np.trace(counts)))
    assert sum(b["count"] for b in summary["data"]["lengths"]) == len(data.stores[0].train)
    assert summary["held_out"]["constant"]["accuracy"] is None and summary["parameters"] > 1000
    said = page.read_text("utf-8")
    assert all(x in said for x in ("type this", "Reliability", "Confusion", "some text", "Lengths", "Row fill"))
    assert said.count("<script>") == 2 and NASTY not in said


def test_quiet_leaves_out_how_far_the_work_is_alone(capsys):
    assert obey_quiet(["predict", "--quiet", "x", "--", "--quiet"]) == ["predict", "x", "--", "--quiet"]
    make_news_console().print("half done")
    make_console().print("the result")
    assert capsys.readouterr().out == "the result\n"
    assert obey_quiet(["predict"]) == ["predict"]
    make_news_console().print("half done")
    assert capsys.readouterr().out == "half done\n"


def test_a_long_log_makes_a_small_page(tmp_path):
    lines = [{"step": 10 * s, "loss": 1.0, "tokens_per_second": 10.0, "spent_seconds": s} for s in range(1, 7001)]
    made = report_page(read_stories([write_run(tmp_path / "run", lines=lines)]))
    data = json.loads(made.split('id="data">')[1].split("</script>")[0])
    scale = data["runs"][0]["scale"]
    assert len(scale["steps"]) <= 1200 and scale["steps"][-1] == 70_000 and scale["tokens"][-1] == 70_000
    assert len({len(values) for values in scale.values()}) == 1 and len(made) < 250_000


@pytest.mark.parametrize("golds", [None, np.zeros(3, np.int32), ("a", 1)])
def test_answers_of_a_kind_that_is_not_shown_are_left_out(classification, golds):
    """Such as texts that are written, pairs without a number, or spans: no page is lost to them."""
    run, data = classification
    task = dataclasses.replace(run.task, gold=lambda split, document, labels: golds)
    assert held_out_answers(SimpleNamespace(**{
        name: getattr(run, name) for name in ("config", "label_names", "tokenizer", "loss_and_outputs")
    }, task=task), data) == {}  # fmt: skip
