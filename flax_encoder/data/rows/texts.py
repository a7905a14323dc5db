"""Texts to packed rows, for who asks a model rather than trains it: any stream of texts, few shapes, each text's place.

`pack_texts` deals a stream of token ids to rows of a few lengths and says where in which row each text lies, so that
what a model gives for the rows can be handed back text by text, in the texts' order. What is in a row depends on the
texts alone. Rows are packed by `PackingPlan`, as training's are.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flax_encoder.data.rows.packing import PackingPlan

_WINDOW = 4096  # texts of one row length that are packed together: with more, rows are hardly fuller


class RowShape(NamedTuple):
    """The shape of a batch's arrays [B, T]: one compiled program each."""

    rows: int
    row_length: int


class EncodedText(NamedTuple):
    """A text as a model reads it."""

    tokens: np.ndarray
    """Ids, special tokens included (`Frame.around` puts them), of one piece of text or several."""
    token_types: np.ndarray | None = None
    """As many types, such as 0 for a first sentence and 1 for a second; None is 0 for all."""


class PackedTexts(NamedTuple):
    """A batch of rows, and where each of its texts lies; the latter are arrays [n] over the n texts of the batch."""

    batch: dict[str, np.ndarray]
    """tokens, segment_ids (from 1 in each row; 0 is padding), positions (from 0 in each text) and token_types, int32
    [B, T]; and target_positions, int32 [B, M]: where the row's texts begin, 0 in the place of those it has not. M is as
    many as a row may hold."""
    text: np.ndarray
    """The text's number in the stream, from 0."""
    row: np.ndarray
    segment: np.ndarray
    """The text's number in its row, from 1; target_positions has it in column segment - 1."""
    start: np.ndarray
    """The row's column of the text's first token."""
    length: np.ndarray
    """Tokens; a text of none has a place, and no token there is its own."""


def pack_texts(
    texts: Iterable[EncodedText], shapes: Sequence[RowShape], pad_id: int, *, alignment: int = 1, window: int = _WINDOW
) -> Iterator[PackedTexts]:
    """Batches that hold every text of a stream once, each in the shortest of the rows that it fits.

    At most `window` texts of a shape, and a batch more, wait to be packed together; so memory is bounded. Only the last
    batch of a shape has empty rows.

    Args:
      shapes: with row lengths that differ.
      pad_id: the token of padding.
      alignment: texts begin at multiples of so many columns. What a sum over a row adds up together can depend on the
        column that a text begins in; with an alignment, a text gets the same bits wherever it lies.

    Raises:
      ValueError: a text longer than all rows, with its number in the stream, or an alignment that does not divide the
        row lengths.
    """
    shapes = sorted(shapes, key=lambda shape: shape.row_length)
    if any(shape.row_length % alignment for shape in shapes):
        raise ValueError(f"alignment must divide row lengths: got {alignment} for {[s.row_length for s in shapes]}.")
    longest = [shape.row_length for shape in shapes]
    # What a row holds if all its texts are the shortest that no shorter row takes.
    slots = [n // (before + alignment) for n, before in zip(longest, [0, *longest], strict=False)]
    waiting: list[dict[int, EncodedText]] = [{} for _ in shapes]
    for number, text in enumerate(texts):
        k = int(np.searchsorted(longest, len(text.tokens)))
        if k == len(shapes):
            raise ValueError(f"a text must have at most {longest[-1]} tokens: number {number} has {len(text.tokens)}.")
        waiting[k][number] = text
        if len(waiting[k]) >= window + shapes[k].rows * slots[k]:
            yield from _full_batches(waiting[k], shapes[k], slots[k], pad_id, alignment)
    for shape, most, left in zip(shapes, slots, waiting, strict=True):
        if left:
            yield from _full_batches(left, shape, most, pad_id, alignment, is_last=True)


def _full_batches(
    waiting: dict[int, EncodedText], shape: RowShape, slots: int, pad_id: int, alignment: int, is_last: bool = False
) -> Iterator[PackedTexts]:
    """Packs what waits, and takes it out as it is given away; unless it is the last, what fills no batch stays."""
    numbers = np.fromiter(waiting, np.int64, len(waiting))
    # In units of the alignment.
    sizes = np.array([max(1, -(-len(text.tokens) // alignment)) for text in waiting.values()])
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    plan = PackingPlan(offsets, shape.row_length // alignment, (0, 0), split_long=False)
    stop = plan.rows_per_epoch
    if not is_last:
        stop = stop // shape.rows * shape.rows
    for first in range(0, stop, shape.rows):
        pieces = plan.rows(np.arange(first, min(first + shape.rows, stop)), seed=0)
        size = sizes[pieces.document]
        first_of_row = np.flatnonzero(np.diff(pieces.row, prepend=-1))
        per_row = np.diff(first_of_row, append=len(size))
        in_row = np.arange(len(size)) - np.repeat(first_of_row, per_row)
        ends = np.cumsum(size)
        begins = ends - size
        start = (begins - np.repeat(begins[first_of_row], per_row)) * alignment
        number = numbers[pieces.document]
        texts = [waiting.pop(int(n)) for n in number]
        length = np.array([len(text.tokens) for text in texts])
        batch = _assemble(texts, pieces.row, in_row + 1, start, length, shape, slots, pad_id)
        yield PackedTexts(batch, number, pieces.row, in_row + 1, start, length)


def _assemble(texts, row, segment, start, length, shape, slots, pad_id) -> dict[str, np.ndarray]:
    names = ("tokens", "segment_ids", "positions", "token_types")
    batch = {name: np.zeros(shape, np.int32) for name in names}
    batch["tokens"][:] = pad_id
    inside = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
    at = inside + np.repeat(row * shape.row_length + start, length)
    batch["tokens"].reshape(-1)[at] = np.concatenate([text.tokens for text in texts])
    batch["segment_ids"].reshape(-1)[at] = np.repeat(segment, length)
    batch["positions"].reshape(-1)[at] = inside
    for text, r, begin in zip(texts, row, start, strict=True):
        if text.token_types is not None:
            batch["token_types"][r, begin : begin + len(text.tokens)] = text.token_types
    batch["target_positions"] = np.zeros((shape.rows, slots), np.int32)
    batch["target_positions"][row, segment - 1] = start
    return batch
