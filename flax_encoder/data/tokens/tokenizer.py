"""Tokenizers: trained here or brought along, always as the text of a tokenizer.json."""

import hashlib
import itertools
import json
import pathlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from flax_encoder.data.sources.records import DataError

# Role -> the names it goes by, in the order in which they are looked for.
SPECIAL_TOKENS = {
    "pad": ("[PAD]", "<pad>"),
    "unknown": ("[UNK]", "<unk>"),
    "first": ("[CLS]", "<s>"),
    "last": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
_PREFIX = "##"
_SPACE_MARKS = ("\u2581", "\u0120")  # SentencePiece's and byte-level BPE's
_ALPHABET = 1000  # characters kept, the most frequent; the rest are unknown


@dataclass(frozen=True)
class TextTokenizer:
    """Text to ids without special tokens; packing puts those around each piece of a document."""

    json: str
    """The text of tokenizer.json."""

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self.json)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def hash(self) -> str:
        return hashlib.sha256(self.json.encode()).hexdigest()

    @cached_property
    def sentinel_ids(self) -> np.ndarray:
        """The ids of <extra_id_0>, <extra_id_1> ..., T5's names for holes in a text; none, where there are none."""
        ids = (self._tokenizer.token_to_id(f"<extra_id_{i}>") for i in itertools.count())
        return np.array(list(itertools.takewhile(lambda i: i is not None, ids)), np.int64)

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def special(self, role: str) -> int:
        """The id of a special token by its role.

        Raises:
          DataError: the vocabulary has none of the role's names.
        """
        ids = (self._tokenizer.token_to_id(name) for name in SPECIAL_TOKENS[role])
        found = next((i for i in ids if i is not None), None)
        if found is None:
            raise DataError(f"the tokenizer has no {role} token: looked for {' and '.join(SPECIAL_TOKENS[role])}.")
        return found

    @cached_property
    def frame(self) -> tuple[int | None, int | None]:
        """The ids of the special tokens before and after a text; None where there is none, as T5 has no first."""
        ids = {name: self._tokenizer.token_to_id(name) for role in ("first", "last") for name in SPECIAL_TOKENS[role]}
        first, last = (
            next((ids[name] for name in SPECIAL_TOKENS[role] if ids[name] is not None), None)
            for role in ("first", "last")
        )
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
        """Ids that are never masked and never drawn at random."""
        names = [name for names in SPECIAL_TOKENS.values() for name in names]
        added = [i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special]
        found = {self._tokenizer.token_to_id(name) for name in names} - {None} | set(added)
        return np.array(sorted(found), np.int32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in encodings]

    def encode_flat(self, texts: list[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All texts' ids end to end, each text's number of them, and whether each begins a word.

        Words are the pre-tokenizer's. Where it cuts none, a token begins one if it is spelled with the mark of a space.
        """
        starts = self._starts_word
        encode = self._tokenizer.encode_batch if starts is None else self._tokenizer.encode_batch_fast
        return self._flat(encode(texts, add_special_tokens=False), dtype)

    def encode_flat_with_offsets(
        self, texts: list[str], dtype: np.dtype
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """As `encode_flat`, and where each token's characters begin and end in its text, int32 [tokens, 2]."""
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        flat = self._flat(encodings, dtype)
        offsets = np.array([pair for e in encodings for pair in e.offsets], np.int32).reshape(-1, 2)
        return *flat, offsets

    def _flat(self, encodings, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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

    @cached_property
    def _starts_word(self) -> np.ndarray | None:
        """Whether a token begins a word [vocab_size], where its spelling says so; None where one must see the text."""
        model = json.loads(self.json)["model"]
        tokens = [""] * self.vocab_size
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            tokens[i] = token
        if model["type"] == "WordPiece":
            return np.array([not t.startswith(model["continuing_subword_prefix"]) for t in tokens])
        if self._tokenizer.pre_tokenizer is None:
            is_marked = np.array([t[:1] in _SPACE_MARKS for t in tokens])
            return is_marked if is_marked.any() else np.ones(len(tokens), bool)
        return None

    def token(self, token_id: int | np.integer) -> str:
        return self._tokenizer.id_to_token(int(token_id)) or ""

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def load_tokenizer(path: str | pathlib.Path) -> TextTokenizer:
    """Read a tokenizer.json, or that of a folder.

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

    The same texts give the same vocabulary, in any order.

    Raises:
      DataError: vocab_size cannot hold the special tokens and the alphabet.
    """
    names = [names[0] for names in SPECIAL_TOKENS.values()]
    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS["unknown"][0], max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_PREFIX)
    texts = list(texts)
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
