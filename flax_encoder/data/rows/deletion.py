"""Texts with words missing, and the whole texts that a decoder writes beside them."""

import functools

import numpy as np

from flax_encoder.data.rows.documents import Batch, Frame
from flax_encoder.data.rows.randomness import random_bits, uniform
from flax_encoder.data.rows.span_corruption import number_runs, put_in_rows
from flax_encoder.data.rows.targets import Rows, TargetInputs, Targets
from flax_encoder.data.sources.records import DataError

_DELETED = 15  # stream of random numbers, of those that data.rows draws


def denoising_targets(inputs: TargetInputs, start: int, end: int) -> Targets:
    """Rows whose documents have lost `autoencoder.deletion_rate` of their words, and the documents as they were.

    Each word is left out with that probability; of a document that would lose all, the likeliest to stay stays. A batch
    gets tokens, segment_ids and positions int32 [B, T] of what is left, decoder_tokens, decoder_segment_ids,
    decoder_positions, targets int32 [B, S] and target_weights float32 [B, S] of the whole texts, each from `start` and
    to `end`, and document_weights float32 [B, P], 1 of each document.

    Raises:
      DataError: a tokenizer with no token before or after a text, in whose place the decoder's end could stand.
    """
    frame = inputs.documents.frame
    if not sum(frame.specials):
        raise DataError(
            "an autoencoder's texts have a token before or after them: the tokenizer has none, such as [CLS] or </s>. "
            "Give another --data.tokenizer; without it one is made."
        )
    rate = inputs.config.autoencoder.deletion_rate
    return functools.partial(_denoising_targets, frame, (start, end), rate, inputs.max_pieces, inputs.config.seed)


def _denoising_targets(
    frame: Frame, ends: tuple[int, int], rate: float, num_slots: int, seed: int, rows: Rows
) -> Batch:
    assert rows.word_starts is not None
    tokens, segments = rows.batch["tokens"], rows.batch["segment_ids"]
    B, T = tokens.shape
    row, column = np.nonzero(segments)
    document = number_runs(row, segments[row, column])  # numbered through the batch
    D = int(document[-1]) + 1 if len(document) else 0
    row_of = np.zeros(D, np.int64)
    row_of[document] = row
    first = np.searchsorted(row_of, np.arange(B))
    begins, stops = np.diff(document, prepend=-1) != 0, np.diff(document, append=D) != 0
    is_text = ~((begins & (frame.first is not None)) | (stops & (frame.last is not None)))

    # Words of the texts, and which of them stay.
    row, column, document, shown = row[is_text], column[is_text], document[is_text], np.ones(len(is_text), bool)
    is_start = rows.word_starts[row, column] | (np.diff(document, prepend=-1) != 0)
    word, owner = np.cumsum(is_start) - 1, document[is_start]
    draw = uniform(random_bits(seed, _DELETED, rows.address[row[is_start]], column[is_start]))
    stays = draw >= rate
    highest, has_any = np.zeros(D), np.zeros(D, bool)
    np.maximum.at(highest, owner, draw)
    has_any[owner[stays]] = True
    stays |= ~has_any[owner] & (draw == highest[owner])
    shown[is_text] = stays[word]

    all_rows, all_columns = np.nonzero(segments)
    all_documents = number_runs(all_rows, segments[all_rows, all_columns])
    left = put_in_rows(all_rows[shown], all_documents[shown], first, B, T, frame.pad)
    left.fill(tokens[all_rows[shown], all_columns[shown]])

    values = np.concatenate([tokens[row, column], np.full(D, ends[1])])
    owners = np.concatenate([document, np.arange(D)])
    order = np.lexsort((np.concatenate([np.arange(len(row)), np.full(D, len(row))]), owners))
    values, owners = values[order], owners[order]
    whole = put_in_rows(row_of[owners], owners, first, B, T, frame.pad)
    whole.fill(values)
    before = np.concatenate([[ends[0]], values[:-1]]) if len(values) else values
    before[np.diff(owners, prepend=-1) != 0] = ends[0]
    given = np.full((B, T), frame.pad, np.int32)
    given[whole.row, whole.column] = before
    weights = np.zeros((B, num_slots), np.float32)
    weights[row_of, np.arange(D) - first[row_of]] = 1.0
    return {
        "tokens": left.tokens, "segment_ids": left.segment_ids,
        "positions": frame.positions(left.tokens, left.segment_ids, left.positions),
        "decoder_tokens": given, "decoder_segment_ids": whole.segment_ids, "decoder_positions": whole.positions,
        "targets": whole.tokens, "target_weights": (whole.segment_ids > 0).astype(np.float32),
        "document_weights": weights,
    }  # fmt: skip
