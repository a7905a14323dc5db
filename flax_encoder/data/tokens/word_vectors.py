"""Word vectors from GloVe's and word2vec's files, as the first rows of a token embedding.

GloVe (Pennington et al. 2014): text, a word and its numbers a line. word2vec (Mikolov et al., arXiv 1301.3781): the
same after a line `COUNT DIMENSION`, or binary: after that line each word, a space, and its numbers, little-endian
float32.
"""

import io
import json
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.tokenizer import SPECIAL_TOKENS, TextTokenizer

_BLOCK = 4096  # words held at a time
_WORD_STARTS = ("▁", "Ġ")  # how SentencePiece and byte-level BPE mark a token that begins a word


class WordVectors(NamedTuple):
    """Rows of an embedding: vectors[i] belongs to token ids[i]; `num_missing` tokens have no vector."""

    ids: np.ndarray
    vectors: np.ndarray
    num_missing: int


def read_word_vectors(path: str | pathlib.Path) -> Iterator[tuple[list[str], np.ndarray]]:
    """(words, float32 [n, D]) in blocks, in the file's order, with memory for one block.

    Raises:
      DataError: no such file, or a bad line or word, with its number.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below, where an OSError is another matter
    except OSError as error:
        raise DataError(f"no word vectors at {path}: {error.strerror}.") from None
    with file:
        first = file.readline(1 << 20)
        header = first.split()
        if len(header) != 2 or not all(part.isdigit() for part in header):
            file.seek(0)
            yield from _blocks(_text_rows(file, path, first.rstrip().count(b" "), None, 1), path)
            return
        count, dim = map(int, header)
        start = file.tell()
        try:
            _parse_line(file.readline(64 * dim + 1024), dim)
            reader = _text_rows(file, path, dim, count, 2)
        except ValueError:
            reader = _binary_rows(file, path, dim, count)
        file.seek(start)
        yield from _blocks(reader, path)


def _parse_line(line: bytes, dim: int) -> tuple[bytes, list[float]]:
    word, *numbers = line.rstrip().rsplit(b" ", dim)
    if dim < 1 or len(numbers) != dim:
        raise ValueError(f"it has {len(numbers)}")
    try:
        float(word.rsplit(b" ", 1)[-1] if b" " in word else b"word")  # words may hold spaces: GloVe has ". . ."
    except ValueError:
        return word, list(map(float, numbers))
    raise ValueError("it has more")


def _text_rows(
    file: io.BufferedReader, path, dim: int, count: int | None, line_number: int
) -> Iterator[tuple[bytes, list[float], str]]:
    found = 0
    for number, line in enumerate(file, line_number):
        if not line.strip():
            continue
        try:
            word, values = _parse_line(line, dim)
        except ValueError as error:
            raise DataError(f"{path}: line {number} must have a word and {dim} numbers: {error}.") from None
        found += 1
        yield word, values, f"line {number}"
    if count is not None and found != count:
        raise DataError(f"{path}: its first line announces {count} words: {found} are there.")


def _binary_rows(file: io.BufferedReader, path, dim: int, count: int) -> Iterator[tuple[bytes, np.ndarray, str]]:
    size, rest = 4 * dim, b""
    for number in range(1, count + 1):
        while (space := rest.find(b" ")) < 0 or len(rest) < space + 1 + size:
            if (more := file.read(1 << 20)) == b"":
                raise DataError(f"{path}: its first line announces {count} words: it ends in word {number}.")
            rest += more
        word, end = rest[:space].lstrip(b"\n"), space + 1 + size  # some writers end each word with a line break
        yield word, np.frombuffer(rest, "<f4", dim, space + 1), f"word {number}"
        rest = rest[end:]
    if (rest + file.read(1)).strip():
        raise DataError(f"{path}: its first line announces {count} words: more follow.")


def _blocks(rows, path) -> Iterator[tuple[list[str], np.ndarray]]:
    words: list[str] = []
    values: list = []
    places: list[str] = []

    def block():
        vectors = np.array(values, np.float32)
        if bad := np.flatnonzero(~np.isfinite(vectors).all(1)).tolist():
            raise DataError(f"{path}: {places[bad[0]]} must hold finite numbers.")
        return words, vectors

    for word, numbers, place in rows:
        try:
            words.append(word.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: {place} must be UTF-8: {error.reason} in {word[:40]!r}.") from None
        values.append(numbers)
        places.append(place)
        if len(words) == _BLOCK:
            yield block()
            words, values, places = [], [], []
    if words:
        yield block()


def embedding_from_vectors(path: str | pathlib.Path, tokenizer: TextTokenizer) -> WordVectors:
    """The vectors of a tokenizer's tokens: of the word as it stands, else in lower case.

    Only tokens that begin a word have one: not WordPiece's `##s`. A word that comes twice keeps its first vector.

    Raises:
      DataError: a bad file, or not one token found.
    """
    special = set(tokenizer.special_ids.tolist())
    wanted: dict[str, list[int]] = {}
    for token_id in range(tokenizer.vocab_size):
        token = tokenizer.token(token_id)
        word = token[1:] if token.startswith(_WORD_STARTS) else token
        if token_id not in special and word and not (token.startswith("##") and len(token) > 2):
            for form in dict.fromkeys((word, word.lower())):
                wanted.setdefault(form, []).append(token_id)
    found: dict[int, np.ndarray] = {}
    is_exact: set[int] = set()
    seen: set[str] = set()
    for words, vectors in read_word_vectors(path):
        for word, vector in zip(words, vectors, strict=True):
            if word not in wanted or word in seen:
                continue
            seen.add(word)
            for token_id in wanted[word]:
                exact = tokenizer.token(token_id).lstrip("".join(_WORD_STARTS)) == word
                if exact or token_id not in is_exact:
                    found[token_id] = vector.copy()
                    is_exact |= {token_id} if exact else set()
    if not found:
        raise DataError(f"not one of the tokenizer's {tokenizer.vocab_size} tokens is a word of {path}.")
    ids = np.array(sorted(found), np.int32)
    return WordVectors(ids, np.stack([found[i] for i in ids.tolist()]), tokenizer.vocab_size - len(ids))


def word_level_tokenizer(path: str | pathlib.Path, vocab_size: int) -> TextTokenizer:
    """A tokenizer whose tokens are the file's first words, the most frequent, after the special tokens.

    Text is split at spaces and around each punctuation mark, and lower-cased if all of the words are.
    """
    names = [names[0] for names in SPECIAL_TOKENS.values()]
    vocab = {name: i for i, name in enumerate(names)}
    for words, _ in read_word_vectors(path):
        for word in words:
            if word and len(vocab) < vocab_size:
                vocab.setdefault(word, len(vocab))
        if len(vocab) >= vocab_size:
            break
    is_lower = all(word == word.lower() for word in vocab if word not in names)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=SPECIAL_TOKENS["unknown"][0]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=is_lower, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(names)
    return TextTokenizer(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=1))
