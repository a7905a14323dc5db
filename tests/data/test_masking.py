"""Masked-LM corruption."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_encoder.data.rows.masking import Vocabulary, budget, mask_rows
from flax_encoder.data.rows.randomness import random_bits, uniform

SPECIAL_IDS, MASK, VOCAB = np.array([0, 1, 2, 3, 4]), 4, 101
RATES = st.floats(0.01, 1.0)
KINDS = st.sampled_from(["token", "whole_word", "span"])
NEW_SPAN, MAX_SPAN = 0.2, 3


def random_rows(num_rows, row_length, seed=0):
    """Rows of ordinary tokens, some special ones between them, and padding of any length, a whole row's included."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, VOCAB, (num_rows, row_length))
    tokens[rng.random(tokens.shape) < 0.1] = rng.integers(1, 5)
    tokens[np.arange(row_length) >= rng.integers(0, row_length + 1, (num_rows, 1))] = 0
    return tokens


def random_words(tokens, seed=0):
    """(segment_ids, word_starts) for rows of tokens."""
    rng = np.random.default_rng(seed)
    segments = 1 + np.cumsum(rng.random(tokens.shape) < 0.1, axis=1)
    return np.where(tokens == 0, 0, segments), rng.random(tokens.shape) < 0.6


def mask(tokens, address, rate=0.15, seed=7, mask_rate=0.8, random_rate=0.1, kind="token", slots=None, words_seed=0):
    segments, starts = random_words(tokens, words_seed)
    return mask_rows(
        tokens, segments, starts, np.asarray(address).astype(np.uint64), Vocabulary(VOCAB, MASK, SPECIAL_IDS),
        kind=kind, rate=rate, mask_rate=mask_rate, random_rate=random_rate,
        slots=slots or budget(kind, rate, tokens.shape[1]), seed=seed, new_span_rate=NEW_SPAN, max_span_words=MAX_SPAN,
    )  # fmt: skip


def plain_units(row, segments, starts, kind, address, seed):
    """One row's units as lists of columns, token by token."""
    units, words = [], 0
    for t, token in enumerate(row):
        if token in SPECIAL_IDS:
            continue
        is_apart = t == 0 or row[t - 1] in SPECIAL_IDS or segments[t] != segments[t - 1]  # then any unit ends
        begins_word = is_apart or starts[t]
        begins = kind == "token" or begins_word
        if kind == "span" and begins_word:
            drawn = uniform(random_bits(seed, 6, address, t))[0] < NEW_SPAN
            begins = is_apart or drawn or words == MAX_SPAN
            words = 1 if begins else words + 1
        if begins or not units:
            units.append([])
        units[-1].append(t)
    return units


def plain_choice(row, segments, starts, kind, address, rate, slots, seed):
    """One row's chosen columns, and the tokens that they are short of the share for want of slots."""
    units = plain_units(row, segments, starts, kind, address, seed)
    n = sum(map(len, units))
    share = max(1, round(rate * n)) if n else 0  # half to even, as NumPy's rint
    chosen = []
    for unit in sorted(units, key=lambda u: int(random_bits(seed, 3, address, u[0])[0])):
        if len(chosen) + len(unit) > share:  # the unit that crosses: whole or not, so that the mean is the share
            if len(chosen) + len(unit) > slots:
                return sorted(chosen), share - len(chosen)
            if uniform(random_bits(seed, 7, address))[0] * len(unit) < share - len(chosen):
                chosen += unit
            return sorted(chosen), 0
        chosen += unit
        if len(chosen) == share:
            break
    return sorted(chosen), 0


@settings(max_examples=120, deadline=None, derandomize=True)
@given(KINDS, RATES, st.integers(1, 43), st.integers(0, 2**31), st.booleans())
def test_choice_equals_a_plain_reference(kind, rate, row_length, seed, is_tight):
    tokens, address = random_rows(7, row_length, seed), np.arange(7) * 1009
    # Special tokens inside a word or span: a unit ends there.
    slots = max(1, int(np.ceil(rate * row_length))) if is_tight else budget(kind, rate, row_length)
    batch = mask(tokens, address, rate, seed, kind=kind, slots=slots, words_seed=seed)
    segments, starts = random_words(tokens, seed)
    for b, row in enumerate(tokens):
        used = batch["target_weights"][b] > 0
        expected, left_out = plain_choice(row, segments[b], starts[b], kind, int(address[b]), rate, slots, seed)
        assert batch["target_positions"][b, used].tolist() == expected
        assert batch["targets"][b, used].tolist() == row[expected].tolist()
        assert batch["overflow"][b] == left_out


@settings(max_examples=80, deadline=None, derandomize=True)
@given(KINDS, RATES, st.integers(1, 43), st.integers(0, 2**31))
def test_targets_are_consistent_and_the_rest_is_untouched(kind, rate, row_length, seed):
    tokens = random_rows(7, row_length, seed)
    batch = mask(tokens, np.arange(7), rate, seed, kind=kind)
    positions, targets, weights = (batch[k] for k in ("target_positions", "targets", "target_weights"))
    assert positions.shape == targets.shape == weights.shape == (7, budget(kind, rate, row_length))
    assert (positions.dtype, targets.dtype, weights.dtype) == (np.int32, np.int32, np.float32)
    assert set(np.unique(weights)) <= {0.0, 1.0}
    assert not targets[weights == 0].any() and not positions[weights == 0].any()
    ordinary = ~np.isin(tokens, SPECIAL_IDS)
    n = ordinary.sum(1)
    if kind == "token":
        np.testing.assert_array_equal(weights.sum(1), np.where(n, np.maximum(1, np.rint(rate * n)), 0))

    row, _ = np.nonzero(weights)
    column = positions[weights > 0]
    chosen = np.zeros(tokens.shape, bool)
    chosen[row, column] = True
    assert chosen.sum() == weights.sum()  # none twice
    assert not (chosen & ~ordinary).any()
    np.testing.assert_array_equal(targets[weights > 0], tokens[row, column])
    np.testing.assert_array_equal(batch["tokens"][~chosen], tokens[~chosen])
    shown = batch["tokens"][chosen]
    assert np.all((shown == MASK) | ~np.isin(shown, SPECIAL_IDS))


@pytest.mark.parametrize("kind", ["token", "whole_word", "span"])
@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_the_realised_rate_is_the_rate_asked_for(kind, rate):
    """Over many rows; each row's own share is a whole number near it, so the mean's error shrinks as 1 / sqrt(rows)."""
    B, T = 4001, 97
    tokens = np.full((B, T), 5)
    batch = mask(tokens, np.arange(B), rate, kind=kind, slots=T)
    taken = batch["target_weights"].sum(1)
    assert not batch["overflow"].any()
    assert abs(taken.mean() - np.rint(rate * T)) < 4.5 * taken.std() / np.sqrt(B) + 1e-9
    assert kind == "token" or taken.std() > 0.3


def test_a_whole_words_pieces_go_together_and_a_spans_fate_is_one():
    tokens = random_rows(211, 41)
    segments, starts = random_words(tokens)
    for kind in ("whole_word", "span"):
        batch = mask(tokens, np.arange(211), 0.3, kind=kind)
        fates = {}
        for b in range(211):
            used = batch["target_weights"][b] > 0
            chosen = set(batch["target_positions"][b, used].tolist())
            for unit in plain_units(tokens[b], segments[b], starts[b], kind, b, 7):
                assert len(chosen & set(unit)) in (0, len(unit))
                if kind == "span" and len(unit) > 1 and unit[0] in chosen:
                    shown = batch["tokens"][b, unit]
                    is_mask, is_kept = np.all(shown == MASK), np.all(shown == tokens[b, unit])
                    assert is_mask or is_kept or not (shown == MASK).any()
                    fates[bool(is_mask)] = fates.get(bool(is_mask), 0) + 1
        assert kind == "whole_word" or (fates[True] > 2 * fates[False] > 0)


def test_span_lengths_are_geometric_and_cut():
    T = 1024
    tokens = np.full((16, T), 5)
    units = [
        unit
        for b in range(16)
        for unit in plain_units(tokens[b], np.ones(T, int), np.ones(T, bool), "span", b, 7)
    ]
    lengths = np.bincount([len(u) for u in units], minlength=5)
    assert lengths[MAX_SPAN] > 0 and not lengths[MAX_SPAN + 1 :].any()
    n = lengths.sum()
    for length in (1, 2):
        share = NEW_SPAN * (1 - NEW_SPAN) ** (length - 1)
        # A cut span goes on as another, whose lengths are drawn alike.
        assert abs(lengths[length] - share * n) < 4.5 * np.sqrt(n * share)


def test_shares_are_those_asked_for_and_all_positions_and_tokens_equally_likely():
    B, T = 4001, 53
    tokens = np.full((B, T), 5)
    batch = mask(tokens, np.arange(B), rate=0.3)
    shown = np.take_along_axis(batch["tokens"], batch["target_positions"], 1)
    n = shown.size
    assert n == B * round(0.3 * T)
    others = VOCAB - len(SPECIAL_IDS)
    shares = {MASK: 0.8, 5: 0.1 + 0.1 / others} | dict.fromkeys(range(6, VOCAB), 0.1 / others)
    for token, share in shares.items():
        assert abs((shown == token).sum() - share * n) < 4.5 * np.sqrt(n * share * (1 - share)), token
    random_share = 0.1 * (1 - 1 / others)
    assert abs(((shown != MASK) & (shown != 5)).sum() - random_share * n) < 4 * np.sqrt(n * random_share)
    share = round(0.3 * T) / T
    chosen = np.bincount(batch["target_positions"].ravel(), minlength=T)
    assert np.all(np.abs(chosen - share * B) < 4.5 * np.sqrt(B * share * (1 - share)))


@pytest.mark.parametrize(("mask_rate", "random_rate"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_extreme_shares_do_one_thing_only(mask_rate, random_rate):
    tokens = random_rows(13, 37)
    batch = mask(tokens, np.arange(13), 0.5, mask_rate=mask_rate, random_rate=random_rate)
    used = batch["target_weights"] > 0
    shown = np.take_along_axis(batch["tokens"], batch["target_positions"], 1)[used]
    if mask_rate:
        assert np.all(shown == MASK)
    elif random_rate:
        assert not np.isin(shown, SPECIAL_IDS).any() and (shown != batch["targets"][used]).mean() > 0.9
    else:
        np.testing.assert_array_equal(batch["tokens"], tokens)


@pytest.mark.parametrize("kind", ["token", "whole_word", "span"])
def test_a_mask_is_a_function_of_seed_and_address_alone(kind):
    tokens = random_rows(11, 41)
    address = np.array([3, 10**12, 5, 0, 8, 9, 77, 2, 1, 4, 6], np.uint64)
    segments, starts = random_words(tokens)
    vocabulary = Vocabulary(VOCAB, MASK, SPECIAL_IDS)

    def of(rows, address, seed=7):
        return mask_rows(
            tokens[rows], segments[rows], starts[rows], address, vocabulary,
            kind=kind, rate=0.2, mask_rate=0.8, random_rate=0.1, slots=14, seed=seed,
        )  # fmt: skip

    order = np.random.default_rng(3).permutation(11)
    whole = of(np.arange(11), address)
    for subset in (order, order[:3], order[:1]):
        part = of(subset, address[subset])
        for name, values in part.items():
            np.testing.assert_array_equal(values, whole[name][subset], err_msg=name)
    for other in (of(np.arange(11), address + np.uint64(1)), of(np.arange(11), address, seed=8)):
        assert (other["target_positions"] != whole["target_positions"]).any(1).mean() > 0.5


def test_masking_leaves_its_input_alone():
    tokens = random_rows(5, 29)
    before = tokens.copy()
    mask(tokens, np.arange(5), rate=1.0)
    np.testing.assert_array_equal(tokens, before)


@pytest.mark.parametrize("kind", ["whole_word", "span"])
def test_overflow_is_what_is_missing_and_long_words_have_their_room(kind):
    """Words of six tokens, as of digits: what is masked and what is said to be short make the share."""
    B, T, rate = 4000, 128, 0.15
    tokens, segments, starts = np.full((B, T), 9), np.ones((B, T), int), np.zeros((B, T), bool)
    starts[:, ::6] = True
    asked, masked = B * round(rate * T), {}
    for slots in (budget(kind, rate, T), budget(kind, rate, T, 6.0)):
        batch = mask_rows(
            tokens, segments, starts, np.arange(B, dtype=np.uint64), Vocabulary(VOCAB, MASK, SPECIAL_IDS), kind=kind,
            rate=rate, mask_rate=0.8, random_rate=0.1, slots=slots, seed=0,
        )  # fmt: skip
        masked[slots] = int(batch["target_weights"].sum())
        assert abs(asked - masked[slots] - int(batch["overflow"].sum())) < 0.01 * asked
    assert max(masked.values()) > 0.98 * asked  # a span of ten words of six tokens has no room even so
