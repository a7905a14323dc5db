"""Labels in shares: answers with their probabilities are what another model can learn from."""

import dataclasses
import json

import numpy as np
import pytest

from flax_encoder.__main__ import main
from flax_encoder.config import DataConfig, RunConfig
from flax_encoder.data.pipeline import open_data
from flax_encoder.data.sources.records import DataError, Record
from flax_encoder.runs.loaded import _named
from flax_encoder.tasks import find_task
from tests.runs import ROOT

TEACHER = ROOT / "tests/golden/runs/classification"
ROWS = ROOT / "tests/golden/runs/rows.jsonl"


def opened(source, **data):
    config = RunConfig(
        objective="classification",
        data=DataConfig(source=str(source), label_column="probabilities", row_length=32, vocab_size=256, **data),
    )
    return open_data(config, find_task("classification").reading)


def batches(data):
    return (data.train[i] for i in range(4))


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_what_predict_writes_is_learned_from(tmp_path, monkeypatch, suffix):
    """The shares of each text in training are the teacher's probabilities, to the number of digits of float32."""
    monkeypatch.setattr("sys.argv", ["flax_encoder", "predict", str(TEACHER), "--input", str(ROWS), "--output",
                                     str(tmp_path / f"soft.{suffix}"), "--probabilities", "--texts"])  # fmt: skip
    main()
    data = opened(tmp_path / f"soft.{suffix}")
    split = data.stores[0].train
    if suffix == "jsonl":
        answers = [json.loads(line) for line in (tmp_path / "soft.jsonl").read_text().splitlines()]
        encoded = data.tokenizer.encode_batch([answer["text"] for answer in answers])
        by_text = {tuple(ids): answer for ids, answer in zip(encoded, answers, strict=True)}
        for i in range(len(split)):
            answer = by_text[tuple(split.document(i))]
            want = [answer["probabilities"][name] for name in data.label_names]
            np.testing.assert_allclose(split.values["shares"][i], want, rtol=1e-5)
            assert data.label_names[split.values["labels"][i]] == answer["label"]
    for batch in batches(data):
        sums = batch["targets"].sum(-1)
        np.testing.assert_allclose(sums, batch["target_weights"], rtol=1e-5)


def test_shares_stand_beside_plain_labels_and_weigh_with_their_classes(tmp_path):
    two = "no", {"no": 0.25, "yes": 0.75}
    rows = [{"text": f"text number {i}", "probabilities": two[i % 2]} for i in range(99)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = opened(tmp_path / "rows.jsonl", held_out_rate=0.2)
    assert data.label_names == ["no", "yes"]
    assert {tuple(shares) for shares in data.stores[0].train.values["shares"]} == {(1.0, 0.0), (0.25, 0.75)}
    labels = dataclasses.replace(RunConfig().labels, class_weights=(1.0, 3.0))
    weighted = open_data(dataclasses.replace(data.config, labels=labels), find_task("classification").reading)
    for batch, plain in zip(batches(weighted), batches(data), strict=True):
        want = plain["targets"][..., 0] + 3 * plain["targets"][..., 1]
        np.testing.assert_allclose(batch["target_weights"], want)


@pytest.mark.parametrize(
    "shares",
    [{"yes": 0.5, "no": 0.2}, {"yes": 1.5, "no": -0.5}, {"yes": "1"}, {"yes": True}, {}, {"yes": float("nan")}],
)
def test_shares_that_are_none_are_refused_by_their_row(tmp_path, shares):
    rows = [{"text": f"text number {i}", "probabilities": {"no": 1.0} if i != 3 else shares} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"at least 0 and add up to 1: .*'probabilities' of .*line 4"):
        opened(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("texts", "answer", "beside"),
    [
        (("a",), {"label": "x"}, {"text": "a"}),
        (("a", "b"), {"label": "x"}, {"text": "a", "text_pair": "b"}),
        (("a", "b", "c"), {"choice": 1}, {"texts": ["a", "b", "c"]}),
        (("a",), {"text": "written"}, {"source": "a"}),
    ],
)
def test_no_text_is_lost_beside_its_answer(texts, answer, beside):
    assert _named(True, Record(texts, id="7"), answer) == {"id": "7"} | beside | answer
    assert _named(False, Record(texts), answer) == answer
