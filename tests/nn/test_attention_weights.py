"""What tokens attend to: torch's numbers, and the laws of packed rows."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import OUTPUT_TOLERANCE
from safetensors.numpy import load_file
from toy import SMALL, random_tokens, split_model

from flax_encoder.config import EncoderConfig
from flax_encoder.nn.encoder import Encoder
from flax_encoder.ops.attention import attention, attention_weights
from flax_encoder.published.load import load_pretrained

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
EXPECTED = np.load(GOLDEN / "attentions.npz")
KINDS = {
    "scanned windows": {"position": "rope", "norm_placement": "pre", "window": 3, "global_every": 2},
    "grouped": {"num_kv_heads": 1, "position": "rope"},
    "disentangled": {
        "relative_position": "disentangled", "position": "none", "relative_buckets": 0, "relative_max_distance": 8,
    },
}  # fmt: skip


def of_encoder(config, *rows):
    graphdef, params = split_model(lambda: Encoder(config, rngs=nnx.Rngs(0)))
    run = jax.jit(lambda params, *rows: nnx.merge(graphdef, params).attention_weights(*rows))
    return np.asarray(run(params, *rows))


@pytest.mark.parametrize("name", EXPECTED.files)
def test_weights_are_those_of_transformers(name):
    """With padding among the keys; of queries that are padding there are none here, and torch's mean nothing."""
    loaded = load_pretrained(GOLDEN / name)
    flat = load_file(GOLDEN / name / "reference.safetensors")
    inputs = {key.removeprefix("input/"): x for key, x in flat.items() if key.startswith("input/")}
    rows = loaded.rows(*(inputs.get(x) for x in ("input_ids", "attention_mask", "token_type_ids")))
    graphdef, params = nnx.split(loaded.model.encoder)
    got = np.asarray(jax.jit(lambda p, *rows: nnx.merge(graphdef, p).attention_weights(*rows))(params, *rows))
    want = EXPECTED[name]
    is_query = np.asarray(rows[1] > 0)[None, :, None, :, None]
    assert got.shape == want.shape and is_query.any() and want.std() > 1e-3
    np.testing.assert_allclose(got, np.where(is_query, want, 0), rtol=0, atol=OUTPUT_TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_row_are_blind_to_each_other(kind):
    """Weights add up to 1 within a segment, are 0 elsewhere, and are those of the documents alone."""
    config = dataclasses.replace(SMALL, **KINDS[kind])
    a, b, T = *np.asarray(random_tokens((2, 8), 3)), 17
    a = a[:7]
    rows = [[(a, 1), (b, 2)], [(a, 1)], [(b, 1)]]  # packed, and each alone
    tokens, segments, positions = np.zeros((3, 3, T), np.int32)
    for i, row in enumerate(rows):
        start = 0
        for document, segment in row:
            part = slice(start, start + len(document))
            tokens[i, part], segments[i, part], positions[i, part] = document, segment, np.arange(len(document))
            start += len(document)
    got = of_encoder(config, *map(jnp.asarray, (tokens, segments, positions)))
    assert got.shape == (config.num_layers, 3, config.num_heads, T, T)
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    assert (got[:, ~np.broadcast_to(same[:, None], got.shape[1:])] == 0).all()
    sums = np.broadcast_to(segments[:, None] > 0, got.shape[:-1])
    np.testing.assert_allclose(got.sum(-1), sums, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got[:, 0, :, :7, :7], got[:, 1, :, :7, :7], rtol=0, atol=2e-6)
    np.testing.assert_allclose(got[:, 0, :, 7:15, 7:15], got[:, 2, :, :8, :8], rtol=0, atol=2e-6)
    if config.window is not None:
        far = np.abs(np.subtract.outer(np.arange(T), np.arange(T))) > config.window
        assert (got[1][..., far] == 0).all() and (got[0][0][:, far & same[0]] > 0).any()


def test_weights_times_values_are_attention():
    r = np.random.default_rng(1)
    query, key, value = (jnp.asarray(r.normal(size=(2, 13, n, 5)), jnp.float32) for n in (6, 3, 3))
    segments = jnp.asarray(r.integers(0, 3, (2, 13)).cumsum(1) // 4, jnp.int32)
    options = {"segment_ids": segments, "window": (4, 2), "scale": 0.7}
    weights = attention_weights(query, key, **options)
    want = attention(query, key, value, **options)
    got = jnp.einsum("BNTS,BSNH->BTNH", weights, jnp.repeat(value, 2, axis=2))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_recurrent_layers_have_none():
    encoder = Encoder(EncoderConfig(vocab_size=37, num_layers=1, layer="lstm", position="none"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="layers with attention"):
        encoder.attention_weights(random_tokens((1, 5)))
