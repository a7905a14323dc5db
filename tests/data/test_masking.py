"""Masked-LM corruption."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_encoder.data.masking import budget, mask_tokens
from flax_encoder.data.randomness import random_bits

SPECIAL_IDS, MASK, VOCAB = np.array([0, 1, 2, 3, 4]), 4, 101
RATES = st.floats(0.01, 1.0)


def random_rows(num_rows, row_length, seed=0):
    """Rows of ordinary tokens, some special ones between them, and padding of any length, a whole row's included."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, VOCAB, (num_rows, row_length))
    tokens[rng.random(tokens.shape) < 0.1] = rng.integers(1, 5)
    tokens[np.arange(row_length) >= rng.integers(0, row_length + 1, (num_rows, 1))] = 0
    return tokens


def mask(tokens, numbers, rate=0.15, seed=7, mask_rate=0.8, random_rate=0.1):
    return mask_tokens(
        tokens, np.asarray(numbers), rate=rate, mask_rate=mask_rate, random_rate=random_rate, mask_id=MASK,
        vocab_size=VOCAB, special_ids=SPECIAL_IDS, seed=seed,
    )  # fmt: skip


def plain_choice(row, number, rate, seed):
    """One row's chosen positions: the ordinary tokens with the smallest draws."""
    ordinary = [t for t, token in enumerate(row) if token not in SPECIAL_IDS]
    by_draw = sorted(ordinary, key=lambda t: int(random_bits(seed, 3, number, t)[0]))
    count = max(1, round(rate * len(ordinary))) if ordinary else 0  # half to even, as NumPy's rint
    return sorted(by_draw[:count])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(RATES, st.integers(1, 43), st.integers(0, 2**31))
def test_choice_equals_a_plain_reference(rate, row_length, seed):
    tokens, numbers = random_rows(7, row_length, seed), np.arange(7) * 1009
    batch = mask(tokens, numbers, rate, seed)
    for b, row in enumerate(tokens):
        used = batch["target_weights"][b] > 0
        expected = plain_choice(row, int(numbers[b]), rate, seed)
        assert batch["target_positions"][b, used].tolist() == expected
        assert batch["targets"][b, used].tolist() == row[expected].tolist()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(RATES, st.integers(1, 43), st.integers(0, 2**31))
def test_targets_are_consistent_and_the_rest_is_untouched(rate, row_length, seed):
    tokens = random_rows(7, row_length, seed)
    batch = mask(tokens, np.arange(7), rate, seed)
    positions, targets, weights = (batch[k] for k in ("target_positions", "targets", "target_weights"))
    assert positions.shape == targets.shape == weights.shape == (7, budget(rate, row_length))
    assert (positions.dtype, targets.dtype, weights.dtype) == (np.int32, np.int32, np.float32)
    assert set(np.unique(weights)) <= {0.0, 1.0}
    assert not targets[weights == 0].any() and not positions[weights == 0].any()
    ordinary = ~np.isin(tokens, SPECIAL_IDS)
    n = ordinary.sum(1)
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


def test_a_mask_is_a_function_of_seed_and_row_number_alone():
    tokens = random_rows(11, 41)
    numbers = np.array([3, 10**12, 5, 0, 8, 9, 77, 2, 1, 4, 6])
    whole = mask(tokens, numbers)
    order = np.random.default_rng(3).permutation(11)
    for subset in (order, order[:3], order[:1]):
        part = mask(tokens[subset], numbers[subset])
        for name, values in part.items():
            np.testing.assert_array_equal(values, whole[name][subset], err_msg=name)
    for other in (mask(tokens, numbers + 1), mask(tokens, numbers, seed=8)):
        assert (other["target_positions"] != whole["target_positions"]).any(1).mean() > 0.5


def test_masking_leaves_its_input_alone():
    tokens = random_rows(5, 29)
    before = tokens.copy()
    mask(tokens, np.arange(5), rate=1.0)
    np.testing.assert_array_equal(tokens, before)
