"""Batches by their number: rows assembled from stores, with an objective's targets, ready for the device."""

import functools
import logging
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np
from absl import flags

from flax_encoder.config import MaskingConfig
from flax_encoder.data.rows.masking import Vocabulary, mask_rows
from flax_encoder.data.rows.packing import PackingPlan, Pieces
from flax_encoder.data.rows.randomness import permute, random_bits
from flax_encoder.data.rows.span_corruption import Sentinels, corrupt_spans
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.store.store import Split
from flax_encoder.data.tokens.tokenizer import TextTokenizer

Batch = dict[str, np.ndarray]

_LEAST_BLOCK, _MOST_BLOCK = 2**12, 2**30  # rows in which a mixture keeps its weights
_LEAST_SHARE = 64  # of these, rows of each source: a weight is kept to one part in twice as many
_POOL = 64  # batches whose rows are sorted by length together, where rows are of several lengths
_PREFETCH = 4
_THREADS = 2  # NumPy lets go of the interpreter in its large operations: a third more batches than one makes


@dataclass(frozen=True)
class Frame:
    """The ids that are not text: padding, and what stands before and after each document, if anything does."""

    pad: int
    first: int | None
    last: int | None

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> "Frame":
        return cls(tokenizer.special("pad"), *tokenizer.frame)

    @property
    def specials(self) -> tuple[int, int]:
        return int(self.first is not None), int(self.last is not None)

    def around(self, ids: np.ndarray) -> np.ndarray:
        """A document's ids with what stands before and after it."""
        return np.array([i for i in (self.first, *ids, self.last) if i is not None])

    def empty(self, rows: int, row_length: int, *, with_words: bool = False) -> Batch:
        """Rows of padding, for `assemble` to write to."""
        batch: Batch = {name: np.zeros((rows, row_length), np.int32) for name in ("segment_ids", "positions")}
        batch["tokens"] = np.full((rows, row_length), self.pad, np.int32)
        return batch | ({"word_starts": np.ones((rows, row_length), bool)} if with_words else {})


@dataclass(frozen=True)
class Rows:
    """Rows before they have targets; targets are made from this."""

    batch: Batch
    """tokens, segment_ids (from 1 in each row; 0 is padding) and positions (from 0 in each piece), int32 [B, T]."""
    word_starts: np.ndarray | None
    address: np.ndarray
    """A number a row [B] that random choices are drawn from."""
    pieces: Pieces
    number: int
    """The batch's."""


Targets = Callable[[Rows], Batch]


def assemble(split: Split, pieces: Pieces, frame: Frame, batch: Batch, rows: np.ndarray) -> None:
    """Write rows [first] piece [last] [first] piece [last] ... into `batch`, whose arrays [B, T] hold padding.

    Args:
      rows: where in the batch each of the pieces' rows goes.
    """
    T = batch["tokens"].shape[1]
    before = pieces.has_first.astype(np.int64)
    lengths = pieces.length + before + pieces.has_last
    ends = np.cumsum(lengths)
    starts = ends - lengths
    first_of_row = np.flatnonzero(np.diff(pieces.row, prepend=-1))
    per_row = np.diff(first_of_row, append=len(lengths))
    segment = np.arange(len(lengths)) - np.repeat(first_of_row, per_row) + 1
    in_row = starts - np.repeat(starts[first_of_row], per_row)

    flat = np.arange(int(ends[-1]))
    at = flat + np.repeat(rows[pieces.row] * T + in_row - starts, lengths)
    batch["segment_ids"].reshape(-1)[at] = np.repeat(segment.astype(np.int32), lengths)
    batch["positions"].reshape(-1)[at] = flat - np.repeat(starts, lengths)

    begin = split.offsets[pieces.document] + pieces.start - before  # in the store, of what stands at `starts`
    source = flat + np.repeat(begin - starts, lengths)
    is_first, is_last = starts[pieces.has_first], ends[pieces.has_last] - 1
    source[is_first], source[is_last] = 0, 0  # nothing is read for these
    tokens, words = _read(split, source, pieces, lengths, with_words="word_starts" in batch)
    tokens[is_first], tokens[is_last] = frame.first or 0, frame.last or 0
    batch["tokens"].reshape(-1)[at] = tokens
    if words is not None:
        words[is_first] = words[is_last] = True
        batch["word_starts"].reshape(-1)[at] = words


def _read(
    split: Split, source: np.ndarray, pieces: Pieces, lengths: np.ndarray, *, with_words: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """The tokens at `source`, positions in all shards end to end, and whether they begin words."""
    if len(split.tokens) == 1:
        tokens = split.tokens[0][source].astype(np.int32)
        return tokens, _bits(split.words[0], source) if with_words else None
    shard = np.searchsorted(split.shard_starts, split.offsets[pieces.document], side="right") - 1
    tokens = np.empty(len(source), np.int32)
    words = np.empty(len(source), bool) if with_words else None
    for s in np.unique(shard).tolist():
        mine = np.repeat(shard == s, lengths)
        local = np.maximum(source[mine] - split.shard_starts[s], 0)
        tokens[mine] = split.tokens[s][local]
        if words is not None:
            words[mine] = _bits(split.words[s], local)
    return tokens, words


def _bits(packed: np.ndarray, index: np.ndarray) -> np.ndarray:
    return (packed[index >> 3] >> (index & 7).astype(np.uint8) & 1).astype(bool)


def masked_lm_targets(
    tokenizer: TextTokenizer, masking: MaskingConfig, rates: tuple[float, float], slots: int, num_batches: int,
    seed: int,
) -> Targets:  # fmt: skip
    """Targets by dynamic masking: each epoch's rows are masked anew.

    The rate goes straight from rates[0] in the first batch to rates[1] in the last.
    """
    vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.special("mask"), tokenizer.special_ids)
    return functools.partial(_masked_lm_targets, vocabulary, masking, rates, slots, num_batches, seed)


def _masked_lm_targets(vocabulary, masking: MaskingConfig, rates, slots, num_batches, seed, rows: Rows) -> Batch:
    done = min(1.0, rows.number / max(num_batches - 1, 1))
    return mask_rows(
        rows.batch["tokens"], rows.batch["segment_ids"], rows.word_starts, rows.address, vocabulary,
        kind=masking.kind, rate=rates[0] + done * (rates[1] - rates[0]), mask_rate=masking.mask_rate,
        random_rate=masking.random_rate, slots=slots, seed=seed, new_span_rate=1 / masking.mean_span_words,
        max_span_words=masking.max_span_words,
    )  # fmt: skip


def span_corruption_targets(
    tokenizer: TextTokenizer, rate: float, mean_span_tokens: float, row_length: int, slots: int, seed: int
) -> Targets:
    """T5's targets, for an encoder-decoder.

    Raises:
      DataError: the tokenizer has no last token, or fewer sentinels <extra_id_0> ... than a full row has spans.
    """
    ids = tokenizer.sentinel_ids
    if not len(ids) or tokenizer.frame[1] is None:
        raise DataError("T5's spans need a tokenizer with sentinels <extra_id_0>, <extra_id_1> ... and a last token.")
    if (spans := round(rate * row_length / mean_span_tokens)) > len(ids):
        raise DataError(
            f"every span of a row needs its sentinel: a row of {row_length} tokens has up to {spans} spans, the "
            f"tokenizer {len(ids)} sentinels. Take shorter rows, a lower rate or longer spans."
        )
    sentinels = Sentinels(ids, tokenizer.frame[1], tokenizer.special("pad"), tokenizer.special("pad"))
    is_text = np.ones(tokenizer.vocab_size, bool)
    is_text[tokenizer.special_ids] = is_text[ids] = False
    return functools.partial(_span_corruption_targets, sentinels, is_text, rate, mean_span_tokens, slots, seed)


def _span_corruption_targets(sentinels, is_text, rate, mean_span_tokens, slots, seed, rows: Rows) -> Batch:
    tokens = rows.batch["tokens"]
    return corrupt_spans(
        tokens, rows.batch["segment_ids"], is_text[tokens], rows.address, sentinels,
        rate=rate, mean_span_tokens=mean_span_tokens, slots=slots, seed=seed,
    )  # fmt: skip


def label_targets(labels: np.ndarray, max_pieces: int) -> Targets:
    """Targets at each document's first token: its label."""
    return functools.partial(_label_targets, labels, max_pieces)


def _label_targets(labels: np.ndarray, max_pieces: int, rows: Rows) -> Batch:
    shape = (len(rows.address), max_pieces)
    batch = {
        "target_positions": np.zeros(shape, np.int32),
        "targets": np.zeros(shape, np.int32),
        "target_weights": np.zeros(shape, np.float32),
    }
    row, column = np.nonzero((rows.batch["positions"] == 0) & (rows.batch["segment_ids"] > 0))
    slot = rows.batch["segment_ids"][row, column] - 1
    batch["target_positions"][row, slot] = column
    batch["targets"][row, slot] = labels[rows.pieces.document]
    batch["target_weights"][row, slot] = 1.0
    return batch


@dataclass(frozen=True)
class Mixture:
    """The endless sequence of rows that a run reads: which plan each comes from, and its number in that plan.

    In every block of rows each plan has its share, in an order of the block's own; so each keeps its own epochs, and
    any row is found by its number. A block has 4,096 rows, or as many more as the smallest share wants.
    """

    plans: Sequence[PackingPlan]
    weights: Sequence[float]

    @functools.cached_property
    def _block(self) -> int:
        wanted = _LEAST_SHARE * sum(self.weights) / min(self.weights)
        return min(max(_LEAST_BLOCK, 2 ** math.ceil(math.log2(wanted))), _MOST_BLOCK)

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        exact = np.asarray(self.weights, float) / sum(self.weights) * self._block
        rows = np.maximum(1, np.floor(exact)).astype(np.int64)
        for k in np.argsort(np.floor(exact) - exact, kind="stable")[: max(0, self._block - rows.sum())]:
            rows[k] += 1
        rows[np.argmax(rows)] += self._block - rows.sum()
        return np.cumsum(rows)

    def locate(self, numbers: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(plan [B], number in it [B])."""
        if len(self.plans) == 1:
            return np.zeros(len(numbers), np.int64), numbers
        block, inside = np.divmod(numbers, self._block)
        place = permute(inside, self._block, seed, 8, block)
        plan = np.searchsorted(self._ends, place, side="right")
        start, share = (self._ends - np.diff(self._ends, prepend=0))[plan], np.diff(self._ends, prepend=0)[plan]
        return plan, block * share + place - start


@dataclass(frozen=True)
class OneByOne:
    """Every row of epoch 0 of each plan once: what an evaluation reads."""

    plans: Sequence[PackingPlan]

    def __len__(self) -> int:
        return sum(plan.rows_per_epoch for plan in self.plans)

    def locate(self, numbers: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(plan [B], number in it [B]); rows of several plans are shuffled together: any part is a sample of all."""
        ends = np.cumsum([plan.rows_per_epoch for plan in self.plans])
        numbers = numbers % ends[-1]
        if len(self.plans) > 1:
            numbers = permute(numbers, int(ends[-1]), seed, 11)
        plan = np.searchsorted(ends, numbers, side="right")
        return plan, numbers - (ends - np.diff(ends, prepend=0))[plan]


class Batches:
    """Random access to batches: number s holds rows [s * batch_size, (s + 1) * batch_size) of a sequence of rows,
    or with `first` = (number, row) the batches from that number on hold the rows from that row on.

    What is in them is a function of (stores, seed, s) alone; a process that takes part of each batch, `rows`, makes
    only that part.

    Args:
      order: `Mixture` or `OneByOne`, over the plans of `splits`.
      targets: makes an objective's targets, and other tokens if it masks.
      with_words: give `targets` the words' starts.
      buckets: T of a batch is the least of these lengths that its longest row fits; rows of like length then share a
        batch. Empty: every row is `row_length` long.
      stop_row: rows from this number on have weight 0.
    """

    def __init__(
        self, splits: Sequence[Split], order: Mixture | OneByOne, targets: Targets, frame: Frame, *, row_length: int,
        batch_size: int, seed: int, num_batches: int, first: tuple[int, int] = (0, 0), rows: slice = slice(None),
        stop_row: int | None = None, with_words: bool = False, buckets: tuple[int, ...] = (),
    ):  # fmt: skip
        self._splits, self._order, self._targets, self._frame = splits, order, targets, frame
        self._row_length, self._batch_size, self._seed = row_length, batch_size, seed
        self._num_batches, self._rows, self._stop_row = num_batches, rows, stop_row
        self._first_batch, self._first_row = first
        self._with_words, self._buckets = with_words, tuple(sorted({*buckets, row_length})) if buckets else ()
        self._pool: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._num_batches

    def __getitem__(self, number: int) -> Batch:
        numbers, T = self._numbers(number)
        numbers = numbers[self._rows]
        batch = self._frame.empty(len(numbers), T, with_words=self._with_words)
        address = np.zeros(len(numbers), np.uint64)
        for k, rows, pieces in self._pieces(numbers):
            assemble(self._splits[k], pieces, self._frame, batch, rows)
            address[rows] = random_bits(k, pieces.address) if k else pieces.address
        batch |= self._targets(Rows(batch, batch.pop("word_starts", None), address, pieces, number))
        if self._stop_row is not None:
            is_real = numbers < self._stop_row
            batch["target_weights"] *= is_real[:, None]
        return batch

    def _pieces(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray, Pieces]]:
        """For each plan that has some of these rows: its index, which of them are its own, and what is in those."""
        plan, inner = self._order.locate(numbers, self._seed)
        for k in np.unique(plan).tolist():
            mine = np.flatnonzero(plan == k)
            yield k, mine, self._order.plans[k].rows(inner[mine], self._seed)

    def _numbers(self, number: int) -> tuple[np.ndarray, int]:
        """The rows of a batch, and their length T."""
        number -= self._first_batch
        if not self._buckets:
            first = self._first_row + number * self._batch_size
            return np.arange(first, first + self._batch_size), self._row_length
        pool, inside = divmod(number, _POOL)
        # An evaluation, or a stage, ends within a pool; there the pool does too.
        batches = min(_POOL, self._num_batches - self._first_batch - pool * _POOL)
        found = self._pool  # one reading: another thread may put the next one there
        if found is None or found[0] != pool:
            first = self._first_row + pool * _POOL * self._batch_size
            numbers = np.arange(first, first + batches * self._batch_size)
            lengths = np.zeros(len(numbers), np.int64)
            for _, rows, p in self._pieces(numbers):
                np.add.at(lengths, rows[p.row], p.length + p.has_first + p.has_last)
            order = np.argsort(lengths, kind="stable")
            found = self._pool = (pool, numbers[order], lengths[order])
        _, numbers, lengths = found
        at = int(permute(np.array([inside]), batches, self._seed, 9, pool)[0])
        mine = slice(at * self._batch_size, (at + 1) * self._batch_size)
        return numbers[mine], self._buckets[int(np.searchsorted(self._buckets, lengths[mine].max()))]

    def iterate(self, start: int = 0, workers: int = 0) -> Iterator[Batch]:
        """Batches from number `start` on, made ahead of time: by threads, or by Grain's worker processes.

        A worker that dies is replaced, and its batches are made again.

        Raises:
          DataError: workers die again and again before the same batch.
        """
        number, lost_at = start, None
        while True:
            batches = self._iterator(number, workers)
            try:
                for batch in batches:
                    number += 1
                    yield batch
                return
            except RuntimeError as error:
                if "terminated unexpectedly" not in str(error):  # Grain's words for a worker that is gone
                    raise
                if number == lost_at:
                    raise DataError(
                        f"data workers must live to make a batch: one died twice before batch {number}, as for want of "
                        f"memory. Give fewer --data.workers (now {workers}), or 0 for a thread."
                    ) from error
                lost_at = number
                logging.getLogger(__name__).warning("a data worker died before batch %d; it is replaced.", number)
            finally:
                batches.close()

    def _iterator(self, start: int, workers: int) -> grain.DatasetIterator:
        batches = grain.MapDataset.source(self)[start:]
        if not workers:
            ahead = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_PREFETCH)
            return iter(batches.to_iter_dataset(ahead))
        if not flags.FLAGS.is_parsed():  # Grain's workers read their settings from flags, which only absl's main parses
            flags.FLAGS.mark_as_parsed()
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        return iter(batches.to_iter_dataset(ahead).mp_prefetch(options, worker_init_fn=_leave_signals))


def _leave_signals(worker: int, workers: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to answer


@dataclass(frozen=True)
class Stages:
    """A run's batches where their shape changes: each stage makes those from the end of the one before to its own."""

    stages: Sequence[Batches]

    def __len__(self) -> int:
        return len(self.stages[-1])

    def __getitem__(self, number: int) -> Batch:
        return next(batches for batches in self.stages if number < len(batches))[number]

    def iterate(self, start: int = 0, workers: int = 0) -> Iterator[Batch]:
        """All stages' batches from number `start` on; `Batches.iterate` says how."""
        for batches in self.stages:
            if start < len(batches):
                yield from batches.iterate(start, workers)
                start = len(batches)
