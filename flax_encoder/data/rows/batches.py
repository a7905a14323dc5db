"""Batches by their number: rows assembled from stores, with an objective's targets, ready for the device."""

import functools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flax_encoder.data.rows.documents import Batch, Documents, assemble, assemble_targets
from flax_encoder.data.rows.packing import Pieces, RowPlan
from flax_encoder.data.rows.randomness import permute, random_bits
from flax_encoder.data.rows.targets import Rows, Targets
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.workers import serve_parent

_LEAST_BLOCK, _MOST_BLOCK = 2**12, 2**30  # rows in which a mixture keeps its weights
_MOST_LEFT = 2**22
_LEAST_SHARE = 64  # of these, rows of each source: a weight is kept to one part in twice as many
_POOL = 64  # batches whose rows are sorted by length together, where rows are of several lengths
_PREFETCH = 4
_THREADS = 2  # NumPy lets go of the interpreter in its large operations: a third more batches than one makes


@dataclass(frozen=True)
class Mixture:
    """The endless sequence of rows that a run reads: which plan each comes from, and its number in that plan.

    In every block of rows each plan has its share, in an order of the block's own; so each keeps its own epochs, and
    any row is found by its number. A block has 4,096 rows, or as many more as the smallest share wants. A plan of
    weight 0 is not read.
    """

    plans: Sequence[RowPlan]
    weights: Sequence[float]
    left: Sequence[np.ndarray] = ()
    """Numbers of each plan's rows that come before those from `start` on, where another mixture was before this one."""
    start: Sequence[int] = ()

    @functools.cached_property
    def _block(self) -> int:
        wanted = _LEAST_SHARE * sum(self.weights) / min(weight for weight in self.weights if weight > 0)
        return min(max(_LEAST_BLOCK, 2 ** math.ceil(math.log2(wanted))), _MOST_BLOCK)

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        exact = np.asarray(self.weights, float) / sum(self.weights) * self._block
        rows = np.where(exact > 0, np.maximum(1, np.floor(exact)), 0).astype(np.int64)
        for k in np.argsort(np.floor(exact) - exact, kind="stable")[: max(0, self._block - rows.sum())]:
            rows[k] += 1
        rows[np.argmax(rows)] += self._block - rows.sum()
        return np.cumsum(rows)

    def locate(self, numbers: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(plan [B], number in it [B])."""
        if len(self.plans) == 1:
            plan, inner = np.zeros(len(numbers), np.int64), numbers
        else:
            plan, inner = self._locate(numbers, seed)
        for k, (left, first) in enumerate(zip(self.left, self.start, strict=True)):
            own, count = plan == k, len(left)
            is_left = own & (inner < count)
            inner = np.where(own & ~is_left, inner + first - count, inner)
            inner[is_left] = left[inner[is_left]]
        return plan, inner

    def _locate(self, numbers: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        block, inside = np.divmod(numbers, self._block)
        place = permute(inside, self._block, seed, 8, block)
        plan = np.searchsorted(self._ends, place, side="right")
        start, share = (self._ends - np.diff(self._ends, prepend=0))[plan], np.diff(self._ends, prepend=0)[plan]
        return plan, block * share + place - start

    def unread(self, number: int, seed: int) -> tuple[list[np.ndarray], list[int]]:
        """(left, start) of a mixture that goes on with the same plans' rows from row `number` of this one on."""
        if len(self.plans) == 1:
            ended, shares = number, np.ones(1, np.int64)
            plan = inner = np.zeros(0, np.int64)
        else:
            ended, shares = -(-number // self._block), np.diff(self._ends, prepend=0)
            rest = ended * self._block - number  # of a block; what is left of a very large one is passed over
            plan, inner = self.locate(np.arange(number, number + (rest if rest < _MOST_LEFT else 0)), seed)
        before = list(zip(self.left, self.start, strict=True)) or [(np.zeros(0, np.int64), 0)] * len(self.plans)
        reached = [int(ended * share) for share in shares]
        left = [np.concatenate([inner[plan == k], old[reached[k] :]]) for k, (old, _) in enumerate(before)]
        return left, [first + max(0, reached[k] - len(old)) for k, (old, first) in enumerate(before)]


@dataclass(frozen=True)
class OneByOne:
    """Every row of epoch 0 of each plan once: what an evaluation reads."""

    plans: Sequence[RowPlan]

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
      order: `Mixture` or `OneByOne`, over the plans of `documents`.
      targets: makes a task's targets, and other tokens if it masks.
      streams: what `targets` reads of each token besides: `word_starts` or `tags`.
      with_types: whether rows say which text of a pair each token is of, in `token_types`.
      buckets: T of a batch is the least of these lengths that its longest row fits; rows of like length then share a
        batch. Empty: every row is `row_length` long.
      stop_row: rows from this number on have weight 0.
    """

    def __init__(
        self, documents: Sequence[Documents], order: Mixture | OneByOne, targets: Targets, *, row_length: int,
        batch_size: int, seed: int, num_batches: int, first: tuple[int, int] = (0, 0), rows: slice = slice(None),
        stop_row: int | None = None, streams: tuple[str, ...] = (), with_types: bool = False,
        buckets: tuple[int, ...] = (),
    ):  # fmt: skip
        self._documents, self._order, self._targets = documents, order, targets
        self._row_length, self._batch_size, self._seed = row_length, batch_size, seed
        self._num_batches, self._rows, self._stop_row = num_batches, rows, stop_row
        self._first_batch, self._first_row = first
        has_types = with_types and any(d.has_types for d in documents)
        self._streams, self._held = (*streams, *(("token_types",) if has_types else ())), streams
        self._buckets = tuple(sorted({*buckets, row_length})) if buckets else ()
        self._pool: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._num_batches

    @property
    def documents(self) -> Sequence[Documents]:
        return self._documents

    def __getitem__(self, number: int) -> Batch:
        numbers, T = self._numbers(number)
        numbers = numbers[self._rows]
        batch = self._documents[0].frame.empty(len(numbers), T, *self._streams)
        target = self._documents[0].target
        written = None if target is None else target.frame.empty(len(numbers), target.row_length)
        address = np.zeros(len(numbers), np.uint64)
        for k, rows, pieces in self._pieces(numbers):
            assemble(self._documents[k], pieces, batch, rows)
            if written is not None:
                assemble_targets(self._documents[k].target, pieces, written, rows)
            address[rows] = random_bits(k, pieces.address) if k else pieces.address
        held = {name: batch.pop(name) for name in self._held}
        batch |= self._targets(Rows(batch, held.get("word_starts"), held.get("tags"), address, pieces, number, written))
        if self._stop_row is not None:
            is_real = numbers < self._stop_row
            batch["target_weights"] *= is_real[:, None]
            if "owners" in batch:
                batch["owners"][~is_real] = -1
        return batch

    def documents_of(self, number: int) -> list[int]:
        """Numbers of the documents in a batch, each among those of its source."""
        found = self._pieces(self._numbers(number)[0])
        return sorted({int(n) for k, _, p in found for n in self._documents[k].documents(p)})

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

    def _iterator(self, start: int, workers: int) -> Any:
        """Grain's iterator."""
        import grain  # it imports JAX and Orbax where they are, and opening or preparing data needs neither
        from absl import flags

        batches = grain.MapDataset.source(self)[start:]
        if not workers:
            ahead = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_PREFETCH)
            return iter(batches.to_iter_dataset(ahead))
        if not flags.FLAGS.is_parsed():  # Grain's workers read their settings from flags, which only absl's main parses
            flags.FLAGS.mark_as_parsed()
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        return iter(batches.to_iter_dataset(ahead).mp_prefetch(options, worker_init_fn=_start_worker))


def _start_worker(worker: int, workers: int) -> None:
    serve_parent()


@dataclass(frozen=True)
class Stages:
    """A run's batches where their shape changes: each stage makes those from the end of the one before to its own."""

    stages: Sequence[Batches]

    def __len__(self) -> int:
        return len(self.stages[-1])

    def __getitem__(self, number: int) -> Batch:
        return next(batches for batches in self.stages if number < len(batches))[number]

    def documents_of(self, number: int) -> list[int]:
        """Numbers of the documents in a batch, each among those of its source."""
        return next(batches for batches in self.stages if number < len(batches)).documents_of(number)

    def iterate(self, start: int = 0, workers: int = 0) -> Iterator[Batch]:
        """All stages' batches from number `start` on; `Batches.iterate` says how."""
        for batches in self.stages:
            if start < len(batches):
                yield from batches.iterate(start, workers)
                start = len(batches)
