"""Published encoder-decoders: transformers' states, logits, gradients and texts, from its own folders."""

import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from flax_encoder.config import ConfigError
from flax_encoder.data.sources.records import DataError
from flax_encoder.families.tensors import export_tensors
from flax_encoder.nn.partition import flatten
from flax_encoder.published.load import load_pretrained
from flax_encoder.published.weights import read_weights

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/text_to_text"
BEAMS = ({}, {"num_beams": 3}, {"num_beams": 2, "length_penalty": 0.5, "early_stopping": True},
         {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"})  # fmt: skip


def assert_near(got, want, tolerance, what):
    assert np.shape(got) == np.shape(want), what
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max(), what


def padded_after_the_end(text):
    """transformers fills the rest of a beam's text with the end's id where the padding's is 0."""
    over = np.cumsum(text[:, 1:] == 1, axis=1) - (text[:, 1:] == 1) > 0
    return np.concatenate([text[:, :1], np.where(over, 0, text[:, 1:])], axis=1)


def compare(folder):
    """States and logits within 2e-5 and gradients within 1e-4 of the largest number; texts the same."""
    expected = np.load(folder / "expected.npz")
    ids, mask, target = (expected[name] for name in ("ids", "mask", "target"))
    loaded = load_pretrained(folder)
    assert loaded.task == "text_to_text" and not loaded.fresh
    with jax.default_matmul_precision("highest"):
        out = loaded(ids, mask, decoder_input_ids=target)
        assert_near(out.logits, expected["logits"], 2e-5, "logits")
        assert_near(np.stack(out.decoder_hidden_states), expected["decoder_hidden"], 2e-5, "decoder_hidden_states")
        real = mask[..., None] > 0
        assert_near(np.stack(out.hidden_states) * real, expected["hidden"] * real, 2e-5, "hidden_states")

        graphdef, params = nnx.split(loaded.model)
        rows = [jnp.asarray(a, jnp.int32) for a in (ids, target, mask)]
        loss = lambda params: (nnx.merge(graphdef, params)(*rows) * expected["weights"]).sum()  # noqa: E731
        gradients = jax.tree.map(np.asarray, flatten(nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))))
    tensors = export_tensors(loaded.family, "text_to_text", gradients, loaded.config.num_heads)
    wanted = {name.removeprefix("grad "): expected[name] for name in expected.files if name.startswith("grad ")}
    assert tensors.keys() == wanted.keys()
    largest = max(np.abs(w).max() for w in wanted.values())
    for name, want in wanted.items():
        # Some gradients are zero but for rounding, such as that of a table whose rows all serve every pair.
        assert np.abs(tensors[name] - want).max() <= 1e-4 * max(np.abs(want).max(), largest / 100), name
    for i, settings in enumerate(BEAMS):
        text = loaded.generate(ids, mask, max_new_tokens=8, **settings)
        want = padded_after_the_end(expected[f"text {i}"])
        np.testing.assert_array_equal(text, want[:, : text.shape[1]], err_msg=str(settings))
        assert not want[:, text.shape[1] :].any()


@pytest.mark.parametrize("name", ["t5", "t5_v1_1"])
def test_a_published_encoder_decoder_computes_and_writes_what_transformers_does(name):
    compare(GOLDEN / name)


def test_all_tensors_go_out_as_they_came():
    loaded = load_pretrained(GOLDEN / "t5_v1_1")
    params = jax.tree.map(np.asarray, flatten(nnx.to_pure_dict(nnx.split(loaded.model)[1])))
    out = export_tensors(loaded.family, "text_to_text", params, loaded.config.num_heads)
    tensors = read_weights(GOLDEN / "t5_v1_1")
    assert out.keys() == tensors.keys()
    for name in tensors:
        np.testing.assert_array_equal(out[name], tensors[name])


def test_without_a_target_it_encodes():
    loaded = load_pretrained(GOLDEN / "t5")
    out = loaded(np.array([[3, 4, 5]]))
    assert out.logits is None and out.decoder_hidden_states is None
    assert out.last_hidden_state.shape == (1, 3, loaded.config.embed_dim)


def test_text_is_drawn_by_a_seed():
    loaded = load_pretrained(GOLDEN / "t5")
    draw = lambda seed: loaded.generate(np.array([[3, 4, 5]]), do_sample=True, seed=seed, max_new_tokens=20)  # noqa: E731
    np.testing.assert_array_equal(draw(0), draw(0))
    assert draw(0).tolist() != draw(1).tolist()


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "t5" / name, tmp_path)
    return tmp_path


def test_the_encoder_alone_can_be_loaded(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["T5EncoderModel"]}))
    loaded = load_pretrained(folder)
    ids = np.array([[3, 4, 5]])
    np.testing.assert_allclose(
        loaded(ids).last_hidden_state, load_pretrained(GOLDEN / "t5")(ids).last_hidden_state, atol=1e-5
    )
    with pytest.raises(DataError, match="only encoder-decoders generate: this model is a bare encoder"):
        loaded.generate(ids)
    with pytest.raises(DataError, match="decoder_input_ids are for encoder-decoders: this is a bare encoder"):
        loaded(ids, decoder_input_ids=ids)


def test_a_table_of_logits_that_is_not_there_is_made_anew(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tensors = read_weights(folder)
    tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors")
    loaded = load_pretrained(folder)
    assert (loaded.decoder.tied, loaded.fresh) == (False, ("head.token",))
    (folder / "config.json").write_text(
        json.dumps(config | {"tie_word_embeddings": False, "architectures": ["T5Model"]})
    )
    assert load_pretrained(folder).fresh == ()


def test_what_cannot_be_served_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": ["1"]}))
    with pytest.raises(ConfigError, match=r"eos_token_id must be a list of token ids: got \['1'\]"):
        load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_decoder_layers": "2"}))
    with pytest.raises(ConfigError, match=r"num_layers must be .*: got '2'"):
        load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_decoder_layers": 7}))
    with pytest.raises(ConfigError, match=r"needs tensors that are missing: decoder\.block\.\d\."):
        load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"token ids must lie in 0 \.\. \d+: got 3 \.\. 999"):
        load_pretrained(folder)(np.array([[3]]), decoder_input_ids=np.array([[3, 999]]))


@pytest.mark.parametrize("seed", range(2, 2 + int(os.environ.get("PARITY_CASES", "2"))))
def test_random_models_compute_and_write_what_transformers_does(tmp_path, seed):
    pytest.importorskip("transformers", reason="the reference")
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_t5", GOLDEN.parent / "make_text_to_text.py")
    make_t5 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_t5)
    make_t5.make(make_t5.draw_config(np.random.default_rng(seed)), seed, tmp_path)
    compare(tmp_path)
