"""The loss of texts that are compared, over a whole batch: by itself, its gradient packed, in parts, over devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import SMALL, assert_trees_close, split_model

from flax_encoder.config import ContrastiveConfig, OptimizerConfig
from flax_encoder.tasks.contrastive import Contrastive
from flax_encoder.tasks.contrastive_loss import cosent, cosines, info_nce, margin_mse
from flax_encoder.training.parameters import join, split, trained
from flax_encoder.training.step import TrainState, coupled_gradient, make_train_step

SGD = optax.sgd(1.0)  # the parameters' change is the gradient

FAST = {symmetric: jax.jit(functools.partial(info_nce, symmetric=symmetric)) for symmetric in (False, True)}
FAST_COSENT, FAST_MARGIN = jax.jit(cosent), jax.jit(margin_mse)


def slow_info_nce(vectors, keys, weights, scale, symmetric):
    """Written anchor by anchor, in float64."""
    real = [i for i in range(len(vectors)) if weights[i]]
    loss = correct = 0.0
    for i in real:
        own_texts = (keys[i, 0], keys[i, 1])
        others = [
            vectors[j, k] for j in real for k in range(1, vectors.shape[1])
            if keys[j, k] not in own_texts and not (k == 1 and keys[j, 0] == keys[i, 0])
        ]  # fmt: skip
        logits = scale * np.array([vectors[i, 0] @ v for v in (vectors[i, 1], *others)])
        own = np.log(np.exp(logits).sum()) - logits[0]
        correct += logits[0] > max(logits[1:], default=-np.inf)
        if symmetric:
            others = [vectors[j, 0] for j in real if keys[j, 0] not in own_texts and keys[j, 1] != keys[i, 1]]
            logits = scale * np.array([vectors[i, 1] @ v for v in (vectors[i, 0], *others)])
            own = (own + np.log(np.exp(logits).sum()) - logits[0]) / 2
        loss += own
    return loss, len(real), correct


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([2, 4]), st.booleans())
def test_the_loss_is_the_slow_ones_whatever_texts_are_equal(data, n, symmetric):
    """Keys are drawn from so few that anchors, positives and negatives equal one another in every way."""
    A = 7
    keys = np.array(data.draw(st.lists(st.integers(0, data.draw(st.sampled_from([2, 5, 40]))),
                                       min_size=A * n, max_size=A * n))).reshape(A, n)  # fmt: skip
    weights = np.array(data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=A, max_size=A)))
    x = np.random.default_rng(int(keys.sum())).standard_normal((A, n, 5))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    words = np.stack([np.zeros_like(keys), keys], -1).astype(np.int32)  # equal in one word, told apart by the other
    got = FAST[symmetric](x.astype("f4"), words, weights.astype("f4"), 7.0)
    loss, count, correct = slow_info_nce(x, keys, weights, 7.0, symmetric)
    np.testing.assert_allclose(got.sum, loss, rtol=1e-5, atol=1e-5)
    assert (got.count, got.metrics["correct"]) == (count, correct)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=5, max_size=5), st.integers(0, 99))
def test_cosent_is_the_sum_over_all_pairs_in_the_wrong_order(numbers, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((len(numbers) + 1, 2, 5))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    cosine = (x[:, 0] * x[:, 1]).sum(-1)
    pairs = [(i, j) for i, a in enumerate(numbers) for j, b in enumerate(numbers) if a > b]
    want = np.log(1 + sum(np.exp(7 * (cosine[j] - cosine[i])) for i, j in pairs))
    weights = np.array([1.0] * len(numbers) + [0.0], "f4")
    got = FAST_COSENT(x.astype("f4"), np.array([*numbers, 9.0], "f4"), weights, 7.0)
    np.testing.assert_allclose(got.sum, want, rtol=1e-5, atol=1e-6)
    assert got.count == 1 and got.metrics["compared"] == len(pairs)
    assert got.metrics["correct"] == sum(cosine[i] > cosine[j] for i, j in pairs)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 9, width=32), st.booleans()), min_size=5, max_size=5), st.integers(0, 99))
def test_margin_mse_is_the_squared_error_of_every_margin(rows, seed):
    """Whatever stands in empty slots, which have no gradient."""
    numbers, weights = (np.array(column, "f4") for column in zip(*rows, strict=True))
    x = np.random.default_rng(seed).standard_normal((len(rows), 3, 7)).astype("f4")
    vectors = np.where(weights[:, None, None] > 0, x / np.linalg.norm(x, axis=-1, keepdims=True), 0.0)
    margins = [7 * (own[0] @ own[1] - own[0] @ own[2]) for own in vectors.astype("f8")]
    errors = [(m - y) ** 2 for m, y, w in zip(margins, numbers, weights, strict=True) if w]
    got = FAST_MARGIN(vectors, numbers, weights, 7.0)
    np.testing.assert_allclose(got.sum, sum(errors), rtol=1e-4, atol=1e-4)
    assert got.count == len(errors) == got.metrics["compared"]
    assert got.metrics["correct"] == sum(m * y > 0 for m, y, w in zip(margins, numbers, weights, strict=True) if w)


@pytest.mark.parametrize("n", [2, 3])
def test_blocks_of_rows_are_all_at_once(n, monkeypatch):
    """Of a batch whose logits are many, and the gradient."""
    rng = np.random.default_rng(0)
    vectors = cosines(jnp.asarray(rng.standard_normal((12, n, 5)), jnp.float32))
    keys, weights = jnp.asarray(rng.integers(0, 9, (12, n, 2)) // 4, jnp.int32), jnp.asarray([1.0] * 11 + [0.0])

    def all_losses():
        def of(vectors):
            losses = [info_nce(vectors, keys, weights, 7.0, symmetric=True)]
            losses += [cosent(vectors, jnp.arange(12.0) // 3, weights, 7.0)] if n == 2 else []
            return sum(loss.sum for loss in losses), losses

        return jax.jit(jax.value_and_grad(of, has_aux=True))(vectors)

    want = all_losses()
    monkeypatch.setattr("flax_encoder.tasks.contrastive_loss._AT_ONCE", {2: 30, 3: 1}[n])  # two rows, one row
    got = all_losses()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


# --- its gradient: packed, in parts, over devices

ROWS, M, N = 8, 2, 3  # two documents of three texts in each row, but for every third
DROPPED = dataclasses.replace(SMALL, dropout_rate=0.3, attention_dropout_rate=0.2)
LEARNED = ContrastiveConfig(learn_temperature=True, symmetric=True, widths=(30, 7), temperature=0.2)


def make_batch(rows=ROWS):
    rng = np.random.default_rng(0)
    batch = {name: np.zeros((rows, 23), np.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["target_weights"] = np.zeros((rows, M), np.float32)
    batch["text_keys"] = np.zeros((rows, M, N, 2), np.int32)
    for r in range(rows):
        lengths = [3, 4, 2, 4, 3, 5][: 3 if r % 3 == 2 else 6]
        begin = 0
        for s, length in enumerate(lengths):
            some = (r, slice(begin, begin + length))
            batch["tokens"][some], batch["segment_ids"][some] = rng.integers(0, 37, length), s + 1
            batch["positions"][some] = np.arange(length)
            begin += length
        batch["target_weights"][r, : len(lengths) // N] = 1
        batch["text_keys"][r, : len(lengths) // N] = rng.integers(0, 9, (len(lengths) // N, N, 2)) // 4
    return jax.tree.map(jnp.asarray, batch)


@functools.cache
def model(config=SMALL, contrastive=LEARNED):
    return split_model(lambda: Contrastive(config, contrastive, rngs=nnx.Rngs(0)))


def test_packed_texts_have_the_vectors_that_they_have_alone():
    """However they are pooled; and the gradient of the loss."""
    graphdef, params = model()
    poolings = [model(SMALL, dataclasses.replace(LEARNED, pooling=p))[0] for p in ("mean", "cls", "lasttoken")]
    packed = make_batch(3)
    alone = {name: np.zeros((18, 5), np.int32) for name in ("tokens", "segment_ids", "positions")}
    for r, s in np.ndindex(3, 6):
        own = np.asarray(packed["segment_ids"][r]) == s + 1
        for name, rows in alone.items():
            rows[6 * r + s, : own.sum()] = 1 if name == "segment_ids" else np.asarray(packed[name][r])[own]
    alone["text_keys"] = np.zeros((18, 1, 1, 2), np.int32)

    def vectors(params, batch):
        return jnp.stack([nnx.merge(graph, params)(batch).reshape(3, M, N, -1) for graph in poolings])

    def gradient(params, batch):
        return jax.grad(lambda p: nnx.merge(graphdef, p).coupled_loss(
            nnx.merge(graphdef, p)(batch).reshape(3, M, N, -1), packed).sum)(params)  # fmt: skip

    both = jax.jit(lambda params, batch: (vectors(params, batch), gradient(params, batch)))
    (got, got_grads), (want, want_grads) = both(params, packed), both(params, alone)
    real = np.asarray(packed["target_weights"]) > 0
    np.testing.assert_allclose(np.asarray(got)[:, real], np.asarray(want)[:, real], rtol=0, atol=1e-5)
    assert np.abs(got[0] - got[1]).max() > 0.1 < np.abs(got[1] - got[2]).max()
    assert_trees_close(got_grads, want_grads)


def test_microbatches_are_one_batch_with_the_same_dropout():
    """The loss and the gradient of all representations at once, whose parts have the parts' keys."""
    graphdef, params = model(DROPPED)
    batch, key = make_batch(), jax.random.key(3)
    mask = trained(OptimizerConfig(freeze=("encoder.layers.0",)), params)
    own, rest = split(params, mask)

    def model_of(own, rest):
        return nnx.merge(graphdef, join(own, rest, mask))

    def whole(own):
        made, halves = model_of(own, rest), jax.tree.map(lambda x: jnp.stack([x[::2], x[1::2]]), batch)
        vectors = jax.lax.map(lambda xs: made.represent(xs[0], key=xs[1]), (halves, jax.random.split(key, 2)))
        loss = made.coupled_loss(jnp.swapaxes(vectors, 0, 1).reshape(ROWS, M, N, -1), batch)
        return loss.sum, loss

    want, loss = jax.jit(jax.grad(whole, has_aux=True))(own)
    got, total = jax.jit(lambda own: coupled_gradient(model_of, own, rest, batch, key, 2))(own)
    np.testing.assert_allclose(total.sum, loss.sum, rtol=1e-6)
    assert (total.count, total.metrics["correct"]) == (loss.count, loss.metrics["correct"])
    assert_trees_close(got, want)
    assert abs(float(update(1)[1].sum) - float(loss.sum)) > 1e-2, "dropout must have moved it"


@functools.cache
def update(num_microbatches, mesh_shape=None):
    """(change of the parameters, loss) of one step."""
    graphdef, params = model()
    state = jax.tree.map(jnp.array, TrainState(jnp.int32(0), params, SGD.init(params)))  # the step takes it away
    before = jax.tree.map(np.array, params)
    batch, step = make_batch(), functools.partial(make_train_step, graphdef, SGD, num_microbatches=num_microbatches)
    if mesh_shape is None:
        new, metrics = step()(state, batch)
    else:
        mesh = jax.make_mesh(mesh_shape, ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3)
        copied, rows = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)) for spec in (
            (), (("data", "fsdp"),)))  # fmt: skip
        shardings = jax.tree.map(lambda x: copied, state)
        with jax.set_mesh(mesh):
            new, metrics = step(shardings=shardings)(jax.device_put(state, shardings), jax.device_put(batch, rows))
    return jax.tree.map(lambda a, b: np.asarray(a) - b, new.params, before), metrics.loss


@pytest.mark.parametrize(("num_microbatches", "mesh"), [(4, None), (1, (8, 1, 1)), (2, (2, 2, 2))])
def test_microbatches_and_devices_make_the_update_of_one_batch(num_microbatches, mesh):
    """Every anchor is told from the texts of all rows, wherever these are."""
    want, loss = update(1)
    got, total = update(num_microbatches, mesh)
    np.testing.assert_allclose(total.sum, loss.sum, rtol=1e-5)
    assert float(total.count) == float(loss.count) == 14
    assert_trees_close(got, want)
