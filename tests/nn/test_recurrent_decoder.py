"""The recurrent decoder against a loop over tokens that fits a screen: outputs and the gradient of every parameter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import assert_trees_close, split_model

from flax_encoder.config import DecoderConfig, EncoderConfig
from flax_encoder.nn.recurrent_decoder import RecurrentDecoder

D, M, T = 10, 13, 7
GRU = EncoderConfig(layer="gru", embed_dim=D, num_layers=1, position="none")
CASES = {
    "gru, three layers, no biases": (dataclasses.replace(GRU, use_bias=False), 3),
    "lstm, two layers": (dataclasses.replace(GRU, layer="lstm", remat="full"), 2),
    "rnn": (dataclasses.replace(GRU, layer="rnn", activation="relu"), 1),
}


def by_hand(config, num_layers, p, memory, x):
    """One document: memory [M, D], x [T, D] -> [T, D], a token at a time."""

    def affine(part, v):
        return jnp.tensordot(v, part["kernel"], 1) + part.get("bias", 0.0)

    attention, layers = p["attention"], [p["first"]]
    layers += [jax.tree.map(lambda a, i=i: a[i], p["layers"]) for i in range(num_layers - 1)]
    hidden = list(jnp.tanh(affine(p["start_state"], memory.mean(0))))
    cells, out = [jnp.zeros(D)] * num_layers, []
    for token in x:
        pairs = affine(attention["query"], hidden[0]) + affine(attention["key"], memory)
        context = jax.nn.softmax(jnp.tanh(pairs) @ attention["score"]) @ memory
        below = token
        for i, layer in enumerate(layers):
            a = affine(layer["input"], below) + (affine(layer["context"], context) if i == 0 else 0.0)
            b = affine({name: w[0] for name, w in layer["recurrence"].items()}, hidden[i])
            if config.layer == "rnn":
                hidden[i] = jax.nn.relu(a + b)[0]
            elif config.layer == "gru":
                r, z = jax.nn.sigmoid(a[:2] + b[:2])
                hidden[i] = (1 - z) * jnp.tanh(a[2] + r * b[2]) + z * hidden[i]
            else:
                enter, keep, write = jax.nn.sigmoid((a + b)[jnp.array([0, 1, 3])])
                cells[i] = keep * cells[i] + enter * jnp.tanh((a + b)[2])
                hidden[i] = write * jnp.tanh(cells[i])
            below = hidden[i]
        out.append(affine(p["out"], jnp.concatenate([below, context, token])).max(-1))
    return jnp.stack(out)


@pytest.mark.parametrize("name", CASES)
def test_packed_targets_equal_each_by_hand_forward_and_gradient(name):
    """Two documents and padding in a row, in other places in the memory's row than in the target's."""
    config, num_layers = CASES[name]
    graphdef, params = split_model(lambda: RecurrentDecoder(config, DecoderConfig(num_layers), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    memory, x, weights = (jnp.asarray(rng.standard_normal((1, n, D)), jnp.float32) for n in (M, T, T))
    memory_segments = jnp.array([[0] + [1] * 5 + [2] * 4 + [0] * 3], jnp.int32)
    segments = jnp.array([[1] * 2 + [2] * 4 + [0]], jnp.int32)

    def ours(params, memory, x):
        out, _ = nnx.merge(graphdef, params)(x, memory, segments, memory_segments)
        return (out * weights)[:, :6].sum(), out[0, :6]

    def theirs(params, memory, x):
        parts = (memory[0, 1:6], x[0, :2]), (memory[0, 6:10], x[0, 2:6])
        out = jnp.concatenate([by_hand(config, num_layers, params, *part) for part in parts])
        return (out * weights[0, :6]).sum(), out

    got, want = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(params, memory, x) for f in (ours, theirs)
    )
    assert_trees_close(got, want)


def test_attention_is_a_mean_of_what_is_seen():
    graphdef, params = split_model(lambda: RecurrentDecoder(GRU, DecoderConfig(1), rngs=nnx.Rngs(0)))
    attention = nnx.merge(graphdef, params).attention
    rng = np.random.default_rng(0)
    state, memory = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((3, D), (3, M, D)))
    seen = jnp.arange(M) < jnp.array([[1], [5], [0]])
    for scale in (1.0, 1e4):  # scores that overflow without the largest taken off
        out = attention(scale * state, scale * attention.key(memory), memory, seen)
        np.testing.assert_allclose(out[0], memory[0, 0], rtol=1e-6)
        low, high = memory[1, :5].min(0) - 1e-6, memory[1, :5].max(0) + 1e-6
        assert ((out[1] >= low) & (out[1] <= high)).all() and not out[2].any()
