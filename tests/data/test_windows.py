"""A passage that is longer than a row: windows that overlap, each behind its question, lose none of its tokens."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from flax_encoder.config import ConfigError, DataConfig
from flax_encoder.data.rows.documents import Documents, Frame, Layout, assemble
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.store.store import Split

FRAMES = [Frame(0, 1, 2, (2,)), Frame(0, 1, 2, (2, 2)), Frame(0, None, 2, (2,))]  # BERT's, RoBERTa's and T5's


def split_of(lengths):
    """Documents of two texts whose every token is another number, from 10."""
    lengths = np.array(lengths, np.uint32)
    total = int(lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths.sum(1), dtype=np.int64)])
    words = np.packbits(np.ones(total, bool), bitorder="little")
    return Split([np.arange(10, 10 + total, dtype=np.uint32)], [words], offsets, {"text_lengths": lengths})


def windows_of(documents, row_length):
    """(document, tokens) of each window, as rows have them."""
    plan = documents.plan(row_length)
    numbers = np.arange(plan.rows_per_epoch)
    batch, pieces = documents.frame.empty(len(numbers), row_length), plan.rows(numbers, 0)
    assemble(documents, pieces, batch, numbers)
    found = {}
    for i, (row, document) in enumerate(zip(pieces.row, pieces.document, strict=True)):
        segment = 1 + i - int(np.flatnonzero(pieces.row == row)[0])
        found[int(document)] = batch["tokens"][row][batch["segment_ids"][row] == segment].tolist()
    return [(int(documents.source[d]), found[d]) for d in range(len(found))]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 150)).filter(sum), min_size=1, max_size=7),
    st.integers(7, 60),
    st.floats(0, 1),
    st.sampled_from(FRAMES),
)
def test_windows_hold_every_token_of_a_passage_behind_the_same_question(lengths, row_length, share, frame):
    overlap = int(share * (row_length // 2))
    split = split_of(lengths)
    documents = Documents(split, Layout(long="windows", overlap=overlap), frame, row_length)
    windows = windows_of(documents, row_length)
    assert [d for d, _ in windows] == sorted(d for d, _ in windows)
    first, last = ([] if i is None else [i] for i in (frame.first, frame.last))
    for d, (length, passage_length) in enumerate(lengths):
        tokens = split.document(d).tolist()
        question, passage = tokens[:length], tokens[length:]
        own = [(documents.window_start[i], w) for i, (source, w) in enumerate(windows) if source == d]
        assert max(len(w) for _, w in own) <= row_length
        width = row_length - len(first) - len(frame.between) - len(last)
        kept = length if passage_length + length <= width else min(
            length, max(1, (width - overlap) // 2, width - passage_length))  # fmt: skip
        covered = set()
        for start, window in own:
            begin = [*first, *question[:kept], *frame.between]
            assert window[: len(begin)] == begin and window[len(window) - len(last) :] == last
            inside = window[len(begin) : len(window) - len(last)]
            assert inside == passage[start : start + len(inside)]
            covered |= set(inside)
        assert covered == set(passage)
        starts = [start for start, _ in own]
        steps = np.diff(starts)
        assert (steps == width - kept - min(overlap, width - kept - 1)).all()
        assert len(own) == 1 or (steps > 0).all()


def test_a_question_is_cut_only_where_its_passage_needs_several_windows():
    frame, layout = FRAMES[0], Layout(long="windows", overlap=8)
    documents = Documents(split_of([(20, 5), (20, 6), (3, 90)]), layout, frame, 28)
    assert next(len(w) for _, w in windows_of(documents, 28)) == 28 and documents.num_cut == 1


def test_a_row_that_holds_no_window_is_refused():
    with pytest.raises(DataError, match=r"4 tokens do not hold 2 texts with 3 special tokens\. Give a longer"):
        Documents(split_of([(2, 3)]), Layout(long="windows"), FRAMES[0], 4)


def test_an_overlap_is_at_most_half_of_the_shortest_row():
    DataConfig(row_length=256, window_overlap=128)
    with pytest.raises(ConfigError, match=r"got 128 with rows of 128 tokens\. Give at most 64, or a longer"):
        DataConfig(row_length=128, window_overlap=128)
    with pytest.raises(ConfigError, match=r"got 100 with rows of 64 tokens\. Give at most 32"):
        DataConfig(row_length=256, last_row_length=64, window_overlap=100)
