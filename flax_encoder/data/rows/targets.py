"""What is predicted of rows: a task's targets, made from the rows and the values of their documents."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flax_encoder.config import DenoiserConfig, MaskingConfig, Ramp, RunConfig
from flax_encoder.data.rows.documents import Batch, Documents
from flax_encoder.data.rows.masking import Vocabulary, budget, mask_rows
from flax_encoder.data.rows.packing import Pieces
from flax_encoder.data.rows.span_corruption import Denoiser, Sentinels, corrupt_spans
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.store.store import Split
from flax_encoder.data.tokens.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

_COUNTED_TOKENS = 2**20  # whose words tell how many tokens a word has
# Fields of a batch that the host alone reads: they are not put on devices.
HOST_FIELDS = ("overflow", "owners", "starts")


@dataclass(frozen=True)
class Rows:
    """Rows before they have targets; targets are made from this."""

    batch: Batch
    """tokens, segment_ids (from 1 in each row; 0 is padding) and positions (from 0 in each segment), int32 [B, T]; and
    token_types where two texts stand together."""
    word_starts: np.ndarray | None
    """bool [B, T], where the targets read them."""
    tags: np.ndarray | None
    """int16 [B, T], likewise; `encoding.Encoded` says how they are written."""
    address: np.ndarray
    """A number a row [B] that random choices are drawn from."""
    pieces: Pieces
    number: int
    """The batch's."""
    written: Batch | None = None
    """The decoder's rows, where the documents have targets: tokens, each target's end included, segment_ids and
    positions, int32 [B, S]."""


Targets = Callable[[Rows], Batch]
"""The fields that a task adds to a batch, each [B, ...]: `target_positions`, `targets` and `target_weights` [B, M] of
most tasks, other `tokens` where it masks. It is sent to worker processes, so it can be pickled."""


class TargetInputs(NamedTuple):
    """What a task makes its targets from."""

    config: RunConfig
    tokenizer: TextTokenizer
    documents: Documents
    """Of the first source."""
    row_length: int
    max_pieces: int
    """Documents in a row, at most."""
    is_training: bool
    with_owners: bool = False
    """Add `owners` int32 [B, M], each target's document among `documents`, where every window is one, or -1: by it a
    prediction finds its way back. Where a document may be several pieces, `starts` int32 [B, M] says where the
    target's piece begins in it, in tokens."""
    masking_rate: Ramp | None = None
    """Of training: the share of masked tokens by the batch's number; None is what config.masking says of the run."""


def tokens_per_word(split: Split) -> float:
    """The mean number of tokens in a word, of the first million tokens of a split."""
    tokens = min(len(split.tokens[0]), _COUNTED_TOKENS)
    starts = int(np.unpackbits(split.words[0][: -(-tokens // 8)], bitorder="little", count=tokens).sum())
    return tokens / max(starts, 1)


def masked_lm(inputs: TargetInputs) -> Targets:
    """Targets of masked language modelling, as `config.masking` says."""
    masking, ramp = inputs.config.masking, masking_ramp(inputs)
    rates = (ramp.first, ramp.last)
    per_word = 1.0 if masking.kind == "token" else tokens_per_word(inputs.documents.split)
    slots = masking.budget or budget(masking.kind, max(rates), inputs.row_length, per_word)
    return masked_lm_targets(
        inputs.tokenizer, masking, rates, slots, ramp.end - ramp.start, inputs.config.seed, ramp.start
    )


def masking_ramp(inputs: TargetInputs) -> Ramp:
    """The share of masked tokens by the batch's number: in training as it goes, in evaluation as it is."""
    masking, steps = inputs.config.masking, inputs.config.steps
    if not inputs.is_training:
        return Ramp(0, steps, masking.eval_rate, masking.eval_rate)
    return inputs.masking_rate or Ramp(0, steps, *masking.rates)


def masking_rate(first: float, last: float, num_batches: int, number: int) -> float:
    """The share in a batch, by its number from where the first share holds; the last holds from batch num_batches - 1
    on."""
    done = min(1.0, number / max(num_batches - 1, 1))
    return first + done * (last - first)


def masked_lm_targets(
    tokenizer: TextTokenizer, masking: MaskingConfig, rates: tuple[float, float], slots: int, num_batches: int,
    seed: int, first_batch: int = 0,
) -> Targets:  # fmt: skip
    """Targets by dynamic masking: each epoch's rows are masked anew.

    The rate goes straight from rates[0] in batch `first_batch` to rates[1] in the last of `num_batches`, and stays.
    """
    vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.special("mask"), tokenizer.special_ids)
    return functools.partial(_masked_lm_targets, vocabulary, masking, rates, slots, num_batches, seed, first_batch)


def _masked_lm_targets(
    vocabulary, masking: MaskingConfig, rates, slots, num_batches, seed, first_batch, rows: Rows
) -> Batch:
    return mask_rows(
        rows.batch["tokens"], rows.batch["segment_ids"], rows.word_starts, rows.address, vocabulary,
        kind=masking.kind, rate=masking_rate(*rates, num_batches, rows.number - first_batch),
        mask_rate=masking.mask_rate, random_rate=masking.random_rate, slots=slots, seed=seed,
        new_span_rate=1 / masking.mean_span_words, max_span_words=masking.max_span_words,
    )  # fmt: skip


def next_token_targets(inputs: TargetInputs) -> Targets:
    """At every token the one after it in its document: `targets` int32 and `target_weights` float32 [B, T], 0 at each
    document's last token and at padding."""
    return _next_token_targets


def _next_token_targets(rows: Rows) -> Batch:
    tokens, segments = rows.batch["tokens"], rows.batch["segment_ids"]
    has_next = np.zeros(segments.shape, bool)
    has_next[:, :-1] = (segments[:, :-1] > 0) & (segments[:, 1:] == segments[:, :-1])
    return {
        "targets": np.where(has_next, np.roll(tokens, -1, axis=1), 0).astype(np.int32),
        "target_weights": has_next.astype(np.float32),
    }


def span_corruption_targets(
    tokenizer: TextTokenizer, denoisers: Sequence[DenoiserConfig], row_length: int, slots: int, seed: int, *,
    start: int | None = None, end: int | None = None,
) -> Targets:  # fmt: skip
    """T5's targets, for an encoder-decoder.

    Args:
      denoisers: how spans are cut; each document draws one.
      start, end: what a target starts from, and ends with; None is the padding's, and the one after a text.

    Raises:
      DataError: the tokenizer has no last token, or fewer sentinels <extra_id_0> ... than a full row has spans, or no
        token for a mode.
    """
    ids, pad = tokenizer.sentinel_ids, tokenizer.special("pad")
    end = tokenizer.frame[1] if end is None else end
    if end is None:
        raise DataError("T5's spans need a tokenizer with a token after a text, such as </s>, to end every target.")
    if (spans := most_spans(denoisers, row_length)) > len(ids):
        raise DataError(
            f"every span of a row needs its sentinel: a row of {row_length} tokens has up to {spans} spans, the "
            f"tokenizer {len(ids)} sentinels <extra_id_0>, <extra_id_1> ... Without --data.tokenizer one is made that "
            f"has 100, and T5's have as many. They are added to a tokenizer.json by t = tokenizers.Tokenizer.from_file("
            f"FILE); t.add_special_tokens([f'<extra_id_{{i}}>' for i in range({spans})]); t.save(FILE). Or take "
            f"shorter rows (--data.row-length), a lower rate (--spans.rate, or a denoiser's) or longer spans "
            f"(mean-tokens)."
        )
    sentinels = Sentinels(ids, end, pad if start is None else start, pad)
    is_text = np.ones(tokenizer.vocab_size, bool)
    is_text[tokenizer.special_ids] = is_text[ids] = False
    modes = {mode: _mode_ids(tokenizer, mode) for mode in {own.mode: None for own in denoisers}}
    ways = tuple(Denoiser(own.share, own.rate, own.mean_tokens, modes[own.mode]) for own in denoisers)
    return functools.partial(_span_corruption_targets, sentinels, is_text, ways, slots, seed)


def most_spans(denoisers: Sequence[DenoiserConfig], row_length: int) -> int:
    """Spans, and so sentinels, of a document that fills a row, by the denoiser that cuts most."""
    return max(max(1, round(own.rate * row_length / own.mean_tokens)) if own.mean_tokens else 1 for own in denoisers)


def _mode_ids(tokenizer: TextTokenizer, mode: str) -> tuple[int, ...]:
    ids = tuple(tokenizer.encode_batch([mode])[0].tolist()) if mode else ()
    if mode and (not ids or tokenizer.unknown_id in ids):
        raise DataError(
            f"a mode is written by the tokenizer's tokens: it has none for {mode!r}. Give the denoiser another mode, "
            f"or '' for none, or another --data.tokenizer."
        )
    if len(ids) > 1:
        logger.warning(
            "the mode %r is %d tokens of this tokenizer, which do not fit beside short texts in full rows: those texts "
            "are left whole and counted as masking_overflow. A tokenizer that a run trains has the mode as one token.",
            mode, len(ids),
        )  # fmt: skip
    return ids


def _span_corruption_targets(sentinels, is_text, denoisers, slots, seed, rows: Rows) -> Batch:
    tokens = rows.batch["tokens"]
    return corrupt_spans(
        tokens, rows.batch["segment_ids"], is_text[tokens], rows.address, sentinels,
        denoisers=denoisers, slots=slots, seed=seed,
    )  # fmt: skip


def written_targets(inputs: TargetInputs, start: int) -> Targets:
    """What a decoder writes: the tokens of each document's target and its end, and for every one of them the token
    before it, which for the first is `start` (T5's shift right).

    A batch gets decoder_tokens, decoder_segment_ids, decoder_positions, targets int32 [B, S] and target_weights
    float32 [B, S]. Documents without targets, since these are to be written, have a target_weights of zeros [B, 1].
    """
    return functools.partial(shifted_targets, start, inputs.with_owners)


def shifted_targets(start: int, with_owners: bool, rows: Rows) -> Batch:
    """`written_targets` of some rows."""
    B = len(rows.address)
    batch: Batch = {}
    if with_owners:  # of rows that hold one document each
        batch["owners"] = np.full((B, 1), -1, np.int32)
        batch["owners"][rows.pieces.row, 0] = rows.pieces.document
    if rows.written is None:
        return batch | {"target_weights": np.zeros((B, 1), np.float32)}
    tokens, segments, positions = (rows.written[name] for name in ("tokens", "segment_ids", "positions"))
    before = np.roll(tokens, 1, axis=1)
    before[(positions == 0) & (segments > 0)] = start
    before[segments == 0] = tokens[segments == 0]  # padding
    return batch | {
        "decoder_tokens": before, "decoder_segment_ids": segments, "decoder_positions": positions,
        "targets": tokens, "target_weights": (segments > 0).astype(np.float32),
    }  # fmt: skip


def document_targets(inputs: TargetInputs, name: str) -> Targets:
    """A target a document, at its first token, or at the first token of each of its choices; -1 is where a document has
    fewer choices than others, or one without a token, unless that is the right one.

    Args:
      name: of the values that are predicted: targets are [B, M, ...] of these. Documents that have none, since they are
        to be predicted, have zeros.
    """
    values = inputs.documents.split.values.get(name)
    values = np.zeros(len(inputs.documents.split), np.int32) if values is None else values
    return functools.partial(_document_targets, inputs.documents, values, inputs.max_pieces, inputs.with_owners)


def _document_targets(
    documents: Documents, values: np.ndarray, max_pieces: int, with_owners: bool, rows: Rows
) -> Batch:
    B, n = len(rows.address), documents.num_segments
    batch = {
        "target_positions": np.zeros((B, max_pieces, n), np.int32),
        "targets": np.zeros((B, max_pieces, *values.shape[1:]), values.dtype),
        "target_weights": np.zeros((B, max_pieces), np.float32),
    }
    row, column = np.nonzero((rows.batch["positions"] == 0) & (rows.batch["segment_ids"] > 0))
    slot, choice = np.divmod(rows.batch["segment_ids"][row, column] - 1, n)
    batch["target_positions"][row, slot, choice] = column
    row, slot = row[::n], slot[::n]
    whose = documents.documents(rows.pieces)
    batch["targets"][row, slot] = values[whose]
    batch["target_weights"][row, slot] = 1.0
    if n == 1:
        batch["target_positions"] = batch["target_positions"][..., 0]
    else:
        is_none = documents.split.values["text_lengths"][whose, 1:] == 0
        is_none[np.arange(len(whose)), values[whose]] = False
        batch["target_positions"][row, slot] = np.where(is_none, -1, batch["target_positions"][row, slot])
    if with_owners:
        batch["owners"] = np.full((B, max_pieces), -1, np.int32)
        batch["owners"][row, slot] = rows.pieces.document
    return batch


def group_targets(inputs: TargetInputs, *, with_numbers: bool = True) -> Targets:
    """A slot m of M for each document, whose n texts are the segments m * n + 1 to m * n + n of the row.

    The fields are `target_weights` float32 [B, M], 1 of a document; `text_keys` int32 [B, M, n, 2], a hash of each
    text; and `targets` float32 [B, M], the documents' numbers, where they have any.

    Args:
      with_numbers: read the numbers, if there are any.

    Raises:
      DataError: some documents have a number and others none.
    """
    split, documents = inputs.documents.split, inputs.documents
    keys = split.values["text_keys"][:, [run.text for run in documents.runs]]
    numbers = split.values.get("number") if with_numbers else None
    if numbers is not None and (is_none := np.isnan(numbers)).any():
        if not is_none.all():
            raise DataError(
                f"either every pair of texts has a number or none has: {int(is_none.sum()):,} of {len(numbers):,} have "
                f"none. Give sources of one kind."
            )
        numbers = None
    return functools.partial(_group_targets, documents, keys, numbers, inputs.max_pieces, inputs.with_owners)


def _group_targets(
    documents: Documents, keys: np.ndarray, numbers: np.ndarray | None, max_pieces: int, with_owners: bool, rows: Rows
) -> Batch:
    B, row = len(rows.address), rows.pieces.row
    slot = np.arange(len(row)) - np.searchsorted(row, row)
    whose = documents.documents(rows.pieces)
    batch = {
        "target_weights": np.zeros((B, max_pieces), np.float32),
        "text_keys": np.zeros((B, max_pieces, documents.num_segments, 2), np.int32),
    }
    batch["target_weights"][row, slot] = 1.0
    batch["text_keys"][row, slot] = np.ascontiguousarray(keys[whose]).view(np.int32).reshape(len(row), -1, 2)
    if numbers is not None:
        batch["targets"] = np.zeros((B, max_pieces), np.float32)
        batch["targets"][row, slot] = numbers[whose]
    if with_owners:
        batch["owners"] = np.full((B, max_pieces), -1, np.int32)
        batch["owners"][row, slot] = rows.pieces.document
    return batch


def word_targets(inputs: TargetInputs, *, all_pieces: bool = False) -> Targets:
    """A target a word, at its first token: its tag. A row has as many slots as tokens, M = T.

    Args:
      all_pieces: a target at every token of a word.
    """
    return functools.partial(_word_targets, inputs.documents, all_pieces, inputs.with_owners)


def _word_targets(documents: Documents, all_pieces: bool, with_owners: bool, rows: Rows) -> Batch:
    assert rows.tags is not None
    row, column = np.nonzero(rows.tags if all_pieces else rows.tags > 0)
    counts = np.bincount(row, minlength=len(rows.tags))
    slot = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape, tags = rows.tags.shape, np.abs(rows.tags[row, column]).astype(np.int32) - 1
    batch = {}
    for name, values in {"target_positions": column, "targets": tags, "target_weights": 1}.items():
        batch[name] = np.zeros(shape, np.float32 if name == "target_weights" else np.int32)
        batch[name][row, slot] = values
    if with_owners:
        first_of_row = np.searchsorted(rows.pieces.row, np.arange(len(rows.tags)))
        piece = first_of_row[row] + rows.batch["segment_ids"][row, column] - 1
        owners = {"owners": documents.documents(rows.pieces)[piece], "starts": rows.pieces.start[piece]}
        for name, values in owners.items():
            batch[name] = np.full(shape, -1, np.int32)
            batch[name][row, slot] = values
    return batch
