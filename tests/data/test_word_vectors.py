"""Word vectors in their three formats, and what becomes of them."""

import json
import os
import pathlib

import numpy as np
import pytest

from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from flax_encoder.data.tokens.word_vectors import embedding_from_vectors, read_word_vectors, word_level_tokenizer

WORDS = ["the", "of", ". . .", "Über", "café", "naïve", "日本", ".", "3.5", "Row"]
VECTORS = np.random.default_rng(0).standard_normal((len(WORDS), 7)).astype(np.float32)


def as_text(words=WORDS, vectors=VECTORS):
    return "".join(f"{w} {' '.join(map(str, v))}\n" for w, v in zip(words, vectors.tolist(), strict=True)).encode()


def as_binary(words=WORDS, vectors=VECTORS, end=b"\n"):
    rows = (w.encode() + b" " + v.astype("<f4").tobytes() + end for w, v in zip(words, vectors, strict=True))
    return f"{len(words)} {vectors.shape[1]}\n".encode() + b"".join(rows)


FORMATS = {
    "glove": as_text,
    "word2vec text": lambda words=WORDS, vectors=VECTORS: f"{len(words)} {vectors.shape[1]}\n".encode()
    + as_text(words, vectors).replace(b"\n", b" \n"),
    "word2vec binary": as_binary,
    "word2vec binary without line breaks": lambda *args: as_binary(*args, end=b""),
}


def read(path):
    blocks = list(read_word_vectors(path))
    return [w for words, _ in blocks for w in words], np.concatenate([v for _, v in blocks])


@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_is_read_as_it_was_written(tmp_path, format_):
    has_spaces = "binary" not in format_  # there a space ends the word
    words = [w for w in WORDS if has_spaces or " " not in w]
    vectors = VECTORS[: len(words)]
    (tmp_path / "vectors").write_bytes(FORMATS[format_](words, vectors))
    got_words, got = read(tmp_path / "vectors")
    assert got_words == words
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, vectors)


def test_blocks_hold_a_part_of_a_large_file(tmp_path):
    vectors = np.random.default_rng(1).standard_normal((10_000, 3)).astype(np.float32)
    for content in (as_text(map(str, range(10_000)), vectors), as_binary([f"w{i}" for i in range(10_000)], vectors)):
        (tmp_path / "vectors").write_bytes(content)
        assert max(len(words) for words, _ in read_word_vectors(tmp_path / "vectors")) < 5_000
        np.testing.assert_array_equal(read(tmp_path / "vectors")[1], vectors)


@pytest.mark.parametrize(("content", "message"), [
    (b"a 1 2 3\nb 1 2\n", "line 2 must have a word and 3 numbers: it has 2"),
    (b"a 1 2 3\nb 1 2 3 4\n", "line 2 must have a word and 3 numbers: it has more"),
    (b"a 1 2 3\n\nb 1 two 3\n", "line 3 must have a word and 3 numbers: could not convert string to float: b'two'"),
    (b"a 1 2 3\n\xff 1 2 3\n", r"line 2 must be UTF-8: invalid start byte in b'\\xff'"),
    (b"a 1 2 3\nb 1 nan 3\n", "line 2 must hold finite numbers"),
    (b"a 1 2 3\nb 1 1e60 3\n", "line 2 must hold finite numbers"),
    (b"3 3\na 1 2 3\nb 1 2 3\n", "announces 3 words: 2 are there"),
    (b"1 3\na 1 2 3\nb 1 2 3\n", "announces 1 words: 2 are there"),
    (b"2 3\na 1 2 3\nb 1 2\n", "line 3 must have a word and 3 numbers: it has 2"),
    (as_binary(["a", "b"], VECTORS[:2])[:-9], "announces 2 words: it ends in word 2"),
    (as_binary(["a"], VECTORS[:1]) + b"more", "announces 1 words: more follow"),
    (as_binary(["a", "b"], VECTORS[:2]).replace(b"\nb ", b"\n\xfe "), "word 2 must be UTF-8"),
    (as_binary(["a"], np.full((1, 7), np.inf, np.float32)), "word 1 must hold finite numbers"),
    (b"word\n", "line 1 must have a word and 0 numbers"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_bad_files_are_explained(tmp_path, content, message):
    (tmp_path / "vectors").write_bytes(content)
    with pytest.raises(DataError, match=rf"vectors: .*{message}"):
        read(tmp_path / "vectors")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no word vectors at .*nothing: No such file"):
        list(read_word_vectors(tmp_path / "nothing"))


def test_word_level_tokens_are_the_first_words_after_the_special_ones(tmp_path):
    (tmp_path / "vectors").write_bytes(as_text())
    tokenizer = word_level_tokenizer(tmp_path / "vectors", 9)
    assert [tokenizer.token(i) for i in range(9)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[:4]]
    assert tokenizer.vocab_size == 9
    whole = word_level_tokenizer(tmp_path / "vectors", 100)
    assert whole.vocab_size == 5 + len(WORDS)
    words = [whole.token(i) for i in whole.encode_batch(["Row of Über, naïve [MASK] row."])[0]]
    assert words == ["Row", "of", "Über", "[UNK]", "naïve", "[MASK]", "[UNK]", "."]


def test_text_is_lower_cased_if_all_words_are(tmp_path):
    (tmp_path / "vectors").write_bytes(as_text(["the", "café"], VECTORS[:2]))
    tokenizer = word_level_tokenizer(tmp_path / "vectors", 100)
    assert tokenizer.encode_batch(["The CAFÉ"])[0].tolist() == [5, 6]


def test_tokens_take_the_vector_of_their_word_else_of_its_lower_case(tmp_path):
    words = ["row", "Row", "the", "row", "s", "[SEP]"]
    (tmp_path / "vectors").write_bytes(as_text(words, VECTORS[:6]))
    rows = embedding_from_vectors(tmp_path / "vectors", word_level_tokenizer(tmp_path / "vectors", 100))
    assert rows.ids.tolist() == [5, 6, 7, 8] and rows.num_missing == 5
    np.testing.assert_array_equal(rows.vectors, VECTORS[[0, 1, 2, 4]])

    tokenizer = train_wordpiece(["the rows " * 5, "Rows", "thes es os"] * 5, 60)
    tokens = [tokenizer.token(i) for i in range(tokenizer.vocab_size)]
    rows = embedding_from_vectors(tmp_path / "vectors", tokenizer)
    assert {tokens[i]: v.tolist() for i, v in zip(rows.ids, rows.vectors, strict=True)} == {
        w: VECTORS[words.index(w)].tolist() for w in ("the", "row", "s") if w in tokens
    }


@pytest.mark.parametrize("mark", ["▁", "Ġ"])
def test_marks_of_a_words_beginning_are_no_part_of_it(tmp_path, mark):
    (tmp_path / "vectors").write_bytes(as_text(["the", "Row"], VECTORS[:2]))
    vocabulary = {"<pad>": 0, mark + "The": 1, mark + "Row": 2, "row": 3, mark: 4}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<pad>"},
    }  # fmt: skip
    from flax_encoder.data.tokens.tokenizer import TextTokenizer

    rows = embedding_from_vectors(tmp_path / "vectors", TextTokenizer(json.dumps(content)))
    assert rows.ids.tolist() == [1, 2]
    np.testing.assert_array_equal(rows.vectors, VECTORS[:2])


def test_a_file_without_one_token_is_an_error(tmp_path):
    (tmp_path / "vectors").write_bytes(as_text(["zebra"], VECTORS[:1]))
    with pytest.raises(DataError, match=r"not one of the tokenizer's \d+ tokens is a word of"):
        embedding_from_vectors(tmp_path / "vectors", train_wordpiece(["the rows of a batch"] * 5, 60))


GLOVE = pathlib.Path(os.environ.get("FLAX_ENCODER_ASSETS", "~/.cache/flax-encoder-assets")).expanduser() / "glove"


@pytest.mark.skipif(not (GLOVE / ".done").exists(), reason="needs the asset glove")
def test_neighbours_of_words_of_glove_make_sense(tmp_path):
    import pyarrow.parquet as parquet

    words = parquet.read_table(GLOVE / "glove_6B_index.parquet")["index"].slice(0, 3000).to_pylist()
    vectors = np.load(GLOVE / "glove_6B_50d_emb.npy", mmap_mode="r")[:3000]
    (tmp_path / "glove.txt").write_bytes(as_text(words, np.asarray(vectors)))
    tokenizer = word_level_tokenizer(tmp_path / "glove.txt", 3005)
    rows = embedding_from_vectors(tmp_path / "glove.txt", tokenizer)
    assert rows.num_missing == 5 and rows.vectors.shape == (3000, 50)
    unit = rows.vectors / np.linalg.norm(rows.vectors, axis=1, keepdims=True)
    king, france = (unit[words.index(w)] for w in ("king", "france"))
    assert words[np.argsort(-unit @ king)[1]] in ("prince", "queen", "ii", "kingdom")
    assert {words[i] for i in np.argsort(-unit @ france)[1:6]} & {"french", "belgium", "spain", "italy", "paris"}
