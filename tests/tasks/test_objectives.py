"""Losses as sums and counts, and the figures reported from them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import SMALL, random_tokens, split_model

from flax_encoder.nn.heads import segment_mean
from flax_encoder.tasks import TASKS, Classifier
from flax_encoder.tasks.classification import macro_f1
from flax_encoder.tasks.loss import LossSum, target_loss

B, M, V = 2, 3, 7


def draw():
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((B, M, V)).astype(np.float32)
    targets = generator.integers(0, V, (B, M)).astype(np.int32)
    return jnp.asarray(logits), jnp.asarray(targets), jnp.array([[1, 0, 1], [0, 1, 1]], jnp.float32)


def test_loss_is_the_sum_of_minus_log_probabilities_and_their_count():
    logits, targets, weights = draw()
    wide = np.asarray(logits, np.float64)
    log_probabilities = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    want = -sum(log_probabilities[b, m, targets[b, m]] for b, m in ((0, 0), (0, 2), (1, 1), (1, 2)))
    total = target_loss(logits, targets, weights)
    np.testing.assert_allclose(total.sum, want, rtol=1e-6)
    assert float(total.count) == 4.0
    assert total.sum.dtype == total.count.dtype == jnp.float32


def test_targets_of_weight_zero_are_ignored():
    logits, targets, weights = draw()
    garbage = jnp.where(weights == 0, (targets + 1) % V, targets)
    one, other = target_loss(logits, targets, weights), target_loss(logits, garbage, weights)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    gradient = jax.grad(lambda x: target_loss(x, targets, weights).sum)(logits)
    assert (np.asarray(gradient)[np.asarray(weights) == 0] == 0).all()
    np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-6)


def test_correct_counts_targets_that_no_class_beats():
    logits = jnp.array([[[0.0, 5, 1], [2, 1, 0], [0, 0, 9]], [[1, 3, 2], [7, 0, 0], [0, 1, 2]]])
    targets = jnp.array([[1, 1, 2], [2, 0, 2]], jnp.int32)
    weights = jnp.array([[1, 1, 1], [1, 1, 0]], jnp.float32)
    assert float(target_loss(logits, targets, weights).metrics["correct"]) == 3.0


def test_loss_is_float32_for_bfloat16_logits():
    logits, targets, weights = draw()
    low = logits.astype(jnp.bfloat16)
    got, want = target_loss(low, targets, weights), target_loss(low.astype(jnp.float32), targets, weights)
    assert got.sum.dtype == jnp.float32
    np.testing.assert_array_equal(got.sum, want.sum)


def test_sums_add_up_to_the_whole():
    logits, targets, weights = draw()
    whole = target_loss(logits, targets, weights)
    parts = target_loss(logits[:1], targets[:1], weights[:1]) + target_loss(logits[1:], targets[1:], weights[1:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), parts, whole)


def test_masked_lm_reports_means_of_the_sums():
    total = LossSum(jnp.float32(6.0), jnp.float32(4.0), {"correct": jnp.float32(3.0)})
    assert TASKS["masked_lm"].report(total) == {"loss": 1.5, "accuracy": 0.75, "perplexity": math.exp(1.5)}


def test_reports_of_nothing_are_finite():
    nothing = LossSum(jnp.float32(0), jnp.float32(0), {"correct": jnp.float32(0), "confusion": jnp.zeros((3, 3))})
    for objective in (TASKS[name] for name in ("masked_lm", "classification")):
        assert all(np.isfinite(value) for value in objective.report(nothing).values())


def test_segment_mean_is_the_mean_of_the_positions_own_document():
    hidden = jnp.arange(2 * 5 * 3.0).reshape(2, 5, 3)
    segments = jnp.array([[1, 1, 2, 2, 2], [1, 1, 1, 2, 0]], jnp.int32)
    got = segment_mean(hidden, segments, jnp.array([[0, 2], [0, 3]], jnp.int32))
    h = np.asarray(hidden)
    want = [[h[0, :2].mean(0), h[0, 2:].mean(0)], [h[1, :3].mean(0), h[1, 3]]]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def slow_macro_f1(actual, predicted):
    scores = []
    for label in sorted({*actual, *predicted}):
        hits = sum(a == p == label for a, p in zip(actual, predicted, strict=True))
        precision = hits / max(predicted.count(label), 1)
        recall = hits / max(actual.count(label), 1)
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return sum(scores) / len(scores)


def test_macro_f1_equals_precision_and_recall_by_label():
    actual = np.random.default_rng(0).integers(0, 5, 101).tolist()  # of 7 classes, two are absent
    predicted = [a if i % 3 else (a + i) % 6 for i, a in enumerate(actual)]
    confusion = np.zeros((7, 7))
    for a, p in zip(actual, predicted, strict=True):
        confusion[a, p] += 1
    assert macro_f1(confusion) == pytest.approx(slow_macro_f1(actual, predicted), rel=1e-12)
    assert macro_f1(np.zeros((3, 3))) == 0.0
    assert macro_f1(np.diag([3.0, 5.0])) == 1.0


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_packed_documents_are_classified_as_if_alone(pooling):
    """And the confusion matrix has the weighted documents, [actual, predicted]."""
    graphdef, params = split_model(lambda: Classifier(SMALL, 5, pooling, rngs=nnx.Rngs(0)))
    call = jax.jit(lambda method, batch: getattr(nnx.merge(graphdef, params), method)(batch), static_argnums=0)
    rows = random_tokens((3, 7))
    positions = jnp.tile(jnp.arange(7, dtype=jnp.int32), (3, 1))
    alone = {
        "tokens": rows,
        "segment_ids": jnp.ones_like(rows),
        "positions": positions,
        "target_positions": jnp.zeros((3, 1), jnp.int32),
    }
    packed = {
        "tokens": rows.reshape(1, -1),
        "segment_ids": jnp.repeat(jnp.arange(1, 4, dtype=jnp.int32), 7)[None],
        "positions": positions.reshape(1, -1),
        "target_positions": jnp.array([[0, 7, 14, 0]], jnp.int32),
        "targets": jnp.array([[4, 0, 2, 1]], jnp.int32),
        "target_weights": jnp.array([[1, 1, 1, 0]], jnp.float32),
    }
    logits = call("__call__", packed)
    np.testing.assert_allclose(logits[0, :3], call("__call__", alone)[:, 0], rtol=0, atol=1e-5)
    want = np.zeros((5, 5))
    for actual, predicted in zip((4, 0, 2), np.asarray(logits[0]).argmax(-1), strict=False):
        want[actual, predicted] += 1
    np.testing.assert_array_equal(call("loss", packed).metrics["confusion"], want)


def test_pooling_mean_differs_from_cls():
    graphdefs = [split_model(lambda p=p: Classifier(SMALL, 5, p, rngs=nnx.Rngs(0))) for p in ("cls", "mean")]
    tokens = random_tokens((1, 7))
    batch = {
        "tokens": tokens,
        "segment_ids": jnp.ones_like(tokens),
        "positions": jnp.arange(7, dtype=jnp.int32)[None],
        "target_positions": jnp.zeros((1, 1), jnp.int32),
    }
    one, other = (jax.jit(lambda b, g=g, p=p: nnx.merge(g, p)(b))(batch) for g, p in graphdefs)
    assert not np.allclose(one, other, atol=1e-3)


def test_classification_head_drops_out_only_with_a_key():
    config = dataclasses.replace(SMALL, dropout_rate=0.5)
    graphdef, params = split_model(lambda: Classifier(config, 5, rngs=nnx.Rngs(0)))
    hidden = jax.random.normal(jax.random.key(0), (2, 3, SMALL.embed_dim))
    head = jax.jit(lambda key: nnx.merge(graphdef, params).head(hidden, key=key))
    np.testing.assert_array_equal(head(None), head(None))
    assert not np.array_equal(head(None), head(jax.random.key(0)))
