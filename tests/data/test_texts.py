"""Texts in packed rows: every text once, whole, where its place says, in bounded memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_encoder.data.rows.texts import EncodedText, RowShape, pack_texts

SHAPES = [RowShape(3, 8), RowShape(2, 24)]
PAD = 7


def texts_of(lengths, typed=False):
    """Texts whose tokens differ from each other's and from padding."""
    ends = np.cumsum(lengths)
    tokens = [np.arange(end - n, end, dtype=np.int32) + 10 for n, end in zip(lengths, ends, strict=True)]
    return [EncodedText(ids, ids % 3 if typed and i % 2 else None) for i, ids in enumerate(tokens)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 24), max_size=80), st.sampled_from([1, 4, 8]), st.integers(1, 12), st.booleans())
def test_every_text_is_once_and_whole_where_its_place_says(lengths, alignment, window, typed):
    texts, seen = texts_of(lengths, typed), []
    for packed in pack_texts(texts, SHAPES, PAD, alignment=alignment, window=window):
        batch, shape = packed.batch, packed.batch["tokens"].shape
        assert shape in SHAPES
        used = np.zeros(shape, bool)
        for text, row, segment, start, length in zip(*packed[1:], strict=True):
            place = (row, slice(start, start + length))
            np.testing.assert_array_equal(batch["tokens"][place], texts[text].tokens)
            np.testing.assert_array_equal(batch["positions"][place], np.arange(length))
            types = texts[text].token_types
            np.testing.assert_array_equal(batch["token_types"][place], np.zeros(length) if types is None else types)
            assert (batch["segment_ids"][place] == segment).all() and segment >= 1
            assert batch["target_positions"][row, segment - 1] == start and start % alignment == 0
            assert not used[place].any() and shape[1] == min(s.row_length for s in SHAPES if s.row_length >= length)
            used[place] = True
        assert (batch["tokens"][~used] == PAD).all() and not batch["segment_ids"][~used].any()
        seen += packed.text.tolist()
    assert sorted(seen) == list(range(len(lengths)))


def test_batches_come_while_texts_are_read_and_only_the_last_has_empty_rows():
    lengths = np.random.default_rng(0).integers(1, 9, 500)
    read = 0

    def stream():
        nonlocal read
        for text in texts_of(lengths):
            read += 1
            yield text

    given_back, empty = 0, []
    for packed in pack_texts(stream(), [RowShape(4, 8)], PAD, window=20):
        given_back += len(packed.text)
        assert read - given_back <= 20 + 2 * 4 * 8
        empty.append(int((packed.batch["segment_ids"] == 0).all(1).sum()))
    assert given_back == 500 and not any(empty[:-1])


def test_rows_are_full():
    lengths = np.random.default_rng(1).integers(3, 40, 3000)
    tokens = sum(p.batch["tokens"].size for p in pack_texts(texts_of(lengths), [RowShape(8, 64)], PAD))
    assert lengths.sum() / tokens > 0.98


def test_a_text_that_no_row_holds_is_named():
    with pytest.raises(ValueError, match="a text must have at most 24 tokens: number 1 has 25"):
        list(pack_texts(texts_of([3, 25]), SHAPES, PAD))


def test_an_alignment_divides_row_lengths():
    with pytest.raises(ValueError, match=r"alignment must divide row lengths: got 5 for \[8, 24\]"):
        list(pack_texts(texts_of([3]), SHAPES, PAD, alignment=5))
