"""Tokenizers for models that write: lossless, the same for the same texts, with T5's ids and sentinels."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.byte_pairs import train_byte_pairs

TEXTS = ["Été à la mer, naïve question", "the cat sat on the mat", "the mat  sat", "<pad> is a word"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_pairs(TEXTS, 420)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_every_text_comes_back_from_its_tokens_as_it_was(tokenizer, text):
    ids = tokenizer.encode_batch([text])[0]
    assert tokenizer.decode(ids) == text


def test_the_same_texts_in_any_order_make_the_same_tokenizer(tokenizer):
    assert train_byte_pairs(TEXTS[::-1], 420).json == tokenizer.json


def test_ids_are_t5s(tokenizer):
    assert [tokenizer.id_of(name) for name in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert tokenizer.frame == (None, 1) and tokenizer.special("pad") == 0
    assert len(tokenizer.sentinel_ids) == 100 and tokenizer.sentinel_ids[0] == tokenizer.vocab_size - 1
    written = tokenizer.encode_batch(["the cat"])[0].tolist()
    wrote = [0, *written, 1, tokenizer.vocab_size + 3]
    assert tokenizer.written(np.array(wrote)) == "the cat"


def test_a_vocabulary_that_cannot_hold_the_bytes_is_refused():
    with pytest.raises(DataError, match=r"got data\.vocab_size 300, at least 359 is needed"):
        train_byte_pairs(TEXTS, 300)
