"""Texts to vectors: what must not change them, sentence-transformers folders, and the command."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_encoder.commands import main
from flax_encoder.config import ConfigError
from flax_encoder.data.sources.opening import DataError
from flax_encoder.published.load import load_pretrained
from flax_encoder.published.weights import read_weights
from flax_encoder.runs.embed import load_embedder, pool, write_sentence_files

GOLDEN = pathlib.Path(__file__).parent / "golden/bert-masked_lm"
TEXTS = ["a b c", "", "d", "a a a a a a a a a a a a a a a a a a a a", "b", "e f g h", "c c", "zzz"]


@pytest.fixture(autouse=True)
def quick_compilation(request):
    """As in conftest.py, but for the real model."""
    jax.config.update("jax_disable_most_optimizations", "minilm" not in request.node.name)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published BERT with a vocabulary of letters."""
    folder = tmp_path_factory.mktemp("bert")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, folder)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    letters = [chr(ord("a") + i) if i < 26 else f"w{i}" for i in range(size - 5)]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    return folder


@pytest.fixture(scope="module")
def embedder(folder):
    return load_embedder(folder)


def by_hand(loaded, text, pooling="mean", normalize=False):
    length = loaded.config.max_length
    limit = length - 2
    ids = [2, *[ord(c) - ord("a") + 5 for c in text.split() if len(c) == 1][:limit], 3] if text != "zzz" else [2, 1, 3]
    padding = [0] * (length - len(ids))
    hidden = loaded(np.array([ids + padding]), np.array([[1] * len(ids) + padding])).last_hidden_state[0, : len(ids)]
    vector = hidden[0] if pooling == "cls" else hidden.mean(0)
    return vector / np.linalg.norm(vector) if normalize else vector


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", False), ("mean", True), ("cls", False)])
def test_a_vector_is_that_of_its_text_alone(folder, pooling, normalize):
    """Whatever stands beside it in a batch; special tokens count; long texts are cut and counted."""
    loaded = load_pretrained(folder)
    vectors, num_cut = load_embedder(folder, pooling=pooling, normalize=normalize).embed(TEXTS, batch_size=3)
    assert num_cut == 1 and vectors.dtype == np.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        np.testing.assert_allclose(vector, by_hand(loaded, text, pooling, normalize), rtol=0, atol=2e-5, err_msg=text)


def test_order_and_batches_do_not_change_vectors(embedder):
    want, _ = embedder.embed(TEXTS, batch_size=len(TEXTS))
    for batch_size, order in ((3, range(8)), (1, [3, 1, 7, 0, 2, 6, 5, 4]), (100, range(8))):
        got, _ = embedder.embed([TEXTS[i] for i in order], batch_size)
        np.testing.assert_allclose(got, want[list(order)], rtol=0, atol=1e-5)


def test_progress_ends_at_the_number_of_texts(embedder):
    seen = []
    embedder.embed(TEXTS, 3, seen.append)
    assert seen == [3, 6, 8]
    assert embedder.embed([])[0].shape == (0, embedder.config.embed_dim)


def test_pooling_reads_real_tokens_alone():
    hidden = jnp.arange(2 * 4 * 3.0).reshape(2, 4, 3)
    mask = jnp.array([[0, 1, 1, 0], [0, 0, 0, 0]], jnp.int32)
    np.testing.assert_array_equal(pool(hidden, mask, "cls", False), [hidden[0, 1], [0, 0, 0]])
    np.testing.assert_array_equal(pool(hidden, mask, "mean", False), [(hidden[0, 1] + hidden[0, 2]) / 2, [0, 0, 0]])
    assert float(jnp.linalg.norm(pool(hidden, mask, "mean", True)[0])) == pytest.approx(1)


def test_bfloat16_is_near_float32(folder, embedder):
    want, _ = embedder.embed(TEXTS)
    got, _ = load_embedder(folder, dtype="bfloat16").embed(TEXTS)
    assert not np.array_equal(got, want)
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_cutting_keeps_the_special_tokens(folder):
    short = load_embedder(folder, max_tokens=4)
    vectors, num_cut = short.embed(["a b c d", "a b"])
    assert num_cut == 1
    np.testing.assert_array_equal(vectors[0], vectors[1])
    with pytest.raises(DataError, match=r"max_tokens must be at least 3 and at most \d+: got 999"):
        load_embedder(folder, max_tokens=999)


@pytest.fixture
def sentence_folder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "sentence")
    write_sentence_files(folder, tmp_path / "sentence", pooling="cls", normalize=True, max_tokens=6)
    return tmp_path / "sentence"


def test_a_sentence_transformers_folder_says_how_to_pool(sentence_folder, folder):
    embedder = load_embedder(sentence_folder)
    assert (embedder.pooling, embedder.normalize, embedder.max_tokens) == ("cls", True, 6)
    other = load_embedder(sentence_folder, pooling="mean", normalize=False)
    assert (other.pooling, other.normalize) == ("mean", False)
    (sentence_folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "A b "}, "default_prompt_name": "query"})
    )
    (sentence_folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    (sentence_folder / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    prompted = load_embedder(sentence_folder)
    assert (prompted.pooling, prompted.prompt, prompted.do_lower_case) == ("mean", "A b ", True)
    want = load_embedder(folder, normalize=True).embed(["a b c"])[0]
    np.testing.assert_array_equal(prompted.embed(["C \n"])[0], want)


@pytest.mark.parametrize(("file", "content", "message"), [
    ("modules.json", [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"},
                      {"path": "2", "type": "x.Dense"}], "must list Transformer .*: got Transformer, Pooling, Dense"),
    ("modules.json", {"0": "Transformer"}, "must hold a JSON list: got dict"),
    ("modules.json", [5], "must be a list of modules, each with a type and a path"),
    ("sentence_bert_config.json", [], "must hold a JSON dict: got list"),
    ("sentence_bert_config.json", {"max_seq_length": "12"}, "must be a number of at least 3 tokens: got '12'"),
    ("config_sentence_transformers.json", {"default_prompt_name": "q"}, "must be one of prompts: got 'q' of {}"),
    ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "must be cls or mean: got pooling_mode_max_tokens"),
    ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, "must be cls or mean"),
    ("1_Pooling/config.json", {}, "must be cls or mean: got none"),
    ("2_Normalize/config.json", {"module_input_name": "token_embeddings"}, "Normalize must be of the pooled vectors"),
])  # fmt: skip
def test_modules_that_are_not_understood_are_named(sentence_folder, file, content, message):
    (sentence_folder / file).parent.mkdir(exist_ok=True)
    (sentence_folder / file).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        load_embedder(sentence_folder)


def test_what_is_no_json_is_named(sentence_folder):
    (sentence_folder / "modules.json").write_text("[")
    with pytest.raises(ConfigError, match=r"modules.json is no JSON"):
        load_embedder(sentence_folder)


def test_a_sentence_folder_goes_through_a_run_and_comes_out_the_same(sentence_folder, tmp_path, capsys):
    (sentence_folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "a "}, "default_prompt_name": "query"})
    )
    want, _ = load_embedder(sentence_folder).embed(TEXTS)
    main(["import", str(sentence_folder), str(tmp_path / "run")])
    main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert "for sentence-transformers" in capsys.readouterr().out
    for path in ("run", "out"):
        embedder = load_embedder(tmp_path / path)
        settings = (embedder.pooling, embedder.normalize, embedder.max_tokens, embedder.prompt)
        assert settings == ("cls", True, 6, "a ")
        np.testing.assert_allclose(embedder.embed(TEXTS)[0], want, rtol=0, atol=1e-6)


def test_a_run_is_exported_for_sentence_transformers_as_asked(folder, tmp_path, capsys):
    main(["import", str(folder), str(tmp_path / "run")])
    main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--pooling", "mean", "--normalize"])
    embedder = load_embedder(tmp_path / "out")
    assert (embedder.pooling, embedder.normalize) == ("mean", True)
    want = load_embedder(folder, normalize=True, max_tokens=embedder.max_tokens).embed(TEXTS)[0]
    np.testing.assert_allclose(embedder.embed(TEXTS)[0], want, rtol=0, atol=1e-6)
    assert not [name for name in read_weights(tmp_path / "out") if name.startswith("cls.")]
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "run"), str(tmp_path / "other"), "--normalize"])
    assert "give --pooling too" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="does not say how to pool"):
        write_sentence_files(folder, tmp_path / "other")


def test_the_command_writes_a_row_a_line(folder, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("".join(f"{t}\n" for t in TEXTS), "utf-8")
    out = tmp_path / "vectors.npy"
    main(["embed", str(folder), "--input", str(tmp_path / "texts.txt"), "--output", str(out), "--batch-size", "3"])
    np.testing.assert_allclose(np.load(out), load_embedder(folder).embed(TEXTS)[0], rtol=0, atol=1e-5)
    assert "1 texts were longer than" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["texts.txt", "vectors.npy"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--input", "nothing.txt", "--output", "v.npy"], "no texts at nothing.txt: No such file"),
    (["--input", "bad.txt", "--output", "v.npy"], "bad.txt: line 2 must be UTF-8"),
    (["--input", "good.txt", "--output", "v.csv"], "must end in .npy: got v.csv"),
    (["--input", "good.txt", "--output", "v.npy", "--batch-size", "0"], "must be above 0: got 0"),
    (["--input", "good.txt", "--output", "v.npy", "--max-tokens", "2"], "max_tokens must be at least 3"),
])  # fmt: skip
def test_bad_input_ends_with_a_message(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xff\n")
    (tmp_path / "good.txt").write_text("a\n")
    with pytest.raises(SystemExit) as stop:
        main(["embed", str(folder), *arguments])
    assert stop.value.code == 1 and message in capsys.readouterr().err


ASSETS = pathlib.Path.home() / ".cache/flax-encoder-assets"
needs_minilm = pytest.mark.skipif(not (ASSETS / "minilm/.done").exists(), reason="needs the asset minilm")


@needs_minilm
def test_minilm_gives_the_vectors_of_sentence_transformers():
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="the reference")
    texts = ["A cat sits on the mat.", "", "Der Hund schläft.", "word " * 400, *TEXTS]
    want = sentence_transformers.SentenceTransformer(str(ASSETS / "minilm"), device="cpu").encode(texts)
    with jax.default_matmul_precision("highest"):
        got, num_cut = load_embedder(ASSETS / "minilm").embed(texts)
    assert num_cut == 1
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()


@needs_minilm
@pytest.mark.skipif(not (ASSETS / "wiki/en.jsonl").exists(), reason="needs the asset wiki")
def test_minilm_finds_wikipedia_leads_of_the_same_topic():
    """Of 600 articles, the nearest other one shares the topic far more often than chance has it."""
    with open(ASSETS / "wiki/en.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for i, line in enumerate(file) if i % 16 == 0]
    rows = [r for r in rows if r["topic"]][:600]
    vectors, _ = load_embedder(ASSETS / "minilm", max_tokens=64).embed([r["text"] for r in rows], 64)
    near = vectors @ vectors.T - 2 * np.eye(len(rows))
    topics = np.array([r["topic"] for r in rows])
    hits = (topics[near.argmax(1)] == topics).mean()
    chance = (topics[:, None] == topics[None]).mean()
    assert hits > 0.3 and hits > 3 * chance, (hits, chance)
