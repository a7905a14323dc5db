"""Recurrent layers against loops in NumPy, against torch (tests/golden), and what a packed row must not mix."""

import dataclasses
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import assert_trees_close, split_model

from flax_encoder.config import ConfigError, EncoderConfig
from flax_encoder.nn.encoder import Encoder
from flax_encoder.nn.recurrent import RecurrentLayer, from_torch

B, T, D = 3, 17, 10
BASE = EncoderConfig(layer="lstm", embed_dim=D, num_layers=1, position="none")
CONFIGS = {
    "rnn tanh": dataclasses.replace(BASE, layer="rnn", activation="tanh"),
    "rnn relu": dataclasses.replace(BASE, layer="rnn", activation="relu"),
    "lstm": BASE,
    "gru": dataclasses.replace(BASE, layer="gru"),
}
SEGMENTS = np.array([
    [1] * 17,
    [1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 4, 4, 0, 0, 0, 0],
    [0, 0, 1, 1, 1, 0, 0, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3],
])  # fmt: skip


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(kind, p, x):
    """One direction over one document, [T, D] -> [T, C], in float64, a token at a time."""
    gates_of = lambda part, v: np.einsum("i,igc->gc", v, part["kernel"]) + part["bias"]  # noqa: E731
    cells = p["recurrence"]["kernel"].shape[0]
    h, c, out = np.zeros(cells), np.zeros(cells), []
    for token in x:
        a, b = gates_of(p["input"], token), gates_of(p["recurrence"], h)
        if kind.startswith("rnn"):
            h = np.tanh(a + b)[0] if kind == "rnn tanh" else np.maximum(a + b, 0)[0]
        elif kind == "lstm":
            i, f, g, o = a + b
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            r, z = sigmoid(a[0] + b[0]), sigmoid(a[1] + b[1])
            h = (1 - z) * np.tanh(a[2] + r * b[2]) + z * h
        out.append(h)
    return np.array(out)


def documents(segments):
    """Slices of the runs of equal segments above 0."""
    edges = [0, *(np.flatnonzero(np.diff(segments)) + 1), len(segments)]
    return [slice(a, b) for a, b in itertools.pairwise(edges) if segments[a]]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_rows_equal_each_document_by_hand(kind, bidirectional):
    config = dataclasses.replace(CONFIGS[kind], bidirectional=bidirectional)
    graphdef, params = split_model(lambda: RecurrentLayer(config, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).standard_normal((B, T, D)).astype(np.float32)
    want = np.zeros((B, T, D))
    for direction in range(1 + bidirectional):
        p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
        own = {
            "input": {"kernel": p["input"]["kernel"][:, direction], "bias": p["input"]["bias"][direction]},
            "recurrence": {name: a[direction] for name, a in p["recurrence"].items()},
        }
        cells = slice(direction * config.num_cells, (direction + 1) * config.num_cells)
        turn = slice(None, None, -1 if direction else 1)
        for row in range(B):
            for document in documents(SEGMENTS[row]):
                want[row, document, cells] = by_hand(kind, own, x[row, document][turn])[turn]
    got = jax.jit(lambda x, s: nnx.merge(graphdef, params)(x, s))(x, jnp.asarray(SEGMENTS, jnp.int32))
    assert_trees_close(got, want)
    assert not np.asarray(got)[SEGMENTS == 0].any()


GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden/recurrent.npz")


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("kind", CONFIGS)
def test_torch_weights_give_torch_results_and_gradients(kind, directions):
    """Two layers; the gradient of every weight and bias, and of the input."""
    case = {name.split("/", 2)[2]: GOLDEN[name] for name in GOLDEN.files if name.startswith(f"{kind}/{directions}/")}
    config = dataclasses.replace(CONFIGS[kind], bidirectional=directions == 2, embed_dim=case["x"].shape[-1])
    graphdef, shapes = split_model(lambda: RecurrentLayer(config, rngs=nnx.Rngs(0)))
    params, want = (
        [from_torch({k.removeprefix(kind_): v for k, v in case.items() if k.startswith(kind_)}, i) for i in range(2)]
        for kind_ in ("param ", "grad ")
    )
    assert jax.tree.map(np.shape, params[0]) == jax.tree.map(np.shape, shapes)

    def loss(params, x):
        out, ones = x, jnp.ones(x.shape[:2], jnp.int32)
        for layer in params:
            out = nnx.merge(graphdef, layer)(out, ones)
        return (out * case["weights"]).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, case["x"])
    assert_trees_close(out, case["out"])
    assert_trees_close(grads, (want, case["grad x"]))


def test_gradients_equal_those_of_the_scan_left_to_itself(monkeypatch):
    """The kernel's gradient as one product is the one that differentiation of the scan adds up."""
    import flax_encoder.nn.recurrent as recurrent

    graphdef, params = split_model(lambda: RecurrentLayer(CONFIGS["gru"], rngs=nnx.Rngs(0)))
    x, weights = np.random.default_rng(1).standard_normal((2, B, T, D)).astype(np.float32)

    def gradients():
        def loss(params, x):
            return (nnx.merge(graphdef, params)(x, jnp.asarray(SEGMENTS, jnp.int32)) * weights).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)

    got = gradients()
    monkeypatch.setattr(recurrent, "_recur", lambda run, inputs, *rest: run(inputs, jnp.zeros_like(inputs), *rest))
    assert_trees_close(got, gradients())


def test_no_biases_and_bfloat16_operands():
    config = dataclasses.replace(BASE, use_bias=False, dtype="bfloat16", num_layers=1)
    graphdef, params = split_model(lambda: RecurrentLayer(config, rngs=nnx.Rngs(0)))
    assert jax.tree.map(np.shape, params) == {
        "input": {"kernel": (D, 2, 4, D // 2)}, "recurrence": {"kernel": (2, D // 2, 4, D // 2)},
    }  # fmt: skip
    plain, _ = split_model(lambda: RecurrentLayer(dataclasses.replace(config, dtype="float32"), rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (B, T, D))

    def outputs_and_gradients(graphdef):
        def loss(params):
            out = nnx.merge(graphdef, params)(x, jnp.asarray(SEGMENTS, jnp.int32))
            return out.sum(), out

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    got, want = outputs_and_gradients(graphdef), outputs_and_gradients(plain)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == jnp.float32 and not np.array_equal(g, w)
        assert np.abs(g - w).max() < 4 * jnp.finfo(jnp.bfloat16).eps * np.abs(w).max()


def test_dropout_follows_each_layer():
    config = dataclasses.replace(BASE, dropout_rate=0.5)
    graphdef, params = split_model(lambda: RecurrentLayer(config, rngs=nnx.Rngs(0)))
    x, ones = jnp.ones((B, T, D)), jnp.ones((B, T), jnp.int32)
    dropped = nnx.merge(graphdef, params)(x, ones, key=jax.random.key(0))
    whole = nnx.merge(graphdef, params)(x, ones)
    kept = np.asarray(dropped) != 0
    assert 0.3 < kept.mean() < 0.7
    np.testing.assert_allclose(np.asarray(dropped)[kept], 2 * np.asarray(whole)[kept], rtol=1e-6)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_first_of_several_layers_reads_embeddings_of_another_width(scan_layers):
    config = dataclasses.replace(BASE, vocab_size=11, embedding_dim=4, num_layers=3, scan_layers=scan_layers)
    graphdef, params = split_model(lambda: Encoder(config, rngs=nnx.Rngs(0)))
    assert params["first"]["input"]["kernel"].shape == (1, 4, 2, 4, D // 2)
    assert params["layers"]["input"]["kernel"].shape == (2, D, 2, 4, D // 2)
    hidden, states = nnx.merge(graphdef, params)(jnp.ones((B, T), jnp.int32), every_layer=True)
    assert states.shape == (3, B, T, D)
    np.testing.assert_array_equal(states[-1], hidden)


@pytest.mark.parametrize(("values", "message"), [
    ({"num_heads": 5}, "num_heads is not for layers of lstm: leave it at 12; got 5"),
    ({"window": 3}, "window is not for layers of lstm"),
    ({"relative_position": "t5"}, "relative_position is not for layers of lstm"),
    ({"activation": "relu"}, "layer rnn needs activation tanh or relu.*: got relu for lstm"),
    ({"layer": "rnn"}, "tanh or relu.*: got gelu for rnn"),
    ({"position": "rope"}, "rope is for attention"),
    ({"embed_dim": 7}, "so it must be even: got 7"),
    ({"layer": "attention", "bidirectional": False, "num_heads": 2}, "leave bidirectional True"),
])  # fmt: skip
def test_settings_that_recurrent_layers_do_not_read_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(BASE, **values)
