"""Rows of pairs: both streams hold whole texts, every pair once, and rows are full."""

import json
import pathlib
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from flax_encoder.data.rows.documents import Documents, Frame, Layout, Written, balanced_length
from flax_encoder.data.rows.packing import Pieces
from flax_encoder.data.rows.pair_packing import PairPlan, pack_pairs
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.store.store import Split
from flax_encoder.data.tokens.byte_pairs import train_byte_pairs

EN_FR = pathlib.Path("~/.cache/flax-encoder-assets/en_fr/pairs.jsonl").expanduser()
CAPACITY = (23, 29)


def drawn_sizes(seed: int, count: int, capacity=CAPACITY) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(1, np.minimum(capacity, rng.integers(2, 30, 2)) + 1, (count, 2))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 200))
def test_each_pair_is_in_one_row_and_neither_stream_overflows(seed, count):
    sizes, counts = np.unique(drawn_sizes(seed, count), axis=0, return_counts=True)
    recipes = pack_pairs(sizes, counts, CAPACITY)
    used = np.zeros(len(sizes), int)
    for times, kinds in recipes:
        assert times > 0 and (sizes[kinds].sum(0) <= CAPACITY).all()
        np.add.at(used, kinds, times)
    np.testing.assert_array_equal(used, counts)


@pytest.mark.parametrize("packing", ["best-fit", "one-per-row"])
@pytest.mark.parametrize("window", [37, 1000])
def test_an_epoch_has_every_pair_once_in_an_order_of_its_own(packing, window):
    sizes = drawn_sizes(1, 150)
    plan = pickle.loads(pickle.dumps(PairPlan(sizes, CAPACITY, (1, 0), packing=packing, window=window)))
    orders = []
    for epoch in range(2):
        numbers = epoch * plan.rows_per_epoch + np.arange(plan.rows_per_epoch)
        pieces: Pieces = plan.rows(numbers, seed=5)
        np.testing.assert_array_equal(np.sort(pieces.document), np.arange(len(sizes)))
        np.testing.assert_array_equal(pieces.length, sizes[pieces.document, 0] - 1)
        assert pieces.has_first.all() and not pieces.has_last.any()
        totals = np.zeros((plan.rows_per_epoch, 2), int)
        np.add.at(totals, pieces.row, sizes[pieces.document])
        assert (totals <= CAPACITY).all()
        np.testing.assert_allclose(plan.fill_rates, totals.sum(0) / (len(totals) * np.array(CAPACITY)))
        assert np.bincount(pieces.row).max() <= plan.max_pieces_per_row
        orders.append(pieces.document.tolist())
    assert orders[0] != orders[1]


def pairs_split(lengths: np.ndarray) -> Split:
    offsets = np.concatenate([[0], np.cumsum(lengths.sum(1))]).astype(np.int64)
    tokens = np.arange(10, 10 + int(lengths.sum())).astype(np.uint32)
    words = np.packbits(np.ones(len(tokens), bool), bitorder="little")
    return Split([tokens], [words], offsets, {"text_lengths": lengths.astype(np.uint32)})


def test_a_target_that_does_not_fit_is_cut_or_left_out_and_counted():
    split, frame = pairs_split(np.array([[3, 4], [30, 2], [2, 9], [1, 5]])), Frame(0, 1, 2)
    cut = Documents(split, Layout(written=Written(6)), frame, 12)
    assert (cut.num_cut, cut.num_left_out, len(cut.source)) == (2, 0, 4)
    left_out = Documents(split, Layout(written=Written(6, leave_out_long=True)), frame, 12)
    assert (left_out.num_cut, left_out.num_left_out, left_out.source.tolist()) == (1, 1, [0, 1, 3])
    with pytest.raises(DataError, match=r"some target must fit a decoder's row: all 4 are longer than 1 tokens\. Give"):
        Documents(split, Layout(written=Written(2, leave_out_long=True)), frame, 12)
    with pytest.raises(DataError, match=r"a target must end.*--decoder\.end-id"):
        Documents(split, Layout(written=Written(6)), Frame(0, None, None), 12)


@pytest.mark.skipif(not EN_FR.exists(), reason="the English-French pairs are not here (shared/assets/fetch.py en_fr)")
@pytest.mark.parametrize("row_length", [64, 256])
def test_rows_of_english_and_french_are_95_percent_full(row_length):
    rows = [json.loads(line) for line in EN_FR.read_text("utf-8").splitlines()]
    texts = [row[name] for row in rows for name in ("en", "fr")]
    tokenizer = train_byte_pairs(texts[::9], 2048)
    split = pairs_split(np.array([len(ids) for ids in tokenizer.encode_batch(texts)]).reshape(-1, 2))
    frame = Frame.of(tokenizer)
    length = balanced_length(split, row_length, frame)
    plan = Documents(split, Layout(written=Written(length)), frame, row_length).plan(row_length)
    assert plan.fill_rate > 0.95 and min(plan.fill_rates) > 0.93
