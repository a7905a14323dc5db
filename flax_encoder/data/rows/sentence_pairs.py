"""Two segments of each text, in an order that is to be told: BERT's next sentences and ALBERT's sentence order.

Rows are packed as for any text; then each document is cut in two where it stands. The tokens between its parts take the
places of as many at its end, so that segments, positions and padding stay what they were.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flax_encoder.config import SentencesConfig
from flax_encoder.config.rules import counted
from flax_encoder.data.rows.documents import Batch, Documents, Frame
from flax_encoder.data.rows.randomness import random_bits
from flax_encoder.data.rows.targets import Rows, TargetInputs, Targets, masked_lm
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.store.store import Split
from flax_encoder.data.tokens.tokenizer import TextTokenizer

Kind = Literal["order", "next"]

_WHERE, _WHETHER, _WHOSE = 12, 13, 14  # streams of random numbers, of those that data.rows draws
_ENDS = (".", "!", "?", "…", "\u3002", "\uff01", "\uff1f", "\u0964", "\u061f")  # Chinese, Hindi and Arabic ones too
_LOOKED_AT = 2000  # documents that show whether a text has any place to be cut
_TRIES = 64  # other documents that are drawn for one segment, at most


@dataclass(frozen=True)
class Cutting:
    """How documents of rows are cut: settings and what the tokenizer says."""

    kind: Kind
    frame: Frame
    is_end: np.ndarray | None
    """bool [vocab_size], the tokens that end a sentence; None cuts before any word."""
    num_slots: int
    """P, documents in a row at most."""
    has_types: bool
    seed: int

    def places(self, text: np.ndarray, is_word: np.ndarray) -> np.ndarray:
        """Where a text may be cut so that both parts keep a token: numbers of tokens before the cut."""
        can = is_word[1 : max(1, len(text) - len(self.frame.between))].copy()
        if self.is_end is not None:
            can &= self.is_end[text[: len(can)]]
        return np.flatnonzero(can) + 1


def sentence_ends(tokenizer: TextTokenizer) -> np.ndarray:
    """bool [vocab_size], the tokens whose spelling ends as a sentence does."""
    return np.array([tokenizer.token(i).endswith(_ENDS) for i in range(tokenizer.vocab_size)])


def sentence_pair_targets(inputs: TargetInputs, kind: Kind) -> Targets:
    """Masked-LM targets of rows whose documents are cut in two, and of each pair whether it is as it was.

    A batch gets, besides what `masked_lm` gives, P slots a row, one a document: `pair_positions` int32 [B, P], its
    first token; `pair_targets` int32 [B, P], 0 where the second segment follows the first in the text, and 1 where the
    two are swapped ("order") or the second is of another document ("next"), which are equally likely; `pair_weights`
    float32 [B, P], 0 where there is no pair; and `token_types` of models that have them, 1 from the second segment on.

    Raises:
      DataError: no document can be cut, or there is no other document to take a segment of.
    """
    settings: SentencesConfig = inputs.config.sentences
    split, frame = inputs.documents.split, inputs.documents.frame
    is_end = sentence_ends(inputs.tokenizer) if settings.unit == "sentence" else None
    cutting = Cutting(
        kind, frame, is_end, inputs.max_pieces, inputs.config.model.num_token_types > 1, inputs.config.seed
    )
    if kind == "next" and len(split) < 2:
        raise DataError(
            f"next_sentence takes segments of other texts: there {'is' if len(split) else 'are'} {len(split)} of a "
            f"split. Give more text, cut finer (--data.text-unit line), or --objective sentence_order."
        )
    if inputs.is_training:
        _check_places(cutting, split, inputs.config.objective)
    return functools.partial(_pair_targets, cutting, inputs.documents, masked_lm(inputs))


def _check_places(cutting: Cutting, split: Split, objective: str) -> None:
    some = np.unique(np.linspace(0, len(split) - 1, min(_LOOKED_AT, len(split))).astype(int)).tolist()
    if any(len(cutting.places(split.document(i), document_words(split, i))) for i in some):
        return
    between, unit = len(cutting.frame.between), "sentences" if cutting.is_end is not None else "words"
    way_out = "--sentences.unit word, which cuts before any word; or longer texts" if unit == "sentences" else (
        "longer texts")  # fmt: skip
    raise DataError(
        f"{objective} cuts a text between two of its {unit}: of the {len(some):,} texts that were looked at none has "
        f"two, with {counted(between, 'token')} to go between them. Give {way_out} (--data.text-unit "
        f"paragraph or file)."
    )


def document_words(split: Split, index: int) -> np.ndarray:
    """bool, whether each token of a document begins a word."""
    begin, end = split.offsets[index : index + 2]
    shard = int(np.searchsorted(split.shard_starts, begin, side="right")) - 1
    at = np.arange(begin, end) - split.shard_starts[shard]
    return (split.words[shard][at >> 3] >> (at & 7).astype(np.uint8) & 1).astype(bool)


def _pair_targets(cutting: Cutting, documents: Documents, mask: Targets, rows: Rows) -> Batch:
    assert rows.word_starts is not None
    tokens, words = rows.batch["tokens"].copy(), rows.word_starts.copy()
    segments, P, frame = rows.batch["segment_ids"], cutting.num_slots, cutting.frame
    types, positions = np.zeros_like(tokens), rows.batch["positions"]
    batch: Batch = {name: np.zeros((len(tokens), P), np.int32) for name in ("pair_positions", "pair_targets")}
    batch["pair_weights"] = np.zeros((len(tokens), P), np.float32)
    before, after = frame.specials
    whose = documents.documents(rows.pieces)
    first = np.searchsorted(rows.pieces.row, np.arange(len(tokens)))
    where, whether = (
        random_bits(cutting.seed, stream, rows.address[rows.pieces.row], np.arange(len(whose)) - first[rows.pieces.row])
        for stream in (_WHERE, _WHETHER)
    )
    for b, row in enumerate(segments):
        edges = np.flatnonzero(np.diff(row, prepend=-1, append=-1))
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            if not row[start]:
                continue
            slot = int(row[start]) - 1
            piece = int(first[b]) + slot
            batch["pair_positions"][b, slot] = start
            begin, end = start + before, stop - after
            text, is_word = tokens[b, begin:end], words[b, begin:end]
            places = cutting.places(text, is_word)
            if not len(places):
                continue
            cut, stay = int(places[int(where[piece] % np.uint64(len(places)))]), len(text) - len(frame.between)
            parts = [(text[:cut], is_word[:cut]), (text[cut:stay], is_word[cut:stay])]
            is_other = bool(whether[piece] >> np.uint64(63))
            if is_other and cutting.kind == "order":
                parts = parts[::-1]
            elif is_other:
                key = int(random_bits(cutting.seed, _WHOSE, int(rows.address[b]), slot)[0])
                parts[1] = _of_others(cutting, documents.split, int(whose[piece]), stay - cut, key)
            middle = begin + len(parts[0][0]) + len(frame.between)
            tokens[b, begin:end] = np.concatenate([parts[0][0], frame.between, parts[1][0]])
            words[b, begin:end] = np.concatenate([parts[0][1], np.ones(len(frame.between), bool), parts[1][1]])
            words[b, middle] = True
            types[b, middle:stop] = 1
            batch["pair_targets"][b, slot] = is_other
            batch["pair_weights"][b, slot] = 1.0
    own = {"tokens": tokens} | ({"token_types": types} if cutting.has_types else {})
    if frame.skips_pad:  # positions do not count a padding's id in a text, and it may stand elsewhere now
        column = np.arange(tokens.shape[1], dtype=np.int32)
        starts = np.maximum.accumulate(np.where(np.diff(segments, axis=1, prepend=-1) != 0, column, 0), axis=1)
        own["positions"] = frame.positions(tokens, segments, np.where(segments > 0, column - starts, positions))
    cut_rows = Rows(
        rows.batch | own, words, rows.tags, rows.address, rows.pieces, rows.number, rows.written
    )
    return batch | own | mask(cut_rows)


def _of_others(cutting: Cutting, split: Split, own: int, length: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, whether each begins a word): `length` of them, from a place where another document may be cut, and on
    from the beginning of more documents where that ends sooner."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    left = length
    for i in range(_TRIES):
        bits = int(random_bits(key, i)[0])
        other = bits % (len(split) - 1)
        other += other >= own
        text, is_word = split.document(other), document_words(split, other)
        places = cutting.places(text, is_word) if not found else ()
        begin = int(places[(bits >> 32) % len(places)]) if len(places) else 0
        found.append((text[begin : begin + left], is_word[begin : begin + left]))
        left -= len(found[-1][0])
        if not left:
            break
    text, is_word = (np.concatenate(parts) for parts in zip(*found, strict=True))
    while len(text) < length:  # of texts of a token or two
        text, is_word = np.tile(text, 2)[:length], np.tile(is_word, 2)[:length]
    return text, is_word
