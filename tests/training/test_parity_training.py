"""A hundred updates of a published classifier, ours and torch's: the same model but for the order of float32 sums."""

import dataclasses
import json
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_encoder.config import OptimizerConfig
from flax_encoder.published.load import load_pretrained
from flax_encoder.tasks import Classifier
from flax_encoder.training.optimizer import make_optimizer
from flax_encoder.training.sharding import logical_axes
from flax_encoder.training.step import TrainState, make_train_step

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "tests/golden/bert-classification"
STEPS, B, T = 100, 8, 11
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-3, b2=0.999, epsilon=1e-8, weight_decay=0.01, clip_norm=1.0, warmup_rate=0.1
)


@pytest.mark.parity
def test_a_hundred_updates_end_where_torchs_do(tmp_path):
    """Ours may be as far from torch in float64 as torch in float32 is, times four: both are one rounding's growth."""
    python = os.environ.get("TORCH_PYTHON")
    if python is None:
        pytest.skip("compares with torch: set TORCH_PYTHON to a Python that has torch and transformers")
    loaded = load_pretrained(FOLDER)
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, loaded.config.vocab_size, (STEPS, B, T))
    lengths = generator.integers(3, T + 1, (STEPS, B, 1))
    mask = np.arange(T) < lengths
    labels = (tokens[:, :, 1] % loaded.num_outputs).astype(np.int64)  # something that can be learned
    settings = {name: getattr(OPTIMIZER, name) for name in (
        "learning_rate", "b1", "b2", "epsilon", "weight_decay", "clip_norm", "warmup_rate")}  # fmt: skip
    np.savez(tmp_path / "batches.npz", tokens=tokens, mask=mask.astype(np.int64), labels=labels,
             settings=json.dumps(settings))  # fmt: skip
    theirs = {}
    for name in ("float32", "float64"):
        done = subprocess.run(
            [python, str(ROOT / "tests/parity_training.py"), "train", str(FOLDER), str(tmp_path / "batches.npz"),
             str(tmp_path / f"{name}.npz"), *["--float64"] * (name == "float64")],
            capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        theirs[name] = np.load(tmp_path / f"{name}.npz")

    config = dataclasses.replace(loaded.config, dropout_rate=0.0, attention_dropout_rate=0.0)
    make_model = lambda: Classifier(  # noqa: E731
        config, loaded.num_outputs, loaded.pooling, loaded.head, rngs=nnx.Rngs(0))  # fmt: skip
    params = nnx.to_pure_dict(nnx.split(loaded.model)[1])
    params = {name: jax.tree.map(jnp.asarray, params[name]) for name in ("encoder", "head")}
    graphdef, _ = nnx.split(make_model())
    tx = make_optimizer(OPTIMIZER, STEPS, logical_axes(make_model))
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    step, losses = make_train_step(graphdef, tx), []

    def rows(number):
        return {
            "tokens": jnp.asarray(np.where(mask[number], tokens[number], 0), jnp.int32),
            "segment_ids": jnp.asarray(mask[number], jnp.int32),
            "positions": jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)),
            "target_positions": jnp.zeros((B, 1), jnp.int32),
            "targets": jnp.asarray(labels[number][:, None], jnp.int32),
            "target_weights": jnp.ones((B, 1), jnp.float32),
        }

    apply = jax.jit(lambda params, batch: nnx.merge(graphdef, params)(batch))

    def all_logits(params):
        return np.stack([np.asarray(apply(params, rows(number)))[:, 0] for number in range(STEPS)])

    before = all_logits(state.params)
    for number in range(STEPS):
        state, metrics = step(state, rows(number))
        losses.append(float(metrics.loss.sum / metrics.loss.count))
    logits = all_logits(state.params)
    exact = theirs["float64"]["logits"]
    ours, torchs = (np.abs(x - exact).max() for x in (logits, theirs["float32"]["logits"]))
    print(f"largest difference of logits from float64: ours {ours:.2e}, torch's {torchs:.2e}, of {np.abs(exact).max()}")
    assert np.abs(before - logits).max() > 0.3, "it must have learned for this to show anything"
    assert ours <= 4 * torchs, (ours, torchs)
    np.testing.assert_allclose(losses, theirs["float64"]["losses"], rtol=1e-4)
