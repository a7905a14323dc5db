"""Tiny folders of every family, made once with torch (tests/golden/make.py): the same numbers, here and packed."""

import dataclasses
import functools
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, differences, run_ours
from safetensors.numpy import load_file
from toy import assert_trees_close

from flax_encoder.nn.encoder import Encoder
from flax_encoder.nn.partition import abstract_model
from flax_encoder.published.load import load_pretrained
from flax_encoder.published.weights import read_weights
from flax_encoder.published.write import write_pretrained

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FOLDERS = sorted(p.name for p in GOLDEN.iterdir() if (p / "config.json").exists())
ONE_A_FAMILY = [next(f for f in FOLDERS if f.rsplit("-", 1)[0] == family) for family in
                sorted({f.rsplit("-", 1)[0] for f in FOLDERS})]  # fmt: skip


@functools.cache
def load(name):
    return load_pretrained(GOLDEN / name)


def reference(name):
    parts = {"input": {}, "label": {}, "output": {}, "gradient": {}}
    flat = load_file(GOLDEN / name / "reference.safetensors")
    loss = flat.pop("loss").item()
    for key, value in flat.items():
        part, _, inner = key.partition("/")
        parts[part][inner] = value
    return parts["input"], parts["label"], parts["output"], loss, parts["gradient"]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_published_folder_gives_torchs_numbers(name):
    """Every hidden state, what the head gives, the loss, and the gradient of every parameter."""
    loaded = load(name)
    assert loaded.fresh == ()
    worst = differences(loaded, *reference(name))
    assert worst["output"] <= OUTPUT_TOLERANCE and worst["gradient"] <= GRADIENT_TOLERANCE, worst


@pytest.mark.parametrize("name", FOLDERS)
def test_what_was_read_is_written_as_it_was(name, tmp_path):
    write_pretrained(load(name), tmp_path / "again")
    got, want = read_weights(tmp_path / "again"), read_weights(GOLDEN / name)
    assert set(want) <= set(got)  # copies of tied biases may come on top
    for key, value in want.items():
        np.testing.assert_array_equal(got[key], value, err_msg=key)
    again = load_pretrained(tmp_path / "again")
    for part in ("config", "head", "pooling", "task"):
        assert getattr(again, part) == getattr(load(name), part)


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_packed_rows_are_the_documents_one_by_one(name):
    """Forward, and the gradient of every parameter."""
    graphdef, params = nnx.split(load(name).model.encoder)
    ids = jnp.asarray(reference(name)[0]["input_ids"], jnp.int32)[:, :7]
    B, T = ids.shape
    segments = jnp.repeat(jnp.arange(B, dtype=jnp.int32) + 1, T)[None]
    positions = jnp.tile(jnp.arange(T, dtype=jnp.int32), B)[None]
    weights = jax.random.normal(jax.random.key(0), (B, T, load(name).config.embed_dim))

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradients(params, *rows):
        out = nnx.merge(graphdef, params)(*rows).reshape(weights.shape)
        return (out * weights).sum(), out

    (want_gradients, want), (got_gradients, got) = (
        gradients(params, ids), gradients(params, ids.reshape(1, -1), segments, positions)
    )  # fmt: skip
    assert_trees_close(got, want, scale_eps=300)
    assert_trees_close(got_gradients, want_gradients, scale_eps=300)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "deberta-v2", "eurobert"])
def test_bfloat16_stays_within_its_rounding(family):
    name = f"{family}-masked_lm"
    config = load(name).config
    _, params = nnx.split(load(name).model.encoder)
    low = dataclasses.replace(config, dtype="bfloat16")
    graphdef, _ = abstract_model(lambda: Encoder(low, rngs=nnx.Rngs(0)))
    ids = reference(name)[0]["input_ids"]
    rows = load(name).rows(ids)
    got = jax.jit(lambda p: nnx.merge(graphdef, p)(*rows))(params)
    want = load(name)(ids).last_hidden_state
    # Each of a layer's half-dozen products rounds its operands; errors of independent roundings add in squares.
    rounds = 8 * config.num_layers
    error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert np.median(error) < float(jnp.finfo(jnp.bfloat16).eps) * rounds**0.5, error


@pytest.mark.parametrize("name", ["bert-masked_lm", "roberta-masked_lm", "t5-encoder", "deberta-v2-masked_lm"])
def test_padding_on_either_side_gives_the_unpadded_vectors(name):
    """Where positions are relative or count real tokens; BERT's are columns, so only padding on the right."""
    loaded = load(name)
    ids = np.where(reference(name)[0]["input_ids"] == loaded.pad_id, 5, reference(name)[0]["input_ids"])[:, :6]
    want = loaded(ids).last_hidden_state
    right = np.pad(ids, [(0, 0), (0, 4)], constant_values=loaded.pad_id)
    mask = np.pad(np.ones_like(ids), [(0, 0), (0, 4)])
    atol = 1e-5 * np.abs(want).max()
    np.testing.assert_allclose(loaded(right, mask).last_hidden_state[:, :6], want, rtol=0, atol=atol)
    left, left_mask = np.roll(right, 4, axis=1), np.roll(mask, 4, axis=1)
    got = loaded(left, left_mask).last_hidden_state[:, 4:]
    if loaded.config.position == "learned" and not loaded.family.counts_real_tokens:
        assert np.abs(got - want).max() > 1e-2  # as torch's
    else:
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def test_old_names_prefixes_and_copies_are_understood(tmp_path):
    """gamma and beta, no `bert.`, a tied decoder that is there, buffers."""
    from safetensors.numpy import save_file

    tensors = read_weights(GOLDEN / "bert-masked_lm")
    old = {}
    for name, value in tensors.items():
        if "LayerNorm" in name:
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        old[name.removeprefix("bert.")] = value
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    old["embeddings.position_ids"] = np.arange(5)[None]
    shutil.copy(GOLDEN / "bert-masked_lm" / "config.json", tmp_path)
    save_file(old, tmp_path / "model.safetensors")
    loaded = load_pretrained(tmp_path)
    inputs, labels, *_ = reference("bert-masked_lm")
    got, want = run_ours(loaded, inputs, labels)[0], run_ours(load("bert-masked_lm"), inputs, labels)[0]
    for key, value in want.items():
        np.testing.assert_array_equal(got[key], value, err_msg=key)
