"""A few held-out texts that a model is asked about at every evaluation, so that people can watch it learn.

A task with answers has them already: `answered` makes a sample of each. A language model is asked to fill in words of
a few sentences, a row each: `filled_sentences`. One that writes what its targets are is asked to: `written_sentences`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from flax_encoder.config import RunConfig
from flax_encoder.data.reading import Reading
from flax_encoder.data.rows.batches import Batches, OneByOne
from flax_encoder.data.rows.documents import Documents, Frame
from flax_encoder.data.rows.targets import TargetInputs
from flax_encoder.data.store.store import Split
from flax_encoder.data.tokens.tokenizer import TextTokenizer

NUM_SAMPLES = 4
SAID = ("label", "choice", "answer", "score", "labels", "tags", "text")
"""Entries of answers that say what a model thinks, whichever the task: an answer's first of them does."""
_SHORTEST, _LONGEST = 8, 24  # tokens of a sentence
_ROW_LENGTH = 32
GAP = "____"
"""Where a word is to be filled in."""
_TRIED = 64  # documents, for each sentence that is looked for
_LETTERS = 240  # of a text that is shown


class Sample(NamedTuple):
    """A text, and what a model says of it beside what is right: an entry for each word to fill in, or one."""

    text: str
    says: tuple[str, ...]
    right: tuple[str, ...]


class Samples(NamedTuple):
    """Rows to ask a model about again and again."""

    batch: dict[str, np.ndarray]
    """What the model's `outputs` reads, [rows, ...]."""
    read: Callable[[Mapping[str, np.ndarray]], list[Sample]]
    """What those outputs, [rows, ...], say."""


class Gapped(NamedTuple):
    """A sentence with words to fill in."""

    tokens: np.ndarray
    """Ids, every word in its place."""
    gaps: list[int]
    """Where the words to fill in stand: each is one token."""
    word_starts: np.ndarray
    """Whether each token begins a word."""


def gapped_sentences(split: Split, tokenizer: TextTokenizer, count: int, most: int = _LONGEST) -> list[Gapped]:
    """Short documents, or beginnings of long ones, evenly spread over a split, with one gap or two.

    Args:
      most: tokens of a sentence.
    """
    short = np.flatnonzero((split.lengths >= _SHORTEST) & (split.lengths <= most))
    if len(short) < count:
        short = np.flatnonzero(split.lengths >= _SHORTEST)
    short = np.roll(short, len(short) // 3)
    found = []
    for part in np.array_split(short, count):
        gapped = (_gapped(split, int(document), tokenizer, most) for document in part[:_TRIED])
        found += [next((sentence for sentence in gapped if sentence is not None), None)]
    return [sentence for sentence in found if sentence is not None]


def _gapped(split: Split, document: int, tokenizer: TextTokenizer, most: int) -> Gapped | None:
    """None for what is no sentence of words."""
    ids, starts = split.document(document)[:most], split.word_starts(document)[: most + 1]
    words = [tokenizer.decode([i]).strip() for i in ids.tolist()]
    ends = np.append(starts, True)[1 : len(ids) + 1]
    whole = [i for i in range(3, len(ids)) if starts[i] and ends[i] and _is_word(words[i])]
    if not whole or sum(word.isalpha() for word in words) <= 0.7 * len(ids):
        return None
    parts = 3 if len(whole) > 5 else 2
    return Gapped(np.array(ids), [whole[len(whole) * k // parts] for k in range(1, parts)], starts[: len(ids)])


def _is_word(text: str) -> bool:
    """Such as is worth asking for: of more than two letters, or of another script than Latin."""
    return text.isalpha() and (len(text) > 2 or not text.isascii())


def filled_sentences(
    config: RunConfig, tokenizer: TextTokenizer, held_out: Split, unit: tuple[int, int] = (1, 1), *,
    looks_back: bool = False,
) -> Samples | None:  # fmt: skip
    """Held-out sentences whose words a language model fills in; None where the held-out text has none.

    The model's `outputs` are `tokens`, int32 [rows, M, k], and their `probabilities`, the likeliest first.

    Args:
      unit: what divides the batch's rows and their length, as the mesh needs it.
      looks_back: the model predicts what follows each token, from those before it. Otherwise gaps are masked.
    """
    frame = Frame.of(tokenizer, config.model.position_offset)
    T = -(-min(_ROW_LENGTH, config.data.row_length) // unit[1]) * unit[1]
    sentences = gapped_sentences(held_out, tokenizer, NUM_SAMPLES, min(_LONGEST, T - sum(frame.specials)))
    if not sentences:
        return None
    B, M = -(-len(sentences) // unit[0]) * unit[0], max(len(sentence.gaps) for sentence in sentences)
    batch = frame.empty(B, T, *["token_types"] * (config.model.num_token_types > 1))
    batch["target_positions"] = np.zeros((B, M), np.int32)
    before = frame.specials[0]
    for row, sentence in enumerate(sentences):
        ids, places = frame.around(sentence.tokens), [before + gap for gap in sentence.gaps]
        batch["tokens"][row, : len(ids)] = ids
        batch["segment_ids"][row, : len(ids)] = 1
        batch["positions"][row, : len(ids)] = np.arange(len(ids))
        batch["target_positions"][row, : len(places)] = places
        if not looks_back:
            batch["tokens"][row, places] = tokenizer.special("mask")
    batch["positions"] = frame.positions(*(batch[name] for name in ("tokens", "segment_ids", "positions")))
    shift = before - 1 if looks_back else None
    return Samples(batch, functools.partial(_read_filled, sentences, tokenizer, shift))


def _read_filled(
    sentences: list[Gapped], tokenizer: TextTokenizer, shift: int | None, outputs: Mapping[str, np.ndarray]
) -> list[Sample]:
    """
    Args:
      shift: from a gap's place in its sentence to the output that predicts it; None: outputs are the gaps', in order.
    """
    samples = []
    for row, sentence in enumerate(sentences):
        says, right, parts, done = [], [], [], 0
        for number, gap in enumerate(sentence.gaps):
            at = number if shift is None else gap + shift
            says.append(_word(outputs["tokens"][row, at], tokenizer))
            right.append(tokenizer.decode(sentence.tokens[[gap]]).strip())
            parts += [tokenizer.decode(sentence.tokens[done:gap]).strip(), GAP]
            done = gap + 1
        text = " ".join([*parts, tokenizer.decode(sentence.tokens[done:]).strip()])
        samples.append(Sample(text.strip(), tuple(says), tuple(right)))
    return samples


def written_sentences(
    reading: Reading, config: RunConfig, tokenizer: TextTokenizer, held_out: Split, unit: tuple[int, int] = (1, 1)
) -> Samples | None:
    """Held-out sentences from which the task's targets take something away, for a model that writes it; None where the
    held-out text has none.

    The model's `outputs` are `text`, int32 [rows, 1, S]: what it writes for each row.

    Args:
      reading: of the task; `decoder_tokens`, `targets` and `target_weights` [rows, S] are what its targets give.
      unit: what divides the batch's rows and their length, as the mesh needs it.
    """
    frame = Frame.of(tokenizer, config.model.position_offset)
    T = -(-min(_ROW_LENGTH, config.data.row_length) // unit[1]) * unit[1]
    sentences = gapped_sentences(held_out, tokenizer, NUM_SAMPLES, min(_LONGEST, T - sum(frame.specials)))
    if not sentences:
        return None
    words = np.packbits(np.concatenate([sentence.word_starts for sentence in sentences]), bitorder="little")
    tokens = [sentence.tokens for sentence in sentences]
    split = Split([np.concatenate(tokens)], [words], np.cumsum([0, *map(len, tokens)], dtype=np.int64))
    documents = Documents(split, reading.layout(config), frame, T)
    plan = documents.plan(T, "one-per-row")
    inputs = TargetInputs(config, tokenizer, documents, T, plan.max_pieces_per_row, is_training=False)
    batches = Batches(
        [documents], OneByOne([plan]), reading.targets(inputs), row_length=T, num_batches=1, seed=config.seed,
        batch_size=-(-len(tokens) // unit[0]) * unit[0], stop_row=len(tokens), streams=reading.streams(config),
    )  # fmt: skip
    batch = batches[0]
    return Samples(batch, functools.partial(_read_written, batch, tokenizer, config.decoder.end_id))


def _read_written(
    batch: Mapping[str, np.ndarray], tokenizer: TextTokenizer, end: int | None, outputs: Mapping[str, np.ndarray]
) -> list[Sample]:
    """What is written into each hole; of texts without sentinels the whole text."""
    samples = []
    for row in np.flatnonzero((batch["target_weights"] > 0).any(1)):
        said = outputs["text"][row, 0]
        said = said[: next(iter(np.flatnonzero(said == end)), len(said))]
        target = batch["targets"][row, batch["target_weights"][row] > 0]
        read = batch["tokens"][row, batch["segment_ids"][row] > 0]
        says, right, kept = (_by_sentinel(ids, tokenizer) for ids in (said, target, read))
        holes = [which for which in right if which is not None] or [None]
        text = f" {GAP} ".join(kept.values()).strip()
        samples.append(Sample(cut(text), *(tuple(cut(own.get(h, "")) for h in holes) for own in (says, right))))
    return samples


def _by_sentinel(ids: np.ndarray, tokenizer: TextTokenizer) -> dict[int | None, str]:
    """What is written behind each sentinel, up to the next; None is what comes before the first."""
    first, *others = np.split(ids, np.flatnonzero(np.isin(ids, tokenizer.sentinel_ids)))
    parts = {None: first} | {int(part[0]): part[1:] for part in others}
    return {which: tokenizer.written(part).strip() for which, part in parts.items()}


def _word(ids: np.ndarray, tokenizer: TextTokenizer) -> str:
    """The first that is no special token, as people read it."""
    words = [i for i in ids.tolist() if i < tokenizer.vocab_size and i not in tokenizer.special_ids]
    return tokenizer.decode(words[:1]).strip()


def answered(
    split: Split, document: int, answer: Mapping[str, Any], right: Any, tokenizer: TextTokenizer, *, writes: bool
) -> Sample | None:
    """What a model answers about a held-out document; None for an answer that is no word or number.

    Args:
      right: the value that the document has, texts being decoded.
      writes: the document's last text is what should be written, which is no part of what is asked.
    """
    name = next((name for name in SAID if name in answer), None)
    if name is None or right is None:
        return None
    tokens = split.document(document)
    if writes and "text_lengths" in split.values:
        tokens = tokens[: -int(split.values["text_lengths"][document, -1]) or None]
    return Sample(shown(tokenizer.decode(tokens)), (shown(answer[name]),), (shown(right),))


def shown(value: Any) -> str:
    """An answer or a right value as people read it, and not all of a long one."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (tuple, list)):  # of spans: a place and a text
        texts = [part[-1] if isinstance(part, (tuple, list)) else part for part in value]
        value = ", ".join(map(str, texts)) or "none"
    return cut(str(value) or "none")


def cut(text: str) -> str:
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"
