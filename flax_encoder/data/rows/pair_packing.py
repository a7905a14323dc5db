"""Packing pairs: a document's source goes into a row of one stream, and its target into the same row of another.

A plan of both lengths: rows are packed so that neither stream overflows, by best fit in two dimensions on the histogram
of pairs of lengths. As in `packing`, what stands in which row is an index, the same for the same seed and epoch.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from flax_encoder.data.rows.packing import WINDOW, Packing, Pieces, Recipe, Recipes, RowPlan, Window


def pack_pairs(sizes: np.ndarray, counts: np.ndarray, capacity: tuple[int, int]) -> list[Recipe]:
    """Best-fit decreasing: counts[k] pairs of sizes[k] into rows that hold `capacity` of each.

    The largest pairs come first, by the sum of their shares of a row; each goes where it leaves the least, likewise.

    Args:
      sizes: [K, 2], from 1 to capacity.

    Returns:
      recipes, as (times used, kinds k of their pairs). Each pair is in exactly one row.
    """
    shares = sizes / np.asarray(capacity)
    left = np.array(counts)
    smallest = sizes[left > 0].min(0)
    rooms, open_rows, full = np.zeros((64, 2), np.int64), [], []

    def put(room: np.ndarray, times: int, kinds: list[int]) -> None:
        nonlocal rooms
        if (room < smallest).any():
            full.append((times, kinds))
            return
        if len(open_rows) == len(rooms):
            rooms = np.concatenate([rooms, np.zeros_like(rooms)])
        rooms[len(open_rows)] = room
        open_rows.append((times, kinds))

    for k in np.argsort(-shares.sum(1), kind="stable").tolist():
        size = sizes[k]
        while left[k]:
            fits = np.flatnonzero((rooms[: len(open_rows)] >= size).all(1))
            if not len(fits):  # start rows of this size alone, as many pairs each as fit
                each = min(int((np.asarray(capacity) // size).min()), int(left[k]))
                times = int(left[k]) // each
                put(np.asarray(capacity) - each * size, times, [k] * each)
                left[k] -= times * each
                continue
            at = int(fits[np.argmin((rooms[fits] / capacity).sum(1))])
            room, (times, kinds) = rooms[at].copy(), open_rows[at]
            rooms[at], open_rows[at] = rooms[len(open_rows) - 1], open_rows[-1]
            open_rows.pop()
            used = min(times, int(left[k]))
            put(room - size, used, [*kinds, k])
            if times > used:
                put(room, times - used, kinds)
            left[k] -= used
    return sorted(full + open_rows, key=lambda recipe: recipe[1])


class PairPlan(RowPlan):
    """Random access to rows of pairs; a piece is a whole pair, and its length that of its source.

    Args:
      sizes: [documents, 2], tokens of each source and target, special tokens included.
      capacity: T and S, room of a row of each stream.
      specials: whether special tokens begin and end each source, as (0 or 1, 0 or 1).
      packing: `best-fit`, or `one-per-row`.
    """

    def __init__(
        self, sizes: np.ndarray, capacity: tuple[int, int], specials: tuple[int, int] = (1, 1), *,
        packing: Packing = "best-fit", window: int = WINDOW,
    ):  # fmt: skip
        super().__init__(len(sizes), specials, window)
        # Kinds are numbered from 1, for Window counts documents of kind 0 as empty.
        kinds, kind_of = np.unique(sizes, axis=0, return_inverse=True)
        self._sizes, self._kind_of = np.concatenate([[[0, 0]], kinds]), (kind_of.reshape(-1) + 1).astype(np.uint32)
        pack: Callable[[np.ndarray], list[Recipe]] = lambda counts: pack_pairs(self._sizes, counts, capacity)  # noqa: E731
        if packing == "one-per-row":
            pack = lambda counts: [(int(counts[k]), [k]) for k in np.flatnonzero(counts).tolist()]  # noqa: E731
        self._recipes = []
        for w in range(self._num_windows):
            counts = np.bincount(self._kind_of[self._documents_of(w)], minlength=len(self._sizes))
            self._recipes.append(Recipes(pack(counts), counts))
        self._count_rows([recipes.num_rows for recipes in self._recipes])
        self.max_pieces_per_row = max(recipes.max_pieces for recipes in self._recipes)
        totals = self._sizes[self._kind_of].sum(0)
        self.tokens_per_epoch = int(totals.sum()) - sum(specials) * len(sizes)
        self.fill_rates = tuple((totals / (self.rows_per_epoch * np.asarray(capacity))).tolist())
        """Of each stream."""
        self.fill_rate = float(totals.sum() / (self.rows_per_epoch * sum(capacity)))

    def _make(self, key: tuple[int, ...], seed: int) -> Window:
        documents = self._documents_of(key[0])
        nothing = np.zeros(len(documents), np.int64)
        kinds = self._kind_of[documents]
        return Window(documents, nothing, kinds, nothing, self._recipes[key[0]], len(self._sizes))

    def rows(self, numbers: np.ndarray, seed: int) -> Pieces:
        pieces = super().rows(numbers, seed)
        return replace(pieces, length=self._sizes[pieces.length, 0] - sum(self._specials))
