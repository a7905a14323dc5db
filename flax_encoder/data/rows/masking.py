"""Which tokens are predicted, and what the model sees in their place: a function of (seed, row).

One mechanism serves every kind. A row is cut into units: tokens, words, or spans of words. Each unit draws a number,
and units are masked in the order of their numbers until the row's share is reached.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from flax_encoder.data.rows.randomness import random_bits, uniform

Kind = Literal["token", "whole_word", "span"]

# What the last unit may need beyond the share, by kind: few words or spans are cut into more pieces.
_ROOM = {"token": 0, "whole_word": 4, "span": 8}
_COLUMN_BITS = 20  # rows have fewer tokens than 2**20; the rest of a key is the draw


def budget(kind: Kind, rate: float, row_length: int, tokens_per_word: float = 1.0) -> int:
    """M, the target slots of a row: enough for `rate` of a row without padding and the rest of its last unit, which is
    longer where words have more tokens."""
    room = _ROOM[kind] * max(1, round(tokens_per_word))
    return max(1, min(row_length, int(np.ceil(rate * row_length)) + room))


@dataclass(frozen=True)
class Vocabulary:
    """What masking knows of a tokenizer."""

    size: int
    mask_id: int
    special_ids: np.ndarray
    """Never predicted and never drawn."""

    def __post_init__(self):
        ordinary = np.ones(self.size, bool)
        ordinary[self.special_ids] = False
        object.__setattr__(self, "ordinary", ordinary)
        object.__setattr__(self, "choices", np.flatnonzero(ordinary).astype(np.int32))


def mask_rows(
    tokens: np.ndarray,
    segment_ids: np.ndarray,
    word_starts: np.ndarray | None,
    address: np.ndarray,
    vocabulary: Vocabulary,
    *,
    kind: Kind,
    rate: float,
    mask_rate: float,
    random_rate: float,
    slots: int,
    seed: int,
    new_span_rate: float = 0.2,
    max_span_words: int = 10,
) -> dict[str, np.ndarray]:
    """Choose about `rate` of each row's ordinary tokens; replace most by [MASK], some by a random token, keep the rest.

    Tokens: Devlin et al., arXiv 1810.04805, section 3.1. Whole words: all pieces of a word or none (their later
    release). Spans: SpanBERT (Joshi et al., arXiv 1907.10529, section 3.1), runs of whole words, their number geometric
    and cut at `max_span_words`; a span is replaced alike throughout.

    Of a row with n ordinary tokens q = round(rate * n) are chosen, at least one. The unit that crosses q is masked
    whole with the probability that makes q the mean. Special tokens, padding among them, are neither chosen nor drawn.

    Args:
      tokens, segment_ids: int [B, T].
      word_starts: bool [B, T], whether a token begins a word; not needed for the kind `token`.
      address: uint64 [B], which with the seed decides the draws.
      slots: M. A unit that would need more is left out, and counted.

    Returns:
      tokens int32 [B, T], and target_positions, targets int32 [B, M], target_weights float32 [B, M]; unused slots have
      weight 0, and positions are in order; M is T where rows are that short. overflow int32 [B]: tokens that the share
      is short of for want of slots.
    """
    B, T = tokens.shape
    slots = min(slots, T)
    maskable = vocabulary.ordinary[tokens]  # type: ignore[attr-defined]
    column = np.arange(T)[None, :]
    row = address[:, None]
    if kind == "token":
        unit = column
    else:
        apart = _apart(maskable, segment_ids)
        starts = word_starts | apart
        if kind == "span":
            starts = _span_starts(starts, apart, row, seed, new_span_rate, max_span_words)
        unit = np.maximum.accumulate(np.where(starts, column, 0), axis=1)
    key = random_bits(seed, 3, row, unit)
    key >>= np.uint64(_COLUMN_BITS)
    key <<= np.uint64(_COLUMN_BITS)
    key |= column.astype(np.uint64)
    key[~maskable] = np.iinfo(np.uint64).max

    # The M smallest keys of each row, in order: units by their draws, a unit's tokens by their columns.
    if slots < T:
        key.partition(slots, axis=1)
    first, beyond = key[:, :slots], key[:, slots] if slots < T else None  # and the next one
    first.sort(axis=1)
    count = maskable.sum(1)
    share = np.where(count > 0, np.maximum(1, np.rint(rate * count)), 0).astype(np.int64)
    if kind == "token":
        chosen_count = np.minimum(share, slots)
        overflow = share - chosen_count
    else:
        chosen_count, overflow = _whole_units(first, beyond, share, row, seed)

    is_chosen = np.arange(slots)[None, :] < chosen_count[:, None]
    found = (first & np.uint64(2**_COLUMN_BITS - 1)).astype(np.int64)
    positions = np.sort(np.where(is_chosen, found, T), axis=1)
    is_chosen = positions < T
    positions = np.where(is_chosen, positions, 0)
    rows = np.broadcast_to(np.arange(B)[:, None], positions.shape)
    targets = tokens[rows, positions]
    fate = uniform(random_bits(seed, 4, row, unit[rows, positions] if kind == "span" else positions))
    choices = vocabulary.choices  # type: ignore[attr-defined]
    random_token = choices[random_bits(seed, 5, row, positions) % np.uint64(len(choices))]
    shown = np.where(fate < mask_rate + random_rate, random_token, targets)
    shown = np.where(fate < mask_rate, vocabulary.mask_id, shown)
    masked = tokens.astype(np.int32)
    masked[rows[is_chosen], positions[is_chosen]] = shown[is_chosen]
    return {
        "tokens": masked,
        "target_positions": positions.astype(np.int32),
        "targets": np.where(is_chosen, targets, 0).astype(np.int32),
        "target_weights": is_chosen.astype(np.float32),
        "overflow": overflow.astype(np.int32),
    }


def _apart(maskable: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """Where a word begins whatever the tokenizer says [B, T]: at a document's start and after a special token."""
    apart = np.ones_like(maskable)
    apart[:, 1:] = ~maskable[:, :-1] | ~maskable[:, 1:] | (segment_ids[:, 1:] != segment_ids[:, :-1])
    return apart


def _span_starts(starts, apart, row, seed, new_span_rate: float, max_span_words: int) -> np.ndarray:
    """Of the words' starts those that begin a span: each does with one probability, so that lengths are geometric."""
    column = np.arange(starts.shape[1])[None, :]
    is_new = apart | (starts & (uniform(random_bits(seed, 6, row, column)) < new_span_rate))
    # The words of a span counted from 0; every max_span_words-th begins another.
    word = np.cumsum(starts, axis=1)
    first_word = np.maximum.accumulate(np.where(is_new, word, 0), axis=1)
    return starts & ((word - first_word) % max_span_words == 0)


def _whole_units(first, beyond, share, row, seed) -> tuple[np.ndarray, np.ndarray]:
    """(tokens to take, tokens short of the share) so that no unit is cut.

    Args:
      first: the smallest keys in order, [B, M]; `beyond` the next one [B], if there is one.
    """
    B, slots = first.shape
    unit = first >> np.uint64(_COLUMN_BITS)
    ends_here = np.ones((B, slots), bool)  # after this token a unit is complete
    ends_here[:, :-1] = unit[:, :-1] != unit[:, 1:]
    if beyond is not None:
        ends_here[:, -1] = unit[:, -1] != beyond >> np.uint64(_COLUMN_BITS)
    after = np.arange(1, slots + 1)
    # How many tokens the whole units up to q take, and up to the end of the unit that crosses it.
    below = np.where(ends_here & (after <= share[:, None]), after, 0).max(axis=1)
    none = slots + 1
    above = np.where(ends_here & (after >= share[:, None]), after, none).min(axis=1)
    draw = uniform(random_bits(seed, 7, row[:, 0]))
    is_left_out = (below < share) & (above == none)  # else above and below make the share on average
    is_taken = (below < share) & ~is_left_out & (draw * (above - below) < share - below)
    return np.where(is_taken, above, below), np.where(is_left_out, share - below, 0)
