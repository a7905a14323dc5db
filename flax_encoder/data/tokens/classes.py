"""What each tokenizer class of transformers 5 makes of a tokenizer.json: a folder names its class in
tokenizer_config.json, or config.json's model_type has one.

A class of `CLASSES` takes the vocabulary alone from the file and builds the rest anew, from its own defaults and the
settings of tokenizer_config.json: these go before the file's normalizer and pre-tokenizer. Every other class takes the
file as it is.
"""

import base64
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from flax_encoder.data.sources.records import DataError

Names = dict[str, str]  # role (of ROLES) -> the text of its special token
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # in the order in which missing ones are added

BERT_NAMES = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
FAIRSEQ_NAMES = {
    "bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>", "pad": "<pad>", "cls": "<s>", "mask": "<mask>",
}  # fmt: skip
T5_NAMES = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
_BRACKETS = {"bos": "[CLS]", "eos": "[SEP]"}
ALBERT_NAMES = BERT_NAMES | _BRACKETS | {"unk": "<unk>", "pad": "<pad>"}
DEBERTA_NAMES = BERT_NAMES | _BRACKETS

TEMPLATES = {
    "bert": ("{cls} $A {sep}", "{cls} $A {sep} $B:1 {sep}:1"),
    "roberta": ("{cls} $A {sep}", "{cls} $A {sep} {sep} $B {sep}"),
    "xlmroberta": ("{bos} $A {eos}", "{bos} $A {eos} {eos} $B {eos}"),
    "t5": ("$A {eos}", "$A {eos} $B {eos}"),
}


class Parts(NamedTuple):
    """What a class may take of a tokenizer.json."""

    vocab: Any
    """WordPiece and BPE: token -> id; Unigram: [(piece, score), ...]."""
    merges: list[tuple[str, str]]
    charsmap: bytes | None
    """SentencePiece's character map."""


class TokenizerClass(NamedTuple):
    model: type
    """Of the vocabulary; with another the class cannot be built."""
    names: Names
    """Of special tokens, where the folder gives no others."""
    template: str
    """Of TEMPLATES: what stands around a text, whatever the file says."""
    build: Callable[[Parts, Mapping[str, Any], Names], Tokenizer]
    keeps_template: bool = False
    """The file's own template, where it has one, is kept."""
    num_extra_ids: int = 0
    """<extra_id_0> .. are special tokens; `extra_ids` goes first."""


def word_piece(parts: Parts, config: Mapping[str, Any], names: Names) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(parts.vocab, unk_token=names["unk"], max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def byte_level(parts: Parts, config: Mapping[str, Any], names: Names) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(parts.vocab, parts.merges, continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space", False))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pieces(vocab: Any, unknown: int, steps: list, prefix: str, before: list) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=unknown, byte_fallback=False))
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prefix)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, spaces])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=prefix)
    return tokenizer


def _charsmap(parts: Parts) -> list:
    return [] if parts.charsmap is None else [normalizers.Precompiled(parts.charsmap)]


def _prefix(config: Mapping[str, Any], otherwise: str) -> str:
    return "always" if config.get("add_prefix_space", True) else otherwise


def _xlm_roberta(parts: Parts, config: Mapping[str, Any], names: Names) -> Tokenizer:
    return _pieces(parts.vocab, 3, _charsmap(parts), _prefix(config, "never"), [pre_tokenizers.WhitespaceSplit()])


def _t5(parts: Parts, config: Mapping[str, Any], names: Names) -> Tokenizer:
    return _pieces(parts.vocab, 2, _charsmap(parts), "always", [pre_tokenizers.WhitespaceSplit()])


def albert_steps(config: Mapping[str, Any]) -> list[normalizers.Normalizer]:
    """Quotes made plain, accents stripped, letters made small: before the model's own character map."""
    steps: list[normalizers.Normalizer] = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    if not config.get("keep_accents", False):
        steps += [normalizers.NFKD(), normalizers.StripAccents()]
    return steps + ([normalizers.Lowercase()] if config.get("do_lower_case", True) else [])


def _albert(parts: Parts, config: Mapping[str, Any], names: Names) -> Tokenizer:
    steps = albert_steps(config) + _charsmap(parts)
    return _pieces(parts.vocab, 1, steps, _prefix(config, "never"), [pre_tokenizers.WhitespaceSplit()])


def _deberta_v2(parts: Parts, config: Mapping[str, Any], names: Names) -> Tokenizer:
    # The class has no place for a character map.
    steps = [normalizers.Lowercase()] if config.get("do_lower_case", False) else []
    steps += [normalizers.Replace(Regex(r"\s{2,}|[\n\r\t]"), " "), normalizers.NFC(), normalizers.Strip(left=False)]
    before = [pre_tokenizers.Punctuation("isolated")] if config.get("split_by_punct", False) else []
    unknown = next((i for i, piece in enumerate(parts.vocab) if piece == (names["unk"], 0.0)), config.get("unk_id", 1))
    return _pieces(parts.vocab, unknown, steps, _prefix(config, "first"), before)


_BERT = TokenizerClass(models.WordPiece, BERT_NAMES, "bert", word_piece)
_ROBERTA = TokenizerClass(models.BPE, FAIRSEQ_NAMES, "roberta", byte_level)
CLASSES = {
    **dict.fromkeys(("bert", "distilbert", "electra", "mobilebert", "squeezebert", "layoutlm", "lxmert"),
                    _BERT),
    **dict.fromkeys(("roberta", "bart", "longformer"), _ROBERTA),
    "xlmroberta": TokenizerClass(models.Unigram, FAIRSEQ_NAMES, "xlmroberta", _xlm_roberta),
    "albert": TokenizerClass(models.Unigram, ALBERT_NAMES, "bert", _albert, keeps_template=True),
    "t5": TokenizerClass(models.Unigram, T5_NAMES, "t5", _t5, num_extra_ids=100),
    "debertav2": TokenizerClass(models.Unigram, DEBERTA_NAMES, "bert", _deberta_v2),
}  # fmt: skip
AS_IT_IS = ("tokenizersbackend", "pretrained", "pythonbackend", "convbert")  # classes that say nothing of their own
# The class of a model_type whose folder names none. For a ModernBERT transformers doesn't believe what it names.
CLASS_OF_TYPE = {
    "bert": "bert", "distilbert": "bert", "electra": "bert", "roberta": "roberta", "xlm-roberta": "xlmroberta",
    "albert": "albert", "t5": "t5", "mt5": "t5", "deberta-v2": "debertav2",
}  # fmt: skip
_UNBELIEVED = ("modernbert",)


def class_name(config: Mapping[str, Any], published: Mapping[str, Any]) -> str:
    """The tokenizer class of a folder in lower case, without "Tokenizer" and "Fast".

    Args:
      config: of tokenizer_config.json.
      published: of config.json; both may be empty.
    """
    kind = published.get("model_type")
    given = config.get("tokenizer_class") or published.get("tokenizer_class") or CLASS_OF_TYPE.get(kind, "")
    if kind in _UNBELIEVED:
        given = ""
    return plain_name(str(given)) or AS_IT_IS[0]


def plain_name(name: str) -> str:
    """"XLMRobertaTokenizerFast" and "xlm-roberta" are both "xlmroberta"."""
    return name.removesuffix("Fast").removesuffix("Tokenizer").lower().replace("-", "").replace("_", "")


def parts_of(content: Mapping[str, Any]) -> Parts:
    """The parts of a tokenizer.json's content that classes build from."""
    model = content["model"]
    vocab = model["vocab"]
    if isinstance(vocab, list):
        vocab = [(text, score) for text, score in vocab]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges", [])]
    steps = content.get("normalizer") or {}
    steps = steps.get("normalizers", []) if steps.get("type") == "Sequence" else [steps]
    maps = (step["precompiled_charsmap"] for step in steps if step.get("type") == "Precompiled")
    charsmap = next(maps, None)
    return Parts(vocab, merges, None if charsmap is None else base64.b64decode(charsmap))


def put_around(tokenizer: Tokenizer, names: Mapping[str, str], template: str) -> None:
    """Make `tokenizer` put the special tokens of a template, a key of TEMPLATES, around texts.

    Raises:
      DataError: the vocabulary has one of them not.
    """
    single, pair = (text.format(**names) for text in TEMPLATES[template])
    used = {name for role, name in names.items() if f"{{{role}}}" in TEMPLATES[template][0]}
    missing = sorted(name for name in used if tokenizer.token_to_id(name) is None)
    if missing:
        raise DataError(f"the vocabulary must hold the special tokens {', '.join(sorted(used))}: {missing[0]} is not.")
    special = [(name, tokenizer.token_to_id(name)) for name in sorted(used)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)


def frame_of(processor: Mapping[str, Any] | None) -> tuple[list[int], list[int]] | None:
    """(ids before, ids after) that a tokenizer.json's post-processor puts around one text; None if it has no say.

    Raises:
      DataError: it takes the text not once.
    """
    kind = None if processor is None else processor["type"]
    if kind == "Sequence":
        frames = [frame for frame in map(frame_of, processor["processors"]) if frame is not None]
        # One after the other: the last is the outermost.
        return None if not frames else ([i for f in frames[::-1] for i in f[0]], [i for f in frames for i in f[1]])
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [processor["cls"][1]], [processor["sep"][1]]
    if kind != "TemplateProcessing":  # ByteLevel's moves offsets alone
        return None
    before, after, num_texts = [], [], 0
    for part in processor["single"]:
        if "Sequence" in part:
            num_texts += 1
        else:
            (after if num_texts else before).extend(processor["special_tokens"][part["SpecialToken"]["id"]]["ids"])
    if num_texts != 1:
        raise DataError(f"a template must take a text once: this takes it {num_texts} times, {processor['single']}.")
    return before, after
