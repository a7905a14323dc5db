"""What bench_learning.py gives its peers is what the recipe reads, and a peer learns from it."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from bench_learning import best_rates, minutes_to, our_curve, peer_spec, write_data

from flax_encoder.config import DataConfig, EncoderConfig, RunConfig
from flax_encoder.data.pipeline import open_data

T = 32
PEER = pathlib.Path(__file__).parents[2] / "benchmarks" / "peer_learning.py"


@pytest.fixture(scope="module")
def opened(corpus):
    source = str(corpus / "lines.txt")
    data = DataConfig(source=source, text_unit="line", vocab_size=300, row_length=T, held_out_rate=0.2)
    model = EncoderConfig(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24, gated=True)
    return open_data(RunConfig(model=model, data=data, batch_size=4, steps=2, budget_minutes=0.02))


def test_a_peer_has_the_training_text_end_to_end_and_the_held_out_tokens_of_our_evaluation(opened, tmp_path):
    write_data(opened, tmp_path / "data.npz")
    written = np.load(tmp_path / "data.npz")
    store, first, last = opened.stores[0], *opened.tokenizer.frame
    ids = np.concatenate([[first, *store.train.document(i), last] for i in range(len(store.train))])
    assert written["rows"].shape == (len(ids) // T, T)
    assert written["rows"].reshape(-1).tolist() == ids[: written["rows"].size].tolist()

    batches = [opened.evaluation[i] for i in range(len(opened.evaluation))]
    restored = written["ids"].copy()
    row, slot = np.nonzero(written["labels"] >= 0)
    restored[row, written["slots"][row, slot]] = written["labels"][row, slot]
    assert (restored != written["ids"]).sum() > len(row) / 2
    assert len(row) == sum(batch["target_weights"].sum() for batch in batches)
    assert written["ids"].tolist() == np.concatenate([batch["tokens"] for batch in batches]).tolist()
    held_out = "".join(map(chr, restored[written["mask"]]))
    for i in range(len(store.validation)):
        assert "".join(map(chr, store.validation.document(i)[: T - 2])) in held_out


def test_our_evaluations_stand_at_the_seconds_of_training(tmp_path):
    lines = [
        {"step": 10, "spent_seconds": 4.0, "epoch": 0.1}, {"step": 15, "eval/loss": 5.0},
        {"step": 20, "spent_seconds": 8.0, "epoch": 0.2}, {"step": 20, "eval/loss": 3.0},
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = our_curve(tmp_path)
    assert read == {"curve": [(6.0, 5.0), (8.0, 3.0)], "updates": 20, "epochs": 0.2}
    assert minutes_to(read["curve"], 5.5) == 0.1 and minutes_to(read["curve"], 2.9) is None
    runs = {("mlm", 1e-3): [{"curve": [(1, 4.0)]}], ("mlm", 2e-3): [{"curve": [(1, 3.5)]}]}
    assert best_rates(runs)["mlm"][0] == 2e-3


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["mlm", "modernbert-muon"])
def test_a_peer_learns(opened, tmp_path, kind):
    pytest.importorskip("torch")
    write_data(opened, tmp_path / "data.npz")
    spec = peer_spec(opened.config, opened) | {
        "kind": kind, "learning_rate": 1e-2, "seed": 0, "masked_rate": 0.3, "evaluations": 2, "compiled": False,
        "cores": 1,
    }  # fmt: skip
    command = [sys.executable, str(PEER), str(tmp_path / "data.npz"), json.dumps(spec)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    seconds, losses = zip(*found["curve"], strict=True)
    assert len(losses) == 3 and list(seconds) == sorted(seconds)
    assert abs(losses[0] - np.log(spec["vocab_size"])) < 0.5 and losses[-1] < losses[0]
