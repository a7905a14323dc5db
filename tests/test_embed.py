"""Texts to vectors: what must not change them, texts of odd kinds, and the command."""

import csv
import gzip
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_encoder.commands import main
from flax_encoder.config import ConfigError
from flax_encoder.data.sources.records import DataError
from flax_encoder.published.load import load_pretrained
from flax_encoder.runs.embed import _MANY, load_embedder
from flax_encoder.runs.vector_file import VectorFile, read_texts

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


@pytest.mark.parametrize("architecture", ["BertForNextSentencePrediction", "BertForSequenceClassification", "MyBert"])
def test_an_encoder_is_embedded_with_whatever_head_is_on_it(folder, embedder, tmp_path, architecture):
    shutil.copytree(folder, tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "bert/config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    np.testing.assert_array_equal(load_embedder(tmp_path / "bert").embed(TEXTS)[0], embedder.embed(TEXTS)[0])


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
    want, _ = embedder.embed(TEXTS)
    for batch_size, order in ((3, range(8)), (1, [3, 1, 7, 0, 2, 6, 5, 4])):
        got, _ = embedder.embed([TEXTS[i] for i in order], batch_size)
        np.testing.assert_allclose(got, want[list(order)], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("texts", "message"), [
    ("hello", "texts must come in a list: got one str, 'hello'"),
    (b"hello", "texts must come in a list: got one bytes"),
    (None, "texts must come in a list: got a NoneType"),
    ({"a": "b"}, r"texts must come in a list: got a dict"), (["a", None], "text 1 is a NoneType"),
    ([b"a"], "text 0 is a bytes"),
    (["a", "b", "c \ud800"], "text 2 has half of a surrogate pair"),
])  # fmt: skip
def test_what_is_no_list_of_texts_is_named(embedder, texts, message):
    with pytest.raises(DataError, match=message):
        embedder.embed(texts)
    with pytest.raises(DataError, match=message):
        list(embedder.stream(texts))


def test_a_text_of_a_stream_is_named_by_its_number_in_it(embedder):
    with pytest.raises(DataError, match="text 1500 is a int"):
        list(embedder.stream(7 if i == 1500 else "a" for i in range(2000)))


def test_any_iterable_of_texts_is_taken(embedder):
    want, _ = embedder.embed(TEXTS)
    for texts in ((t for t in TEXTS), tuple(TEXTS), np.array(TEXTS)):
        np.testing.assert_array_equal(embedder.embed(texts)[0], want)


@pytest.mark.parametrize("pooling", ["median", ["mean", "median"], [], 3])
def test_a_pooling_that_is_not_known_is_named(folder, pooling):
    with pytest.raises(ConfigError, match=r"pooling must be of cls, max, mean, .*: got"):
        load_embedder(folder, pooling=pooling)


@pytest.mark.parametrize("batch_size", [0, -1, True, 1.5, "8"])
def test_a_batch_has_rows(embedder, batch_size):
    with pytest.raises(DataError, match=f"batch_size must be a whole number above 0: got {batch_size!r}"):
        embedder.embed(["a"], batch_size)


def test_a_prompt_that_is_not_there_is_named(embedder):
    with pytest.raises(DataError, match="prompt_name must be one of no prompts: got 'query'"):
        embedder.embed(["a"], prompt_name="query")


def test_progress_ends_at_the_number_of_texts(embedder):
    seen = []
    embedder.embed(TEXTS, progress=seen.append)
    assert seen[-1] == len(TEXTS) and seen == sorted(seen)
    assert embedder.embed([])[0].shape == (0, embedder.config.embed_dim)


@pytest.mark.parametrize("pooling", ["mean", "max", "weightedmean"])
def test_a_vector_has_the_same_bits_whatever_is_beside_its_text(folder, pooling):
    """Alone, first, last, in any mix of short and long texts, in any order."""
    embedder = load_embedder(folder, pooling=pooling)
    rng = np.random.default_rng(3)
    texts = [" ".join(rng.choice([*"abcdefgh"], n)) for n in rng.integers(0, embedder.config.max_length, 300)]
    want = streamed(embedder, texts)
    np.testing.assert_array_equal(embedder.embed(texts)[0], want)
    for order in (rng.permutation(300), np.arange(300)[::-1], np.arange(0, 300, 7)):
        np.testing.assert_array_equal(streamed(embedder, [texts[i] for i in order]), want[order])
    for i in (0, 131, 299):
        np.testing.assert_array_equal(streamed(embedder, [texts[i]])[0], want[i])


def streamed(embedder, texts):
    vectors = np.zeros((len(texts), embedder.embed_dim), np.float32)
    for part in embedder.stream(texts):
        vectors[part.numbers] = part.vectors
    return vectors


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_few_texts_have_the_vectors_of_many_up_to_rounding(folder, pooling):
    """They take programs of their own, for one text and for up to 16."""
    embedder = load_embedder(folder, pooling=pooling, normalize=True)
    texts = [" ".join("abcdefgh"[n % 8 :] * n) for n in range(18)]
    want = streamed(embedder, texts)
    for some in (texts[5:6], texts[-1:], texts[:2], texts[2:18]):
        np.testing.assert_allclose(embedder.embed(some)[0], want[[texts.index(t) for t in some]], rtol=0, atol=2e-6)


def test_few_programs_serve_all_lengths(embedder):
    texts = [" ".join("a" * n) for n in range(200)]
    shapes = {packed.batch["tokens"].shape for packed, _ in embedder._packed(texts, "", _MANY["cpu"])}
    assert len(shapes) <= 4 and {B * T for B, T in shapes} == {1024}


def test_a_stream_gives_vectors_before_it_has_read_all_texts(embedder):
    read = 0

    def texts():
        nonlocal read
        for i in range(20_000):
            read += 1
            yield TEXTS[i % len(TEXTS)]

    stream = embedder.stream(texts())
    first = next(stream)
    assert read < 12_000 and len(first.numbers) == len(first.vectors)
    stream.close()


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
    with pytest.raises(DataError, match=r"max_tokens must be at least 3 and at most \d+, a whole number: got 999"):
        load_embedder(folder, max_tokens=999)


@pytest.mark.parametrize("normalize", [None, True])
def test_cut_vectors_are_the_first_features_of_whole_ones(folder, embedder, normalize):
    """And of length 1 again, where whole ones are."""
    whole, _ = embedder.embed(TEXTS)
    cut, _ = load_embedder(folder, dimensions=3, normalize=normalize).embed(TEXTS)
    want = whole[:, :3]
    if normalize:
        want = want / np.maximum(np.linalg.norm(want, axis=1, keepdims=True), 1e-12)
    np.testing.assert_allclose(cut, want, atol=1e-5)
    with pytest.raises(DataError, match=r"from 1 to the vectors' \d+: got 0"):
        load_embedder(folder, dimensions=0)


def test_the_command_writes_a_row_a_line(folder, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("".join(f"{t}\n" for t in TEXTS), "utf-8")
    out = tmp_path / "vectors.npy"
    main(["embed", str(folder), "--input", str(tmp_path / "texts.txt"), "--output", str(out), "--batch-size", "3"])
    np.testing.assert_allclose(np.load(out), load_embedder(folder).embed(TEXTS)[0], rtol=0, atol=1e-5)
    assert "1 texts were longer than" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["texts.txt", "vectors.npy"]


def test_the_command_reads_rows_of_tables_and_packed_lines(folder, tmp_path):
    """A row has the text of its column, whatever else stands beside it; no line of JSON is taken for a text."""
    texts = [text for text in TEXTS if text.strip()]
    rows = [{"id": str(i), "text": text, "note": "other words"} for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "note", "text"])
        writer.writeheader()
        writer.writerows(rows)
    with gzip.open(tmp_path / "a.txt.gz", "wt", encoding="utf-8") as file:
        file.write("".join(f"{text}\n" for text in texts))
    want, _ = load_embedder(folder).embed(texts)
    for name in ("a.jsonl", "a.csv", "a.txt.gz"):
        main(["embed", str(folder), "--input", str(tmp_path / name), "--output", str(tmp_path / "v.npy")])
        np.testing.assert_allclose(np.load(tmp_path / "v.npy"), want, rtol=0, atol=1e-5, err_msg=name)
    notes = ["--text-column", "note"]
    main(["embed", str(folder), "--input", str(tmp_path / "a.csv"), "--output", str(tmp_path / "v.npy"), *notes])
    others, _ = load_embedder(folder).embed(["other words"] * len(texts))
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), others, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--input", "good.txt", "--output", "v.npy", "--text-column", "text"], "needs a file with columns"),
    (["--input", "nothing.txt", "--output", "v.npy"], "no texts at nothing.txt: No such file"),
    (["--input", "bad.txt", "--output", "v.npy"], "bad.txt: line 2 must be UTF-8"),
    (["--input", "good.txt", "--output", "v.csv"], "must end in .npy: got v.csv"),
    (["--input", "good.txt", "--output", "none/v.npy"], "into a folder that is there: none is not. Make it first"),
    (["--input", "good.txt", "--output", "v.npy", "--batch-size", "0"], "must be above 0: got 0"),
    (["--input", "good.txt", "--output", "v.npy", "--max-tokens", "2"], "max_tokens must be at least 3"),
    (["--input", "good.txt", "--output", "v.npy", "--prompt-name", "q"], "must be one of no prompts: got 'q'"),
])  # fmt: skip
def test_bad_input_ends_with_a_message(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xff\n")
    (tmp_path / "good.txt").write_text("a\n")
    with pytest.raises(SystemExit) as stop:
        main(["embed", str(folder), *arguments])
    assert stop.value.code == 1 and message in capsys.readouterr().err
    assert not [*tmp_path.glob("v.*")]


@pytest.mark.parametrize("content", ["a b\nc\n", "a b\r\nc\r\n", "a b\nc", "\ufeffa b\nc\n"])
def test_a_text_file_of_any_mark_and_line_end_gives_the_same_texts(tmp_path, content):
    (tmp_path / "texts.txt").write_text(content, "utf-8", newline="")
    assert list(read_texts(tmp_path / "texts.txt")) == ["a b", "c"]


@given(st.permutations(range(9)), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_a_vector_file_is_that_of_numpy_in_whatever_order_it_is_written(tmp_path_factory, order, at_once):
    path = tmp_path_factory.mktemp("vectors") / "v.npy"
    want = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    with VectorFile(path, 5) as file:
        for i in range(0, 9, at_once):
            some = np.array(order[i : i + at_once])
            file.write(some, want[some])
    np.testing.assert_array_equal(np.load(path), want)
    assert [p.name for p in path.parent.iterdir()] == ["v.npy"]


def test_an_empty_file_gives_no_vectors(folder, tmp_path):
    (tmp_path / "none.txt").write_text("")
    main(["embed", str(folder), "--input", str(tmp_path / "none.txt"), "--output", str(tmp_path / "v.npy")])
    assert np.load(tmp_path / "v.npy").shape == (0, load_embedder(folder).embed_dim)


ASSETS = pathlib.Path.home() / ".cache/flax-encoder-assets"
needs_minilm = pytest.mark.skipif(not (ASSETS / "minilm/.done").exists(), reason="needs the asset minilm")


@needs_minilm
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_minilm_gives_a_text_the_same_bits_alone_and_in_any_mix(dtype):
    """As compiled for users: what is vectorised there could make sums in an order that depends on the place."""
    rng = np.random.default_rng(0)
    words = ["the", "fox", "reads", "a", "very", "unlikely", "story"]
    texts = [" ".join(rng.choice(words, n)) for n in range(0, 90, 2)]
    embedder = load_embedder(ASSETS / "minilm", dtype=dtype)
    want = streamed(embedder, texts)
    order = rng.permutation(len(texts))[:30]
    np.testing.assert_array_equal(embedder.embed([texts[i] for i in order])[0], want[order])
    for i in (3, 40):
        np.testing.assert_array_equal(streamed(embedder, [texts[i]])[0], want[i])


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
