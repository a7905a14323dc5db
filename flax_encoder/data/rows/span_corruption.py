"""T5's spans: text with holes, and what was in them, for an encoder-decoder; and UL2's mixture of ways to cut.

Raffel et al., arXiv 1910.10683, section 3.1.4; how spans are drawn is in their code, `random_spans_noise_mask`. Tay et
al., arXiv 2205.05131, section 3.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flax_encoder.data.rows.randomness import random_bits, uniform


@dataclass(frozen=True)
class Sentinels:
    """The ids that stand for holes, in order, and those that are not text."""

    ids: np.ndarray
    last: int
    """Ends every input and every target (T5's </s>)."""
    start: int
    """What the decoder is given first (T5's padding token)."""
    pad: int


class Denoiser(NamedTuple):
    """One way to cut spans out of a document."""

    share: float = 1.0
    """Of the documents, relative to the others'."""
    rate: float = 0.15
    """Of a document's tokens."""
    mean_span_tokens: float | None = 3.0
    """None is one span."""
    mode: tuple[int, ...] = ()
    """The tokens before the first of the text that the encoder reads."""

    def counts(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens that are cut, spans) of documents of n ordinary tokens, int64; none of a document of one."""
        cut = np.clip(np.rint(n * self.rate), 1, np.maximum(n - 1, 1)).astype(np.int64)
        wanted = np.ones(len(n)) if self.mean_span_tokens is None else np.rint(cut / self.mean_span_tokens)
        spans = np.minimum(np.maximum(1, wanted), np.maximum(n - cut, 1)).astype(np.int64)
        return np.where(n > 1, cut, 0), np.where(n > 1, spans, 0)


def draw_denoisers(denoisers: Sequence[Denoiser], key: np.ndarray) -> np.ndarray:
    """The number of each document's denoiser, [documents], by the bits that its draws are made of."""
    shares = np.cumsum([denoiser.share for denoiser in denoisers])
    return np.searchsorted(shares[:-1] / shares[-1], uniform(random_bits(key, 2)), side="right")


def corrupt_spans(
    tokens: np.ndarray, segment_ids: np.ndarray, is_text: np.ndarray, address: np.ndarray, sentinels: Sentinels, *,
    denoisers: Sequence[Denoiser], slots: int, seed: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Cut random spans out of each document; the targets are the spans, each behind the sentinel that replaces it.

    Of a document's n ordinary tokens round(rate * n) are cut, from 1 to n - 1, in round(cut / mean_span_tokens) spans,
    at least one; where spans begin and end is equally likely every way. Text comes first and a span last, so one span
    is always the end. A document of one token is left whole, without targets. Each document draws its denoiser.

    Args:
      tokens, segment_ids: int [B, T], documents left to right as `batches.assemble` makes them.
      is_text: bool [B, T], the ordinary tokens; others are kept where they are.
      address: uint64 [B], which with the seed decides the draws.
      slots: S, the decoder's row. A document whose targets do not fit any more is left whole, and counted; so is one
        whose mode has no room in its row, where little is cut.

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

    first = np.searchsorted(row_of, np.arange(B))
    key = random_bits(seed, 10, address[row_of], np.arange(D) - first[row_of])
    drawn = draw_denoisers(denoisers, key)
    cut, spans = np.array([own.counts(n) for own in denoisers])[drawn, :, np.arange(D)].T
    if (too_many := spans.max(initial=0)) > len(sentinels.ids):
        raise ValueError(f"a document needs {too_many} sentinels, the tokenizer has {len(sentinels.ids)}.")
    needs = np.where(spans > 0, cut + spans + 1, 0)
    left_out = _before(needs, first[row_of]) + needs > slots  # and with it those after it
    mode_lengths = np.array([len(own.mode) for own in denoisers])
    if mode_lengths.any():
        growth = np.where(spans > 0, np.maximum(0, mode_lengths[drawn] + spans - cut), 0)
        free = (T - np.bincount(row, minlength=B))[row_of]
        left_out |= (growth > 0) & (_before(growth, first[row_of]) + growth > free)
    cut, spans, needs = (np.where(left_out, 0, x) for x in (cut, spans, needs))
    overflow = np.bincount(row_of[left_out], minlength=B)

    # Lengths of the spans kept and cut, alternating; then of every text token whether it is cut.
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

    # The encoder's rows: the mode, what is kept, and a sentinel where a span opens.
    shown = ~is_cut | opens
    of_shown = np.where(opens, sentinels.ids[sentinel], tokens[row, column])[shown]
    at, mode = _modes(denoisers, drawn, text, document, spans > 0)
    at = (np.cumsum(shown) - shown)[at]
    out = put_in_rows(*(np.insert(x[shown], at, x[shown][at]) for x in (row, document)), first, B, T, sentinels.pad)
    out.fill(np.insert(of_shown, at, mode))
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


def _before(sizes: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The sum of the sizes of each document's row before it; `first` is the row's first document, of each."""
    before = np.cumsum(sizes) - sizes
    return before - before[first]


def _modes(
    denoisers: Sequence[Denoiser], drawn: np.ndarray, text: np.ndarray, document: np.ndarray, has_mode: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(the tokens before which the modes of documents go, their ids), both [tokens of all modes]."""
    of_text = np.flatnonzero(text)
    first = of_text[np.diff(document[of_text], prepend=-1) != 0]  # of each document with text
    first = first[has_mode[document[first]]]
    modes = [denoisers[number].mode for number in drawn[document[first]].tolist()]
    return np.repeat(first, [len(mode) for mode in modes]).astype(np.int64), np.array(
        [token for mode in modes for token in mode], np.int64
    )


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
