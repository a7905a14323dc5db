"""The tokenizer that is trained here, and those brought along."""

import json

import numpy as np
import pytest

from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.tokenizer import SPECIAL_TOKENS, TextTokenizer, load_tokenizer, train_wordpiece

WORDS = ["padding", "packing", "masking", "tokens", "segment", "Encoder", "decoder", "row", "rows", "batch", "batches",
         "été", "naïve", "42", "(", ")", "."]


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 23))) for _ in range(211)]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_wordpiece(texts, 127)


def test_training_is_a_function_of_the_set_of_texts(texts, tokenizer):
    assert train_wordpiece(texts, 127).json == tokenizer.json
    shuffled = [texts[i] for i in np.random.default_rng(1).permutation(len(texts))]
    assert train_wordpiece(iter(shuffled), 127).json == tokenizer.json


def test_special_tokens_come_first_and_are_the_only_added_ones(tokenizer):
    names = [names[0] for names in SPECIAL_TOKENS.values()]
    assert [tokenizer.token(i) for i in range(5)] == names == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert [tokenizer.special(role) for role in SPECIAL_TOKENS] == tokenizer.special_ids.tolist() == list(range(5))
    assert [t["content"] for t in json.loads(tokenizer.json)["added_tokens"]] == names
    assert 5 < tokenizer.vocab_size <= 127


def test_decode_inverts_encode_up_to_case_and_accents(tokenizer):
    (ids,) = tokenizer.encode_batch(["Encoder rows ÉTÉ batches repacking"])
    assert tokenizer.decode(ids.tolist()) == "encoder rows ete batches repacking"
    assert tokenizer.special("unknown") not in ids


def test_encoding_adds_nothing_and_a_batch_equals_its_texts(texts, tokenizer):
    together = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, together, strict=True):
        (alone,) = tokenizer.encode_batch([text])
        np.testing.assert_array_equal(ids, alone)
    assert not np.isin(np.concatenate(together), tokenizer.special_ids).any()
    assert tokenizer.encode_batch([""])[0].tolist() == []


def test_mask_in_text_is_one_token(tokenizer):
    (ids,) = tokenizer.encode_batch(["padding [MASK] rows"])
    assert (ids == tokenizer.special("mask")).sum() == 1
    (without,) = tokenizer.encode_batch(["padding rows"])
    assert ids[ids != tokenizer.special("mask")].tolist() == without.tolist()


def test_the_smallest_vocabulary_is_the_one_that_the_error_names(texts):
    with pytest.raises(DataError, match=r"vocab_size 29, at least (\d+) is needed") as error:
        train_wordpiece(texts, 29)
    needed = int(str(error.value).split("at least ")[1].split()[0])
    assert train_wordpiece(texts, needed).vocab_size == needed
    with pytest.raises(DataError):
        train_wordpiece(texts, needed - 1)


def test_loading_gives_back_the_tokenizer_and_ignores_its_truncation(texts, tokenizer, tmp_path):
    content = json.loads(tokenizer.json) | {
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        for a, b in zip(load_tokenizer(path).encode_batch(texts), tokenizer.encode_batch(texts), strict=True):
            np.testing.assert_array_equal(a, b)
    assert TextTokenizer(tokenizer.json).hash == tokenizer.hash != load_tokenizer(tmp_path).hash


def test_other_names_of_special_tokens_are_found_and_missing_ones_named(tokenizer):
    renamed = tokenizer.json
    for names in SPECIAL_TOKENS.values():
        renamed = renamed.replace(names[0], names[1])
    assert [TextTokenizer(renamed).special(role) for role in SPECIAL_TOKENS] == list(range(5))
    with pytest.raises(DataError, match=r"no mask token: looked for \[MASK\] and <mask>"):
        TextTokenizer(tokenizer.json.replace("[MASK]", "[BLANK]")).special("mask")


def test_what_is_no_tokenizer_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer at .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json: .*tokenizer\.json"):
        load_tokenizer(tmp_path)
