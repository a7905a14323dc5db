"""What all modules share: parameters only, every axis named; and the linear layer's packing."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from optax import sgd
from toy import SMALL, B, D, T, assert_trees_close, random_tokens, split_model

from flax_encoder.config import Activation, EncoderConfig
from flax_encoder.nn.encoder import Encoder
from flax_encoder.nn.feed_forward import ACTIVATIONS
from flax_encoder.nn.heads import gather_rows
from flax_encoder.nn.linear import Linear, packed
from flax_encoder.nn.partition import MESH_AXES, abstract_model, partition_spec, round_up_vocab
from flax_encoder.tasks import Classifier, MaskedLM
from flax_encoder.training.step import init_train_state

CONFIGS = {
    "bert": SMALL,
    "modern": dataclasses.replace(
        SMALL, norm_placement="pre", norm="rms_norm", position="rope", gated=True, use_bias=False, num_kv_heads=1
    ),
    "deberta": dataclasses.replace(
        SMALL, relative_position="disentangled", conv_width=3, share_relative_projections=False, num_token_types=2
    ),
    "gru": EncoderConfig(vocab_size=37, layer="gru", num_layers=2, embed_dim=30, max_length=29),
    "crammed": dataclasses.replace(SMALL, position="sinusoidal", position_scale=True, embedding_dim=12),
}
MODELS = {
    "encoder": Encoder,
    "masked_lm": MaskedLM,
    "classifier": lambda config, rngs: Classifier(config, 7, rngs=rngs),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("model", MODELS)
def test_modules_hold_named_float32_parameters_and_nothing_else(model, config):
    abstract = nnx.eval_shape(lambda: MODELS[model](CONFIGS[config], rngs=nnx.Rngs(0)))
    _, params, rest = nnx.split(abstract, nnx.Param, ...)
    assert not nnx.to_flat_state(rest)
    for path, leaf in nnx.to_flat_state(params):
        names = leaf.get_metadata()["out_sharding"]
        assert len(names) == leaf.ndim, path
        assert set(names) <= set(MESH_AXES), path
        assert leaf.dtype == jnp.float32, path
        assert (names[0] == "layers") == bool({"layers", "first"} & set(path)), path


def test_every_activation_that_a_config_can_name_is_there():
    assert list(ACTIVATIONS) == list(typing.get_args(Activation))


def test_use_bias_false_leaves_no_bias_in_layers_or_norms():
    config = dataclasses.replace(SMALL, use_bias=False, norm_placement="pre")
    paths = [path for path, _ in nnx.to_flat_state(abstract_model(lambda: Encoder(config, rngs=nnx.Rngs(0)))[1])]
    assert paths and not [path for path in paths if "bias" in path]


@pytest.fixture(scope="module")
def fresh():
    """seed -> parameters as the model makes them."""
    config = dataclasses.replace(SMALL, init_std=0.02)

    @functools.cache
    def make(seed):
        return init_train_state(lambda: MaskedLM(config, rngs=nnx.Rngs(seed)), sgd(0.1))[1].params

    return make


def test_parameters_start_as_the_config_says(fresh):
    """Kernels and embeddings are cut normals of init_std, biases zeros, scales ones."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(fresh(0)):
        name, values = path[-1].key, np.asarray(leaf)
        if name in ("bias", "scale"):
            assert (values == (name == "scale")).all(), path
        else:
            cut_std = 0.02 * 0.8796  # of a normal cut at two standard deviations
            assert np.abs(values).max() <= 0.04 * (1 + 1e-6), path
            assert abs(values.std() / cut_std - 1) < 5 / values.size**0.5, path


def test_layers_do_not_start_alike(fresh):
    kernel = fresh(0)["encoder"]["layers"]["attention"]["query"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])


def test_the_seed_makes_the_parameters(fresh):
    one, other = (fresh(seed)["encoder"]["embedding"]["token"] for seed in (0, 1))
    assert not np.array_equal(one, other)
    jax.tree.map(np.testing.assert_array_equal, fresh(0), fresh.__wrapped__(0))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_layers_equal_separate_layers(use_bias, dtype):
    outputs = {"heads": 5, "head_dim": 2}, {"kv_heads": 3, "head_dim": 2}, {"mlp": 7}
    options = {"std": 1.0, "use_bias": use_bias, "dtype": dtype, "rngs": nnx.Rngs(0)}
    layers = [Linear({"embed": D}, out, **options) for out in outputs]
    for i, layer in enumerate(layers):
        if use_bias:
            layer.bias[...] = i + jnp.arange(layer.bias.size, dtype=jnp.float32).reshape(layer.bias.shape)
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    got, want = packed(x, *layers), [layer(x) for layer in layers]
    assert [y.shape for y in got] == [(B, T, 5, 2), (B, T, 3, 2), (B, T, 7)]
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5)


def test_linear_contracts_several_axes():
    layer = Linear({"heads": 5, "head_dim": 3}, {"embed": 7}, std=1.0, use_bias=True, dtype="float32", rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(7.0)
    x = np.random.default_rng(0).standard_normal((2, 11, 5, 3)).astype(np.float32)
    want = np.einsum("btnh,nhd->btd", x, np.asarray(layer.kernel[...])) + np.arange(7.0)
    np.testing.assert_allclose(layer(jnp.asarray(x)), want, rtol=0, atol=1e-5)


def test_gather_rows_takes_the_rows_at_the_positions():
    hidden = jnp.arange(2 * 5 * 3.0).reshape(2, 5, 3)
    got = gather_rows(hidden, jnp.array([[4, 0, 4, 1], [2, 2, 3, 0]], jnp.int32))
    want = [[hidden[0, 4], hidden[0, 0], hidden[0, 4], hidden[0, 1]], [hidden[1, i] for i in (2, 2, 3, 0)]]
    np.testing.assert_array_equal(got, want)


def test_masked_lm_reads_only_target_positions():
    graphdef, params = split_model(lambda: MaskedLM(SMALL, rngs=nnx.Rngs(0)))
    tokens = random_tokens((B, T))
    positions = jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1))
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": positions}
    logits = jax.jit(lambda batch: nnx.merge(graphdef, params)(batch))
    every = logits(batch | {"target_positions": positions})
    some = logits(batch | {"target_positions": jnp.array([[3, 1, 22], [0, 0, 7]], jnp.int32)})
    assert_trees_close(some, np.stack([every[0][jnp.array([3, 1, 22])], every[1][jnp.array([0, 0, 7])]]))


def test_unknown_axes_are_refused_with_the_known():
    known = "unknown logical axis 'depth'; known are batch, length, tokens, places, layers"
    with pytest.raises(ValueError, match=known):
        partition_spec("layers", "depth")


@pytest.mark.parametrize(("size", "want"), [(1, 128), (128, 128), (129, 256), (30_522, 30_592)])
def test_vocabularies_are_rounded_up_to_128(size, want):
    assert round_up_vocab(size) == want
