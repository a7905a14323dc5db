"""T5's spans: text with holes, and what was in them, for an encoder-decoder.

Raffel et al., arXiv 1910.10683, section 3.1.4; how spans are drawn is in their code, `random_spans_noise_mask`.
"""

from dataclasses import dataclass

import numpy as np

from flax_encoder.data.rows.randomness import random_bits


@dataclass(frozen=True)
class Sentinels:
    """The ids that stand for holes, in order, and those that are not text."""

    ids: np.ndarray
    last: int
    """Ends every input and every target (T5's </s>)."""
    start: int
    """What the decoder is given first (T5's padding token)."""
    pad: int


def corrupt_spans(
    tokens: np.ndarray, segment_ids: np.ndarray, is_text: np.ndarray, address: np.ndarray, sentinels: Sentinels, *,
    rate: float, mean_span_tokens: float, slots: int, seed: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Cut random spans out of each document; the targets are the spans, each behind the sentinel that replaces it.

    Of a document's n ordinary tokens round(rate * n) are cut, from 1 to n - 1, in round(cut / mean_span_tokens) spans,
    at least one; where spans begin and end is equally likely every way. Text comes first and a span last, so one span
    is always the end. A document of one token is left whole, without targets.

    Args:
      tokens, segment_ids: int [B, T], documents left to right as `batches.assemble` makes them.
      is_text: bool [B, T], the ordinary tokens; others are kept where they are.
      address: uint64 [B], which with the seed decides the draws.
      slots: S, the decoder's row. A document whose targets do not fit any more is left whole, and counted.

    Returns:
      tokens, segment_ids, positions int32 [B, T], shorter than before and padded; decoder_tokens,
      decoder_segment_ids, decoder_positions, targets int32 [B, S], target_weights float32 [B, S]; overflow int32 [B].
    """
    B, T = tokens.shape
    row, column = np.nonzero(segment_ids)
    document = number_runs(row, segment_ids[row, column])  # numbered through the batch
    D = int(document[-1]) + 1 if len(document) else 0
    row_of = np.zeros(D, np.int64)
    row_of[document] = row
    text = is_text[row, column]
    n = np.bincount(document[text], minlength=D)

    cut = np.clip(np.rint(n * rate), 1, np.maximum(n - 1, 1)).astype(np.int64)
    spans = np.minimum(np.maximum(1, np.rint(cut / mean_span_tokens)), np.maximum(n - cut, 1)).astype(np.int64)
    cut, spans = np.where(n > 1, cut, 0), np.where(n > 1, spans, 0)
    if (too_many := spans.max(initial=0)) > len(sentinels.ids):
        raise ValueError(f"a document needs {too_many} sentinels, the tokenizer has {len(sentinels.ids)}.")
    needs = np.where(spans > 0, cut + spans + 1, 0)
    before = np.cumsum(needs) - needs
    first = np.searchsorted(row_of, np.arange(B))
    left_out = before - before[first[row_of]] + needs > slots  # and with it those after it
    cut, spans, needs = (np.where(left_out, 0, x) for x in (cut, spans, needs))
    overflow = np.bincount(row_of[left_out], minlength=B)

    # Lengths of the spans kept and cut, alternating; then of every text token whether it is cut.
    key = random_bits(seed, 10, address[row_of], np.arange(D) - first[row_of])
    kept = _partition(n - cut, np.maximum(spans, 1), key)
    gone = _partition(cut, spans, random_bits(key, 1))
    owner = np.concatenate([kept.owner, gone.owner])
    order = np.lexsort((np.concatenate([kept.index * 2, gone.index * 2 + 1]), owner))
    lengths = np.concatenate([kept.length, gone.length])[order]
    is_gone_span = np.concatenate([np.zeros(len(kept.length), bool), np.ones(len(gone.length), bool)])[order]
    span_index = np.concatenate([kept.index, gone.index])[order]
    is_cut, opens, sentinel = (np.zeros(len(row), kind) for kind in (bool, bool, np.int64))
    is_cut[text] = np.repeat(is_gone_span, lengths)
    starts = np.zeros(int(lengths.sum()), bool)
    starts[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    opens[text] = starts & is_cut[text]
    sentinel[text] = np.repeat(span_index, lengths)

    # The encoder's rows: what is kept, and a sentinel where a span opens.
    shown = ~is_cut | opens
    out = put_in_rows(row[shown], document[shown], first, B, T, sentinels.pad)
    out.fill(np.where(opens, sentinels.ids[sentinel], tokens[row, column])[shown])
    # The decoder's: sentinel, span, sentinel, span ... and the end.
    which = np.flatnonzero(is_cut)
    opened = np.flatnonzero(opens)
    ended = np.flatnonzero(spans > 0)
    owner = np.concatenate([document[which], document[opened], ended])
    value = np.concatenate([
        tokens[row, column][which], sentinels.ids[sentinel[opened]], np.full(len(ended), sentinels.last)
    ])  # fmt: skip
    place = np.concatenate([2 * which + 1, 2 * opened, np.full(len(ended), 2 * len(row) + 2)])
    order = np.lexsort((place, owner))
    owner, value = owner[order], value[order]
    decoder = put_in_rows(row_of[owner], owner, first, B, slots, sentinels.pad)
    decoder.fill(value)
    given = np.concatenate([[sentinels.start], value[:-1]]) if len(value) else value
    given[np.diff(owner, prepend=-1) != 0] = sentinels.start
    inputs = np.full((B, slots), sentinels.pad, np.int32)
    inputs[decoder.row, decoder.column] = given
    return {
        "tokens": out.tokens, "segment_ids": out.segment_ids, "positions": out.positions,
        "decoder_tokens": inputs, "decoder_segment_ids": decoder.segment_ids, "decoder_positions": decoder.positions,
        "targets": np.where(decoder.segment_ids > 0, decoder.tokens, 0),
        "target_weights": (decoder.segment_ids > 0).astype(np.float32),
        "overflow": overflow.astype(np.int32),
    }  # fmt: skip


def number_runs(row: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """Number the (row, segment) runs from 0."""
    if not len(row):
        return row
    return np.cumsum((np.diff(row, prepend=-1) != 0) | (np.diff(segment, prepend=-1) != 0)) - 1


@dataclass
class _Spans:
    owner: np.ndarray
    index: np.ndarray
    length: np.ndarray


def _partition(items: np.ndarray, parts: np.ndarray, key: np.ndarray) -> _Spans:
    """Cut each document's `items` into `parts` runs of at least one, every way equally likely."""
    owner = np.repeat(np.arange(len(items)), items)
    inside = np.arange(len(owner)) - np.repeat(np.cumsum(items) - items, items)
    draw = random_bits(key[owner], inside)
    # Of the places between items, those with the parts - 1 smallest draws; the first item always begins a run.
    order = np.lexsort((draw, inside > 0, owner))
    rank = np.empty(len(owner), np.int64)
    rank[order] = inside
    begins = rank < parts[owner]
    run = np.cumsum(begins) - 1
    length = np.bincount(run, minlength=int(begins.sum())) if len(run) else np.zeros(0, np.int64)
    run_owner = owner[begins]
    index = np.arange(len(run_owner)) - np.searchsorted(run_owner, run_owner)
    return _Spans(run_owner, index, length)


@dataclass
class _Placed:
    row: np.ndarray
    column: np.ndarray
    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray

    def fill(self, values: np.ndarray) -> None:
        self.tokens[self.row, self.column] = values


def put_in_rows(row: np.ndarray, document: np.ndarray, first: np.ndarray, B: int, T: int, pad: int) -> _Placed:
    """Columns for items that stand in order: each row's from the left, documents numbered from 1 in their row."""
    column = np.arange(len(row)) - np.searchsorted(row, row)
    placed = _Placed(row, column, np.full((B, T), pad, np.int32), *(np.zeros((B, T), np.int32) for _ in range(2)))
    placed.segment_ids[row, column] = document - first[row] + 1
    placed.positions[row, column] = np.arange(len(row)) - np.searchsorted(document, document)
    return placed
