"""Packing as an index: which pieces of which documents fill which row, from lengths, seed and epoch alone.

Documents of one length are interchangeable to a packer, so only the histogram of lengths is packed (Krell et al.,
arXiv 2107.02027): into a few hundred recipes, such as "two pieces of 57 and one of 14", each used many times. Recipes
are the same every epoch; which document fills which slot, and the order of rows, are permutations that the seed and
epoch pick. So an epoch costs nothing to start, and any row can be asked for by its number, without the others.
"""

import bisect
from dataclasses import dataclass

import numpy as np

from flax_encoder.data.randomness import permute, random_bits


@dataclass(frozen=True)
class Pieces:
    """What fills rows: document[i]'s tokens [start[i], start[i] + length[i]), for the row[i]-th row asked for."""

    row: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray


def pack_histogram(counts: np.ndarray, capacity: int) -> list[tuple[int, list[int]]]:
    """Best-fit decreasing on a histogram: counts[n] pieces of size n into rows of `capacity`.

    Returns:
      recipes, as (times used, sizes, largest first). Each piece is in exactly one row.
    """
    open_rows: dict[int, list[tuple[int, list[int]]]] = {}  # room left -> rows like that
    rooms: list[int] = []  # its keys, in order

    def put(room: int, times: int, sizes: list[int]) -> None:
        if room not in open_rows:
            bisect.insort(rooms, room)
            open_rows[room] = []
        open_rows[room].append((times, sizes))

    for size in range(len(counts) - 1, 0, -1):
        left = int(counts[size])
        while left:
            at = bisect.bisect_left(rooms, size)
            if at == len(rooms):  # start rows of this size alone, as many pieces each as fit
                fit = capacity // size
                times, fit = (left // fit, fit) if left >= fit else (1, left)
                sizes, left = [size] * fit, left - times * fit
                put(capacity - size * fit, times, sizes)
                continue
            room = rooms[at]
            times, sizes = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
            fit = min(room // size, left)
            used = min(times, left // fit)
            left -= used * fit
            put(room - size * fit, used, sizes + [size] * fit)
            if times > used:
                put(room, times - used, sizes)
    return sorted(((t, s) for rows in open_rows.values() for t, s in rows), key=lambda recipe: recipe[1], reverse=True)


class PackingPlan:
    """Random access to the rows of any epoch.

    Args:
      lengths: tokens of each document, at least 1.
      capacity: room of a row.
      overhead: room that a piece takes besides its tokens (its special tokens).
      split_long: cut a document that no row holds into pieces, full rows and a remainder, with no token lost; or else
        keep its first tokens only.
      one_per_row: give each piece a row of its own.
    """

    def __init__(
        self, lengths: np.ndarray, capacity: int, overhead: int, *, split_long: bool = True, one_per_row: bool = False
    ):
        lengths = np.asarray(lengths)
        self._size = room = capacity - overhead
        if not len(lengths):
            raise ValueError("there is no document to pack.")
        full, rest = np.divmod(lengths, room)
        if not split_long:
            full, rest = np.zeros_like(lengths), np.minimum(lengths, room)
        # Pieces of one length stand together in `by_length`: the remainders by document, then the full rows' pieces.
        order = np.argsort(rest.astype(np.uint16 if room < 2**16 else np.int64), kind="stable")
        order = order[np.searchsorted(rest[order], 1) :]
        owners = np.repeat(np.arange(len(lengths)), full)
        self._document = np.concatenate([order, owners])
        first_piece = np.cumsum(full) - full
        chunk = np.concatenate([full[order], np.arange(len(owners)) - np.repeat(first_piece, full)])
        self._start = chunk * room
        self._length = np.concatenate([rest[order], np.full(len(owners), room)])
        counts = np.bincount(self._length, minlength=room + 1)
        self._bucket_start = np.cumsum(counts) - counts
        self._bucket_size = counts
        if one_per_row:
            recipes = [(int(n), [size]) for size, n in enumerate(counts) if n]
        else:
            packed = pack_histogram(np.concatenate([np.zeros(overhead, int), counts]), capacity)
            recipes = [(times, [s - overhead for s in sizes]) for times, sizes in packed]
        self._recipe_rows = np.cumsum([0, *(times for times, _ in recipes)])
        self._recipe_sizes = [np.array(sizes) for _, sizes in recipes]
        self._recipe_slots = self._slots(recipes)
        self.rows_per_epoch = int(self._recipe_rows[-1])
        self.pieces = len(self._length)
        self.max_pieces_per_row = max(len(sizes) for _, sizes in recipes)
        self.fill_rate = float((self._length + overhead).sum() / (self.rows_per_epoch * capacity))

    def _slots(self, recipes) -> list[np.ndarray]:
        """For each recipe and slot: how many pieces of that slot's length earlier recipes and slots use up."""
        used = np.zeros(len(self._bucket_size), np.int64)
        slots = []
        for times, sizes in recipes:
            first = np.empty(len(sizes), np.int64)
            for i, size in enumerate(sizes):
                first[i] = used[size]
                used[size] += times
            slots.append(first)
        return slots

    def rows(self, numbers: np.ndarray, seed: int) -> Pieces:
        """The pieces of rows by their number over all epochs: number // rows_per_epoch is the epoch."""
        numbers = np.asarray(numbers)
        epoch, place = np.divmod(numbers, self.rows_per_epoch)
        place = permute(place, self.rows_per_epoch, seed, epoch, 0)
        recipe = np.searchsorted(self._recipe_rows, place, side="right") - 1
        use = place - self._recipe_rows[recipe]
        sizes = [self._recipe_sizes[r] for r in recipe]
        per_row = np.array([len(s) for s in sizes])
        row = np.repeat(np.arange(len(numbers)), per_row)
        length = np.concatenate(sizes)
        # The pieces of one length are dealt to its slots by a permutation of their own each epoch.
        slot = np.concatenate([self._recipe_slots[r] for r in recipe]) + use[row]
        dealt = permute(slot, self._bucket_size[length], seed, epoch[row], 1, length)
        piece = self._bucket_start[length] + dealt
        # Within a row the order is random too, or the longest piece would always stand first.
        slot_in_row = np.arange(len(row)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
        order = np.lexsort((random_bits(seed, epoch[row], 2, place[row], slot_in_row), row))
        piece = piece[order]
        return Pieces(row, self._document[piece], self._start[piece], self._length[piece])
