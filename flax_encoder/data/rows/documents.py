"""Documents as rows hold them: which texts stand together, what stands between them, and what is cut.

A document of one text is one segment of a row: first, text, last. A pair is one segment too: first, text, between,
text, last. A choice is a segment of its own: of a context and n choices, n segments that do not see each other. Texts
that are compared are segments of their own too; where a document has one text alone, that text is there twice. What a
decoder writes stands in a row of its own, beside that of the encoder: text, end.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from flax_encoder.data.rows.packing import Packing, PackingPlan, Pieces, RowPlan, length_histogram
from flax_encoder.data.rows.pair_packing import PairPlan
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.store.store import Split
from flax_encoder.data.tokens.tokenizer import TextTokenizer

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Frame:
    """The ids that are not text: padding, what stands before and after each segment, if anything does, and what stands
    between two texts of one."""

    pad: int
    first: int | None
    last: int | None
    between: tuple[int, ...] = ()
    skips_pad: bool = False
    """Positions do not count the padding's id, also where a text spells it, as RoBERTa's don't."""
    truncation_side: str = "right"
    """"right" or "left": where a text that is cut loses tokens."""

    @classmethod
    def of(cls, tokenizer: TextTokenizer, position_offset: int = 0) -> "Frame":
        """Of a model whose positions begin at `position_offset`: if that is after the padding's id, they skip it."""
        pad = tokenizer.special("pad")
        skips_pad = position_offset > 0 and pad == position_offset - 1
        return cls(pad, *tokenizer.frame, tokenizer.between, skips_pad, tokenizer.truncation_side)

    @property
    def specials(self) -> tuple[int, int]:
        return int(self.first is not None), int(self.last is not None)

    def around(self, ids: np.ndarray) -> np.ndarray:
        """A document's ids with what stands before and after it."""
        return np.array([i for i in (self.first, *ids, self.last) if i is not None])

    def positions(self, tokens: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Each token's place in its segment as the model counts it, int32 [B, T]; -1 at a padding's id in a text.

        Args:
          positions: each token's column from its segment's first, int32 [B, T].
        """
        is_skipped = (tokens == self.pad) & (segment_ids > 0)
        if not self.skips_pad or not is_skipped.any():
            return positions
        before = np.cumsum(is_skipped, axis=1, dtype=np.int32) - is_skipped
        first = np.arange(tokens.shape[1], dtype=np.int32) - positions
        own = before - np.take_along_axis(before, first, axis=1)
        return np.where(is_skipped, -1, positions - np.where(segment_ids > 0, own, 0)).astype(np.int32)

    def empty(self, rows: int, row_length: int, *streams: str) -> Batch:
        """Rows of padding, for `assemble` to write to.

        Args:
          streams: what else to read of each token: `word_starts`, `tags`, `token_types`.
        """
        batch: Batch = {name: np.zeros((rows, row_length), np.int32) for name in ("segment_ids", "positions")}
        batch["tokens"] = np.full((rows, row_length), self.pad, np.int32)
        blank = {"word_starts": np.ones, "tags": np.zeros, "token_types": np.zeros}
        dtype = {"word_starts": bool, "tags": np.int16, "token_types": np.int32}
        return batch | {name: blank[name]((rows, row_length), dtype[name]) for name in streams}


class Written(NamedTuple):
    """How the last text of a document stands in the decoder's row."""

    length: int
    """S, room of a row in tokens."""
    end: int | None = None
    """The token that ends it; None is the one that stands after every segment."""
    leave_out_long: bool = False
    """A document whose text does not fit is left out, or else the text is cut, its end being kept."""


class Layout(NamedTuple):
    """How a document's texts become segments, and what happens to a document that no row holds."""

    segments: Literal["together", "choices", "apart"] = "together"
    """All texts are one segment; or those after the first are choices, each a segment with the first; or each text is
    a segment, and a single one two of them, which share the row's room."""
    long: Literal["split", "cut", "windows"] = "cut"
    """`split` makes pieces of a text that lose no token; `cut` takes tokens off the longest text, as transformers'
    `longest_first` does, on the tokenizer's `truncation_side`; `windows` repeats the first text before overlapping
    stretches of the last."""
    overlap: int = 0
    """With windows: tokens that two neighbouring ones share."""
    written: Written | None = None
    """A document's last text is what a decoder writes. Of three the first is a conversation before the second, and is
    cut at its beginning."""


class Run(NamedTuple):
    """A text and the special tokens beside it."""

    text: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    segment: int
    token_type: int


class Documents:
    """A split's documents laid out for rows of one length: what `PackingPlan` packs and `assemble` writes.

    A document that windows cut is as many documents here as it has windows; `source` says of which.

    Args:
      row_length: T, room of a row in tokens.
    """

    def __init__(self, split: Split, layout: Layout, frame: Frame, row_length: int):
        self.split, self.layout, self.frame = split, layout, frame
        has_texts = "text_lengths" in split.values and layout.long != "split"  # which takes them for one
        num_texts = split.values["text_lengths"].shape[1] if has_texts else 1
        is_written = layout.written is not None
        self.runs = _runs(layout, frame, 1 if is_written else num_texts)
        self.num_segments = self.runs[-1].segment + 1
        self.has_types = any(run.token_type for run in self.runs)
        self.num_cut = self.num_left_out = 0
        self.target: Target | None = None
        """The second texts, where a decoder writes them."""
        self._room = row_length - sum(frame.specials)
        self.source: np.ndarray | None = None  # document [V] of each; None: they are the split's own
        self.window_start: np.ndarray | None = None  # [V], where windows of the last text begin in it, in tokens
        if num_texts > 1 and is_written:
            self._two_streams(row_length, layout.written)
        elif len(self.runs) > 1:
            self._lay_out(row_length)
        elif layout.long == "cut":
            self.num_cut = int((split.lengths > row_length - sum(frame.specials)).sum()) if len(split) else 0

    def _lay_out(self, row_length: int) -> None:
        lengths = self.split.values.get("text_lengths", self.split.lengths[:, None]).astype(np.int64)
        begins = self.split.offsets[:-1, None] + np.cumsum(lengths, axis=1) - lengths
        specials = sum(len(run.before) + len(run.after) for run in self.runs)
        # Runs that share their room.
        segments = [0 if self.layout.segments == "apart" else run.segment for run in self.runs]
        groups = [[r for r, own in enumerate(segments) if own == segment] for segment in sorted({*segments})]
        room = (row_length - specials) // len(groups)
        if room < len(groups[0]):
            raise DataError(
                f"a row must hold a document: {row_length} tokens do not hold {len(self.runs)} texts with {specials} "
                f"special tokens. Give a longer --data.row-length."
            )
        texts = [run.text for run in self.runs]
        self.source = np.arange(len(lengths))
        if self.layout.long == "windows":
            self._windows(begins, lengths, room)
        else:
            begin, length = begins[:, texts], lengths[:, texts]
            for group in groups:
                length[:, group] = longest_first(length[:, group], room)
            if self.frame.truncation_side == "left":
                begin = begin + lengths[:, texts] - length
            self.num_cut = int((length < lengths[:, texts]).any(1).sum())
            self._begin, self._length = begin, length
        self._offsets = np.concatenate([[0], np.cumsum(self._length.sum(1) + specials - sum(self.frame.specials))])

    def _two_streams(self, row_length: int, written: Written) -> None:
        """The first text for the encoder's row, the second for the decoder's."""
        end = self.frame.last if written.end is None else written.end
        if end is None:
            raise DataError(
                "a target must end, so that a model learns to: the tokenizer has no token after a text. Give its id as "
                "--decoder.end-id, or another --data.tokenizer."
            )
        of_texts = self.split.values["text_lengths"].astype(np.int64)
        newest, lengths = of_texts[:, -2], source_and_target_lengths(self.split)
        begins = self.split.offsets[:-1, None] + np.cumsum(lengths, axis=1) - lengths
        room = (row_length - sum(self.frame.specials), written.length - 1)
        if room[0] < 1:
            raise DataError(f"a row must hold a source: {row_length} tokens do not hold one. Give a longer "
                            f"--data.row-length.")  # fmt: skip
        kept = np.flatnonzero((lengths[:, 1] <= room[1]) | (not written.leave_out_long))
        if not len(kept):
            raise DataError(
                f"some target must fit a decoder's row: all {len(lengths)} are longer than {room[1]} tokens. Give a "
                f"longer --data.target-length, or --data.long-targets cut."
            )
        self.num_left_out = len(lengths) - len(kept)
        begins, lengths, newest, self.source = begins[kept], lengths[kept], newest[kept], kept
        cut = np.minimum(lengths, room)
        self.num_cut = int((cut < lengths).any(1).sum())
        # A conversation loses its oldest turns, and the newest one, which is all of a source without any, is cut only
        # where it fills the row alone.
        excess = 0 if self.frame.truncation_side == "left" else np.maximum(newest - room[0], 0)
        begins[:, 0] += lengths[:, 0] - cut[:, 0] - excess
        self._begin, self._length = begins[:, :1], cut[:, :1]
        self._sizes = cut + np.array([sum(self.frame.specials), 1])
        self.target = Target(self.split, self.frame, end, kept, begins[:, 1:], cut[:, 1:], written.length)

    def _windows(self, begins: np.ndarray, lengths: np.ndarray, room: int) -> None:
        """The first text, and of the last text as much as there is room for, step by step.

        Where the last text needs several windows the first keeps at most half of what their overlap leaves, so that
        every window has as many new tokens at least.
        """
        overlap, last = self.layout.overlap, lengths[:, -1]
        prefix = np.minimum(lengths[:, 0], np.maximum(max(1, (room - overlap) // 2), room - last))
        width = room - prefix
        step = np.maximum(1, width - overlap)
        count = 1 + np.maximum(0, -(-(last - width) // step))
        self.source = np.repeat(np.arange(len(lengths)), count)
        start = (np.arange(len(self.source)) - np.repeat(np.cumsum(count) - count, count)) * step[self.source]
        length = np.minimum(width[self.source], last[self.source] - start)
        self._begin = np.stack([begins[self.source, 0], begins[self.source, -1] + start], 1)
        self._length = np.stack([prefix[self.source], length], 1)
        self.num_cut = int((prefix < lengths[:, 0]).sum())
        self.window_start = start

    def plan(self, row_length: int, packing: Packing = "best-fit") -> RowPlan:
        """The packing of these documents into rows.

        Raises:
          DataError: `mixed`, of sources and targets.
        """
        if self.target is not None:
            if packing == "mixed":
                raise DataError(
                    "a source and its target are packed together, best-fit or one-per-row: got data.packing mixed. "
                    "Leave it out."
                )
            return PairPlan(self._sizes, (row_length, self.target.row_length), self.frame.specials, packing=packing)
        if self.source is None:
            return PackingPlan(
                self.split.offsets, row_length, self.frame.specials, packing=packing,
                split_long=self.layout.long == "split", truncation_side=self.frame.truncation_side,
                histogram=self.split.histogram,
            )  # fmt: skip
        return PackingPlan(self._offsets, row_length, self.frame.specials, packing=packing, split_long=False,
                           histogram=length_histogram(self._offsets))  # fmt: skip

    def texts(self, pieces: Pieces) -> tuple[np.ndarray, np.ndarray]:
        """Where each run's text begins in the split's tokens, and its length: [pieces, runs] both."""
        if self.source is None:
            return (self.split.offsets[pieces.document] + pieces.start)[:, None], pieces.length[:, None]
        return self._begin[pieces.document], self._length[pieces.document]

    def num_pieces(self, document: int) -> int:
        """In how many pieces or windows one of the split's documents stands in rows, if they are not concatenated."""
        if self.source is not None:
            return int((self.source == document).sum())
        return -(-int(self.split.lengths[document]) // self._room) if self.layout.long == "split" else 1

    def documents(self, pieces: Pieces) -> np.ndarray:
        """The split's document that each piece is of, [pieces]."""
        return pieces.document if self.source is None else self.source[pieces.document]


class Target:
    """What `assemble` reads of documents, of the texts that a decoder writes: each is a segment, text and end.

    Args:
      kept: the split's documents that these are of.
      begin, length: [documents, 1], where each text stands in the split's tokens.
    """

    num_segments = 1

    def __init__(self, split: Split, frame: Frame, end: int, kept: np.ndarray, begin, length, row_length: int):
        self.split, self.row_length = split, row_length
        self.frame = replace(frame, first=None, last=end, skips_pad=False)
        self.runs = (Run(0, (), (end,), 0, 0),)
        self._kept, self._begin, self._length = kept, begin, length

    def texts(self, pieces: Pieces) -> tuple[np.ndarray, np.ndarray]:
        """As `Documents.texts`."""
        return self._begin[pieces.document], self._length[pieces.document]

    def documents(self, pieces: Pieces) -> np.ndarray:
        """As `Documents.documents`."""
        return self._kept[pieces.document]


def assemble_targets(target: Target, pieces: Pieces, batch: Batch, rows: np.ndarray) -> None:
    """As `assemble`, into the decoder's rows; a piece's number in its row is that of its source."""
    always = np.ones(len(pieces.row), bool)
    assemble(target, replace(pieces, has_first=always, has_last=always), batch, rows)


def balanced_length(split: Split, row_length: int, frame: Frame) -> int:
    """Room of a decoder's row beside each encoder's row of `row_length`, a multiple of 8: as much as the targets need
    for both to fill alike, and 99 of 100 targets at least of the sources that fit, or of all if most do not."""
    sizes = source_and_target_lengths(split) + np.array([sum(frame.specials), 1])
    fits = sizes[:, 0] <= row_length
    typical = sizes[fits if 2 * fits.sum() >= len(fits) else slice(None)]
    ratio = typical[:, 1].sum() / np.minimum(typical[:, 0], row_length).sum()
    wanted = max(row_length * ratio, np.quantile(typical[:, 1], 0.99))
    return int(-(-wanted // 8)) * 8


def source_and_target_lengths(split: Split) -> np.ndarray:
    """Tokens of each document's source, the turns before it included, and of its target, int64 [documents, 2]."""
    lengths = split.values["text_lengths"].astype(np.int64)
    return np.stack([lengths[:, :-1].sum(1), lengths[:, -1]], 1)


def _runs(layout: Layout, frame: Frame, num_texts: int) -> tuple[Run, ...]:
    first = () if frame.first is None else (frame.first,)
    last = () if frame.last is None else (frame.last,)
    if layout.segments == "apart":
        return tuple(Run(min(k, num_texts - 1), first, last, k, 0) for k in range(max(num_texts, 2)))
    if num_texts == 1:
        return (Run(0, first, last, 0, 0),)
    if layout.segments == "choices":
        pairs = ((Run(0, first, frame.between, k - 1, 0), Run(k, (), last, k - 1, 1)) for k in range(1, num_texts))
        return tuple(run for pair in pairs for run in pair)
    inner = [Run(k, first if k == 0 else (), frame.between, 0, min(k, 1)) for k in range(num_texts - 1)]
    return (*inner, Run(num_texts - 1, (), last, 0, 1))


def longest_first(lengths: np.ndarray, room: int) -> np.ndarray:
    """Lengths [N, texts] cut to `room` together, tokens being taken from the longest, as transformers cuts pairs."""
    order = np.argsort(lengths, axis=1, kind="stable")
    cut, left = np.zeros_like(lengths), np.full(len(lengths), room)
    for k, column in enumerate(order.T):
        # A text has at most its share of what the shorter ones leave.
        at = np.arange(len(lengths)), column
        cut[at] = np.minimum(lengths[at], left // (lengths.shape[1] - k))
        left = left - cut[at]
    return cut


def assemble(documents: "Documents | Target", pieces: Pieces, batch: Batch, rows: np.ndarray) -> None:
    """Write rows of pieces, each with its special tokens, into `batch`, whose arrays [B, T] hold padding.

    Args:
      rows: where in the batch each of the pieces' rows goes.
    """
    T = batch["tokens"].shape[1]
    runs, R = documents.runs, len(documents.runs)
    text_begin, text_length = documents.texts(pieces)
    before = np.tile(np.array([len(run.before) for run in runs]), (len(pieces.row), 1))
    after = np.tile(np.array([len(run.after) for run in runs]), (len(pieces.row), 1))
    before[:, 0] *= pieces.has_first
    after[:, -1] *= pieces.has_last
    lengths = (text_length + before + after).ravel()
    ends = np.cumsum(lengths)
    starts = ends - lengths
    piece_starts = starts[::R]
    first_of_row = np.flatnonzero(np.diff(pieces.row, prepend=-1))
    per_row = np.diff(first_of_row, append=len(pieces.row))
    in_row = np.arange(len(pieces.row)) - np.repeat(first_of_row, per_row)
    segment = (in_row * documents.num_segments)[:, None] + np.array([run.segment + 1 for run in runs])
    first_run = np.array([next(i for i, other in enumerate(runs) if other.segment == run.segment) for run in runs])
    segment_starts = starts.reshape(-1, R)[:, first_run]
    shift = rows[pieces.row] * T - np.repeat(piece_starts[first_of_row], per_row)

    flat = np.arange(int(ends[-1]))
    at = flat + np.repeat(np.repeat(shift, R), lengths)
    batch["segment_ids"].reshape(-1)[at] = np.repeat(segment.ravel().astype(np.int32), lengths)
    batch["positions"].reshape(-1)[at] = flat - np.repeat(segment_starts.ravel(), lengths)
    if "token_types" in batch:
        types = np.tile(np.array([run.token_type for run in runs], np.int32), len(pieces.row))
        batch["token_types"].reshape(-1)[at] = np.repeat(types, lengths)

    source = flat + np.repeat((text_begin - before).ravel() - starts, lengths)
    special_at, special_ids = _specials(runs, starts, ends, before, after)
    source[special_at] = 0  # nothing is read for these
    streams = [name for name in ("word_starts", "tags") if name in batch]
    document_begin = np.repeat(documents.split.offsets[documents.documents(pieces)], R)
    read = _read(documents.split, source, document_begin, lengths, streams)
    blank = {"tokens": special_ids, "word_starts": True, "tags": 0}
    for name, values in read.items():
        values[special_at] = blank[name]
        batch[name].reshape(-1)[at] = values
    if documents.frame.skips_pad:
        own = (batch[name][rows] for name in ("tokens", "segment_ids", "positions"))
        batch["positions"][rows] = documents.frame.positions(*own)


def _specials(runs, starts, ends, before, after) -> tuple[np.ndarray, np.ndarray]:
    """Where special tokens stand among all tokens of the runs, and their ids."""
    R, at, ids = len(runs), [], []
    for r, run in enumerate(runs):
        for i, token in enumerate(run.before):
            found = starts[r::R][before[:, r] > 0] + i
            at.append(found)
            ids.append(np.full(len(found), token))
        for i, token in enumerate(run.after):
            found = ends[r::R][after[:, r] > 0] - len(run.after) + i
            at.append(found)
            ids.append(np.full(len(found), token))
    return (np.concatenate(at), np.concatenate(ids)) if at else (np.zeros(0, np.int64), np.zeros(0, np.int64))


def _read(
    split: Split, source: np.ndarray, begin: np.ndarray, lengths: np.ndarray, streams: list[str]
) -> dict[str, np.ndarray]:
    """The tokens at `source`, positions in all shards end to end, and what else is kept of each.

    Args:
      begin: where each run's document begins, by which its shard is known; `lengths` says how much of `source` is its.
    """
    kept = {"tokens": (split.tokens, np.int32), "word_starts": (split.words, bool), "tags": (split.tags, np.int16)}
    if len(split.tokens) == 1:
        return {name: _take(name, kept[name][0][0], source) for name in ("tokens", *streams)}
    shard = np.searchsorted(split.shard_starts, begin, side="right") - 1
    read = {name: np.empty(len(source), kept[name][1]) for name in ("tokens", *streams)}
    for s in np.unique(shard).tolist():
        mine = np.repeat(shard == s, lengths)
        local = np.maximum(source[mine] - split.shard_starts[s], 0)
        for name, values in read.items():
            values[mine] = _take(name, kept[name][0][s], local)
    return read


def _take(name: str, kept: np.ndarray, index: np.ndarray) -> np.ndarray:
    if name == "word_starts":
        return (kept[index >> 3] >> (index & 7).astype(np.uint8) & 1).astype(bool)
    return kept[index].astype(np.int32 if name == "tokens" else kept.dtype)

