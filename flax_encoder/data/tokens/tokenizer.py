"""Tokenizers: trained here or brought along, always as the text of a tokenizer.json."""

import hashlib
import itertools
import json
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.texts import check_texts

# Role -> the names it goes by, in the order in which they are looked for.
SPECIAL_TOKENS = {
    "pad": ("[PAD]", "<pad>"),
    "unknown": ("[UNK]", "<unk>"),
    "first": ("[CLS]", "<s>"),
    "last": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
SETTINGS = "flax_encoder"  # a member of tokenizer.json's model, which other tools ignore; at the top they would not
_PREFIX = "##"
_SPACE_MARKS = ("\u2581", "\u0120")  # SentencePiece's and byte-level BPE's
_ALPHABET = 1000  # characters kept, the most frequent; the rest are unknown
_LONGEST_WORD = 100  # characters; a longer word is one unknown token
_MOST_UNKNOWN = 0.1  # of a text's tokens, before it is worth a warning
_MOST_DIGITS = 7  # of an id
_MANY_DIGITS = re.compile(rf"\d{{{_MOST_DIGITS + 1},}}")


@dataclass(frozen=True)
class TextTokenizer:
    """Text to ids without special tokens; packing puts those around each piece of a document.

    A tokenizer.json cannot say everything that a published folder does. What is more, `settings` hold, which stand in
    the same text: `roles` (role -> the name of its special token), `frame` (the ids before and after a text),
    `truncation_side`, `max_tokens`, and `text_hash`. Each is there only where it differs from what this class finds by
    itself.
    """

    json: str
    """The text of tokenizer.json."""

    def __repr__(self) -> str:
        return f"TextTokenizer({self.vocab_size:,} tokens)"

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        # Without a large number no id is too large, and a large file need not be parsed here.
        if any(self.json[found.start() - 1] != "." for found in _MANY_DIGITS.finditer(self.json)):
            content = json.loads(self.json)
            with suppress(KeyError, TypeError, AttributeError):  # which the library explains
                vocab, added = content["model"].get("vocab"), content.get("added_tokens") or ()
                check_ids([*(vocab.values() if isinstance(vocab, dict) else ()), *(token["id"] for token in added)])
        tokenizer = Tokenizer.from_str(self.json)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @property
    def parts(self) -> dict[str, Any]:
        """What tokenizer.json holds as the library writes it, with all members; without truncation and padding."""
        return json.loads(self._tokenizer.to_str())

    @cached_property
    def settings(self) -> dict[str, Any]:
        return json.loads(self.json)["model"].get(SETTINGS, {}) if f'"{SETTINGS}"' in self.json else {}

    @property
    def plain_json(self) -> str:
        """The text of tokenizer.json without the settings, which a folder for other tools has beside it."""
        if not self.settings:
            return self.json
        content = json.loads(self.json)
        del content["model"][SETTINGS]
        return json.dumps(content, ensure_ascii=False, indent=1)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of what makes the tokens: of the text, or of that without settings if these came later."""
        return self.settings.get("text_hash") or hashlib.sha256(self.json.encode()).hexdigest()

    @cached_property
    def sentinel_ids(self) -> np.ndarray:
        """The ids of <extra_id_0>, <extra_id_1> ..., T5's names for holes in a text; none, where there are none."""
        ids = (self._tokenizer.token_to_id(f"<extra_id_{i}>") for i in itertools.count())
        return np.array(list(itertools.takewhile(lambda i: i is not None, ids)), np.int64)

    @cached_property
    def vocab_size(self) -> int:
        """The highest id and one: rows of a table that has one for each token. Ids may have holes."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def truncation_side(self) -> str:
        """"right" or "left": where a text that is too long loses tokens."""
        return self.settings.get("truncation_side", "right")

    @property
    def max_tokens(self) -> int | None:
        """The longest text that the folder it came from allows, in tokens, special ones included; None is any."""
        return self.settings.get("max_tokens")

    def id_of(self, token: str) -> int | None:
        """The id of a token by its text; None where there is none."""
        return self._tokenizer.token_to_id(token)

    def find(self, role: str) -> int | None:
        """The id of a special token by its role, a key of SPECIAL_TOKENS; None where there is none."""
        given = self.settings.get("roles", {}).get(role)
        ids = map(self._tokenizer.token_to_id, SPECIAL_TOKENS[role] if given is None else [given])
        return next((i for i in ids if i is not None), None)

    def special(self, role: str) -> int:
        """The id of a special token by its role, a key of SPECIAL_TOKENS.

        Raises:
          DataError: the vocabulary has none of the role's names.
        """
        if (found := self.find(role)) is None:
            raise DataError(
                f"the tokenizer has no {role} token: looked for {' and '.join(SPECIAL_TOKENS[role])}. A folder says "
                f"other names in tokenizer_config.json."
            )
        return found

    @cached_property
    def frame(self) -> tuple[int | None, int | None]:
        """The ids of the special tokens before and after a text; None where there is none, as T5 has no first."""
        first, last = self.settings.get("frame") or (self.find("first"), self.find("last"))
        return first, last

    @cached_property
    def between(self) -> tuple[int, ...]:
        """The ids of the special tokens between two texts: its template's, else what stands after a text."""
        found: list[int] = []
        if self._tokenizer.num_special_tokens_to_add(True):
            pair = self._tokenizer.encode("a", "a")
            of = pair.sequence_ids
            if 0 in of and 1 in of:
                found = pair.ids[len(of) - of[::-1].index(0) : of.index(1)]
        last = self.frame[1]
        return tuple(found) or (() if last is None else (last,))

    @cached_property
    def special_ids(self) -> np.ndarray:
        """Ids that are never masked and never drawn at random: special tokens, and ids that no token has."""
        names = [name for names in SPECIAL_TOKENS.values() for name in names]
        special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        special |= {*map(self._tokenizer.token_to_id, names), *map(self.find, SPECIAL_TOKENS)} - {None}
        is_special = np.ones(self.vocab_size, bool)
        is_special[list(self._tokenizer.get_vocab(with_added_tokens=True).values())] = False
        is_special[list(special)] = True
        return np.flatnonzero(is_special).astype(np.int32)

    @cached_property
    def unknown_id(self) -> int | None:
        """The id of what the vocabulary cannot spell; None where it can spell everything, as bytes do."""
        model = self._tokenizer.model
        if isinstance(model, models.Unigram):
            return json.loads(self.json)["model"].get("unk_id")
        return None if model.unk_token is None else self._tokenizer.token_to_id(model.unk_token)

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """Each text's ids, int32, without special tokens around it.

        Raises:
          DataError: what `check_texts` refuses.
        """
        encodings = self._encodings(check_texts(texts), with_words=False)
        return [np.array(e.ids, np.int32) for e in encodings]

    def encode_rows(self, texts: Iterable[str], max_tokens: int | None = None) -> tuple[list[np.ndarray], int]:
        """(each text's ids with the special tokens around it, int32; how many texts were cut).

        Args:
          max_tokens: the longest row, special tokens included; a longer text loses what is over on `truncation_side`.

        Raises:
          DataError: what `check_texts` refuses, or max_tokens leaves no room for text.
        """
        before, after = ([] if i is None else [i] for i in self.frame)
        encoded, num_cut = self.encode_batch(texts), 0
        if max_tokens is not None:
            room = max_tokens - len(before) - len(after)
            if room < 1:
                raise DataError(f"max_tokens must leave room for text: got {max_tokens}, {max_tokens - room} special.")
            num_cut = sum(len(ids) > room for ids in encoded)
            encoded = [self.cut(ids, room) for ids in encoded]
        return [np.array([*before, *ids, *after], np.int32) for ids in encoded], num_cut

    def cut(self, ids: np.ndarray, room: int) -> np.ndarray:
        """At most `room` of a text's ids: its first, or its last where the left is cut."""
        return ids[:room] if self.truncation_side == "right" else ids[max(0, len(ids) - room) :]

    def encode_flat(self, texts: Iterable[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All texts' ids end to end, each text's number of them, and whether each begins a word.

        Words are the pre-tokenizer's. Where it cuts none, a token begins one if it is spelled with the mark of a space.

        Raises:
          DataError: what `check_texts` refuses.
        """
        texts = check_texts(texts)
        return self._flat(self._encodings(texts, with_words=self._starts_word is None), dtype)

    def encode_flat_with_offsets(
        self, texts: Iterable[str], dtype: np.dtype
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """As `encode_flat`, and where each token's characters begin and end in its text, int32 [tokens, 2]."""
        encodings = self._encodings(check_texts(texts), with_words=True)
        flat = self._flat(encodings, dtype)
        offsets = np.array([pair for e in encodings for pair in e.offsets], np.int32).reshape(-1, 2)
        return *flat, offsets

    def _flat(self, encodings: list[Encoding], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        starts = self._starts_word
        ids = [e.ids for e in encodings]
        lengths = np.array([len(i) for i in ids], np.uint32)
        flat = np.fromiter(itertools.chain.from_iterable(ids), dtype, int(lengths.sum()))
        if starts is not None:
            begins = starts[flat]
        else:
            words = itertools.chain.from_iterable(e.word_ids for e in encodings)
            word = np.fromiter((-1 if w is None else w for w in words), np.int64, len(flat))
            begins = (np.diff(word, prepend=-1) != 0) | (word < 0)
        begins[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        return flat, lengths, begins

    def _encodings(self, texts: list[str], *, with_words: bool) -> list[Encoding]:
        encode = self._tokenizer.encode_batch if with_words else self._tokenizer.encode_batch_fast
        try:
            return encode(texts, add_special_tokens=False)
        except Exception as error:  # the library's is bare, such as for an unknown token that is not there
            raise DataError(f"the tokenizer cannot read a text: {error}.") from None

    @cached_property
    def _starts_word(self) -> np.ndarray | None:
        """Whether a token begins a word [vocab_size], where its spelling says so; None where one must see the text."""
        model = self._tokenizer.model  # whose kind the library infers, where the file doesn't say it
        tokens = [""] * self.vocab_size
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            tokens[i] = token
        if isinstance(model, models.WordPiece):
            return np.array([not t.startswith(model.continuing_subword_prefix) for t in tokens])
        if self._tokenizer.pre_tokenizer is None:
            is_marked = np.array([t[:1] in _SPACE_MARKS for t in tokens])
            return is_marked if is_marked.any() else np.ones(len(tokens), bool)
        return None

    def token(self, token_id: int | np.integer) -> str:
        return self._tokenizer.id_to_token(int(token_id)) or ""

    def written(self, ids: np.ndarray) -> str:
        """The text of ids that a model wrote: special tokens, and ids that no token has, are left out."""
        return self.decode(ids[(ids < self.vocab_size) & ~np.isin(ids, self.special_ids)])

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


@dataclass
class UnknownCount:
    """How many tokens of texts the vocabulary cannot spell. Add what is tokenized; ask for the warning at the end."""

    tokenizer: TextTokenizer
    num_unknown: int = 0
    num_tokens: int = 0

    def add(self, encoded: Sequence[np.ndarray]) -> None:
        """Count the ids of some texts, special tokens around them or not."""
        unknown = self.tokenizer.unknown_id
        self.num_tokens += sum(map(len, encoded))
        self.num_unknown += 0 if unknown is None else sum(int((ids == unknown).sum()) for ids in encoded)

    @property
    def warning(self) -> str | None:
        """What to tell the user if more than a tenth of the tokens are unknown, else None."""
        if self.num_unknown <= _MOST_UNKNOWN * self.num_tokens:
            return None
        return (
            f"{self.num_unknown:,} of {self.num_tokens:,} tokens ({self.num_unknown / self.num_tokens:.0%}) are "
            f"{self.tokenizer.token(self.tokenizer.unknown_id)}, of which a model learns nothing: is this the text's "
            f"tokenizer, and is its case kept (do_lower_case in tokenizer_config.json)?"
        )


def check_ids(ids: Iterable[Any]) -> None:
    """Raises: DataError: an id is so large that the library, which makes a list of all below it, takes gigabytes."""
    if odd := [i for i in ids if isinstance(i, int) and i >= 10**_MOST_DIGITS]:
        raise DataError(f"ids of tokens are below {10**_MOST_DIGITS:,}: got {odd[0]}.")


def load_tokenizer(path: str | pathlib.Path) -> TextTokenizer:
    """Read a tokenizer.json, or that of a folder, as it is: of a store or a run. `read_tokenizer` reads what other
    tools wrote, and what stands beside it.

    Raises:
      DataError: there is none, or it is not one.
    """
    path = pathlib.Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = TextTokenizer(path.read_text("utf-8"))
        tokenizer.vocab_size  # noqa: B018 - parses it
    except OSError as error:
        raise DataError(f"no tokenizer at {path}: {error.strerror}.") from None
    except Exception as error:  # the library raises bare Exception for anything malformed
        raise DataError(f"not a tokenizer.json: {path}: {error}.") from None
    return tokenizer


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Train a lower-casing WordPiece with [PAD]=0, [UNK], [CLS], [SEP], [MASK] (Devlin et al. use the same).

    The same texts give the same vocabulary, in any order. Words of more than 100 characters, which the tokenizer will
    read as one unknown token, are not learnt from.

    Raises:
      DataError: vocab_size cannot hold the special tokens and the alphabet.
    """
    names = [names[0] for names in SPECIAL_TOKENS.values()]
    unknown = SPECIAL_TOKENS["unknown"][0]
    tokenizer = Tokenizer(models.WordPiece(unk_token=unknown, max_input_chars_per_word=_LONGEST_WORD))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_PREFIX)
    texts = [_without_long_words(text, tokenizer) for text in check_texts(texts)]
    counts = Counter(itertools.chain.from_iterable(map(tokenizer.normalizer.normalize_str, texts)))
    alphabet = sorted(c for c in sorted(counts, key=lambda c: (-counts[c], c))[:_ALPHABET] if not c.isspace())
    if vocab_size < (needed := len(names) + 2 * len(alphabet)):
        raise DataError(
            f"a vocabulary must hold the special tokens and every character, at a word's start and inside: got "
            f"data.vocab_size {vocab_size}, at least {needed} is needed."
        )
    # The trainer gives ids to inner characters in the order of a hash table and breaks ties by id, so that two runs
    # differ. As special tokens they have fixed ids; afterwards they are made ordinary again.
    inner = [_PREFIX + c for c in alphabet]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=names + inner,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in names]
    return TextTokenizer(json.dumps(content, ensure_ascii=False, indent=1))


def _without_long_words(text: str, tokenizer: Tokenizer) -> str:
    # Normalising makes at most four characters of one, so that shorter runs cannot become long words.
    if not re.search(rf"\S{{{_LONGEST_WORD // 4},}}", text):
        return text
    words = [w for w, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))]
    short = [word for word in words if len(word) <= _LONGEST_WORD]
    return text if len(short) == len(words) else " ".join(short)
