"""Suites: every set is found and read in its own layout, scored as its paper does, trained once, and gone on with."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from flax_encoder.commands import main
from flax_encoder.config import ConfigError, DataConfig
from flax_encoder.data.sources.opening import open_source
from flax_encoder.data.sources.records import DataError, Record
from flax_encoder.runs.load import load, read_origin
from flax_encoder.runs.loaded import model_factory
from flax_encoder.runs.record import RunRecord
from flax_encoder.runs.score_file import Scored
from flax_encoder.runs.start import like_origin
from flax_encoder.runs.suite import Suite, choose_tasks, run_suite, table_rows
from flax_encoder.runs.suite_data import find_files, open_place
from flax_encoder.runs.suites import SUITES, flatten_multirc, flatten_wsc, positive_f1, question_exact_match
from flax_encoder.tasks import find_task
from flax_encoder.training.checkpoint import Checkpoints
from flax_encoder.training.step import TrainState
from tests.runs import ROOT, with_fields
from tests.suites import made_sets

GOLDEN = ROOT / "tests/golden/runs/classification"
SERVED = [
    (suite, task) for suite, tasks in SUITES.items() for task in tasks
    if not task.not_served and task.name != "wikiann_en"  # which has files of no layout of its own
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("sets")
    for suite in SUITES:
        getattr(made_sets, f"write_{suite}")(folder / suite)
    return folder


def records_of(config: DataConfig, task, cache) -> list[Record]:
    source = open_source(config.sources[0], config, find_task(task.objective).reading.columns, cache)
    return list(source.records("train"))


@pytest.mark.parametrize(("suite", "task"), SERVED, ids=[f"{suite}-{task.name}" for suite, task in SERVED])
def test_every_set_is_read_in_its_own_layout(made, tmp_path, suite, task):
    place = open_place(task, made / suite, "tfds", tmp_path / "out")
    columns = find_task(task.objective).reading.columns
    records = records_of(place.train, task, tmp_path)
    counts = {"glue": 12, "superglue": 16 if task.name == "multirc" else 8, "ner": 12, "qa": 6}
    assert len(records) == counts[suite]
    assert place.train.validation is not None
    assert {len(record.texts) for record in records} == {len(records[0].texts)} <= {
        *range(columns.min_texts, columns.max_texts + 1)
    }
    assert all(f" {made_sets.QUOTED} " in " ".join(record.texts) for record in records)
    values = {record.value for record in records}
    assert None not in values and (task.name in ("conll2003", "wnut_17") or len(values) > 1)
    ends = {"": 1} if task.name != "mnli" else {"_matched": 1, "_mismatched": 1}
    assert place.reported.keys() == ends.keys()
    for config, split in place.reported.values():
        assert split is None
        assert records_of(config, task, tmp_path) != records


def test_labels_are_those_of_the_set(made, tmp_path):
    def values(suite, name):
        [task] = choose_tasks(suite, [name])
        place = open_place(task, made / suite, "tfds", tmp_path / name)
        return [record.value for record in records_of(place.train, task, tmp_path)]

    assert values("glue", "cola")[:3] == ["0", "1", "0"]
    assert values("glue", "stsb")[:3] == [0.0, 0.5, 1.0]
    assert values("glue", "mnli")[:3] == ["entailment", "neutral", "contradiction"]
    assert values("superglue", "multirc")[:2] == ["1", "0"]
    assert values("superglue", "boolq")[:2] == ["True", "False"]
    assert {tag for value in values("ner", "conll2003") for *_, tag in value} == {"O", "B-PER"}
    assert values("qa", "squad_v2")[0] == () and values("qa", "squad_v2")[1] != ()


def test_rows_of_the_hub_are_those_of_the_archive():
    hub = {"paragraph": "p", "question": "q", "answer": "a", "label": 1, "idx": {"answer": 0}}
    archive = {"passage": {"text": "p", "questions": [{"question": "q", "answers": [{"text": "a", "label": True}]}]}}
    assert list(flatten_multirc(hub)) == list(flatten_multirc(archive)) == [
        {"text_a": "q p", "text_b": "a", "label": "1"}
    ]
    marks = {"span1_text": "Ann", "span1_index": 0, "span2_text": "her own", "span2_index": 2}
    flat = [{"text_a": "Ann saw *her own* hat", "text_b": "Ann", "label": "0"}]
    assert list(flatten_wsc({"text": "Ann saw her own hat", "label": 0} | marks)) == flat
    assert list(flatten_wsc({"text": "Ann saw her own hat", "label": False, "target": marks})) == flat


def test_answers_are_scored_over_all_and_by_question():
    given, golds = ["1", "0", "1", "1"], ["1", "0", "0", "1"]
    records = [Record((question, "an answer")) for question in ("first", "first", "second", "second")]
    found = Scored({}, [{"label": label} for label in given], golds, records, "")
    assert positive_f1(found) == pytest.approx(0.8)  # precision 2/3, recall 1
    assert question_exact_match(found) == 0.5
    named = found._replace(
        answers=[{"label": {"1": "equivalent", "0": "not_equivalent"}[label]} for label in given],
        golds=[{"1": "equivalent", "0": "not_equivalent"}[label] for label in golds],
    )
    assert positive_f1(named) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"dev.tsv": None}, "SST-2 has no validation file: validation or dev"),
        ({"train.tsv": "text\tclass\nx\t1\n"}, "has the columns text, class: sst2 has sentence label"),
    ],
)
def test_files_that_are_not_the_sets_are_said(made, tmp_path, broken, message):
    (tmp_path / "SST-2").mkdir()
    for path in (made / "glue/SST-2").iterdir():
        if path.name not in broken:
            (tmp_path / "SST-2" / path.name).write_bytes(path.read_bytes())
    for name, text in broken.items():
        if text is not None:
            (tmp_path / "SST-2" / name).write_text(text)
    [task] = choose_tasks("glue", ["sst2"])
    with pytest.raises(DataError, match=message):
        open_place(task, tmp_path, "tfds", tmp_path / "out")
    with pytest.raises(DataError, match="no folder cola or CoLA"):
        find_files(choose_tasks("glue", ["cola"])[0], tmp_path)


def suite_of(made, out, *tasks, **fields) -> Suite:
    fields = {"data_dir": made / "glue"} | fields
    return Suite("glue", str(GOLDEN), out, choose_tasks("glue", tasks), **fields)


def short(config):
    return with_fields(config, epochs=1.0, data__row_length=32, mesh__data=1)


LABELS = {"mnli": ["contradiction", "entailment", "neutral"], "stsb": None}


def untrained(config):
    """A run's folder, as training leaves it."""
    labels = LABELS[pathlib.Path(config.run_dir).parent.name]
    origin, _ = read_origin(config.init_from, config.objective)
    config = like_origin(config, origin, has_head=False)
    params = nnx.to_pure_dict(nnx.split(model_factory(config, labels)())[1])
    with Checkpoints(pathlib.Path(config.run_dir), keep=1) as checkpoints:
        record = RunRecord(config, origin.tokenizer, labels, step=1)
        checkpoints.save(TrainState(jnp.ones((), jnp.int32), params, {}), 1, record.to_json())
    return {}


def test_a_suite_goes_on_where_it_was_and_tasks_start_from_mnli(made, tmp_path):
    trained, said = [], []

    def training(config):
        trained.append(config)
        return None if len(trained) == 2 else untrained(config)

    (tmp_path / "some").mkdir()
    for name in ("MNLI", "STS-B"):
        (tmp_path / "some" / name).symlink_to(made / "glue" / name)
    suite = suite_of(made, tmp_path / "out", "stsb", "mnli", "rte", data_dir=tmp_path / "some")
    assert run_suite(suite, training, short, said.append) is None  # a signal stops the second task
    assert [pathlib.Path(config.run_dir).parent.name for config in trained] == ["mnli", "stsb"]
    assert trained[1].init_from == trained[0].run_dir
    assert any("rte is left out" in message and "RTE" in message for message in said)

    summary = run_suite(suite, training, short, said.append)
    assert [pathlib.Path(config.run_dir).parent.name for config in trained] == ["mnli", "stsb", "stsb"]
    assert trained[2] == trained[1]
    assert list(summary["tasks"]) == ["mnli", "stsb"] and list(summary["missing"]) == ["rte"]
    metrics = {name: value["median"] for name, value in summary["tasks"]["mnli"]["metrics"].items()}
    assert list(metrics) == ["accuracy_matched", "accuracy_mismatched"]
    scores = [summary["tasks"][name]["score"]["median"] for name in ("mnli", "stsb")]
    assert scores[0] == pytest.approx(sum(metrics.values()) / 2)  # the two metrics of a task are averaged first
    assert summary["average"]["median"] == pytest.approx(sum(scores) / 2)
    rows = table_rows(summary, suite.tasks)
    assert [row["task"] for row in rows] == ["mnli", "stsb", "rte", "average"]
    assert "left out" in rows[2]["medians of"] and rows[3]["medians of"] == "2 of 3 tasks"

    again = run_suite(suite, training, short, said.append)
    assert again == summary == json.loads((tmp_path / "out/suite.json").read_text()) and len(trained) == 3
    with pytest.raises(ConfigError, match=r"(?s)goes on with the settings it began with.*optimizer.learning_rate"):
        run_suite(suite, training, lambda c: with_fields(short(c), optimizer__learning_rate=1.0), said.append)


def test_the_suite_says_what_it_settles_itself(made, tmp_path):
    def never(config):
        raise AssertionError

    with pytest.raises(ConfigError, match=r"a suite settles .* got init_from"):
        run_suite(suite_of(made, tmp_path, "rte"), never, lambda c: with_fields(c, init_from="x"), print)
    with pytest.raises(ConfigError, match=r"the tasks of glue are .*: got wnli"):
        choose_tasks("glue", ["wnli"])


def test_tags_without_names_are_said_before_anything_is_trained(tmp_path, cache_folder):
    """As `to_json` writes a set of the Hub, whose names stay behind."""
    (tmp_path / "wikiann").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / f"wikiann/{split}.jsonl").write_text('{"tokens": ["by", "Ann"], "ner_tags": [0, 1]}\n')
    suite = Suite("ner", str(GOLDEN), tmp_path / "out", choose_tasks("ner", ["wikiann_en"]), 1, tmp_path)
    trained = []
    found = run_suite(suite, trained.append, lambda config: config, print)
    assert not trained and "has 0, 1. Name them in their order, such as --data.label-names O" in str(found["missing"])
    assert run_suite(suite, trained.append, lambda c: with_fields(c, data__label_names=("O", "B-PER")), print) is None
    assert len(trained) == 1


def test_a_listing_trains_nothing(made, capsys):
    main(["suite", "superglue", "FOLDER", "--list", "--json", "--data-dir", str(made / "superglue")])
    rows = {row["task"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["boolq"]["data"] == "BoolQ/train.jsonl, BoolQ/val.jsonl"
    assert rows["record"]["data"].startswith("left out: ")
    main(["suite", "glue", "FOLDER", "--list", "--tasks", "cola,rte"])
    shown = capsys.readouterr().out
    assert "cola" in shown and "mrpc" not in shown


def by_name(tmp_path, task, rows):
    """The task with a set of the Hub's layout that lies in a folder: rows by split."""
    folder = tmp_path / task.name
    folder.mkdir(parents=True)
    for split, of_split in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_split))
    return dataclasses.replace(task, hf=f"hf:{folder}")


def test_sets_by_name_are_scored_on_the_split_that_is_reported(tmp_path, cache_folder):
    [task] = choose_tasks("ner", ["conll2003"])
    rows = {
        split: [{"tokens": ["Ann", split], "pos_tags": ["X", "X"], "ner_tags": ["B-PER", "O"]}]
        for split in ("train", "validation", "test")
    }
    place = open_place(by_name(tmp_path, task, rows), None, "hf", tmp_path / "out")
    assert place.train.text_column == "tokens" and place.train.label_column == "ner_tags"
    [(config, split)] = place.reported.values()
    source = open_source(config.sources[0], config, find_task(task.objective).reading.columns, tmp_path)
    assert split == "test" and [record.texts for record in source.records(split)] == [("Ann test",)]

    [mnli] = choose_tasks("glue", ["mnli"])
    row = {"premise": "a", "hypothesis": "b", "label": "neutral"}
    mnli = by_name(tmp_path, mnli, {split: [row] for split in ("train", "validation_matched", "validation_mismatched")})
    place = open_place(mnli, None, "hf", tmp_path / "out")
    splits = [(config.validation_split, split) for config, split in place.reported.values()]
    assert splits == [("validation_matched", "validation"), ("validation_mismatched", "validation")]
    assert place.train.validation_split == "validation_matched"
    with pytest.raises(DataError, match="wnut_17 is no set of tfds: give --data-dir, or another --source"):
        open_place(choose_tasks("ner", ["wnut_17"])[0], None, "tfds", tmp_path / "out")


@pytest.mark.parametrize("column", ["ner_tags", "tags", "ner"])  # the Hub's, and those of TensorFlow Datasets
def test_tags_are_found_by_the_name_that_the_set_gives_them(tmp_path, cache_folder, column):
    [task] = choose_tasks("ner", ["wikiann_en"])
    rows = [{"tokens": ["Ann"], "pos_tags": ["X"], column: ["B-PER"]}]
    task = by_name(tmp_path, task, {split: rows for split in ("train", "validation", "test")})
    assert open_place(task, None, "hf", tmp_path / "out").train.label_column == column
    row = {"tokens": ["Ann"], "marks": ["X"]}
    other = by_name(tmp_path / "other", task, {"train": [row], "test": [row]})
    with pytest.raises(DataError, match=r"has the columns tokens, marks: wikiann_en has tokens ner_tags, or tokens"):
        open_place(other, None, "hf", tmp_path / "out")


def test_rows_that_are_no_pairs_are_made_pairs_of_sets_by_name_too(tmp_path, cache_folder):
    [task] = choose_tasks("superglue", ["wic"])
    row = {"word": "bank", "sentence1": "a bank", "sentence2": "the bank", "label": 1}
    task = by_name(tmp_path, task, {"train": [row], "validation": [row | {"label": 0}]})
    place = open_place(task, None, "hf", tmp_path / "out")
    [record] = records_of(place.train, task, tmp_path)
    assert (record.texts, record.value) == (("bank: a bank", "the bank"), "1")
    broken = by_name(tmp_path / "out", task, {"train": [row | {"label": 5}], "validation": [row]})
    with pytest.raises(DataError, match=r"a label is 0 or 1.*: column 'label' of row 1 of wic's train holds 5"):
        open_place(broken, None, "hf", tmp_path / "again")


@pytest.mark.slow
def test_the_command_trains_scores_and_prints_one_object(made, tmp_path, capsys):
    jax.config.update("jax_disable_most_optimizations", True)  # conftest.py undoes it
    folders = ["--data-dir", str(made / "glue"), "--out", str(tmp_path / "out")]
    settings = ["--epochs", "1", "--data.row-length", "32"]
    main(["suite", "glue", str(GOLDEN), "--tasks", "rte", "--json", *folders, *settings])
    summary = json.loads(capsys.readouterr().out)
    assert list(summary["tasks"]) == ["rte"] and summary["missing"] == {}
    run = load(tmp_path / "out/rte/seed-0")
    assert run.label_names == ["entailment", "not_entailment"] and run.config.epochs == 1
    assert summary["tasks"]["rte"]["metrics"]["accuracy"]["values"] == [summary["average"]["median"]]
