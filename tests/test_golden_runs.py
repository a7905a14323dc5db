"""Run folders of before: opened, asked and resumed as on the day they were written.

tests/golden/runs holds two runs of 12 steps that a signal stopped after 6 (one layer of 16, in float32, with dropout),
what they answered then, and what the same runs logged when nothing stopped them.
"""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from flax_encoder.config import OptimizerConfig, RunConfig
from flax_encoder.data.tokens.tokenizer import TextTokenizer
from flax_encoder.runs.load import load
from flax_encoder.runs.record import RunRecord, read_record
from flax_encoder.training.run_log import read_metrics
from train import train

GOLDEN = pathlib.Path(__file__).parent / "golden/runs"


def golden(name):
    return json.loads((GOLDEN / name).read_text())


def test_an_old_masked_lm_run_gives_the_answers_of_its_day():
    [guesses] = load(GOLDEN / "masked_lm").fill_mask("the list returns a [MASK] of each")
    [want] = golden("masked_lm_answer.json")
    assert [g["token"] for g in guesses] == [w["token"] for w in want]
    np.testing.assert_allclose([g["probability"] for g in guesses], [w["probability"] for w in want], rtol=1e-5)


def test_an_old_classifier_gives_the_answers_of_its_day():
    answers = load(GOLDEN / "classification").classify("the list returns a value first 3")
    want = golden("classification_answer.json")
    assert [a["label"] for a in answers] == [w["label"] for w in want]
    np.testing.assert_allclose([a["probability"] for a in answers], [w["probability"] for w in want], rtol=1e-5)


def test_a_run_of_float8_is_asked_in_another_dtype():
    run = load(GOLDEN / "masked_lm")
    narrow = run.with_model_settings(dtype="bfloat16", product_dtype="float8")
    assert narrow.with_dtype("float32").config.model == run.with_dtype("float32").config.model


def test_it_is_said_how_many_texts_are_cut_to_be_asked(caplog):
    run = load(GOLDEN / "classification")
    assert len(list(run.predict(["short", "word " * 3 * run.row_length]))) == 2
    assert f"1 of 2 texts were longer than the model's rows of {run.row_length} tokens, and cut" in caplog.text


@pytest.mark.parametrize("name", ["masked_lm", "classification"])
def test_an_old_run_resumes_on_the_same_batches(tmp_path, one_device, name):
    shutil.copytree(GOLDEN / name, tmp_path / name)
    config = read_record(tmp_path / name).config
    data = {"source": str(GOLDEN / "rows.jsonl")}
    config = dataclasses.replace(config, run_dir=str(tmp_path / name), data=dataclasses.replace(config.data, **data))
    train(config)
    got = {line["step"]: line for line in read_metrics(tmp_path / name) if "loss" in line}
    want = {line["step"]: line for line in golden(f"{name}_whole.json") if "loss" in line}
    assert got.keys() == want.keys()
    for step, line in want.items():
        np.testing.assert_allclose(got[step]["loss"], line["loss"], rtol=2e-5)
    held_out = [line for line in golden(f"{name}_whole.json") if "eval/loss" in line][-1]
    now = [line for line in read_metrics(tmp_path / name) if "eval/loss" in line][-1]
    for metric in held_out.keys() - {"step"}:
        np.testing.assert_allclose(now[metric], held_out[metric], rtol=2e-5, err_msg=metric)


@pytest.mark.parametrize("unread", [
    {"schedule": "cosine", "decay_rate": 0.1}, {"schedule": "constant", "final_rate": 0.1},
])  # fmt: skip
def test_an_old_run_may_have_settings_that_its_schedule_does_not_read(unread):
    record = RunRecord(RunConfig(), TextTokenizer((GOLDEN / "masked_lm/tokenizer.json").read_text())).to_json()
    record["config"]["optimizer"] |= unread
    assert RunRecord.from_json(record).config.optimizer == OptimizerConfig(schedule=unread["schedule"])


def test_a_record_survives_the_way_through_json():
    record = read_record(GOLDEN / "classification")
    assert record.label_names == ["first", "second", "third"] and record.step == 6
    again = RunRecord.from_json(json.loads(json.dumps(record.to_json())))
    assert again == record and isinstance(again.tokenizer, TextTokenizer)
