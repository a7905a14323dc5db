"""A published folder's tokenizer, whatever files it is in, as a `TextTokenizer` whose tokenizer.json works elsewhere.

Files, in the order in which they are looked for: tokenizer.json; a SentencePiece model (Kudo and Richardson, arXiv
1808.06226), with the ids that its family gives to pieces; vocab.json and merges.txt (byte-level BPE, as GPT-2 and
RoBERTa have); vocab.txt (BERT's WordPiece). Beside them tokenizer_config.json, special_tokens_map.json and
added_tokens.json may change names and add tokens.
"""

import json
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.tokenizer import TextTokenizer, load_tokenizer

SENTENCEPIECE_FILES = ("spiece.model", "sentencepiece.bpe.model", "spm.model", "tokenizer.model")
ROLES = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")
# Settings of tokenizer_config.json that have one value here; any other would change the ids.
_FIXED = {
    "do_basic_tokenize": (True,), "never_split": (None, []), "do_subword_tokenize": (True,), "remove_space": (True,),
    "word_tokenizer_type": ("basic",), "subword_tokenizer_type": ("wordpiece",), "sp_model_kwargs": (None, {}),
    "wordpieces_prefix": ("##",), "split_by_punct": (False,),
}  # fmt: skip
_BERT_NAMES = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
_FAIRSEQ_NAMES = {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
_TEMPLATES = {
    "bert": ("{cls} $A {sep}", "{cls} $A {sep} $B:1 {sep}:1"),
    "fairseq": ("{cls} $A {sep}", "{cls} $A {sep} {sep} $B {sep}"),
    "t5": ("$A {eos}", "$A {eos} $B {eos}"),
}


class Layout(NamedTuple):
    """How a family numbers the pieces of its SentencePiece model, and what it does to text before."""

    names: dict[str, str]
    template: str
    head: tuple[str, ...] = ()
    """Pieces with the first ids, in place of the model's own first ..."""
    num_replaced: int = 0
    """... so many."""
    tail: tuple[str, ...] = ()
    """Pieces after the model's own, where the model has them not."""
    num_extra_ids: int = 0
    """<extra_id_N-1> .. <extra_id_0> after those; tokenizer_config.json's `extra_ids` goes first."""
    lower: bool = False
    """Lower-case; `do_lower_case` goes first."""
    is_albert: bool = False
    """Quotes made plain, accents stripped (unless `keep_accents`), and no piece that ends in a digit and a comma."""


LAYOUTS = {
    "albert": Layout(_BERT_NAMES | {"pad": "<pad>", "unk": "<unk>"}, "bert", lower=True, is_albert=True),
    "t5": Layout({"pad": "<pad>", "unk": "<unk>", "eos": "</s>"}, "t5", num_extra_ids=100),
    "xlmroberta": Layout(
        _FAIRSEQ_NAMES, "fairseq", head=("<s>", "<pad>", "</s>", "<unk>"), num_replaced=3, tail=("<mask>",)
    ),
    "debertav2": Layout(_BERT_NAMES, "bert", tail=("[MASK]",)),
}
LAYOUTS["mt5"] = LAYOUTS["t5"]


def read_tokenizer(folder: str | pathlib.Path) -> TextTokenizer:
    """The tokenizer of a published folder.

    Raises:
      DataError: no such files (it lists what was looked for), files that cannot be decoded, a vocabulary with holes, or
        a setting that would change the ids and is not understood.
    """
    folder = pathlib.Path(folder)
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    config = _json(folder / "special_tokens_map.json", {}) | _json(folder / "tokenizer_config.json", {})
    for name, served in _FIXED.items():
        if config.get(name, served[0]) not in served:
            raise DataError(
                f"{folder / 'tokenizer_config.json'}: {name} must be {served[0]!r}, the only way it is done here: got "
                f"{config[name]!r}."
            )
    model = next((folder / name for name in SENTENCEPIECE_FILES if (folder / name).is_file()), None)
    try:
        if model is not None:
            tokenizer, names = _sentencepiece(model, config, _layout(folder, config))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokenizer, names = _byte_level(folder, config)
        elif (folder / "vocab.txt").is_file():
            tokenizer, names = _word_piece(folder / "vocab.txt", config)
        else:
            raise DataError(
                f"no tokenizer in {folder}: looked for tokenizer.json, {', '.join(SENTENCEPIECE_FILES)}, vocab.json "
                f"with merges.txt, and vocab.txt."
            )
        _add_tokens(tokenizer, folder, config, names)
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exception for anything malformed
        raise DataError(f"no tokenizer can be made of the files in {folder}: {error}.") from None
    return TextTokenizer(tokenizer.to_str(pretty=True))


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8: {error.reason} at byte {error.start}.") from None


def _json(path: pathlib.Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        content = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is no JSON: {error}.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold an object: got a {type(content).__name__}.")
    return content


def _names(config: Mapping[str, Any], default: Mapping[str, str]) -> dict[str, str]:
    """Role -> special token; the config has texts, or objects with their text as `content`."""
    given = {role: config.get(f"{role}_token") for role in ROLES}
    given = {role: x["content"] if isinstance(x, dict) else x for role, x in given.items() if x is not None}
    return {role: str(given.get(role, default.get(role))) for role in ROLES if role in default}


def _post_process(tokenizer: Tokenizer, names: dict[str, str], template: str) -> None:
    single, pair = (text.format(**names) for text in _TEMPLATES[template])
    used = {name for role, name in names.items() if f"{{{role}}}" in _TEMPLATES[template][0]}
    missing = sorted(name for name in used if tokenizer.token_to_id(name) is None)
    if missing:
        raise DataError(f"the vocabulary must hold the special tokens {', '.join(sorted(used))}: {missing[0]} is not.")
    special = [(name, tokenizer.token_to_id(name)) for name in sorted(used)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)


def _add_tokens(tokenizer: Tokenizer, folder: pathlib.Path, config: Mapping[str, Any], names: dict[str, str]) -> None:
    """Mark the special tokens, and add those that the folder lists beyond the vocabulary, under the ids it gives."""
    strips = names.get("cls") == "<s>" or names.get("pad") == "<pad>"  # RoBERTa's and ALBERT's mask eat a space before
    for role, name in names.items():
        if tokenizer.token_to_id(name) is not None:
            token = AddedToken(name, special=True, normalized=False, lstrip=strips and role == "mask")
            tokenizer.add_special_tokens([token])
    listed = {int(i): t for i, t in config.get("added_tokens_decoder", {}).items()}
    for text, i in _json(folder / "added_tokens.json", {}).items():
        listed.setdefault(i, {"content": text, "special": text in names.values()})
    flags = ("special", "normalized", "lstrip", "rstrip", "single_word")
    for token_id, token in sorted(listed.items()):
        options = {flag: bool(token[flag]) for flag in flags if flag in token}
        before = tokenizer.token_to_id(token["content"])
        tokenizer.add_tokens([AddedToken(token["content"], **({"normalized": False} | options))])
        if (got := tokenizer.token_to_id(token["content"])) != token_id:
            raise DataError(
                f"{folder}: the added token {token['content']!r} must have the id {token_id}: "
                f"{'the vocabulary has it at' if before is not None else 'the next free id is'} {got}."
            )


def _check_ids(vocab: Mapping[str, int], where: pathlib.Path) -> None:
    ids = sorted(vocab.values())
    if ids != list(range(len(ids))):
        hole = next(i for i, got in enumerate([*ids, -1]) if i != got)
        raise DataError(f"{where}: {len(ids)} tokens have the ids 0 to {len(ids) - 1}, each once: {hole} is amiss.")


def _word_piece(path: pathlib.Path, config: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    lines = _read(path).removesuffix("\n").split("\n")
    vocab: dict[str, int] = {}
    for i, line in enumerate(lines):
        if (first := vocab.setdefault(line.rstrip("\r"), i)) != i:
            raise DataError(f"{path}: a vocabulary has each token once: {line!r} is on lines {first + 1} and {i + 1}.")
    names = _names(config, _BERT_NAMES)
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=names["unk"], max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    _post_process(tokenizer, names, "bert")
    return tokenizer, names


def _byte_level(folder: pathlib.Path, config: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    vocab = _json(folder / "vocab.json", {})
    _check_ids(vocab, folder / "vocab.json")
    lines = _read(folder / "merges.txt").split("\n")
    merges = []
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = tuple(line.rstrip("\r").split(" "))
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise DataError(f"{folder / 'merges.txt'}: line {number} must merge tokens of vocab.json: got {line!r}.")
        merges.append(pair)
    names = {role: name for role, name in _names(config, _FAIRSEQ_NAMES).items() if name in vocab}
    tokenizer = Tokenizer(models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space", False))
    tokenizer.decoder = decoders.ByteLevel()
    if {"cls", "sep"} <= names.keys():
        _post_process(tokenizer, names, "bert" if names["cls"] == "[CLS]" else "fairseq")
    return tokenizer, names


# SentencePiece. Splits equal its own but where two are equally likely, as in a long run of one symbol. The model is a
# protocol buffer, of which these fields count (sentencepiece_model.proto).
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


def _layout(folder: pathlib.Path, config: Mapping[str, Any]) -> Layout:
    """By the tokenizer's class if it is told, else the model's type: some models use another family's tokenizer."""
    told = str(config.get("tokenizer_class") or _json(folder / "config.json", {}).get("model_type", ""))
    name = told.removesuffix("Fast").removesuffix("Tokenizer").lower().replace("-", "").replace("_", "")
    if name not in LAYOUTS:
        raise DataError(
            f"{folder}: a SentencePiece model's ids depend on the family in tokenizer_config.json (tokenizer_class) or"
            f" config.json (model_type): got {told!r}; known are {', '.join(LAYOUTS)}."
        )
    return LAYOUTS[name]


def _sentencepiece(
    path: pathlib.Path, config: Mapping[str, Any], layout: Layout
) -> tuple[Tokenizer, dict[str, str]]:
    try:
        model = parse_sentencepiece(path.read_bytes())
    except DataError as error:
        raise DataError(f"{path}: {error}.") from None
    names = _names(config, layout.names)
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
    _post_process(tokenizer, names, layout.template)
    return tokenizer, names


def _normalizer(
    model: SentencePieceModel, config: Mapping[str, Any], layout: Layout, has_prefix: bool
) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if layout.is_albert:
        steps += [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
        if not config.get("keep_accents", False):
            steps += [normalizers.NFKD(), normalizers.StripAccents()]
    if config.get("do_lower_case", layout.lower):
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
