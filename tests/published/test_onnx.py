"""An exported run goes on to ONNX by transformers' own exporter, with the same logits."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from flax_encoder.config import DataConfig, EncoderConfig, HeadConfig, RunConfig
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from flax_encoder.runs.exchange import export_run
from flax_encoder.runs.load import load
from tests.toy import save_run

PYTHON = sys.executable if importlib.util.find_spec("optimum") else os.environ.get("ONNX_PYTHON")
PEER = pathlib.Path(__file__).parents[1] / "peer_onnx.py"
TEXTS = ["the list of a value", "a value in the list returns each item in order", "calls"]
MODEL = EncoderConfig(
    num_layers=2, embed_dim=24, num_heads=3, mlp_dim=40, max_length=40, num_token_types=2, embedding_norm=True
)
MODERN = EncoderConfig(
    num_layers=4, embed_dim=24, num_heads=3, mlp_dim=40, max_length=40, position="rope", norm_placement="pre",
    first_attention_norm=False, embedding_norm=True, gated=True, use_bias=False, window=4, global_every=3,
    norm_epsilon=1e-5,
)  # fmt: skip
MODERN_HEAD = HeadConfig(transform=True, activation="gelu", norm=True, dense_bias=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective, task, labels, model, head",
    [
        ("classification", "text-classification", ["one", "other", "third"], MODEL, HeadConfig()),
        ("masked_lm", "fill-mask", None, MODEL, HeadConfig()),
        ("token_classification", "token-classification", ["B-A", "I-A", "O"], MODERN, MODERN_HEAD),
    ],
)
def test_an_exported_run_has_the_same_logits_in_onnx(tmp_path, objective, task, labels, model, head):
    """By the command that docs/library.md gives, then by ONNX Runtime alone."""
    if PYTHON is None:
        pytest.skip("goes through optimum: set ONNX_PYTHON to a Python that has optimum[onnxruntime]")
    tokenizer = train_wordpiece(TEXTS * 3, 120)
    run_dir, published, onnx = (tmp_path / name for name in ("run", "published", "onnx"))
    config = RunConfig(
        objective=objective, model=model, head=head, run_dir=str(run_dir), data=DataConfig(row_length=32)
    )
    save_run(config, tokenizer, labels)
    export_run(str(run_dir), str(published))
    command = f"-m optimum.commands.optimum_cli export onnx --model {published} --task {task} {onnx}"
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    made = subprocess.run([PYTHON, *command.split()], capture_output=True, text=True, timeout=500, env=offline)
    assert (onnx / "model.onnx").exists(), made.stdout + made.stderr

    run = load(str(published))
    rows = [run.row(text) for text in TEXTS]
    inputs = {
        "input_ids": np.concatenate([row["tokens"] for row in rows]),
        "attention_mask": np.concatenate([row["segment_ids"] for row in rows]),
        "token_type_ids": np.concatenate([np.zeros_like(row["tokens"]) for row in rows]),
    }
    np.savez(tmp_path / "inputs.npz", **inputs)
    subprocess.run([PYTHON, str(PEER), onnx / "model.onnx", tmp_path / "inputs.npz", tmp_path / "out.npy"], check=True)
    got = np.load(tmp_path / "out.npy")
    for row, text, logits in zip(rows, TEXTS, got, strict=True):
        every = np.arange(row["tokens"].shape[1], dtype=np.int32)[None]
        want = np.asarray(run._logits(row | {"target_positions": every}))[0]
        # Of a text its first token's, of tokens those that are no padding.
        want, logits = (want[0], logits) if logits.ndim == 1 else (x[row["segment_ids"][0] > 0] for x in (want, logits))
        np.testing.assert_allclose(logits, want, rtol=0, atol=2e-5 * np.abs(want).max(), err_msg=text)
