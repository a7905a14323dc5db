"""Tokenizers from whatever files a folder has. tests/golden holds what SentencePiece itself makes of some texts."""

import json
import pathlib
import pydoc_data.topics as prose
import shutil
import struct

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.sentencepiece import parse_sentencepiece
from flax_encoder.data.tokens.tokenizer_files import read_tokenizer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "sentencepiece.json").read_text("utf-8"))
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "Cat", "cafe", "café", "中", "中文", "."]
TEXTS = [
    "Hello  world ", "\n a\tb", "café naïve \uff21\uff22 \uff11\uff12 ﬁne", "日本語 テキスト。", "Привет мир",
    "x🙂y 🙂🙂 z", "a\u200bb",
    "100, 9, (See also", "e\u0301 é", "don't ``quote'' it", "\u00a0nbsp\u3000full", "ABC İI ß ẞ Σς", "x [MASK] y",
    *(line for line in prose.topics["assignment"].split("\n") if "***" not in line),  # equally likely splits
]  # fmt: skip


def write(folder, **files):
    """Files by name, `_` for `.`; dicts as JSON."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, "utf-8")
    return folder


def tokens(folder, text, pair=None):
    """With the special tokens that the written tokenizer.json puts around."""
    return Tokenizer.from_str(read_tokenizer(folder).json).encode(text, pair).tokens


def sentencepiece_folder(folder, family, kind="unigram", **config):
    shutil.copy(GOLDEN / f"sentencepiece-{kind}.model", folder / "spiece.model")
    return write(folder, config__json={"model_type": family}, tokenizer_config__json=config)


def test_a_tokenizer_json_is_taken_as_it_is(tmp_path):
    write(tmp_path, vocab__txt="\n".join(WORDS))
    made = read_tokenizer(tmp_path)
    write(tmp_path, tokenizer__json=made.json, vocab__txt="nonsense")
    assert read_tokenizer(tmp_path).json == made.json


@pytest.mark.parametrize(("config", "want"), [
    ({}, ["the", "cat", "##s", "cafe", "中", "[UNK]", "."]),
    ({"do_lower_case": False}, ["[UNK]", "Cat", "##s", "café", "中", "[UNK]", "."]),
    ({"do_lower_case": False, "strip_accents": True}, ["[UNK]", "Cat", "##s", "cafe", "中", "[UNK]", "."]),
    ({"strip_accents": False}, ["the", "cat", "##s", "café", "中", "[UNK]", "."]),
    ({"tokenize_chinese_chars": False}, ["the", "cat", "##s", "cafe", "中文", "."]),
])  # fmt: skip
def test_word_pieces_follow_the_config(tmp_path, config, want):
    write(tmp_path, vocab__txt="\n".join(WORDS) + "\n", tokenizer_config__json=config)
    assert tokens(tmp_path, "The Cats café 中文.") == ["[CLS]", *want, "[SEP]"]
    assert tokens(tmp_path, "the", "[MASK]s") == ["[CLS]", "the", "[SEP]", "[MASK]", "[UNK]", "[SEP]"]
    tokenizer = read_tokenizer(tmp_path)
    assert [tokenizer.special(role) for role in ("pad", "unknown", "first", "last", "mask")] == [0, 1, 2, 3, 4]
    assert tokenizer.special_ids.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("is_object", [False, True])
def test_special_tokens_take_the_names_that_the_folder_gives(tmp_path, is_object):
    given = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
    if is_object:
        given = {role: {"content": name, "lstrip": False} for role, name in given.items()}
    words = ["<pad>", "[UNK]", "<s>", "</s>", "<mask>", "the"]
    write(tmp_path, vocab__txt="\n".join(words), special_tokens_map__json=given)
    assert Tokenizer.from_str(read_tokenizer(tmp_path).json).encode("the <mask>").ids == [2, 5, 4, 3]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    trainer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer.train_from_iterator(TEXTS, vocab_size=400, special_tokens=special, show_progress=False)
    trainer.save_model(str(folder))
    return folder


@pytest.mark.parametrize("prefix", [False, True])
def test_byte_level_bpe_is_undone_by_decoding(bpe, tmp_path, prefix):
    shutil.copytree(bpe, tmp_path, dirs_exist_ok=True)
    write(tmp_path, tokenizer_config__json={"add_prefix_space": prefix})
    tokenizer = read_tokenizer(tmp_path)
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert tokenizer.decode(ids) == (" " + text if prefix and text[:1] not in ("", " ") else text)
    assert [tokenizer.special(role) for role in ("first", "pad", "last", "unknown", "mask")] == [0, 1, 2, 3, 4]
    ids = Tokenizer.from_str(tokenizer.json).encode("a", "b").ids
    assert [i for i in ids if i < 5] == [0, 2, 2, 2]
    # A mask takes the space before it along only where a file says so, as roberta-base's does.
    assert len(tokenizer.encode_batch(["a <mask>"])[0]) == len(tokenizer.encode_batch(["a<mask>"])[0]) + 1


def test_merges_of_unknown_tokens_name_their_line(bpe, tmp_path):
    shutil.copytree(bpe, tmp_path, dirs_exist_ok=True)
    for line in ("nope nope", "one", "a b c"):
        (tmp_path / "merges.txt").write_text(f"#version: 0.2\n\n{line}\n")
        with pytest.raises(DataError, match=rf"line 3 must merge tokens of vocab.json: got '{line}'"):
            read_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_models_split_as_sentencepiece_does(tmp_path, kind):
    sentencepiece_folder(tmp_path, "t5", kind, extra_ids=0, eos_token="</s>")
    tokenizer = read_tokenizer(tmp_path)
    own = [p.text for p in parse_sentencepiece((tmp_path / "spiece.model").read_bytes()).pieces]
    assert [tokenizer.token(i) for i in range(tokenizer.vocab_size)] == own
    for text, want, ids in zip(EXPECTED["texts"], EXPECTED["pieces"][kind], tokenizer.encode_batch(EXPECTED["texts"]),
                               strict=True):  # fmt: skip
        assert [own[i] for i in ids] == [p if p in own else "<unk>" for p in want], text


def test_families_number_the_pieces_in_their_ways(tmp_path):
    pieces = [p.text for p in parse_sentencepiece((GOLDEN / "sentencepiece-unigram.model").read_bytes()).pieces]
    t5 = read_tokenizer(sentencepiece_folder(tmp_path, "t5"))
    assert t5.vocab_size == len(pieces) + 100
    assert (t5.token(len(pieces)), t5.token(len(pieces) + 99)) == ("<extra_id_99>", "<extra_id_0>")
    assert tokens(tmp_path, "the", "of") == ["▁the", "</s>", "▁of", "</s>"]

    xlm = read_tokenizer(sentencepiece_folder(tmp_path, "xlm-roberta"))
    assert [xlm.token(i) for i in range(6)] == ["<s>", "<pad>", "</s>", "<unk>", pieces[3], pieces[4]]
    assert xlm.token(len(pieces) + 1) == "<mask>" and xlm.vocab_size == len(pieces) + 2
    assert tokens(tmp_path, "the", "of") == ["<s>", "▁the", "</s>", "</s>", "▁of", "</s>"]
    np.testing.assert_array_equal(xlm.encode_batch(["the 語"])[0], [pieces.index("▁the") + 1, pieces.index("▁") + 1, 3])


def test_a_tokenizer_class_goes_before_the_type_of_the_model(tmp_path):
    sentencepiece_folder(tmp_path, "bert", tokenizer_class="XLMRobertaTokenizerFast")
    assert read_tokenizer(tmp_path).token(1) == "<pad>"


def test_added_tokens_have_the_ids_that_the_folder_says(tmp_path):
    write(tmp_path, vocab__txt="\n".join(WORDS), added_tokens__json={"[NEW]": len(WORDS), "[OTHER]": len(WORDS) + 1})
    (ids,) = read_tokenizer(tmp_path).encode_batch(["the[NEW][OTHER]"])
    assert ids.tolist() == [5, 14, 15]
    write(tmp_path, added_tokens__json={"[NEW]": 99})
    with pytest.raises(DataError, match=r"'\[NEW\]' must have the id 99: the next free id is 14"):
        read_tokenizer(tmp_path)
    write(tmp_path, added_tokens__json={}, tokenizer_config__json={"added_tokens_decoder": {"3": {"content": "cat"}}})
    with pytest.raises(DataError, match=r"'cat' must have the id 3: the vocabulary has it at 6"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(("files", "message"), [
    ({}, r"looked for tokenizer.json, spiece.model, .*, vocab.json with merges.txt, and vocab.txt"),
    ({"vocab__json": {}}, r"looked for tokenizer.json"),
    ({"vocab__json": {"a": 0, "b": 0}, "merges__txt": ""}, r"an id of its own: '[ab]' and '[ab]' have 0"),
    ({"vocab__json": "[", "merges__txt": ""}, r"vocab.json is no JSON"),
    ({"vocab__json": "[]", "merges__txt": ""}, r"vocab.json must hold an object: got a list"),
    ({"vocab__txt": "[UNK]\n[CLS]\na\nb\na\n"}, r"'a' is on lines 3 and 5"),
    ({"vocab__txt": "[UNK]\n[CLS]\na\n\n\n"}, r"'' is on lines 4 and 5"),
    ({"vocab__txt": "a\nb"}, r"must hold the special tokens \[CLS\], \[SEP\]: \[CLS\] is not"),
    ({"vocab__txt": "a", "tokenizer_config__json": {"do_basic_tokenize": False}}, r"do_basic_tokenize must be True"),
    ({"vocab__txt": "a", "tokenizer_config__json": {"word_tokenizer_type": "mecab"}}, r"must be 'basic'.*got 'mecab'"),
    ({"tokenizer__json": "{}"}, r"not a tokenizer.json"),
    ({"spiece__model": "no model", "config__json": {"model_type": "t5"}}, r"spiece.model: truncated, corr"),
    ({"spiece__model": "", "config__json": {"model_type": "t5"}}, r"one unknown piece"),
    ({"spiece__model": "", "config__json": {"model_type": "llama"}}, r"got 'llama'; known are albert, t5, "),
    ({"spiece__model": ""}, r"got ''; known are"),
])  # fmt: skip
def test_bad_folders_are_explained(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        read_tokenizer(write(tmp_path, **files))


def test_text_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"[UNK]\n\xff\xfe")
    with pytest.raises(DataError, match=r"vocab.txt must be UTF-8: .* at byte 6"):
        read_tokenizer(tmp_path)


# A protocol buffer by hand.


def field(number, value):
    if isinstance(value, int):
        return bytes([number << 3 & 127 | 128 * (number > 15)]) + bytes([number >> 4] * (number > 15)) + bytes([value])
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    return bytes([number << 3 | 2, len(value)]) + value


def piece(text, kind=1, score=-1.0):
    return field(1, field(1, text.encode()) + field(2, score) + field(3, kind))


BASE = piece("<unk>", 2) + piece("</s>", 3) + piece("a")


@pytest.mark.parametrize(("data", "message"), [
    (BASE + piece("a"), "'a' is there twice"),
    (BASE + piece("<unk>", 2), "one unknown piece"),
    (BASE + field(2, field(3, 3)), r"must be unigram \(1\) or BPE \(2\): its type is 3"),
    (BASE + field(2, field(24, 1)), "mark spaces at the end of words"),
    (BASE + field(3, field(5, 0)), "mark spaces at the end of words, or not at all"),
    (BASE + piece("ab", 4) + field(2, field(3, 2)), "symbols of several characters are not understood in BPE: got"),
    (BASE[:-3], "truncated, corrupt"),
    (BASE + b"\x0a\xff\xff\xff\xff\x0f", "truncated, corrupt .*: a field of 4294967295 bytes where 0 are left"),
    (BASE + b"\x08" + b"\xff" * 11, "more than 64 bits"),
    (BASE + b"\x0b\x00", "unknown kind 3"),
    (BASE + field(1, field(1, b"\xff")), "truncated, corrupt"),
    (piece("<unk>", 2) + piece("a"), "must hold the special tokens </s>"),
])  # fmt: skip
def test_damaged_or_unusual_sentencepiece_models_are_explained(tmp_path, data, message):
    (tmp_path / "spiece.model").write_bytes(data)
    write(tmp_path, config__json={"model_type": "t5"})
    with pytest.raises(DataError, match=message):
        read_tokenizer(tmp_path)


def test_dummy_prefixes_and_extra_spaces_follow_the_model(tmp_path):
    spaced = BASE + piece("▁") + piece("b")
    write(tmp_path, config__json={"model_type": "t5"})
    for flags, want in (({}, "▁a▁b"), ({3: 0}, "a▁b"), ({4: 0}, "▁▁a▁▁b"), ({3: 0, 4: 0}, "▁a▁▁b")):
        normalizer = b"".join(field(number, value) for number, value in flags.items())
        (tmp_path / "spiece.model").write_bytes(spaced + field(3, normalizer))
        assert "".join(tokens(tmp_path, " a  b")[:-1]) == want


# Where transformers and SentencePiece are installed: the same ids as theirs, on real models of every family.


def folder_for(tmp_path, family, **files):
    write(tmp_path, config__json={"model_type": family}, **files)
    return tmp_path


@pytest.mark.parametrize("config", [{}, {"do_lower_case": False}, {"strip_accents": False}])
def test_ids_equal_transformers_for_bert(tmp_path, config):
    transformers = pytest.importorskip("transformers", reason="the reference")
    letters = [chr(c) for c in range(33, 1200) if not chr(c).isspace()]
    vocab = WORDS[:5] + letters + ["##" + c for c in letters if c.isalnum()]
    folder = folder_for(tmp_path, "bert", vocab__txt="\n".join(dict.fromkeys(vocab)), tokenizer_config__json=config)
    assert_same(folder, transformers.BertTokenizer)


def test_ids_equal_transformers_for_roberta(bpe, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the reference")
    shutil.copytree(bpe, tmp_path, dirs_exist_ok=True)
    assert_same(folder_for(tmp_path, "roberta"), transformers.RobertaTokenizer)


@pytest.mark.parametrize(("family", "name", "options"), [
    ("albert", "spiece.model", {"unk_id": 1, "pad_id": 0, "bos_id": -1, "eos_id": -1,
                                "control_symbols": ["[CLS]", "[SEP]", "[MASK]"]}),
    ("t5", "spiece.model", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
    ("xlm-roberta", "sentencepiece.bpe.model", {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}),
    ("deberta-v2", "spm.model", {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "pad_piece": "[PAD]",
                                 "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}),
])  # fmt: skip
def test_ids_equal_transformers_and_sentencepiece(tmp_path, family, name, options):
    transformers = pytest.importorskip("transformers", reason="the reference")
    sentencepiece = pytest.importorskip("sentencepiece", reason="the reference")
    lines = [line for topic in list(prose.topics.values())[:40] for line in topic.split("\n") if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "m"), vocab_size=500, minloglevel=2, **options
    )
    (tmp_path / "m.model").rename(tmp_path / name)
    folder = folder_for(tmp_path, family)
    if family != "deberta-v2":  # transformers 5 leaves out the model's character map there
        classes = {"albert": "AlbertTokenizer", "t5": "T5Tokenizer", "xlm-roberta": "XLMRobertaTokenizer"}
        assert_same(folder, getattr(transformers, classes[family]))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / name))
    shift = int(family == "xlm-roberta")
    texts = [t for t in TEXTS if "[MASK]" not in t and not (family == "albert" and (not t.isascii() or "`" in t))]
    texts = [t.lower() for t in texts] if family == "albert" else texts
    for text, ids in zip(texts, read_tokenizer(folder).encode_batch(texts), strict=True):
        want = [3 if shift and i == 0 else i + shift for i in processor.encode(text)]
        assert ids.tolist() == want, text


def assert_same(folder, theirs):
    ours, theirs = Tokenizer.from_str(read_tokenizer(folder).json), theirs.from_pretrained(folder)
    for a, b in zip(TEXTS, [*TEXTS[3:], "x", "y", "z"], strict=True):
        assert ours.encode(a).ids == theirs(a)["input_ids"], a
        if b:
            assert ours.encode(a, b).ids == theirs(a, b)["input_ids"], (a, b)
