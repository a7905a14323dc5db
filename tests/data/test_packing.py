"""Packing plans: what must hold for any lengths, and what one row holds."""

import collections
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_encoder.data.rows.packing import PackingPlan, length_histogram, pack_histogram, pack_mixed

OVERHEAD = 2
KINDS = ("best-fit", "mixed", "one-per-row", "concatenate")
LENGTHS = st.one_of(
    st.lists(st.integers(1, 9), min_size=1, max_size=40),
    st.lists(st.integers(1, 90), min_size=1, max_size=40),
    st.lists(st.sampled_from([1, 5, 10, 11, 29]), min_size=1, max_size=60),
)
lengths_and_capacity = given(
    LENGTHS, st.integers(3, 31), st.booleans(), st.sampled_from(KINDS), st.integers(0, 5), st.sampled_from([3, 7, 1000])
)
few = settings(max_examples=150, deadline=None, derandomize=True)


def realistic_lengths(num_documents=20_011):
    return np.random.default_rng(0).lognormal(5.0, 1.0, num_documents).astype(int) + 1


def plan_of(lengths, capacity, **options):
    return PackingPlan(offsets_of(lengths), capacity, **options)


def offsets_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def as_rows(pieces):
    """Each row's pieces as a list of (document, start, length)."""
    rows = [[] for _ in range(int(pieces.row.max()) + 1)]
    columns = (pieces.row, pieces.document, pieces.start, pieces.length)
    for row, *piece in zip(*(x.tolist() for x in columns), strict=True):
        rows[row].append(tuple(piece))
    return rows


def times_seen(rows, lengths):
    """How often each token of each document stands in the rows."""
    seen = [np.zeros(n, int) for n in lengths]
    for row in rows:
        for document, start, length in row:
            assert start + length <= lengths[document]
            seen[document][start : start + length] += 1
    return seen


@few
@lengths_and_capacity
def test_every_token_is_in_exactly_one_place_each_epoch(lengths, capacity, split_long, packing, epoch, window):
    split_long |= packing == "concatenate"
    plan = plan_of(lengths, capacity, split_long=split_long, packing=packing, window=window)
    R = plan.rows_per_epoch
    pieces = plan.rows(np.arange(epoch * R, (epoch + 1) * R), seed=11)
    for seen in times_seen(as_rows(pieces), lengths):
        kept = len(seen) if split_long else capacity - OVERHEAD
        assert np.all(seen[:kept] == 1) and not seen[kept:].any()
    begun = np.bincount(pieces.document[pieces.has_first & (pieces.start == 0)], minlength=len(lengths))
    np.testing.assert_array_equal(begun, 1)
    assert len(np.unique(pieces.address)) == R


@few
@lengths_and_capacity
def test_rows_are_never_empty_and_never_exceed_their_room(lengths, capacity, split_long, packing, epoch, window):
    split_long |= packing == "concatenate"
    plan = plan_of(lengths, capacity, split_long=split_long, packing=packing, window=window)
    R = plan.rows_per_epoch
    pieces = plan.rows(np.arange(epoch * R, (epoch + 1) * R), seed=11)
    size = pieces.length + pieces.has_first + pieces.has_last
    used = np.bincount(pieces.row, size, minlength=R)
    assert np.all(np.diff(pieces.row) >= 0) and len(used) == R
    assert used.min() >= 1 and used.max() <= capacity
    per_row = np.bincount(pieces.row)
    if packing == "concatenate":
        assert np.count_nonzero(used < capacity) <= -(-len(lengths) // window)  # each window's last row
        assert per_row.max() <= plan.max_pieces_per_row
    else:
        assert pieces.has_first.all() and pieces.has_last.all() and pieces.length.min() >= 1
        assert plan.fill_rate == pytest.approx(used.sum() / (R * capacity), rel=1e-12)
        assert per_row.max() == plan.max_pieces_per_row
        assert packing != "one-per-row" or plan.max_pieces_per_row == 1


@few
@given(LENGTHS, st.integers(3, 31), st.integers(0, 4), st.integers(0, 10**6), st.integers(1, 90))
def test_a_changed_document_changes_the_rows_of_its_window_only(lengths, capacity, epoch, which, new_length):
    """Of about seven documents: the rest of the epoch keeps its rows, and the addresses they are masked by."""
    which %= len(lengths)
    changed = [new_length if i == which else n for i, n in enumerate(lengths)]
    contents = []
    for these in (lengths, changed):
        plan = plan_of(these, capacity, window=7)
        R = plan.rows_per_epoch
        pieces = plan.rows(np.arange(epoch * R, (epoch + 1) * R), seed=5)
        contents.append({(int(a), tuple(row)) for a, row in zip(pieces.address, as_rows(pieces), strict=True)})
    touched = {piece[0] for _, row in contents[0] ^ contents[1] for piece in row}
    assert len(touched) <= 7


@few
@given(st.lists(st.integers(1, 12_000), min_size=1, max_size=60), st.sampled_from([1, 7, 1000]))
def test_a_length_histogram_counts_the_documents_of_each_window(lengths, window):
    offsets = offsets_of(lengths)
    found = collections.Counter({(w, n): c for w, n, c in length_histogram(offsets, window).T.tolist()})
    plan = PackingPlan(offsets, 31, window=window)
    windows = [plan._documents_of(w) for w in range(-(-len(lengths) // window))]
    assert sorted(np.concatenate(windows).tolist()) == list(range(len(lengths)))
    assert max(map(len, windows)) <= window
    assert found == collections.Counter((w, lengths[d]) for w, some in enumerate(windows) for d in some)


def test_a_plan_from_a_known_histogram_is_the_same_plan():
    lengths = realistic_lengths(997)
    known = plan_of(lengths, 61, histogram=length_histogram(offsets_of(lengths)))
    numbers = np.arange(50)
    assert as_rows(known.rows(numbers, seed=2)) == as_rows(plan_of(lengths, 61).rows(numbers, seed=2))


def test_a_window_is_a_sample_of_the_whole_corpus():
    plan = plan_of(np.full(1000, 8), 10, window=101)
    R = plan.rows_per_epoch
    documents = plan.rows(np.arange(R), seed=0).document.reshape(10, 100)  # one document a row, window after window
    assert np.all(np.ptp(documents, axis=1) > 950)
    period = np.stack([np.bincount(d % 10, minlength=10) for d in documents])  # of a corpus sorted in tens
    assert period.max() < 30
    other = plan.rows(np.arange(R, 2 * R), seed=0).document.reshape(10, 100)
    assert {frozenset(d) for d in documents} == {frozenset(d) for d in other} and not np.array_equal(documents, other)


def test_a_plan_sent_to_another_process_gives_the_same_rows():
    plan = plan_of(realistic_lengths(211), 64, window=50)
    plan.rows(np.arange(3), seed=1)
    numbers = np.arange(2 * plan.rows_per_epoch)
    assert as_rows(pickle.loads(pickle.dumps(plan)).rows(numbers, seed=1)) == as_rows(plan.rows(numbers, seed=1))


def test_concatenated_documents_are_cut_every_row_and_framed_once():
    plan = plan_of([4, 1, 2], 5, packing="concatenate")
    pieces = plan.rows(np.arange(plan.rows_per_epoch), seed=0)
    assert plan.rows_per_epoch == 3  # 4 + 1 + 2 tokens and 3 x 2 special ones, of 15 places
    rows = [[], [], []]
    columns = (pieces.row, pieces.document, pieces.start, pieces.length, pieces.has_first, pieces.has_last)
    for row, document, start, length, first, last in zip(*(c.tolist() for c in columns), strict=True):
        rows[row] += ["["] * first + [(document, start + i) for i in range(length)] + ["]"] * last
    framed = [["[", *[(d, i) for i in range(n)], "]"] for d, n in enumerate([4, 1, 2])]

    def endless(lists):
        return {tuple(itertools.chain.from_iterable(order)) for order in itertools.permutations(lists)}

    assert endless(rows) & endless(framed)
    assert sorted(map(len, rows)) == [3, 5, 5]


@pytest.mark.parametrize("specials", [(0, 1), (0, 0)])
def test_a_tokenizer_without_a_first_or_last_token_leaves_more_room(specials):
    plan = plan_of([11, 12, 25], 12, specials=specials)
    pieces = plan.rows(np.arange(plan.rows_per_epoch), seed=0)
    room = 12 - sum(specials)
    assert pieces.length.max() == room and pieces.length.sum() == 48
    assert plan.fill_rate == pytest.approx((48 + sum(specials) * len(pieces.row)) / (12 * plan.rows_per_epoch))


@few
@given(st.lists(st.integers(0, 23), min_size=2, max_size=14), st.integers(13, 29))
def test_histogram_packing_is_best_fit_decreasing(counts, capacity):
    counts = np.array([0, *counts[1:]])
    recipes = pack_histogram(counts, capacity)
    used = np.zeros_like(counts)
    for times, sizes in recipes:
        assert times > 0 and sizes == sorted(sizes, reverse=True)
        np.add.at(used, sizes, times)
    np.testing.assert_array_equal(used, counts)

    rooms = []  # piece by piece: into the fullest row that has room, else into a new one
    for size in range(len(counts) - 1, 0, -1):
        for _ in range(counts[size]):
            fitting = [room for room in rooms if room >= size]
            if fitting:
                rooms.remove(min(fitting))
            rooms.append((min(fitting) if fitting else capacity) - size)
    assert sorted(rooms) == sorted(capacity - sum(sizes) for times, sizes in recipes for _ in range(times))


@few
@given(st.lists(st.integers(0, 23), min_size=2, max_size=14), st.integers(13, 29))
def test_mixed_packing_has_each_piece_once_and_leaves_no_two_rows_that_fit_one(counts, capacity):
    counts = np.array([0, *counts[1:]])
    used, lengths = np.zeros_like(counts), []
    for times, sizes in pack_mixed(counts, capacity):
        assert times > 0 and sizes == sorted(sizes, reverse=True)
        np.add.at(used, sizes, times)
        lengths += [sum(sizes)] * times
    np.testing.assert_array_equal(used, counts)
    assert max(lengths, default=0) <= capacity
    # A row is begun for a piece that no open row had room for.
    assert sum(sorted(lengths)[:2]) > capacity or len(lengths) < 2


def test_mixed_rows_are_samples_of_all_lengths():
    """Names of three tokens and addresses of twelve: a row of best-fit has one kind, mixed ones have both."""
    lengths = np.random.default_rng(0).permutation([3] * 600 + [12] * 600)
    spread = {}
    for packing in ("best-fit", "mixed"):
        plan = plan_of(lengths, 128, packing=packing)
        pieces = plan.rows(np.arange(plan.rows_per_epoch), seed=0)
        short = np.bincount(pieces.row, pieces.length == 3) / np.bincount(pieces.row)
        spread[packing] = short.std()
        assert plan.fill_rate > 0.97
    assert spread["mixed"] < 0.2 < 0.4 < spread["best-fit"], spread


def test_long_documents_are_cut_into_full_rows_and_a_remainder():
    plan = plan_of([23, 10, 3], 12)
    rows = as_rows(plan.rows(np.arange(plan.rows_per_epoch), seed=0))
    assert sorted(map(sorted, rows)) == [[(0, 0, 10)], [(0, 10, 10)], [(0, 20, 3), (2, 0, 3)], [(1, 0, 10)]]


def test_a_row_does_not_depend_on_the_other_rows_asked_for():
    plan = plan_of(realistic_lengths(997), 128)
    numbers = np.random.default_rng(1).integers(0, 5 * plan.rows_per_epoch, 101)
    together = as_rows(plan.rows(numbers, seed=3))
    assert together == [as_rows(plan.rows(numbers[i : i + 1], seed=3))[0] for i in range(len(numbers))]


def test_epochs_and_seeds_differ_and_a_seed_repeats_itself():
    lengths = np.random.default_rng(0).choice([7, 13, 29, 47], 1009)
    plan = plan_of(lengths, 61)
    first, second = np.arange(plan.rows_per_epoch), np.arange(plan.rows_per_epoch, 2 * plan.rows_per_epoch)
    rows = as_rows(plan.rows(first, seed=3))
    assert rows == as_rows(plan_of(lengths, 61).rows(first, seed=3))
    for other in (as_rows(plan.rows(second, seed=3)), as_rows(plan.rows(first, seed=4))):
        assert sum(a == b for a, b in zip(rows, other, strict=True)) < 0.02 * len(rows)
        mates, other_mates = ({frozenset(row) for row in r if len(row) > 1} for r in (rows, other))
        assert len(mates & other_mates) < 0.05 * len(mates)


def test_the_longest_piece_stands_anywhere_in_its_row():
    plan = plan_of(realistic_lengths(997), 128)
    rows = as_rows(plan.rows(np.arange(plan.rows_per_epoch), seed=0))
    pairs = [row for row in rows if len(row) == 2 and row[0][2] != row[1][2]]
    longest_first = sum(a[2] > b[2] for a, b in pairs)
    assert abs(longest_first - len(pairs) / 2) < 4 * np.sqrt(len(pairs) / 4)


def test_realistic_lengths_fill_at_least_99_percent():
    plan = plan_of(realistic_lengths(), 512)
    pieces = plan.rows(np.arange(plan.rows_per_epoch), seed=0)
    assert (pieces.length + OVERHEAD).sum() / (512 * plan.rows_per_epoch) >= 0.99


def test_no_documents_is_an_error():
    with pytest.raises(ValueError, match="no document"):
        plan_of([], 12)
