"""Packing as an index: which pieces of which documents fill which row, from lengths, seed and epoch alone.

Documents are dealt to windows of about a million, each a sample of the whole corpus, and every window is packed by
itself: so memory is bounded, an epoch starts at once, and a changed document changes the rows of its window only. In a
window, documents of one length are interchangeable to a packer, so only the histogram of lengths is packed (Krell et
al., arXiv 2107.02027): into a few hundred recipes, such as "two pieces of 57 and one of 14", each used many times.
Windows and recipes are the same every epoch; the order of windows, which document fills which slot, and the order of
rows are permutations that the seed and epoch pick. So any row can be asked for by its number, without the others.
"""

import bisect
import collections
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from flax_encoder.data.rows.randomness import permute, random_bits

Packing = Literal["best-fit", "mixed", "one-per-row", "concatenate"]
Recipe = tuple[int, list[int]]
"""How often a row is used, and the kinds of its pieces: their lengths, or of pairs, numbers."""

WINDOW = 2**20  # documents packed together, at most; a window's index takes about 20 MB
_CACHED_WINDOWS = 4
_COUNTED_AT_ONCE = 2**22
_DENSE_LENGTHS = 4096  # lengths below this are counted in a table


@dataclass(frozen=True)
class Pieces:
    """What fills rows: document[i]'s tokens [start[i], start[i] + length[i]), for the row[i]-th row asked for."""

    row: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    has_first: np.ndarray
    """Whether the special token that begins a document stands before the piece ..."""
    has_last: np.ndarray
    """... and the one that ends it after it."""
    address: np.ndarray
    """A number a row [B] that says which row of which epoch it is: what else is random about it is drawn from this."""


def pack_histogram(counts: np.ndarray, capacity: int) -> list[Recipe]:
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


def _turns(first: int, groups: int, num_windows: int) -> np.ndarray:
    """Of each group of neighbours every window takes one document: window w the one at (w + turn) mod windows.

    Turned by random steps, so that text which itself has a period is not sorted into windows by it.
    """
    bits = random_bits(0, np.arange(first, first + groups))
    return (bits % np.uint64(num_windows)).astype(np.uint32)


def length_histogram(offsets: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """How many documents of each length each window has: columns (window, length, count), uint32 [3, entries].

    A store keeps it, so that a plan of any row length is made without a look at the documents.
    """
    documents = len(offsets) - 1
    n = max(1, -(-documents // window))
    dense, sparse = np.zeros(n * _DENSE_LENGTHS, np.int64), collections.Counter()
    step = _COUNTED_AT_ONCE // n * n
    for begin in range(0, documents, step):
        end = min(begin + step, documents)
        lengths = np.diff(offsets[begin : end + 1]).astype(np.uint32)
        groups = -(-(end - begin) // n)
        which = np.arange(n, 2 * n, dtype=np.uint32) - _turns(begin // n, groups, n)[:, None]
        which = np.minimum(which, which - np.uint32(n)).ravel()[: end - begin]  # modulo n: below 0 wraps up
        is_long = lengths >= _DENSE_LENGTHS
        pairs = which[is_long].astype(np.uint64) << np.uint64(32) | lengths[is_long]
        long, count = np.unique(pairs, return_counts=True)
        sparse.update(dict(zip(long.tolist(), count.tolist(), strict=True)))
        key = which * np.uint32(_DENSE_LENGTHS) + lengths
        dense += np.bincount(key[~is_long] if is_long.any() else key, minlength=len(dense))
    at = np.flatnonzero(dense)
    short = np.stack([at // _DENSE_LENGTHS, at % _DENSE_LENGTHS, dense[at]])
    long = np.array([(key >> 32, key % 2**32, count) for key, count in sorted(sparse.items())], np.int64).reshape(-1, 3)
    return np.concatenate([short, long.T], axis=1).astype(np.uint32)


class RowPlan:
    """What every plan has in common: windows of documents, each with an index that is made as it is needed.

    Args:
      documents: how many there are.
      specials: whether a special token begins and ends each piece, as (0 or 1, 0 or 1).
      window: documents packed together, at most.
    """

    rows_per_epoch: int
    max_pieces_per_row: int
    tokens_per_epoch: int
    fill_rate: float
    """Share of all rows that is tokens, special ones included."""

    def __init__(self, documents: int, specials: tuple[int, int], window: int):
        if not documents:
            raise ValueError("there is no document to pack.")
        self._documents, self._specials = documents, specials
        self._num_windows = -(-documents // window)
        self._cache: collections.OrderedDict[tuple, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        """For worker processes: what is made as needed is made there."""
        return self.__dict__ | {"_cache": None, "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state | {"_cache": collections.OrderedDict(), "_lock": threading.Lock()}

    def _count_rows(self, rows: Sequence[int] | np.ndarray) -> None:
        """Take in how many rows each window has."""
        self._window_rows = np.asarray(rows)
        self.rows_per_epoch = int(self._window_rows.sum())

    def _documents_of(self, window: int) -> np.ndarray:
        n = self._num_windows
        if n == 1:
            return np.arange(self._documents)
        groups = -(-self._documents // n)
        documents = np.arange(groups) * n + (np.uint32(window) + _turns(0, groups, n)) % np.uint32(n)
        return documents[documents < self._documents]

    def _key(self, window: int, epoch: int, seed: int) -> tuple[int, ...]:
        """What a window's index depends on, the window first."""
        return (window,)

    def _make(self, key: tuple[int, ...], seed: int) -> Any:
        """The index of a window."""
        raise NotImplementedError

    def _open(self, key: tuple[int, ...], seed: int):
        """The index of a window, made when it is first asked for."""
        with self._lock:
            if key not in self._cache:
                self._cache[key] = self._make(key, seed)
                while len(self._cache) > _CACHED_WINDOWS:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(key)
            return self._cache[key]

    def rows(self, numbers: np.ndarray, seed: int) -> Pieces:
        """The pieces of rows by their number over all epochs: number // rows_per_epoch is the epoch."""
        numbers = np.asarray(numbers)
        epoch, place = np.divmod(numbers, self.rows_per_epoch)
        found = []
        for e in np.unique(epoch).tolist():
            order = np.argsort(random_bits(seed, e, 3, np.arange(self._num_windows)))
            ends = np.cumsum(self._window_rows[order])
            at = np.searchsorted(ends, place, side="right")
            for k in np.unique(at[epoch == e]).tolist():
                window, mine = int(order[k]), np.flatnonzero((epoch == e) & (at == k))
                rows = int(self._window_rows[window])
                inside = permute(place[mine] - (ends[k] - rows), rows, seed, e, 0, window)
                pieces = self._open(self._key(window, e, seed), seed).rows(inside, (seed, e, window))
                address = random_bits(e, window, inside)
                begins, ends_it = map(bool, self._specials)
                pieces = replace(pieces, has_first=pieces.has_first & begins, has_last=pieces.has_last & ends_it)
                found.append(replace(pieces, row=mine[pieces.row], address=address))
        if len(found) == 1:
            return found[0]
        joined = {name: np.concatenate([getattr(p, name) for p in found]) for name in Pieces.__dataclass_fields__}
        order = np.argsort(joined["row"], kind="stable")
        address = np.empty(len(numbers), np.uint64)
        address[np.concatenate([np.unique(p.row) for p in found])] = joined.pop("address")
        return Pieces(**{name: values[order] for name, values in joined.items()}, address=address)

class PackingPlan(RowPlan):
    """Random access to the rows of any epoch.

    Args:
      offsets: [documents + 1], where each document's tokens start and the last one's end; read in passing, not kept in
        memory if it is a memory map.
      row_length: T, room of a row.
      specials: whether a special token begins and ends each piece, as (0 or 1, 0 or 1).
      packing: `best-fit` fills rows with pieces, largest first; `mixed` does so in random order; `one-per-row` gives
        each piece a row of its own; `concatenate` cuts the endless text of all documents, in random order, every T
        tokens.
      split_long: cut a document that no row holds into pieces, full rows and a remainder, with no token lost; or else
        keep its first tokens only, or its last where `truncation_side` is "left".
      window: documents packed together, at most.
      histogram: `length_histogram(offsets)`, if it is known.
    """

    def __init__(
        self, offsets: np.ndarray, row_length: int, specials: tuple[int, int] = (1, 1), *,
        packing: Packing = "best-fit", split_long: bool = True, truncation_side: str = "right", window: int = WINDOW,
        histogram: np.ndarray | None = None,
    ):  # fmt: skip
        super().__init__(len(offsets) - 1, specials, window)
        self._offsets, self._row_length = offsets, row_length
        self._packing, self._split_long, self._keeps_last = packing, split_long, truncation_side == "left"
        if packing == "concatenate" and not split_long:
            raise ValueError("concatenate cuts documents anywhere: split_long must be True.")
        self._overhead = sum(specials)
        self._room = row_length - self._overhead
        if histogram is None or window != WINDOW:
            histogram = length_histogram(offsets, window)
        self._count(histogram)

    def __getstate__(self) -> dict:
        """For worker processes: a memory map goes by its file's name."""
        file = getattr(self._offsets, "filename", None)
        return super().__getstate__() | ({"_offsets": file} if file else {})

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if not isinstance(self._offsets, np.ndarray):
            self._offsets = np.load(self._offsets, mmap_mode="r")

    def _count(self, histogram: np.ndarray) -> None:
        """From each window's histogram of lengths: that of its pieces, its recipes and rows."""
        rest, full = self._histograms(histogram)
        documents, counts = rest.sum(1), rest
        counts[:, 0] = 0  # what is left of a document cut into full rows
        counts[:, self._room] += full
        tokens = counts @ np.arange(self._room + 1)
        if self._packing == "concatenate":
            total = tokens + self._overhead * documents
            self._recipes = [None] * self._num_windows
            rows = -(-total // self._row_length)
            self.max_pieces_per_row = self._row_length
        else:
            self._recipes = [
                Recipes(_length_recipes(c, self._row_length, self._overhead, self._packing), c) for c in counts
            ]
            rows = np.array([r.num_rows for r in self._recipes])
            self.max_pieces_per_row = max(r.max_pieces for r in self._recipes)
            total = tokens + self._overhead * counts.sum(1)
        self._count_rows(rows)
        self.tokens_per_epoch = int(tokens.sum())
        self.fill_rate = float(total.sum() / (self.rows_per_epoch * self._row_length))

    def _histograms(self, histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many documents of each window leave n tokens over [windows, room + 1], and the full rows [windows]."""
        n, room = self._num_windows, self._room
        window, lengths, count = (row.astype(np.int64) for row in histogram)
        full, rest = (x.astype(np.int64) for x in self._cut(lengths))
        counts = np.bincount(window * (room + 1) + rest, count, n * (room + 1)).astype(np.int64)
        return counts.reshape(n, room + 1), np.bincount(window, full * count, n).astype(np.int64)

    def _cut(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(full rows, tokens left over) of documents of these lengths."""
        lengths = lengths.astype(np.uint32)
        if not self._split_long:
            return np.zeros_like(lengths), np.minimum(lengths, self._room)
        full = lengths // np.uint32(self._room)
        return full, lengths - full * np.uint32(self._room)

    def _key(self, window: int, epoch: int, seed: int) -> tuple[int, ...]:
        return (window, epoch, seed) if self._packing == "concatenate" else (window,)

    def _make(self, key: tuple[int, ...], seed: int):
        documents = self._documents_of(key[0])
        lengths = self._offsets[documents + 1] - self._offsets[documents]
        if self._packing == "concatenate":
            return _Concatenated(documents, lengths, self._row_length, self._specials, (seed, 4, *key[:2]))
        full, rest = self._cut(lengths)
        begin = (lengths - rest) * (self._split_long or self._keeps_last)
        return Window(documents, full, rest, begin, self._recipes[key[0]], self._room)


def pack_mixed(counts: np.ndarray, capacity: int) -> list[Recipe]:
    """Best fit in random order on a histogram, as `pack_histogram` but for the order: a row has pieces of all sizes.

    A row that `pack_histogram` starts with a small piece has pieces of that size alone. Where sizes go with kinds of
    documents, so do rows then, and a batch of few rows is no sample of the documents.
    """
    sizes = np.repeat(np.arange(len(counts)), counts)
    sizes = sizes[permute(np.arange(len(sizes)), len(sizes), 0)]
    open_rows: dict[int, list[list[int]]] = {}  # room left -> rows like that
    rooms: list[int] = []  # its keys, in order
    for size in sizes.tolist():
        at = bisect.bisect_left(rooms, size)
        room, row = capacity, []
        if at < len(rooms):
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        row.append(size)
        if room - size not in open_rows:
            bisect.insort(rooms, room - size)
            open_rows[room - size] = []
        open_rows[room - size].append(row)
    rows = (tuple(sorted(row, reverse=True)) for alike in open_rows.values() for row in alike)
    return [(times, list(row)) for row, times in sorted(collections.Counter(rows).items())]


def _length_recipes(counts: np.ndarray, row_length: int, overhead: int, packing: Packing) -> list[Recipe]:
    """Of counts[n] pieces of n tokens and `overhead` special ones."""
    if packing == "one-per-row":
        return [(int(n), [size]) for size, n in enumerate(counts) if n]
    pack = pack_mixed if packing == "mixed" else pack_histogram
    packed = pack(np.concatenate([np.zeros(overhead, int), counts]), row_length)
    return [(times, [s - overhead for s in sizes]) for times, sizes in packed]


class Recipes:
    """How pieces fill rows, as arrays that answer for many rows at once.

    Args:
      counts: pieces of each kind, of which kind 0 has none. What is called a length below is a kind.
    """

    def __init__(self, recipes: list[Recipe], counts: np.ndarray):
        self.bucket_size = counts
        self.bucket_start = np.cumsum(counts) - counts
        self.first_row = np.cumsum([0, *(times for times, _ in recipes)])  # of each recipe
        self.num_rows = int(self.first_row[-1])
        self.width = np.array([len(sizes) for _, sizes in recipes])
        self.max_pieces = int(self.width.max())
        # Slots, all recipes' end to end: a slot's piece length, and how many pieces of it earlier slots use up.
        self.first_slot = np.cumsum(self.width) - self.width
        self.slot_length = np.concatenate([sizes for _, sizes in recipes])
        times = np.repeat(np.diff(self.first_row), self.width)
        by_length = np.argsort(self.slot_length, kind="stable")
        used = np.cumsum(times[by_length]) - times[by_length]
        self.slot_used = np.empty_like(used)
        self.slot_used[by_length] = used - self.bucket_start[self.slot_length[by_length]]


class Window:
    """A window whose pieces stand sorted by kind: the remainders by document, then the full rows' pieces.

    Args:
      begin: where in its document each remainder begins.
    """

    def __init__(
        self, documents: np.ndarray, full: np.ndarray, rest: np.ndarray, begin: np.ndarray, recipes: Recipes, room: int
    ):
        self._recipes = recipes
        order = np.argsort(rest.astype(np.uint16 if room < 2**16 else np.uint32), kind="stable")
        order = order[int(np.count_nonzero(rest == 0)) :]
        self._document, self._start = documents[order], begin[order].astype(np.int64)
        if full.any():
            owners = np.repeat(np.arange(len(documents)), full)
            first_piece = np.cumsum(full, dtype=np.int64) - full
            chunk = np.arange(len(owners)) - first_piece[owners]
            self._document = np.concatenate([self._document, documents[owners]])
            self._start = np.concatenate([self._start, chunk * room])

    def rows(self, place: np.ndarray, address: tuple[int, int, int]) -> Pieces:
        r, (seed, epoch, window) = self._recipes, address
        recipe = np.searchsorted(r.first_row, place, side="right") - 1
        width = r.width[recipe]
        row = np.repeat(np.arange(len(place)), width)
        in_row = np.arange(len(row)) - np.repeat(np.cumsum(width) - width, width)
        slot = r.first_slot[recipe][row] + in_row
        length = r.slot_length[slot]
        # The pieces of one length are dealt to its slots by a permutation of their own each epoch.
        use = r.slot_used[slot] + (place - r.first_row[recipe])[row]
        piece = r.bucket_start[length] + permute(use, r.bucket_size[length], seed, epoch, 1, window, length)
        # Within a row the order is random too, or the longest piece would always stand first.
        order = np.lexsort((random_bits(seed, epoch, 2, window, place[row], in_row), row))
        piece, always = piece[order], np.ones(len(row), bool)
        return Pieces(row, self._document[piece], self._start[piece], length[order], always, always, place)


class _Concatenated:
    """A window whose documents, special tokens included, stand end to end in a random order and are cut every T."""

    def __init__(self, documents, lengths, row_length: int, specials: tuple[int, int], address: tuple[int, ...]):
        order = permute(np.arange(len(documents)), len(documents), *address)
        self._documents, self._lengths = documents[order], lengths[order].astype(np.int64)
        self._ends = np.cumsum(self._lengths + sum(specials))
        self._row_length, self._specials = row_length, specials

    def rows(self, place: np.ndarray, address: tuple[int, int, int]) -> Pieces:
        begin = place * self._row_length
        end = np.minimum(begin + self._row_length, self._ends[-1])
        first = np.searchsorted(self._ends, begin, side="right")
        width = np.searchsorted(self._ends, end, side="left") - first + 1
        row = np.repeat(np.arange(len(place)), width)
        index = np.arange(len(row)) - np.repeat(np.cumsum(width) - width, width) + first[row]
        num_first, num_last = self._specials
        lengths = self._lengths[index]
        starts = self._ends[index] - lengths - num_first - num_last
        low, high = np.maximum(begin[row] - starts, 0), np.minimum(end[row], self._ends[index]) - starts
        start = np.maximum(low - num_first, 0)
        length = np.maximum(np.minimum(high - num_first, lengths) - start, 0)
        has_first, has_last = low < num_first, high > num_first + lengths
        return Pieces(row, self._documents[index], start, length, has_first, has_last, place)
