"""SentencePiece models (Kudo and Richardson, arXiv 1808.06226) as tokenizers, with the ids that families give pieces.

Splits equal SentencePiece's own but where two are equally likely, as in a long run of one symbol.
"""

import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.classes import ALBERT_NAMES, DEBERTA_NAMES, FAIRSEQ_NAMES, T5_NAMES, Names, albert_steps

SENTENCEPIECE_FILES = ("spiece.model", "sentencepiece.bpe.model", "spm.model", "tokenizer.model")


class Layout(NamedTuple):
    """How a family numbers the pieces of its SentencePiece model, and what it does to text before."""

    names: Names
    template: str
    """A key of `classes.TEMPLATES`."""
    head: tuple[str, ...] = ()
    """Pieces with the first ids, in place of the model's own first ..."""
    num_replaced: int = 0
    """... so many."""
    tail: tuple[str, ...] = ()
    """Pieces after the model's own, where the model has them not."""
    num_extra_ids: int = 0
    """<extra_id_N-1> .. <extra_id_0> after those; tokenizer_config.json's `extra_ids` goes first."""
    is_albert: bool = False
    """Quotes made plain, accents stripped (unless `keep_accents`), and no piece that ends in a digit and a comma."""


LAYOUTS = {
    "albert": Layout(ALBERT_NAMES, "bert", is_albert=True),
    "t5": Layout(T5_NAMES, "t5", num_extra_ids=100),
    "xlmroberta": Layout(
        FAIRSEQ_NAMES, "xlmroberta", head=("<s>", "<pad>", "</s>", "<unk>"), num_replaced=3, tail=("<mask>",)
    ),
    "debertav2": Layout(DEBERTA_NAMES, "bert", tail=("[MASK]",)),
}
LAYOUTS["mt5"] = LAYOUTS["t5"]


# The model is a protocol buffer, of which these fields count (sentencepiece_model.proto).
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protocol buffer; numbers as they come, everything else as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise DataError("a number of more than 64 bits")

    while at < len(data):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise DataError(f"a field of unknown kind {kind}")
        size = {1: 8, 5: 4}.get(kind) or varint()
        if size > len(data) - at:
            raise DataError(f"a field of {size} bytes where {len(data) - at} are left")
        yield tag >> 3, data[at : at + size]
        at += size


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


class SentencePieceModel(NamedTuple):
    pieces: list[Piece]
    kind: int
    byte_fallback: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def parse_sentencepiece(data: bytes) -> SentencePieceModel:
    """A SentencePiece model from its file's bytes.

    Raises:
      DataError: it is damaged, or uses what is not done here.
    """
    pieces = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(data):
            if number == _PIECES:
                piece = dict(_fields(value))  # type: ignore[arg-type]
                (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
                pieces.append(Piece(piece[1].decode("utf-8"), score, piece.get(3, 1)))
            elif number == _TRAINER:
                trainer = dict(_fields(value))  # type: ignore[arg-type]
            elif number == _NORMALIZER:
                normalizer = dict(_fields(value))  # type: ignore[arg-type]
    except (DataError, IndexError, KeyError, TypeError, AttributeError, ValueError, struct.error) as error:
        raise DataError(f"truncated, corrupt or no SentencePiece model: {error}") from None
    kind = trainer.get(3, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE):
        raise DataError(f"a SentencePiece model must be unigram (1) or BPE (2): its type is {kind}")
    if trainer.get(24, 0) or not normalizer.get(5, 1):
        raise DataError("SentencePiece models that mark spaces at the end of words, or not at all, are not understood")
    if sum(p.kind == _UNKNOWN for p in pieces) != 1:
        raise DataError("a SentencePiece model has one unknown piece")
    return SentencePieceModel(
        pieces, kind, bool(trainer.get(35, 0)), normalizer.get(2, b""), bool(normalizer.get(3, 1)),
        bool(normalizer.get(4, 1)),
    )  # fmt: skip


def sentencepiece_tokenizer(path: pathlib.Path, config: Mapping[str, Any], layout: Layout) -> Tokenizer:
    """The tokenizer of a SentencePiece model's file, without its template.

    Args:
      config: of tokenizer_config.json.

    Raises:
      DataError: the file is damaged, or uses what is not done here.
    """
    try:
        model = parse_sentencepiece(path.read_bytes())
    except DataError as error:
        raise DataError(f"{path}: {error}.") from None
    own = model.pieces[layout.num_replaced :]
    texts = {piece.text for piece in own}
    if layout.is_albert:  # pieces such as "9," were split once more after the fact; a score no path takes does the same
        own = [p._replace(score=p.score - 100) if p.text[-1:] == "," and p.text[-2:-1].isdigit() else p for p in own]
    extra = [f"<extra_id_{i}>" for i in reversed(range(config.get("extra_ids", layout.num_extra_ids)))]
    tail = [t for t in layout.tail if t not in texts] + extra
    vocab = [*((t, 0.0) for t in layout.head), *((p.text, p.score) for p in own), *((t, 0.0) for t in tail)]
    if layout.head:  # the family's own unknown piece stands for the model's
        vocab = [v for i, v in enumerate(vocab) if i < len(layout.head) or v[0] not in layout.head]
    ids = {text: i for i, (text, _) in enumerate(vocab)}
    if len(ids) != len(vocab):
        twice = next(text for i, (text, _) in enumerate(vocab) if ids[text] != i)
        raise DataError(f"{path}: a vocabulary has each token once: {twice!r} is there twice.")
    unknown = next(p.text for p in model.pieces if p.kind == _UNKNOWN)
    if unknown not in ids:
        raise DataError(f"{path}: the unknown token must be in the vocabulary: {unknown!r} is not.")
    if model.kind == _UNIGRAM:
        # Pieces that the user defined have the score 0, more than any other path's, so that they are taken always.
        tokenizer = Tokenizer(models.Unigram(vocab, unk_id=ids[unknown], byte_fallback=model.byte_fallback))
    else:
        if long := [p.text for p in own if p.kind == _USER_DEFINED and len(p.text) > 1]:
            raise DataError(f"{path}: symbols of several characters are not understood in BPE: got {long[0]!r}.")
        mergeable = {p.text: p.score for p in own if p.kind == _NORMAL}
        tokenizer = Tokenizer(
            models.BPE(ids, _merges(mergeable), unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback)
        )
    has_prefix = model.add_dummy_prefix and config.get("add_prefix_space", True)
    tokenizer.normalizer = _normalizer(model, config, layout, has_prefix)
    # Words can be split before pieces are looked for, unless pieces hold several spaces.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=model.remove_extra_whitespaces)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always" if has_prefix else "never")
    if model.byte_fallback:
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), tokenizer.decoder])
    control = [p.text for p in model.pieces if p.kind == _CONTROL and p.text in ids] + tail
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    return tokenizer


def _normalizer(
    model: SentencePieceModel, config: Mapping[str, Any], layout: Layout, has_prefix: bool
) -> normalizers.Normalizer:
    steps = albert_steps(config) if layout.is_albert else []
    if config.get("do_lower_case", False) and not layout.is_albert:
        steps.append(normalizers.Lowercase())
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if has_prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence(steps)


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The pairs of pieces that make up a piece, best score first: what BPE tries, in SentencePiece's order."""
    pairs = [
        (-score, len(left), left, right)
        for text, score in scores.items()
        for left, right in ((text[:i], text[i:]) for i in range(1, len(text)))
        if left in scores and right in scores
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]
