"""sentence-transformers' folders: what each version says, and that it comes back out."""

import dataclasses
import json
import pathlib
import shutil
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_encoder.commands import main
from flax_encoder.config import ConfigError
from flax_encoder.config.model import PoolingMode
from flax_encoder.data.tokens.tokenizer_files import read_tokenizer
from flax_encoder.published.load import load_pretrained
from flax_encoder.published.sentence_transformers import (
    NORMALIZE,
    TEXT_FILES,
    Layer,
    SentenceSettings,
    read_sentence_settings,
    write_sentence_settings,
)
from flax_encoder.published.weights import read_weights, write_weights
from flax_encoder.runs.embed import apply_layer, load_embedder
from flax_encoder.runs.vector_settings import write_sentence_files

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/bert-masked_lm"
TEXTS = ["a b c", "", "d", "a a a a a a a a a a a a", "b", "e f g h"]
MODES = get_args(PoolingMode)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A published BERT with a vocabulary of letters."""
    folder = tmp_path_factory.mktemp("bert")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, folder)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    letters = [chr(ord("a") + i) if i < 26 else f"w{i}" for i in range(size - 5)]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    return folder


@pytest.fixture
def folder(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "sentence")
    write_sentence_files(bert, tmp_path / "sentence", pooling="cls", normalize=True, max_tokens=6)
    return tmp_path / "sentence"


def dump(folder, name, content):
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def dense(rng, size, out_size, activation, has_bias, adds_input):
    arrays = {"kernel": rng.normal(size=(size, out_size)).astype(np.float32)}
    arrays |= {"bias": rng.normal(size=out_size).astype(np.float32)} if has_bias else {}
    if adds_input and size != out_size:
        arrays["residual"] = rng.normal(size=(size, out_size)).astype(np.float32)
    return Layer("Dense", activation, arrays, adds_input)


LAYERS = st.tuples(st.sampled_from([5, None]), st.sampled_from(["tanh", "identity", "gelu", "relu", "silu"]),
                   st.booleans(), st.booleans())  # fmt: skip


def settings_of(pooling, dense_layers, has_norm, is_unit, **others):
    """Layers that fit each other, of an encoder of 6 features."""
    rng, size, layers = np.random.default_rng(0), 6 * len(pooling), []
    for out_size, activation, has_bias, adds_input in dense_layers:
        layers.append(dense(rng, size, out_size or size, activation, has_bias, adds_input))
        size = out_size or size
    norm = {name: rng.normal(size=size).astype(np.float32) for name in ("scale", "bias")}
    layers += [Layer("LayerNorm", arrays=norm)] * has_norm + [NORMALIZE] * is_unit
    return SentenceSettings(tuple(pooling), layers=tuple(layers), **others)


def comparable(value):
    """Arrays as lists, since those compare."""
    return json.dumps(dataclasses.asdict(value), default=lambda x: x.tolist(), sort_keys=True)


PROMPTS = st.dictionaries(st.sampled_from(["query", "document", "é"]), st.text(max_size=9), max_size=3)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(MODES), min_size=1, max_size=3, unique=True), st.lists(LAYERS, max_size=2),
       st.booleans(), st.booleans(), st.booleans(), st.sampled_from([None, 3, 512]),
       st.sampled_from([None, "left", "right"]), st.booleans(), PROMPTS, st.sampled_from([None, 4]))  # fmt: skip
def test_settings_that_are_written_are_read(
    tmp_path_factory, pooling, layers, has_norm, is_unit, include_prompt, max_tokens, side, is_lower, prompts, dim
):
    folder = tmp_path_factory.mktemp("sentence")
    value = settings_of(
        pooling, layers, has_norm, is_unit, include_prompt=include_prompt, max_tokens=max_tokens, truncation_side=side,
        do_lower_case=is_lower, prompts=prompts, default_prompt_name=next(iter(prompts), None), truncate_dim=dim,
    )  # fmt: skip
    write_sentence_settings(folder, value, 6)
    assert comparable(read_sentence_settings(folder)) == comparable(value)


@pytest.mark.parametrize("name", TEXT_FILES)
@pytest.mark.parametrize("module", ["sentence_transformers.models", "sentence_transformers.base.modules.transformer"])
def test_every_versions_names_are_read_alike(folder, name, module):
    text = json.loads((folder / TEXT_FILES[0]).read_text())
    (folder / TEXT_FILES[0]).unlink()
    dump(folder, name, text)
    modules = json.loads((folder / "modules.json").read_text())
    kinds = ["Transformer", "Pooling", "Normalize"]
    dump(folder, "modules.json", [m | {"type": f"{module}.{k}"} for m, k in zip(modules, kinds, strict=True)])
    dump(folder, "1_Pooling/config.json", {"embedding_dimension": 6, "pooling_mode": "cls"})
    assert read_sentence_settings(folder) == SentenceSettings(("cls",), True, (NORMALIZE,), 6)


def test_an_encoder_in_a_folder_of_its_own_is_the_same(folder, bert, tmp_path):
    want, _ = load_embedder(folder).embed(TEXTS)
    inner = folder / "0_Transformer"
    inner.mkdir()
    for name in ("config.json", "model.safetensors", "vocab.txt", TEXT_FILES[0]):
        (folder / name).rename(inner / name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0] |= {"path": "0_Transformer", "type": "sentence_transformers.models.BERT"}
    dump(folder, "modules.json", modules)
    np.testing.assert_array_equal(load_embedder(folder).embed(TEXTS)[0], want)
    main(["import", str(folder), str(tmp_path / "run")])
    main(["export", str(folder), str(tmp_path / "out")])
    for path in ("run", "out"):
        np.testing.assert_array_equal(load_embedder(tmp_path / path).embed(TEXTS)[0], want)


@pytest.mark.parametrize(("pooling", "want"), [
    ({}, ("mean",)),
    ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}, ("mean",)),
    ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
    ({"pooling_mode": ["mean", "cls"], "pooling_mode_max_tokens": True}, ("mean", "cls")),
    ({"pooling_mode_lasttoken": True}, ("lasttoken",)),
])  # fmt: skip
def test_pooling_is_what_the_file_says_or_the_mean(folder, pooling, want):
    dump(folder, "1_Pooling/config.json", {"word_embedding_dimension": 6} | pooling)
    assert read_sentence_settings(folder).pooling == want


@pytest.mark.parametrize(("files", "want"), [
    ({TEXT_FILES[0]: {"max_seq_length": 9}, "tokenizer_config.json": {"model_max_length": 5}}, 9),
    ({TEXT_FILES[0]: {}, "tokenizer_config.json": {"model_max_length": 5}}, 5),
    ({TEXT_FILES[0]: {"max_seq_length": None}, "tokenizer_config.json": {"model_max_length": 1e30}}, None),
    ({TEXT_FILES[0]: {"max_seq_length": 9, "tokenizer_args": {"model_max_length": 4}}}, 4),
    ({TEXT_FILES[0]: {"max_seq_length": 9, "processing_kwargs": {"text": {"max_length": 4}}}}, 4),
    ({TEXT_FILES[0]: {"max_seq_length": 10_000}}, None),
])  # fmt: skip
def test_a_text_is_as_long_as_the_folder_says_and_no_longer_than_positions_reach(folder, files, want):
    for name, content in files.items():
        dump(folder, name, content)
    embedder = load_embedder(folder)
    assert embedder.max_tokens == (want or embedder.config.max_length)
    _, num_cut = embedder.embed([" ".join("a" * n) for n in (embedder.max_tokens - 2, embedder.max_tokens - 1)])
    assert num_cut == 1


def test_a_long_text_is_cut_on_the_side_that_the_folder_says(folder):
    dump(folder, TEXT_FILES[0], {"max_seq_length": 4, "tokenizer_args": {"truncation_side": "left"}})
    vectors, num_cut = load_embedder(folder).embed(["a b c d", "c d", "a b"])
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert num_cut == 1 and np.abs(vectors[0] - vectors[2]).max() > 1e-3


def test_prompts_are_put_before_texts_by_name(folder):
    prompts = {"query": "A b ", "none": ""}
    dump(folder, "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": "query"})
    dump(folder, TEXT_FILES[0], {})
    embedder = load_embedder(folder)
    assert embedder.prompts == prompts and embedder.prompt == "A b "
    want, _ = embedder.embed(["a b c", "a b d"], prompt_name="none")
    for name in (None, "query"):
        np.testing.assert_array_equal(embedder.embed(["c", "d"], prompt_name=name)[0], want)


@pytest.mark.parametrize("text", ["c d", ""])
def test_a_prompt_that_is_not_pooled_is_read_all_the_same(folder, bert, text):
    dump(folder, "1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "include_prompt": False})
    dump(folder, "config_sentence_transformers.json", {"prompts": {"query": "a b "}})
    dump(folder, TEXT_FILES[0], {})
    embedder = load_embedder(folder, normalize=False)
    ids = [2, *(ord(c) - ord("a") + 5 for c in "a b " + text if c != " "), 3]
    want = load_pretrained(bert)(np.array([ids])).last_hidden_state[0, 3:].mean(0)
    np.testing.assert_allclose(embedder.embed([text], prompt_name="query")[0][0], want, rtol=0, atol=2e-5)


def test_lower_casing_leaves_special_tokens(folder):
    dump(folder, TEXT_FILES[0], {"do_lower_case": True})
    embedder = load_embedder(folder)
    vectors, _ = embedder.embed(["A [MASK] B", "a [MASK] b", "a [mask] b"])
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert np.abs(vectors[1] - vectors[2]).max() > 1e-3


@pytest.mark.parametrize("arguments", [
    {"tokenizer_args": {"do_lower_case": False}}, {"processor_kwargs": {"do_lower_case": False, "revision": "main"}},
])  # fmt: skip
def test_what_a_folder_hands_to_its_tokenizer_wins_wherever_it_is_opened(folder, tmp_path, arguments):
    dump(folder, "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    (text,) = read_tokenizer(folder).encode_batch(["A b"])
    dump(folder, "sentence_bert_config.json", {"config_args": {"output_attentions": False}} | arguments)
    (cased,) = read_tokenizer(folder).encode_batch(["A b"])
    assert cased.tolist() == [1, text[1]] and text[0] != 1
    embedder = load_embedder(folder)
    want = embedder.embed(["A b"])[0]
    main(["import", str(folder), str(tmp_path / "run")])
    main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    main(["export", str(folder), str(tmp_path / "again")])
    for path in (tmp_path / "run", tmp_path / "out", tmp_path / "again"):
        assert np.abs(load_embedder(path).embed(["A b"])[0] - want).max() < 1e-5
        assert load_embedder(path).tokenizer.encode_batch(["A b"])[0].tolist() == cased.tolist()


@pytest.mark.parametrize(("name", "of_two", "of_minus_two"), [
    ("ELU", 2, np.exp(-2) - 1), ("CELU", 2, np.exp(-2) - 1), ("Softplus", np.log1p(np.exp(2)), np.log1p(np.exp(-2))),
    ("SELU", 2 * 1.0507009873554805, 1.0507009873554805 * 1.6732632423543772 * (np.exp(-2) - 1)),
    ("Softsign", 2 / 3, -2 / 3), ("LogSigmoid", -np.log1p(np.exp(-2)), -np.log1p(np.exp(2))), ("Hardtanh", 1, -1),
    ("Hardsigmoid", 5 / 6, 1 / 6), ("Hardswish", 5 / 3, -1 / 3), ("Tanhshrink", 2 - np.tanh(2), np.tanh(2) - 2),
])  # fmt: skip
def test_a_dense_modules_activation_is_that_of_torch(tmp_path, name, of_two, of_minus_two):
    dump(tmp_path, "modules.json", [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for path, kind in (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"))
    ])  # fmt: skip
    dump(tmp_path, "2_Dense/config.json", {"bias": False, "activation_function": f"torch.nn.modules.activation.{name}"})
    write_weights(tmp_path / "2_Dense", {"linear.weight": np.eye(2, dtype=np.float32)})
    (layer,) = read_sentence_settings(tmp_path).layers
    got = apply_layer(layer, jnp.asarray([[2.0, -2.0]]))
    np.testing.assert_allclose(got, [[of_two, of_minus_two]], rtol=1e-5)


def test_what_follows_pooling_is_done_in_turn(folder, tmp_path):
    rng = np.random.default_rng(0)
    plain = load_embedder(folder, pooling=["cls", "mean"], normalize=False)
    pooled, _ = plain.embed(TEXTS)
    first = dense(rng, pooled.shape[1], 7, "tanh", True, False)
    second = dense(rng, 7, 5, "identity", False, True)
    value = dataclasses.replace(plain.settings, layers=(first, second, NORMALIZE), truncate_dim=3)
    write_sentence_settings(folder, value, plain.config.embed_dim)
    x = np.tanh(pooled @ first.arrays["kernel"] + first.arrays["bias"])
    x = x @ second.arrays["kernel"] + x @ second.arrays["residual"]
    want = (x / np.linalg.norm(x, axis=1, keepdims=True))[:, :3]
    embedder = load_embedder(folder)
    assert embedder.embed_dim == 3 and not embedder.normalize
    np.testing.assert_allclose(embedder.embed(TEXTS)[0], want, rtol=0, atol=1e-5)
    unit, _ = load_embedder(folder, normalize=True).embed(TEXTS)
    np.testing.assert_allclose(unit, want / np.linalg.norm(want, axis=1, keepdims=True), rtol=0, atol=1e-5)
    main(["import", str(folder), str(tmp_path / "run")])
    main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    for path in ("run", "out"):
        np.testing.assert_allclose(load_embedder(tmp_path / path).embed(TEXTS)[0], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("file", "content", "message"), [
    ("modules.json", [{"path": "", "type": "sentence_transformers.models.Transformer"},
                      {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
                      {"path": "2", "type": "sentence_transformers.models.CNN"}], "must list .*: got .*models.CNN"),
    ("modules.json", [{"path": "", "type": "their_code.Transformer"}], "must list .*: got their_code.Transformer"),
    ("modules.json", [{"path": "../up", "type": "sentence_transformers.models.Transformer"},
                      {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}], "must lie in the folder"),
    ("modules.json", {"0": "Transformer"}, "must hold a JSON list: got dict"),
    ("modules.json", [5], "must be a list of modules, each with a type and a path"),
    ("modules.json", "[", "modules.json is no JSON"),
    ("sentence_bert_config.json", [], "must hold a JSON dict: got list"),
    ("sentence_bert_config.json", {"max_seq_length": "12"}, "must be a number of at least 3 tokens: got '12'"),
    ("sentence_bert_config.json", {"model_args": {"hidden_act": "relu"}}, "not understood: model.hidden_act"),
    ("sentence_bert_config.json", {"tokenizer_args": {"sp_model_kwargs": {}}}, "not understood: tokenizer.sp_mod"),
    ("sentence_bert_config.json", {"new_setting": 1}, "not understood: new_setting"),
    ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "not understood: transformer_task"),
    ("config_sentence_transformers.json", {"default_prompt_name": "q"}, r"must be one of prompts: got 'q' of \[\]"),
    ("config_sentence_transformers.json", {"prompts": {"q": 5}}, "prompts must be texts by name"),
    ("1_Pooling/config.json", {"pooling_mode_median_tokens": True}, "must be of cls, .*: got .*median"),
    ("1_Pooling/config.json", {"pooling_mode": ["cls", "median"]}, "must be of cls, .*: got .*median"),
    ("2_Normalize/config.json", {"module_input_name": "token_embeddings"}, "Normalize must be of the pooled vectors"),
])  # fmt: skip
def test_what_is_not_understood_is_named(folder, file, content, message):
    dump(folder, file, content)
    with pytest.raises(ConfigError, match=message):
        load_embedder(folder)


@pytest.mark.parametrize(("config", "tensors", "message"), [
    ({"activation_function": "their.Swish"}, {"linear.weight": (5, 6)}, "must be one of torch.nn's .*'their.Swish'"),
    ({"bias": True}, {"linear.weight": (5, 6)}, "must have the tensors linear.weight, linear.bias"),
    ({}, {"linear.weight": (5, 7)}, r"Dense must take vectors of \d+, which come before it"),
])  # fmt: skip
def test_a_dense_module_that_does_not_fit_is_named(folder, config, tensors, message):
    modules = json.loads((folder / "modules.json").read_text())
    modules[2] |= {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    dump(folder, "modules.json", modules)
    dump(folder, "2_Dense/config.json", {"bias": False} | config)
    write_weights(folder / "2_Dense", {name: np.zeros(shape, np.float32) for name, shape in tensors.items()})
    with pytest.raises(ConfigError, match=message):
        load_embedder(folder)


def test_a_folder_goes_through_a_run_and_comes_out_the_same(folder, tmp_path, capsys):
    dump(folder, "config_sentence_transformers.json",
         {"prompts": {"query": "a ", "document": "b "}, "default_prompt_name": "query"})  # fmt: skip
    want = load_embedder(folder)
    vectors = {name: want.embed(TEXTS, prompt_name=name)[0] for name in (None, "document")}
    main(["import", str(folder), str(tmp_path / "run")])
    main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert "for sentence-transformers" in capsys.readouterr().out
    for path in ("run", "out"):
        embedder = load_embedder(tmp_path / path)
        assert embedder.settings == want.settings
        for name, vector in vectors.items():
            np.testing.assert_allclose(embedder.embed(TEXTS, prompt_name=name)[0], vector, rtol=0, atol=1e-6)


def test_a_run_is_exported_as_asked(bert, tmp_path, capsys):
    main(["import", str(bert), str(tmp_path / "run")])
    main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--pooling", "mean", "--normalize"])
    embedder = load_embedder(tmp_path / "out")
    assert (embedder.pooling, embedder.normalize) == ("mean", True)
    want = load_embedder(bert, normalize=True, max_tokens=embedder.max_tokens).embed(TEXTS)[0]
    np.testing.assert_allclose(embedder.embed(TEXTS)[0], want, rtol=0, atol=1e-6)
    assert not [name for name in read_weights(tmp_path / "out") if name.startswith("cls.")]
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "run"), str(tmp_path / "other"), "--normalize"])
    assert "give --pooling too" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="does not say how to pool"):
        write_sentence_files(bert, tmp_path / "other")
