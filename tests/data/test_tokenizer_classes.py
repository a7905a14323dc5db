"""What stands beside a tokenizer.json counts, as transformers' tokenizer classes read it."""

import hashlib
import json
import pathlib

import numpy as np
import pytest
from tokenizer_parity import (
    FOLDERS,
    GOLDEN,
    bert_json,
    byte_level,
    differences,
    digest,
    dump,
    make_folder,
    ours,
    saved,
    unigram,
    word_piece,
)
from tokenizer_parity import texts as odd_texts
from tokenizers import Tokenizer, processors

from flax_encoder.data.rows.masking import Vocabulary, mask_rows
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.texts import check_texts
from flax_encoder.data.tokens.tokenizer import SPECIAL_TOKENS, TextTokenizer, UnknownCount, train_wordpiece
from flax_encoder.data.tokens.tokenizer_files import published_files, read_tokenizer

UINT16 = np.dtype(np.uint16)
KINDS = sorted(FOLDERS)
EXPECTED = json.loads((GOLDEN / "tokenizers.json").read_text("utf-8"))["digests"]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A folder of a kind, written once."""
    made: dict[str, pathlib.Path] = {}

    def folder(kind):
        if kind not in made:
            made[kind] = make_folder(kind, tmp_path_factory.mktemp("kind"))
        return made[kind]

    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_folder_gives_the_ids_that_transformers_gave(folder_of, kind):
    assert digest(ours(folder_of(kind))) == EXPECTED[kind]


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_folder_gives_the_ids_of_transformers(folder_of, kind):
    pytest.importorskip("transformers", reason="compares with transformers: pip install -e '.[parity]'")
    assert differences(folder_of(kind)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_travels_as_one_text_and_comes_back_from_exported_files(folder_of, tmp_path, kind):
    tokenizer = read_tokenizer(folder_of(kind))
    dump(tmp_path, **{name.replace(".", "__"): content for name, content in published_files(tokenizer).items()})
    for again in (TextTokenizer(tokenizer.json), read_tokenizer(tmp_path)):
        assert [again.find(role) for role in SPECIAL_TOKENS] == [tokenizer.find(role) for role in SPECIAL_TOKENS]
        assert (again.frame, again.truncation_side, again.max_tokens, again.vocab_size) == (
            tokenizer.frame, tokenizer.truncation_side, tokenizer.max_tokens, tokenizer.vocab_size,
        )  # fmt: skip
        for a, b in zip(again.encode_batch(odd_texts()), tokenizer.encode_batch(odd_texts()), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_other_tools_read_the_text_with_its_settings(folder_of, kind):
    tokenizer = read_tokenizer(folder_of(kind))
    rows, _ = tokenizer.encode_rows(odd_texts())
    theirs = Tokenizer.from_str(tokenizer.json)
    theirs.no_truncation()
    assert [e.ids for e in theirs.encode_batch(odd_texts())] == [row.tolist() for row in rows]


def test_the_file_and_its_folder_are_read_alike(tmp_path):
    bert_json(do_lower_case=False)(tmp_path)
    assert read_tokenizer(tmp_path / "tokenizer.json").json == read_tokenizer(tmp_path).json
    (tmp_path / "other.json").write_text(word_piece().to_str())  # a file of another name stands alone
    assert read_tokenizer(tmp_path / "other.json").json == word_piece().to_str()


def test_a_text_that_nothing_beside_it_changes_stays_to_the_byte(tmp_path):
    text = word_piece().to_str(pretty=True)
    dump(tmp_path, tokenizer__json=text, tokenizer_config__json={"tokenizer_class": "BertTokenizer"})
    assert read_tokenizer(tmp_path).json == text
    (tmp_path / "tokenizer_config.json").unlink()
    assert read_tokenizer(tmp_path).json == text


def test_the_hash_is_that_of_the_text_unless_its_ids_change(tmp_path):
    text = word_piece().to_str()
    want = hashlib.sha256(text.encode()).hexdigest()
    about = {"tokenizer_class": "BertTokenizer", "model_max_length": 16, "truncation_side": "left"}
    dump(tmp_path, tokenizer__json=text, tokenizer_config__json=about)
    assert read_tokenizer(tmp_path).json != text and read_tokenizer(tmp_path).hash == want == TextTokenizer(text).hash
    dump(tmp_path, tokenizer_config__json=about | {"do_lower_case": False})
    assert read_tokenizer(tmp_path).hash != want


def test_special_tokens_go_by_the_names_that_the_folder_gives(folder_of):
    tokenizer = read_tokenizer(folder_of("EuroBERT, its names"))
    assert [tokenizer.special(role) for role in ("first", "pad", "last", "unknown", "mask")] == [0, 1, 2, 3, 4]
    assert tokenizer.frame == (0, 2) and set(range(5)) <= set(tokenizer.special_ids.tolist())


def test_a_published_tokenizer_without_a_template_adds_nothing_and_one_alone_what_runs_add(tmp_path):
    bare = word_piece()
    bare.post_processor = processors.ByteLevel()
    dump(tmp_path, tokenizer__json=bare.to_str())
    assert read_tokenizer(tmp_path).frame == (2, 3)
    dump(tmp_path, tokenizer_config__json={"tokenizer_class": "PreTrainedTokenizerFast", "cls_token": "[CLS]"})
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.frame == (None, None) and tokenizer.special("first") == 2
    assert tokenizer.encode_rows(["the"])[0][0].tolist() == tokenizer.encode_batch(["the"])[0].tolist()


@pytest.mark.parametrize("template", ["[CLS] [MASK] $A [SEP]", "[CLS] $A $A"])
def test_templates_that_no_row_can_hold_are_refused(tmp_path, template):
    tokenizer = word_piece()
    names = [name for name in template.split() if name != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
    )
    dump(tmp_path, tokenizer__json=tokenizer.to_str())
    with pytest.raises(DataError, match=r"2 before and 1 after it|takes it 2 times"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("where", ["tokenizer_config.json", "tokenizer.json"])
def test_long_texts_lose_tokens_on_the_folders_side(tmp_path, side, where):
    own, about = word_piece(), {"tokenizer_class": "BertTokenizer"}
    if where == "tokenizer.json":
        own.enable_truncation(7, direction=side)
    else:
        about["truncation_side"] = side
    saved(own, tmp_path, about.pop("tokenizer_class"), "bert", **about)
    tokenizer = read_tokenizer(tmp_path)
    (whole,), none_cut = tokenizer.encode_rows(["the work and the license of the work"])
    (row,), num_cut = tokenizer.encode_rows(["the work and the license of the work"], 5)
    assert (none_cut, num_cut, len(row)) == (0, 1, 5) and [row[0], row[-1]] == [2, 3]
    assert row[1:-1].tolist() == (whole[1:4] if side == "right" else whole[-4:-1]).tolist()
    with pytest.raises(DataError, match="max_tokens must leave room for text: got 2, 2 special"):
        tokenizer.encode_rows(["the"], 2)


@pytest.mark.parametrize("make", [word_piece, byte_level, lambda: unigram(("<unk>",))])
def test_a_tokenizer_reads_alike_with_and_without_the_kind_of_its_model(make):
    content = json.loads(make().to_str())
    typed = TextTokenizer(json.dumps(content))
    del content["model"]["type"]
    untyped = TextTokenizer(json.dumps(content))
    for a, b in zip(*(t.encode_flat(odd_texts(), UINT16) for t in (typed, untyped)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_ids_with_holes_size_tables_by_the_highest_and_no_hole_is_drawn():
    content = json.loads(word_piece().to_str())
    highest = len(content["model"]["vocab"]) + 90
    content["model"]["vocab"]["work"] = highest
    tokenizer = TextTokenizer(json.dumps(content))
    assert tokenizer.vocab_size == highest + 1
    flat, _, begins = tokenizer.encode_flat(["the work"], UINT16)
    assert flat[-1] == highest and begins.all()
    vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.special("mask"), tokenizer.special_ids)
    rows = np.full((8, 64), flat[0], np.int32)
    masked = mask_rows(
        rows, np.ones_like(rows), None, np.arange(8, dtype=np.uint64), vocabulary, kind="token", rate=1.0,
        mask_rate=0.0, random_rate=1.0, slots=64, seed=0,
    )  # fmt: skip
    assert all(tokenizer.token(i) for i in np.unique(masked["tokens"]))


@pytest.mark.parametrize(("change", "message"), [
    ({"id": 900}, r"'\[NEW\]' must have the id 900: the next free id is \d+, which every tool would give it"),
    ({"content": "work"}, r"'work' must have the id \d+: the vocabulary has it at \d+"),
])  # fmt: skip
def test_added_tokens_must_have_the_ids_that_the_file_says(tmp_path, change, message):
    own = word_piece()
    own.add_tokens(["[NEW]"])
    content = json.loads(own.to_str())
    content["added_tokens"][-1] |= change
    dump(tmp_path, tokenizer__json=content, tokenizer_config__json={"tokenizer_class": "BertTokenizer"})
    with pytest.raises(DataError, match=message):
        read_tokenizer(tmp_path)


def test_special_tokens_that_only_a_name_makes_are_left_out_where_no_row_holds_them(tmp_path, caplog):
    size = word_piece().get_vocab_size()
    bert_json(extra_special_tokens=["[A]", "[B]"])(tmp_path)
    assert read_tokenizer(tmp_path).vocab_size == size + 2
    assert read_tokenizer(tmp_path, num_rows=size + 1).vocab_size == size + 1
    assert "left out the special tokens [B], which are not in the vocabulary" in caplog.text


@pytest.mark.parametrize(("config", "message"), [
    ({"split_special_tokens": True}, r"split_special_tokens must be False"),
    ({"truncation_side": "middle"}, r"truncation_side must be left or right: got 'middle'"),
    ({"added_tokens_decoder": [1]}, r"no tokenizer can be made"),
])  # fmt: skip
def test_settings_that_are_not_understood_are_refused_by_name(tmp_path, config, message):
    bert_json(**config)(tmp_path)
    with pytest.raises(DataError, match=message):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(("texts", "message"), [
    ("one text", r"texts must come in a list: got one str, 'one text'"),
    (b"bytes", r"texts must come in a list: got one bytes"),
    (3, r"texts must come in a list: got a int"),
    (["a", b"b"], r"must be a str: .decode\('utf-8'\) makes it one: text 1 is a bytes, b'b'"),
    (["a", "b", None], r"each text must be a str: text 2 is a NoneType, None"),
    (["é", "ok\ud800bad"], r"text 1 has half of a surrogate pair, '\\ud800', at character 2"),
])  # fmt: skip
def test_texts_of_other_kinds_are_named_with_their_place(texts, message):
    with pytest.raises(DataError, match=message):
        check_texts(texts)


def test_texts_are_checked_wherever_they_are_read():
    tokenizer = TextTokenizer(word_piece().to_str())
    encoders = (tokenizer.encode_batch, tokenizer.encode_rows, lambda x: tokenizer.encode_flat(x, UINT16))
    for encode in (*encoders, lambda x: train_wordpiece(x, 300)):
        with pytest.raises(DataError, match="text 1 has half of a surrogate pair"):
            encode(["é", "ok\ud800bad"])
    assert len(tokenizer.encode_batch(text for text in ("a", "b"))) == 2  # any iterable is a list of texts


def test_more_than_a_tenth_of_unknown_tokens_is_worth_a_warning():
    tokenizer = TextTokenizer(word_piece().to_str())
    (word,), (unknown,) = tokenizer.encode_batch(["the"]), tokenizer.encode_batch(["\U0003ffff…ꙮ"])
    count = UnknownCount(tokenizer)
    assert count.warning is None
    count.add([np.repeat(word, 90), np.repeat(unknown[-1:], 10)])
    assert count.warning is None
    count.add([unknown[-1:]])
    assert count.warning.startswith("11 of 101 tokens (11%) are [UNK]")
    assert TextTokenizer(byte_level().to_str()).unknown_id is None
    assert TextTokenizer(unigram(("<pad>", "<unk>"), unknown=1).to_str()).unknown_id == 1


@pytest.mark.parametrize("junk", ["Ab" * 51, "x" * 101, "\u0130" * 101, "é" * 101, "한" * 40, "a" * 60 + "9" * 60])
def test_words_that_no_model_reads_are_not_learnt_from(junk):
    texts = [f"the word number {i} and its list" for i in range(20)]
    plain = train_wordpiece(texts, 200)
    (ids,) = plain.encode_batch([junk])
    assert ids.tolist() == [plain.special("unknown")]
    for text in (junk, f"the {junk} word", f"({junk}) number 3"):
        kept = text.replace(junk, "")
        assert train_wordpiece([*texts, text], 200).json == train_wordpiece([*texts, kept], 200).json


def test_words_of_a_hundred_characters_are_learnt_from():
    texts = ["the " + "ab" * 50] * 3
    assert "ab" * 50 in json.loads(train_wordpiece(texts, 200).json)["model"]["vocab"]
