"""Packing plans: what must hold for any lengths, and what one row holds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_encoder.data.packing import PackingPlan, pack_histogram

OVERHEAD = 2
LENGTHS = st.one_of(
    st.lists(st.integers(1, 9), min_size=1, max_size=40),
    st.lists(st.integers(1, 90), min_size=1, max_size=40),
    st.lists(st.sampled_from([1, 5, 10, 11, 29]), min_size=1, max_size=60),
)
lengths_and_capacity = given(LENGTHS, st.integers(3, 31), st.booleans(), st.booleans(), st.integers(0, 5))
few = settings(max_examples=60, deadline=None, derandomize=True)


def realistic_lengths(num_documents=20_011):
    return np.random.default_rng(0).lognormal(5.0, 1.0, num_documents).astype(int) + 1


def plan_of(lengths, capacity, **options):
    return PackingPlan(np.asarray(lengths, np.int64), capacity, OVERHEAD, **options)


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
def test_every_token_is_in_exactly_one_place_each_epoch(lengths, capacity, split_long, one_per_row, epoch):
    plan = plan_of(lengths, capacity, split_long=split_long, one_per_row=one_per_row)
    R = plan.rows_per_epoch
    rows = as_rows(plan.rows(np.arange(epoch * R, (epoch + 1) * R), seed=11))
    for seen in times_seen(rows, lengths):
        kept = len(seen) if split_long else capacity - OVERHEAD
        assert np.all(seen[:kept] == 1) and not seen[kept:].any()


@few
@lengths_and_capacity
def test_rows_are_never_empty_and_never_exceed_capacity(lengths, capacity, split_long, one_per_row, epoch):
    plan = plan_of(lengths, capacity, split_long=split_long, one_per_row=one_per_row)
    R = plan.rows_per_epoch
    rows = as_rows(plan.rows(np.arange(epoch * R, (epoch + 1) * R), seed=11))
    used = [sum(length + OVERHEAD for *_, length in row) for row in rows]
    assert len(rows) == R and sum(map(len, rows)) == plan.pieces
    assert min(length for row in rows for *_, length in row) >= 1
    assert max(used) <= capacity
    assert plan.fill_rate == pytest.approx(sum(used) / (R * capacity), rel=1e-12)
    assert max(map(len, rows)) == plan.max_pieces_per_row
    assert not one_per_row or plan.max_pieces_per_row == 1


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
