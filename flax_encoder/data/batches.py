"""Batches by their number: rows assembled from a store, with an objective's targets, ready for the device."""

from collections.abc import Callable, Iterator

import grain
import numpy as np

from flax_encoder.config import MaskingConfig
from flax_encoder.data.masking import mask_tokens
from flax_encoder.data.packing import PackingPlan, Pieces
from flax_encoder.data.store import Split
from flax_encoder.data.tokenizer import TextTokenizer

Batch = dict[str, np.ndarray]
# (rows without targets, the pieces in them, the rows' numbers) -> the batch's targets, and its tokens if they change
Targets = Callable[[Batch, Pieces, np.ndarray], Batch]

SPECIAL_PER_PIECE = 2  # [CLS] and [SEP]


def assemble(split: Split, pieces: Pieces, num_rows: int, row_length: int, special: dict[str, int]) -> Batch:
    """Rows of [CLS] piece [SEP] [CLS] piece [SEP] ... and padding.

    Returns:
      tokens, segment_ids (from 1 in each row; 0 is padding) and positions (from 0 in each piece), int32 [B, T].
    """
    lengths = pieces.length + SPECIAL_PER_PIECE
    first_of_row = np.flatnonzero(np.diff(pieces.row, prepend=-1))
    ends = np.cumsum(lengths)
    per_row = np.diff(first_of_row, append=len(lengths))
    row_starts = np.repeat((ends - lengths)[first_of_row], per_row)
    column = ends - lengths - row_starts  # of each piece's first token
    segment = np.arange(len(lengths)) - np.repeat(first_of_row, per_row) + 1

    total = int(lengths.sum())
    position = np.arange(total) - np.repeat(ends - lengths, lengths)
    at = np.repeat(pieces.row * row_length + column, lengths) + position
    source = np.repeat(split.offsets[pieces.document] + pieces.start - 1, lengths) + position
    first, last = ends - lengths, ends - 1
    source[first] += 1  # stay inside the store; these two are overwritten
    source[last] -= 1
    flat = split.tokens[source].astype(np.int32)
    flat[first], flat[last] = special["first"], special["last"]

    batch = {name: np.zeros(num_rows * row_length, np.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["tokens"][:] = special["pad"]
    batch["tokens"][at] = flat
    batch["segment_ids"][at] = np.repeat(segment, lengths)
    batch["positions"][at] = position
    return {name: values.reshape(num_rows, row_length) for name, values in batch.items()}


def masked_lm_targets(tokenizer: TextTokenizer, masking: MaskingConfig, rate: float, seed: int) -> Targets:
    """Targets by dynamic masking: each epoch's rows are masked anew."""
    mask_id, vocab_size, special_ids = tokenizer.special("mask"), tokenizer.vocab_size, tokenizer.special_ids

    def targets(rows: Batch, pieces: Pieces, numbers: np.ndarray) -> Batch:
        return mask_tokens(
            rows["tokens"],
            numbers,
            rate=rate,
            mask_rate=masking.mask_rate,
            random_rate=masking.random_rate,
            mask_id=mask_id,
            vocab_size=vocab_size,
            special_ids=special_ids,
            seed=seed,
        )

    return targets


def label_targets(labels: np.ndarray, max_pieces: int) -> Targets:
    """Targets at each document's first token: its label."""

    def targets(rows: Batch, pieces: Pieces, numbers: np.ndarray) -> Batch:
        shape = (len(numbers), max_pieces)
        batch = {
            "target_positions": np.zeros(shape, np.int32),
            "targets": np.zeros(shape, np.int32),
            "target_weights": np.zeros(shape, np.float32),
        }
        row, column = np.nonzero((rows["positions"] == 0) & (rows["segment_ids"] > 0))
        slot = rows["segment_ids"][row, column] - 1
        batch["target_positions"][row, slot] = column
        batch["targets"][row, slot] = labels[pieces.document]
        batch["target_weights"][row, slot] = 1.0
        return batch

    return targets


class Batches:
    """Random access to batches: number s holds rows [s * batch_size, (s + 1) * batch_size) of the endless row sequence.

    What is in them is a function of (store, seed, s) alone; a process that takes part of each batch, `rows`, makes
    only that part.
    """

    def __init__(
        self, split: Split, plan: PackingPlan, targets: Targets, tokenizer: TextTokenizer, *, row_length: int,
        batch_size: int, seed: int, num_batches: int, rows: slice = slice(None), stop_row: int | None = None,
    ):  # fmt: skip
        self._split, self._plan, self._targets = split, plan, targets
        self._special = {role: tokenizer.special(role) for role in ("pad", "first", "last")}
        self._row_length, self._batch_size, self._seed = row_length, batch_size, seed
        self._num_batches, self._rows, self._stop_row = num_batches, rows, stop_row

    def __len__(self) -> int:
        return self._num_batches

    def __getitem__(self, number: int) -> Batch:
        numbers = np.arange(number * self._batch_size, (number + 1) * self._batch_size)[self._rows]
        real = numbers if self._stop_row is None else numbers[numbers < self._stop_row]
        if not len(real):  # a process whose whole share lies past the last row still takes part
            real = numbers[:1]
        pieces = self._plan.rows(real, self._seed)
        batch = assemble(self._split, pieces, len(real), self._row_length, self._special)
        batch |= self._targets(batch, pieces, real)
        if self._stop_row is not None and self._stop_row <= numbers[-1]:
            batch = {name: _pad_rows(values, len(numbers)) for name, values in batch.items()}
            batch["target_weights"] *= (numbers < self._stop_row)[:, None]
        return batch

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """Batches from number `start` on, made ahead of time by Grain's threads."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        return iter(grain.MapDataset.source(self)[start:].to_iter_dataset(options))


def _pad_rows(values: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(values, [(0, rows - len(values))] + [(0, 0)] * (values.ndim - 1))


def one_pass(plan: PackingPlan, batch_size: int, limit: int | None = None) -> dict[str, int]:
    """`Batches` settings that read every row of epoch 0 once, the last batch filled up with rows of weight 0."""
    batches = -(-plan.rows_per_epoch // batch_size)
    return {"num_batches": batches if limit is None else min(limit, batches), "stop_row": plan.rows_per_epoch}
