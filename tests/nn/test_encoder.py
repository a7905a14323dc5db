"""The encoder: what must not change its output, what must, and BERT's equations by hand."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import SMALL, B, D, F, H, L, N, T, V, assert_trees_close, random_tokens, split_model

from flax_encoder.config import EncoderConfig
from flax_encoder.nn.encoder import Encoder

PRE = dataclasses.replace(SMALL, norm_placement="pre")
LSTM = EncoderConfig(
    vocab_size=V, layer="lstm", num_layers=L, embed_dim=D, max_length=29, position="none", embedding_norm=False
)
VARIANTS = {
    "bert": SMALL,
    "pre-norm": PRE,
    "modern": dataclasses.replace(
        PRE, position="rope", gated=True, activation="gelu", use_bias=False, window=2, global_every=2
    ),
    "llama-like": dataclasses.replace(
        PRE, position="rope", gated=True, activation="silu", norm="rms_norm", num_kv_heads=1, norm_epsilon=1e-6
    ),
    "sinusoidal post-norm, narrow": dataclasses.replace(SMALL, position="sinusoidal", window=1, global_every=0),
    "no positions": dataclasses.replace(SMALL, position="none", activation="relu"),
    "chunked": dataclasses.replace(SMALL, attention_implementation="chunked"),
    "albert-like": dataclasses.replace(SMALL, num_layers=4, num_layer_groups=2, embedding_dim=13, num_token_types=2),
    "roberta-like": dataclasses.replace(SMALL, position_offset=2),
    "mosaic-like": dataclasses.replace(
        SMALL, position="none", relative_position="alibi", gated=True, mlp_bias=False, mlp_out_bias=True
    ),
    "t5-like": dataclasses.replace(
        PRE, position="none", relative_position="t5", relative_buckets=8, relative_max_distance=6, norm="rms_norm",
        use_bias=False, attention_scale=1.0, attention_head_dim=4, activation="relu",
    ),
    "deberta-like": dataclasses.replace(
        SMALL, position="none", relative_position="disentangled", relative_buckets=4, relative_max_distance=8,
        conv_width=3,
    ),
    "deberta-like, own projections": dataclasses.replace(
        SMALL, relative_position="disentangled", relative_buckets=0, relative_max_distance=5, relative_norm=False,
        share_relative_projections=False, disentangled_terms="p2c",
    ),
    "modernbert-like": dataclasses.replace(
        PRE, position="rope", gated=True, use_bias=False, window=2, global_every=2, local_rope_theta=100.0,
        embedding_norm=True, first_attention_norm=False,
    ),
    "rnn": dataclasses.replace(LSTM, layer="rnn", activation="tanh", position="learned"),
    "lstm": dataclasses.replace(LSTM, embedding_dim=13, norm_placement="pre"),
    "gru, one direction": dataclasses.replace(LSTM, layer="gru", bidirectional=False),
    "crammed-like": dataclasses.replace(PRE, position="sinusoidal", position_scale=True, embedding_norm=True),
}  # fmt: skip


def make(config):
    return split_model(lambda: Encoder(config, rngs=nnx.Rngs(0)))


def hidden_and_gradients(graphdef, *arguments):
    """Jitted (params, weights [B, T, D]) -> (hidden, gradients of the weighted sum of hidden)."""

    @jax.jit
    def function(params, weights):
        def loss(params):
            hidden = nnx.merge(graphdef, params)(*arguments)
            return (hidden * weights).sum(), hidden

        gradients, hidden = jax.grad(loss, has_aux=True)(params)
        return hidden, gradients

    return function


DOCUMENTS, LENGTH = 3, 7


@pytest.mark.parametrize(
    ("variant", "dtype"), [*((v, "float32") for v in VARIANTS), ("bert", "bfloat16"), ("modern", "bfloat16")]
)
def test_packed_equals_separate(variant, dtype):
    """Three documents in a row, with padding, give the vectors and the gradients of three rows of one document."""
    graphdef, params = make(dataclasses.replace(VARIANTS[variant], dtype=dtype))
    rows = random_tokens((DOCUMENTS, LENGTH))
    weights = jax.random.normal(jax.random.key(1), (DOCUMENTS, LENGTH, D))
    padding = T - DOCUMENTS * LENGTH
    segments = jnp.array([[1] * LENGTH + [2] * LENGTH + [3] * LENGTH + [0] * padding], jnp.int32)
    positions = jnp.array([[*range(LENGTH)] * DOCUMENTS + [0] * padding], jnp.int32)
    packed = jnp.concatenate([rows.reshape(1, -1), random_tokens((1, padding), seed=2)], axis=1)
    packed_weights = jnp.pad(weights.reshape(1, -1, D), [(0, 0), (0, padding), (0, 0)])

    want, want_gradients = hidden_and_gradients(graphdef, rows)(params, weights)
    got, got_gradients = hidden_and_gradients(graphdef, packed, segments, positions)(params, packed_weights)
    assert got.dtype == jnp.float32
    got = got[:, :-padding].reshape(want.shape)
    if dtype == "float32":
        assert_trees_close(got, want)
        assert_trees_close(got_gradients, want_gradients)
    else:
        # A sum in another order can fall to the other side of a bfloat16 rounding, and does now and then.
        assert float(jnp.sqrt(((got - want) ** 2).mean() / (want**2).mean())) < jnp.finfo(jnp.bfloat16).eps
        for g, w in zip(*map(jax.tree.leaves, (got_gradients, want_gradients)), strict=True):
            assert g.dtype == w.dtype == jnp.float32


@pytest.mark.parametrize("variant", ["bert", "modern", "deberta-like"])
def test_padding_does_not_change_output(variant):
    """Neither how much of it there is nor which tokens and positions it holds."""
    graphdef, params = make(VARIANTS[variant])
    encode = jax.jit(lambda *args: nnx.merge(graphdef, params)(*args))
    tokens, real = random_tokens((B, 11)), jnp.ones((B, 11), jnp.int32)
    positions = jnp.tile(jnp.arange(11, dtype=jnp.int32), (B, 1))
    want = encode(tokens, real, positions)
    for seed in (1, 2):
        garbage = random_tokens((B, T - 11), seed=seed)
        longer = (tokens, garbage), (real, jnp.zeros_like(garbage)), (positions, garbage % 29)
        got = encode(*(jnp.concatenate(pair, axis=1) for pair in longer))
        assert jnp.isfinite(got).all()
        assert_trees_close(got[:, :11], want)


def test_no_segments_is_one_document_counted_from_zero():
    graphdef, params = make(SMALL)
    encode = nnx.merge(graphdef, params)
    tokens = random_tokens((B, T))
    positions = jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1))
    # Both are known as the program is compiled, which may then leave the mask out: that rounds differently.
    whole = jax.jit(lambda tokens: encode(tokens, jnp.ones_like(tokens), positions))
    np.testing.assert_array_equal(jax.jit(encode)(tokens), whole(tokens))


SEGMENTS = jnp.array([[1] * 11 + [2] * 7 + [0] * 5, [1] * 3 + [2] * 20], jnp.int32)
DROPPED = dataclasses.replace(
    SMALL, num_layers=2, dropout_rate=0.2, attention_dropout_rate=0.3, window=3, global_every=2
)


@functools.cache
def reference_run(config):
    graphdef, params = make(config)
    weights = jax.random.normal(jax.random.key(1), (B, T, D))
    return params, weights, _keyed(graphdef)(params, weights)


def _keyed(graphdef):
    @jax.jit
    def function(params, weights):
        def loss(params):
            hidden = nnx.merge(graphdef, params)(random_tokens((B, T)), SEGMENTS, key=jax.random.key(5))
            return (hidden * weights).sum(), hidden

        return jax.grad(loss, has_aux=True)(params)

    return function


@pytest.mark.parametrize(
    ("scan_layers", "remat"),
    [(False, "none"), *((scans, remat) for scans in (True, False) for remat in ("feed_forward", "dots", "full"))],
)
def test_how_layers_run_changes_nothing(scan_layers, remat):
    """Scanned or unrolled, recomputed or kept: one output, one gradient, dropout and windows included."""
    params, weights, want = reference_run(DROPPED)
    other = dataclasses.replace(DROPPED, scan_layers=scan_layers, remat=remat)
    graphdef, own_params = make(other)
    jax.tree.map(np.testing.assert_array_equal, own_params, params)
    assert_trees_close(_keyed(graphdef)(params, weights), want)


@pytest.mark.parametrize("variant", ["albert-like", "deberta-like", "modernbert-like"])
def test_every_layer_is_the_same_scanned_and_unrolled(variant):
    """Shared parameters, a first layer of its own, and rotations that differ between layers."""
    config = VARIANTS[variant]
    graphdef, params = make(config)
    unrolled, _ = make(dataclasses.replace(config, scan_layers=False, remat="full"))
    tokens = random_tokens((B, T))
    both = [jax.jit(lambda p, g=g: nnx.merge(g, p)(tokens, SEGMENTS, every_layer=True)) for g in (graphdef, unrolled)]
    (hidden, states), want = both[0](params), both[1](params)
    assert_trees_close((hidden, states), want)
    assert states.shape == (config.num_layers + 1, B, T, D)
    np.testing.assert_array_equal(states[-1], hidden)
    np.testing.assert_array_equal(jax.jit(lambda p: nnx.merge(graphdef, p)(tokens, SEGMENTS))(params), hidden)
    shallow, _ = make(dataclasses.replace(config, scan_layers=False))
    embed = jax.jit(lambda p: nnx.merge(shallow, p).embedding(tokens, jnp.zeros_like(tokens) + jnp.arange(T)))
    assert_trees_close(states[0], embed(params))


def test_shared_layers_are_one_layer_repeated():
    shared = dataclasses.replace(SMALL, num_layers=4, num_layer_groups=2)
    graphdef, params = make(shared)
    plain, _ = make(dataclasses.replace(shared, num_layer_groups=None))
    repeated = params | {"layers": jax.tree.map(lambda a: jnp.repeat(a, 2, axis=0), params["layers"])}
    tokens = random_tokens((B, T))
    want = jax.jit(lambda p: nnx.merge(plain, p)(tokens))(repeated)
    assert_trees_close(jax.jit(lambda p: nnx.merge(graphdef, p)(tokens))(params), want)


def test_token_types_are_added_and_default_to_the_first():
    graphdef, params = make(dataclasses.replace(SMALL, num_token_types=2))
    encode = jax.jit(lambda *args: nnx.merge(graphdef, params)(*args))
    tokens = random_tokens((B, T))
    zeros = jnp.zeros_like(tokens)
    np.testing.assert_array_equal(encode(tokens, None, None, zeros), encode(tokens))
    assert not np.allclose(encode(tokens, None, None, zeros + 1), encode(tokens), atol=0.1)
    plain, plain_params = make(SMALL)
    with pytest.raises(ValueError, match="this model has 0"):
        nnx.merge(plain, plain_params)(tokens, token_types=zeros)


def test_dropout_is_a_function_of_the_key():
    graphdef, params = make(DROPPED)
    plain, plain_params = make(dataclasses.replace(DROPPED, dropout_rate=0.0, attention_dropout_rate=0.0))
    encode = jax.jit(lambda tokens, key: nnx.merge(graphdef, params)(tokens, key=key))
    tokens = random_tokens((B, T))
    one, other = jax.random.split(jax.random.key(0))
    np.testing.assert_array_equal(encode(tokens, one), encode(tokens, one))
    assert not np.array_equal(encode(tokens, one), encode(tokens, other))
    np.testing.assert_array_equal(encode(tokens, None), encode(tokens, None))
    want = jax.jit(lambda tokens: nnx.merge(plain, plain_params)(tokens))(tokens)
    np.testing.assert_array_equal(encode(tokens, None), want)


@pytest.mark.parametrize(("rate", "attention_rate"), [(0.5, 0.0), (0.0, 0.5)])
def test_each_dropout_rate_is_used(rate, attention_rate):
    graphdef, params = make(
        dataclasses.replace(SMALL, num_layers=1, dropout_rate=rate, attention_dropout_rate=attention_rate)
    )
    encode = jax.jit(lambda key: nnx.merge(graphdef, params)(random_tokens((B, T)), key=key))
    assert not np.allclose(encode(jax.random.key(0)), encode(None), atol=0.1)


@pytest.mark.parametrize(("n", "k"), [(4, 4), (6, 2), (6, 1)])
def test_grouped_heads_equal_plain_heads_with_keys_and_values_repeated(n, k):
    config = dataclasses.replace(SMALL, embed_dim=n * H, num_heads=n, num_kv_heads=k, position="rope", num_layers=2)
    graphdef, params = make(config)
    plain_graphdef, _ = make(dataclasses.replace(config, num_kv_heads=None))
    plain = jax.tree.map(lambda x: x, params)
    for name in ("key", "value"):
        layer = params["layers"]["attention"][name]
        assert layer["kernel"].shape == (2, n * H, k, H)
        plain["layers"]["attention"][name] = {
            "kernel": jnp.repeat(layer["kernel"], n // k, axis=2),
            "bias": jnp.repeat(layer["bias"], n // k, axis=1),
        }
    tokens = random_tokens((B, T))
    got = jax.jit(lambda p: nnx.merge(graphdef, p)(tokens))(params)
    assert_trees_close(got, jax.jit(lambda p: nnx.merge(plain_graphdef, p)(tokens))(plain))


@pytest.mark.parametrize(
    ("window", "global_every", "want"),
    [
        (None, 1, (None,) * 7),
        (5, 1, (None,) * 7),
        (5, 0, (5,) * 7),
        (5, 3, (None, 5, 5, None, 5, 5, None)),
        (0, 2, (None, 0, None, 0, None, 0, None)),
    ],
)
def test_layers_have_the_windows_written_here(window, global_every, want):
    assert dataclasses.replace(SMALL, num_layers=7, window=window, global_every=global_every).windows == want


def test_a_window_limits_how_far_a_token_reaches():
    """After L layers of one token to either side, a change is felt L tokens away and no further."""
    graphdef, params = make(dataclasses.replace(SMALL, window=1, global_every=0))
    encode = jax.jit(lambda tokens: nnx.merge(graphdef, params)(tokens))
    tokens = random_tokens((1, T))
    other = tokens.at[0, 10].set((tokens[0, 10] + 1) % 37)
    changed = np.any(np.asarray(encode(tokens)) != np.asarray(encode(other)), axis=-1)[0]
    np.testing.assert_array_equal(np.flatnonzero(changed), np.arange(10 - L, 10 + L + 1))


def bert_by_hand(params, tokens):
    """One document a row, in float64 (Devlin et al., arXiv 1810.04805; Vaswani et al., arXiv 1706.03762)."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]

    def gelu(x):
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    x = norm(p["embedding"]["token"][tokens] + p["embedding"]["position"][: tokens.shape[1]], p["embedding"]["norm"])
    layer = jax.tree.map(lambda a: a[0], p["layers"])
    q, k, v = (
        np.einsum("btd,dnh->bnth", x, layer["attention"][name]["kernel"]) + layer["attention"][name]["bias"][:, None]
        for name in ("query", "key", "value")
    )
    weights = np.exp(q @ k.swapaxes(2, 3) / math.sqrt(H))
    heads = weights / weights.sum(-1, keepdims=True) @ v
    out = layer["attention"]["out"]
    x = norm(x + np.einsum("bnth,nhd->btd", heads, out["kernel"]) + out["bias"], layer["attention_norm"])
    up, down = layer["feed_forward"]["up"], layer["feed_forward"]["down"]
    block = gelu(x @ up["kernel"] + up["bias"]) @ down["kernel"] + down["bias"]
    return norm(x + block, layer["feed_forward_norm"])


def test_one_layer_is_bert_by_hand():
    graphdef, params = make(dataclasses.replace(SMALL, num_layers=1))
    tokens = random_tokens((B, T))
    assert_trees_close(jax.jit(lambda p: nnx.merge(graphdef, p)(tokens))(params), bert_by_hand(params, tokens))


def test_sizes_are_those_of_the_config():
    _, params = make(dataclasses.replace(SMALL, gated=True))
    layers = params["layers"]
    assert layers["attention"]["query"]["kernel"].shape == (L, D, N, H)
    assert layers["attention"]["out"]["kernel"].shape == (L, N, H, D)
    assert layers["feed_forward"]["gate"]["kernel"].shape == layers["feed_forward"]["up"]["kernel"].shape == (L, D, F)
    assert layers["feed_forward"]["down"]["kernel"].shape == (L, F, D)


def test_rows_that_learned_positions_do_not_reach_are_refused():
    encoder = Encoder(dataclasses.replace(SMALL, max_length=8), rngs=nnx.Rngs(0))
    tokens = random_tokens((1, 9))
    with pytest.raises(ValueError, match="learned positions reach max_length: got rows of 9 tokens for 8"):
        encoder(tokens)
    positions = jnp.array([[*range(5), *range(4)]])
    segments = jnp.array([[1] * 5 + [2] * 4])
    assert np.isfinite(encoder(tokens, segments, positions)).all()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0)])
def test_no_rows_and_no_tokens_are_no_vectors(shape):
    assert Encoder(SMALL, rngs=nnx.Rngs(0))(jnp.zeros(shape, jnp.int32)).shape == (*shape, SMALL.embed_dim)


def test_an_encoder_without_a_vocabulary_says_so():
    with pytest.raises(ValueError, match="vocab_size"):
        Encoder(dataclasses.replace(SMALL, vocab_size=0), rngs=nnx.Rngs(0))
