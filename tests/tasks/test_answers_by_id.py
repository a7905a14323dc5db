"""Answers carry the names of what they answer, from files that name it."""

import csv
import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_encoder.commands import main
from flax_encoder.config import ConfigError, DataConfig, EncoderConfig, RunConfig, to_dict
from flax_encoder.data.pipeline import open_data
from flax_encoder.data.sources.columns import SAMPLED_ROWS, Columns
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from flax_encoder.nn.partition import round_up_vocab
from flax_encoder.runs import ask_file
from flax_encoder.runs.ask_file import AnswerFile, open_input
from flax_encoder.runs.load import load
from flax_encoder.runs.loaded import model_factory
from flax_encoder.training.checkpoint import Checkpoints
from flax_encoder.training.step import TrainState

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
PASSAGE = "the river is blue and the stone is red and the cloud is white"
MODEL = EncoderConfig(num_layers=1, embed_dim=12, num_heads=2, mlp_dim=8, position="rope", num_token_types=2)


def make_run(path, objective, label_names=None):
    tokenizer = train_wordpiece([PASSAGE] * 3, 60)
    model = EncoderConfig(**{**vars(MODEL), "vocab_size": round_up_vocab(tokenizer.vocab_size)})
    config = RunConfig(run_dir=str(path), objective=objective, model=model, data=DataConfig(row_length=24))
    params = nnx.to_pure_dict(nnx.split(model_factory(config, label_names)())[1])
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + jnp.asarray(0.3 * draw.standard_normal(x.shape), jnp.float32), params)
    record = {"config": to_dict(config), "tokenizer": tokenizer.json, "label_names": label_names}
    with Checkpoints(path, keep=1) as checkpoints:
        checkpoints.save(TrainState(jnp.zeros((), jnp.int32), params, {}), 3, record)


@pytest.fixture(scope="module")
def squad(tmp_path_factory):
    """(folder with a model, SQuAD 2.0's file of four questions, of which one has no answer)."""
    folder = tmp_path_factory.mktemp("squad")
    make_run(folder / "run", "question_answering")
    asked = [{"id": f"q{i}", "question": f"what is {word}", "is_impossible": not at, "answers": [
        {"text": word, "answer_start": PASSAGE.find(word)}] * at}
        for i, (word, at) in enumerate((("blue", 1), ("red", 1), ("door", 0), ("white", 1)))]  # fmt: skip
    content = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": PASSAGE, "qas": asked}]}]}
    (folder / "dev-v2.0.json").write_text(json.dumps(content))
    return folder


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_to_squad_are_by_the_ids_of_their_questions(squad, tmp_path):
    out, predictions = tmp_path / "answers.jsonl", tmp_path / "predictions.json"
    main(["predict", str(squad / "run"), "--input", str(squad / "dev-v2.0.json"), "--output", str(out), "--squad",
          str(predictions)])  # fmt: skip
    answers = lines(out)
    assert [answer["id"] for answer in answers] == ["q0", "q1", "q2", "q3"]
    assert json.loads(predictions.read_text()) == {answer["id"]: answer["answer"] for answer in answers}
    assert all(PASSAGE[a["start"] : a["end"]] == a["answer"] for a in answers if a["answer"])


def test_scores_of_a_file_with_unanswerable_questions_say_both_kinds(squad, capsys):
    main(["evaluate", str(squad / "run"), "--data.source", str(squad / "dev-v2.0.json"), "--json"])
    scores = json.loads(capsys.readouterr().out)
    assert {"exact_match", "f1", "has_answer_f1", "no_answer_exact_match"} <= scores.keys()


def test_ids_are_kept_by_every_task_and_needed_by_squad_alone(squad, tmp_path, capsys):
    make_run(tmp_path / "run", "classification", ["no", "yes"])
    (tmp_path / "texts.jsonl").write_text('{"id": 7, "text": "the river"}\n{"id": null, "text": "the stone"}\n')
    main(["predict", str(tmp_path / "run"), "--input", str(tmp_path / "texts.jsonl"), "--output",
          str(tmp_path / "out.jsonl")])  # fmt: skip
    first, second = lines(tmp_path / "out.jsonl")
    assert (first["id"], second["id"]) == ("7", "") and first.keys() == second.keys()
    late = [{"text": "the river"}] * SAMPLED_ROWS + [{"text": "the stone", "id": "late"}]
    (tmp_path / "late.jsonl").write_text("".join(json.dumps(row) + "\n" for row in late))
    (tmp_path / "late.json").write_text(json.dumps(late))
    for name in ("late.jsonl", "late.json"):
        records = list(open_input(str(tmp_path / name), DataConfig(), Columns()))
        assert [record.id for record in records] == [""] * SAMPLED_ROWS + ["late"]
    refused = {"run": (tmp_path / "run", "--squad needs a model of question_answering"),
               "no ids": (squad / "run", "the question of .* line 1, has none")}  # fmt: skip
    (tmp_path / "asked.jsonl").write_text(json.dumps({"question": "what is blue", "context": PASSAGE}) + "\n")
    for folder, message in refused.values():
        with pytest.raises(SystemExit):
            main(["predict", str(folder), "--input", str(tmp_path / "asked.jsonl"), "--output",
                  str(tmp_path / "again.jsonl"), "--squad", str(tmp_path / "p.json")])  # fmt: skip
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(("records", "message"), [
    ("one text", r"texts must come in a list: got one str, 'one text'. Put it in \[ \]"), (b"one", "got one bytes"),
    (None, "got a NoneType"), (3, "got a int"), ({"text": "a"}, "got a dict"),
    (["a", None], "text 1 is a NoneType"),
    (["a", "b", b"c"], r"must be a str: .decode\('utf-8'\) makes it one: text 2 is a bytes"),
    ([{"text": "a"}], "text 0 is a dict"), (["a", float("nan")], "text 1 is a float"), ([1], "text 0 is a int"),
    ([("a", None)], "text 0 is a NoneType"), (["a", "\ud800"], "text 1 has half of a surrogate pair"),
])  # fmt: skip
def test_what_is_no_list_of_records_is_named(squad, records, message):
    run = load(squad / "run")
    with pytest.raises(DataError, match=message):
        list(run.predict(records))


def test_what_is_no_text_or_no_objective_is_named(squad):
    run = load(squad / "run")
    for text in (None, 3, b"a", ["a"]):
        with pytest.raises(DataError, match="each text must be a str"):
            run.row(text)
    config = EncoderConfig(**vars(MODEL))
    object.__setattr__(config, "dtype", "float16")  # which a user's call, whose annotations nothing checks, may give
    with pytest.raises(ConfigError, match="dtype must be bfloat16 or float32: got 'float16'"):
        config.__post_init__()
    with pytest.raises(ConfigError, match="no objective 'foo'; known are masked_lm"):
        load(GOLDEN / "bert-masked_lm", objective="foo")


def test_a_table_of_answers_has_room_for_texts_without_any(squad, tmp_path):
    make_run(tmp_path / "run", "classification", ["no", "yes"])
    out, texts = tmp_path / "out.csv", tmp_path / "texts.txt"
    for written in ("\n\nthe river\n\n", "\n\n", ""):  # the first answers, all, and none
        texts.write_text(written)
        main(["predict", str(tmp_path / "run"), "--input", str(texts), "--output", str(out)])
        rows = list(csv.DictReader(out.read_text().splitlines()))
        assert [row["error"] != "" for row in rows] == [line == "" for line in written.splitlines()]
        assert [row["label"] in ("no", "yes") for row in rows if row["error"] == ""] == [True] * ("river" in written)


def test_a_table_of_answers_has_the_ids_that_only_later_rows_have(squad, tmp_path, monkeypatch):
    """Also when it is interrupted, and however many texts are empty before the first answer, up to a bound."""
    make_run(tmp_path / "run", "classification", ["no", "yes"])
    out, asked, ids = tmp_path / "out.csv", tmp_path / "texts.jsonl", [None, ..., None, "c", 4]
    rows = [{"text": "" if i < 2 else f"the river {i}", "id": own} for i, own in enumerate(ids)]
    asked.write_text("".join(json.dumps({n: x for n, x in row.items() if x is not ...}) + "\n" for row in rows))
    command = ["predict", str(tmp_path / "run"), "--input", str(asked), "--output", str(out)]
    monkeypatch.setattr(ask_file, "_KEPT_EVERY", 3)
    line, made = AnswerFile._line, []

    def until_the_fourth(self, answer):
        made.append(answer)
        if len(made) == 4:
            raise KeyboardInterrupt
        return line(self, answer)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(AnswerFile, "_line", until_the_fourth)
        main(command)
    assert not out.exists()
    main(command)
    found = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["id"] for row in found] == ["", "", "", "c", "4"] and len(made) == 4
    assert [row["error"] == "" for row in found] == [False, False, True, True, True]
    monkeypatch.setattr(ask_file, "_MOST_EMPTY", 2)
    out.unlink()
    with pytest.raises(DataError, match=r"the first 2 texts are empty\. Name another --text-column, or"):
        AnswerFile(out, "x").write(({"error": "the text has no token"} for _ in range(3)), 0, print)


def test_what_a_message_says_is_understood_by_the_command_that_said_it(squad, tmp_path, capsys):
    (tmp_path / "asked.jsonl").write_text('{"title": "the river", "body": "a"}\n{"title": 5, "body": "a"}\n')
    make_run(tmp_path / "run", "classification", ["no", "yes"])
    command = ["predict", str(tmp_path / "run"), "--input", str(tmp_path / "asked.jsonl"), "--output", "-"]
    for options in ([], ["--data.text-column", "title"], ["--data.text-column", "title", "--data.skip-bad-rows"]):
        said = capsys.readouterr().err
        assert all(option in said for option in options if option.startswith("--") and option == options[-1])
        try:
            main([*command, *options])
        except SystemExit:
            continue
    shown = capsys.readouterr()
    assert json.loads(shown.out)["label"] in ("no", "yes") and "1 row cannot be used, and left out" in shown.err


@pytest.mark.parametrize(("objective", "value", "labels", "words"), [
    ("classification", "yes", ["no", "yes"], "the data has yes"),
    ("multi_label", ["a", "b"], ["a", "b"], "the data has a, b"),
    ("regression", 2.5, None, "the data has 2.5"),
    ("multiple_choice", 1, None, "the data has choice 1"),
])  # fmt: skip
def test_a_run_ends_with_what_it_says_of_held_out_texts(tmp_path, objective, value, labels, words):
    make_run(tmp_path / "run", objective, labels)
    other = {"classification": "no", "multi_label": ["a"], "regression": 0.0, "multiple_choice": 0}[objective]
    for name, text, right in (("held_out", "the river", value), ("rows", "the cloud", other)):
        texts = {"text": text}
        if objective == "multiple_choice":
            texts = {"context": text, "choices": ["is blue", "is red"]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(texts | {"label": right}) + "\n")
    run = load(tmp_path / "run")
    rows, held_out = (str(tmp_path / f"{name}.jsonl") for name in ("rows", "held_out"))
    data = DataConfig(source=rows, validation=held_out, row_length=24, label_column="label")
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, data=data))
    opened = open_data(run.config, run.task.reading, tokenizer=run.tokenizer, label_names=labels)
    [line] = run.task.examples(run, opened)
    assert "the river" in line and "the model says" in line and (words in line or "which is right" in line)
