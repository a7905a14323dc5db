"""Records to tokens: what every way from a text to a row has in common, in training, evaluation and prediction."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.records import DataError, Record
from flax_encoder.data.sources.words import Word, words_of_text
from flax_encoder.data.tokens.tokenizer import TextTokenizer

NO_ANSWER = -1


@dataclass(frozen=True)
class Encoded:
    """The tokens of N documents end to end, without special tokens, and their values as far as these lie in tokens."""

    tokens: np.ndarray
    """uint16 or uint32 [tokens]."""
    words: np.ndarray
    """bool [tokens]: whether a token begins a word, as the tokenizer cuts words."""
    text_lengths: np.ndarray
    """uint32 [N, texts]: tokens of each text of a document, 0 of the choices that others have more; last those of the
    text that is its value, if it is one. Of texts with a history [N, 3]: its turns, the text, and the value, if any."""
    tags: np.ndarray | None = None
    """int16 [tokens], of documents with tags: tag + 1 at a word's first token, -(tag + 1) at its other tokens, and 0 at
    tokens of no word."""
    unread_words: int = 0
    """Words with a tag that no token begins, as where a tokenizer leaves out what they consist of: their tags are
    not learnt."""
    answers: np.ndarray | None = None
    """int32 [N, 2], of documents with answers: the first and the last token of the first answer, counted in the last
    text; NO_ANSWER twice where there is none."""
    offsets: np.ndarray | None = None
    """int32 [tokens, 2]: where each token's characters begin and end in its text."""
    text_keys: np.ndarray | None = None
    """uint64 [N, texts], where `Columns.has_keys`: a hash of each text without prompts and outer blanks, 0 of none."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, uint32 [N]."""
        return self.text_lengths.sum(1, dtype=np.uint32)

    @property
    def is_empty(self) -> np.ndarray:
        """Whether a document has no token, or one of its texts that are compared has none, bool [N]."""
        if self.text_keys is None:
            return self.lengths == 0
        return ((self.text_keys == 0) | (self.text_lengths == 0)).any(1)


def exact_texts(record: Record, columns: Columns) -> tuple[str, ...]:
    """A record's texts as they are tokenized, its history first: they are stripped, but where their values can count
    characters."""
    texts = (*(record.history or ()), *record.texts)
    return tuple(text.strip() for text in texts) if columns.value in ("none", "text") else texts


def held_out_text(record: Record, columns: Columns) -> str:
    """What decides by its hash whether a record is held out, the same for records of one group."""
    return "\x1e".join(exact_texts(record, columns)) if record.group is None else record.group


def tokenized_texts(record: Record, columns: Columns) -> tuple[str, ...]:
    """What is tokenized of a record: its texts, and the text that is its value, where it has one."""
    texts = exact_texts(record, columns)
    return texts if columns.value != "text" or record.value is None else (*texts, record.value.strip())


def encode_records(
    records: Sequence[Record], tokenizer: TextTokenizer, columns: Columns, tag_ids: dict[str, int],
    dtype: np.dtype, *, with_offsets: bool = False,
) -> Encoded:  # fmt: skip
    """Tokenize records.

    Args:
      tag_ids: number of each tag; tags that are not there are added. A tag that is None, to be predicted, is 0.
      with_offsets: return `offsets`, which tags and answers need anyway.

    Raises:
      DataError: records that differ in how many texts they have, but for choices.
    """
    if any(record.history is not None for record in records):
        return _with_history(records, tokenizer, columns, dtype)
    each = [tokenized_texts(record, columns) for record in records]
    num_texts = max(len(own) for own in each) if columns.is_choice else len(each[0])
    if not columns.is_choice and (other := next((i for i, own in enumerate(each) if len(own) != num_texts), None)):
        raise other_number_of_texts(records[other], num_texts)
    texts = [text for own in each for text in (*own, *[""] * (num_texts - len(own)))]
    keys = None
    if columns.has_keys:
        keys = np.array([text_key(text) for text in texts], np.uint64).reshape(len(records), num_texts)
    if any(columns.prompts):
        texts = [columns.prompts[min(i % num_texts, 1)] + text for i, text in enumerate(texts)]
    needs_offsets = with_offsets or columns.value in ("tags", "answers")
    offsets = None
    if needs_offsets:
        tokens, counts, words, offsets = tokenizer.encode_flat_with_offsets(texts, dtype)
    else:
        tokens, counts, words = tokenizer.encode_flat(texts, dtype)
    text_lengths = counts.reshape(len(records), num_texts)
    tags, unread, answers = None, 0, None
    if columns.value == "tags":
        tags, unread = _token_tags(records, text_lengths[:, 0], offsets, tag_ids)
    elif columns.value == "answers":
        answers = _token_answers(records, text_lengths, offsets)
    return Encoded(tokens, words, text_lengths, tags, unread, answers, offsets, keys)


def _with_history(
    records: Sequence[Record], tokenizer: TextTokenizer, columns: Columns, dtype: np.dtype
) -> Encoded:
    """Records of three texts: the turns of a history, each with the separator after it, the newest turn, with the
    prompt before it, and what is written, of no token where it is to be found."""
    separator = np.array(turn_separator_ids(tokenizer, columns.turn_separator), dtype)
    prompt = columns.prompts[0] if columns.prompts else ""
    texts: list[str] = []
    place: list[int] = []  # record * 3 + which of its texts, of each
    for i, record in enumerate(records):
        *before, newest = exact_texts(record, columns)
        texts += [*before, prompt + newest, (record.value or "").strip()]
        place += [*[3 * i] * len(before), 3 * i + 1, 3 * i + 2]
    tokens, counts, words = tokenizer.encode_flat(texts, dtype)
    is_turn = np.array(place) % 3 == 0
    ends = np.repeat(np.cumsum(counts, dtype=np.int64)[is_turn], len(separator))
    tokens = np.insert(tokens, ends, np.tile(separator, int(is_turn.sum())))
    words = np.insert(words, ends, True)
    lengths = np.bincount(place, counts + len(separator) * is_turn, 3 * len(records))
    return Encoded(tokens, words, lengths.astype(np.uint32).reshape(-1, 3))


def turn_separator_ids(tokenizer: TextTokenizer, separator: str | None) -> list[int]:
    """The tokens after every turn of a history: those of the text `separator`, or of None the tokenizer's between two
    texts.

    Raises:
      DataError: the tokenizer has none.
    """
    ids = list(tokenizer.between) if separator is None else tokenizer.encode_batch([separator])[0].tolist()
    unknown = tokenizer.unknown_id
    if ids and (unknown is None or unknown not in ids):
        return ids
    found = "no token between two texts" if separator is None else f"no token for {separator!r}"
    raise DataError(
        f"turns must be kept apart: the tokenizer has {found}. Give a text that it has as --data.turn-separator, or "
        f"another --data.tokenizer."
    )


def split_turns(tokens: np.ndarray, separator: Sequence[int]) -> list[np.ndarray]:
    """The turns of a history's tokens, without the separators after them."""
    width, at, found = len(separator), 0, []
    for end in range(len(tokens) - width + 1):
        if end >= at and list(tokens[end : end + width]) == list(separator):
            found.append(tokens[at:end])
            at = end + width
    return found if at == len(tokens) else [*found, tokens[at:]]


def text_key(text: str) -> int:
    """64 bits that tell a text from others, blanks around it left out; 0 of an empty one."""
    text = text.strip()
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") if text else 0


def words_of_record(record: Record) -> list[Word]:
    """Where the words of a text with tags are: those that its value names, or those that are found in the text."""
    if record.value is None:
        return words_of_text(record.texts[0])
    return [(start, end) for start, end, _ in record.value]


def join_text_lengths(parts: Sequence[np.ndarray]) -> np.ndarray:
    """`text_lengths` of several parts end to end, [documents, texts] of the most texts: those that are none have 0."""
    num_texts = max((part.shape[1] for part in parts if len(part)), default=parts[0].shape[1])
    return np.concatenate([np.pad(part, ((0, 0), (0, num_texts - part.shape[1]))) for part in parts if len(part)]
                          or parts[:1])  # fmt: skip


def other_number_of_texts(record: Record, num_texts: int) -> DataError:
    return DataError(
        f"every record must have as many texts as the others: {record.where or 'one'} has {len(record.texts)}, those "
        f"before it {num_texts}."
    )


def words_of_tokens(offsets: np.ndarray, words: Sequence[tuple[int, int]]) -> np.ndarray:
    """The word that each token of one text lies in, int64 [tokens]; -1 is none.

    A token lies in the first word that ends after the token's start, if that word begins before the token's end; so a
    token that begins with the blank before a word lies in that word.

    Args:
      offsets: [tokens, 2], characters.
      words: (start, end) of each word in characters, in order, without overlaps.
    """
    if not len(words):
        return np.full(len(offsets), -1)
    begins, ends = np.array(words, np.int64).T
    word = np.searchsorted(ends, offsets[:, 0], side="right")
    inside = np.minimum(word, len(words) - 1)
    is_in = (word < len(words)) & (begins[inside] < offsets[:, 1])
    return np.where(is_in, inside, -1)


def _token_tags(
    records, lengths: np.ndarray, offsets: np.ndarray, tag_ids: dict[str, int]
) -> tuple[np.ndarray, int]:
    """(`Encoded.tags`, `Encoded.unread_words`)."""
    tags, unread = np.zeros(len(offsets), np.int16), 0
    ends = np.cumsum(lengths, dtype=np.int64)
    for record, begin, end in zip(records, (ends - lengths).tolist(), ends.tolist(), strict=True):
        words = words_of_record(record)
        word = words_of_tokens(offsets[begin:end], words)
        tags_of = [None] * len(words) if record.value is None else [tag for _, _, tag in record.value]
        numbers = np.array([0 if t is None else tag_ids.setdefault(t, len(tag_ids)) for t in tags_of], np.int64)
        inside = np.flatnonzero(word >= 0)
        word = word[inside]
        is_first = np.diff(word, prepend=-1) != 0
        unread += len(words) - int(is_first.sum())
        if not len(inside):
            continue
        tags[begin + inside] = np.where(is_first, numbers[word] + 1, -(numbers[word] + 1))
    return tags, unread


def _token_answers(records, text_lengths: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    answers = np.full((len(records), 2), NO_ANSWER, np.int32)
    ends = text_lengths.sum(1, dtype=np.int64).cumsum()
    for i, (record, end) in enumerate(zip(records, ends.tolist(), strict=True)):
        if not record.value:
            continue
        start, text = record.value[0]
        of_passage = offsets[end - int(text_lengths[i, -1]) : end]
        inside = np.flatnonzero((of_passage[:, 1] > start) & (of_passage[:, 0] < start + len(text)))
        if len(inside):
            answers[i] = inside[0], inside[-1]
    return answers
