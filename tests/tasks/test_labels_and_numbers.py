"""multi_label, regression and shares of labels: losses by the formula, of documents and of slots without one."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_encoder.tasks.classification import Classifier
from flax_encoder.tasks.multi_label import MultiLabelClassifier
from flax_encoder.tasks.regression import Regressor
from tests.toy import SMALL, random_tokens, split_model

POSITIONS = np.array([[0, 7, 0], [0, 4, 9]])
WEIGHTS = np.array([[1, 1, 0], [1, 1, 1]], np.float32)


def batch_with(targets):
    segments = np.array([[1] * 7 + [2] * 5 + [0] * 2, [1] * 4 + [2] * 5 + [3] * 5], np.int32)
    column = np.arange(14) - np.array([[0] * 7 + [7] * 7, [0] * 4 + [4] * 5 + [9] * 5])
    return {
        "tokens": random_tokens((2, 14)), "segment_ids": jnp.asarray(segments),
        "positions": jnp.asarray(np.where(segments, column, 0), jnp.int32),
        "target_positions": jnp.asarray(POSITIONS, jnp.int32), "target_weights": jnp.asarray(WEIGHTS),
        "targets": jnp.asarray(targets),
    }  # fmt: skip


def made(make, targets):
    graphdef, params = split_model(make)
    model, batch = nnx.merge(graphdef, params), batch_with(targets)
    total, logits = jax.jit(lambda batch: (model.loss(batch), model(batch)))(batch)
    return total, np.asarray(logits, np.float64)


def test_the_loss_of_labels_is_the_mean_binary_cross_entropy_of_each():
    targets = np.random.default_rng(0).integers(0, 2, (2, 3, 4)).astype(np.int32)
    total, logits = made(lambda: MultiLabelClassifier(SMALL, 4, rngs=nnx.Rngs(0)), targets)
    want = exact = 0.0
    for b, m in np.argwhere(WEIGHTS):
        p, y = 1 / (1 + np.exp(-logits[b, m])), targets[b, m]
        want -= (y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
        exact += ((p > 0.5) == y).all()
    np.testing.assert_allclose(total.sum, want, rtol=1e-5)
    assert float(total.count) == 5 and float(total.metrics["exact"]) == exact


def test_the_loss_of_numbers_is_the_squared_error():
    targets = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    total, numbers = made(lambda: Regressor(SMALL, 1, rngs=nnx.Rngs(0)), targets)
    error = (numbers[..., 0] - targets)[WEIGHTS > 0]
    np.testing.assert_allclose(total.sum, (error**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(total.metrics["absolute"], np.abs(error).sum(), rtol=1e-5)
    assert float(total.count) == 5


def test_the_loss_of_shares_is_the_cross_entropy_with_them_and_of_whole_ones_that_of_labels():
    make = lambda: Classifier(SMALL, 4, smoothing=0.1, rngs=nnx.Rngs(0))  # noqa: E731
    shares = np.random.default_rng(0).dirichlet(np.ones(4), (2, 3)).astype(np.float32)
    total, logits = made(make, shares)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -((0.9 * shares + 0.025) * logs).sum(-1)[WEIGHTS > 0]
    np.testing.assert_allclose(total.sum, want.sum(), rtol=1e-5)
    right = (logs.argmax(-1) == shares.argmax(-1))[WEIGHTS > 0]
    assert float(total.metrics["correct"]) == right.sum() == np.trace(total.metrics["confusion"])

    labels = shares.argmax(-1).astype(np.int32)
    (whole, _), (hard, _) = made(make, np.eye(4, dtype=np.float32)[labels]), made(make, labels)
    np.testing.assert_allclose(whole.sum, hard.sum, rtol=1e-6)
    np.testing.assert_array_equal(whole.metrics["confusion"], hard.metrics["confusion"])
