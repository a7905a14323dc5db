"""Small tokenizer folders of every kind, and texts that tell readers of them apart; ours against transformers'.

`FOLDERS` holds a maker a kind, which needs tokenizers alone; `differences(folder)` needs transformers.
"""

# ruff: noqa: RUF001 - letters that look like others are what is tested

import functools
import hashlib
import itertools
import json
import pathlib
from collections import Counter
from collections.abc import Callable

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from flax_encoder.data.tokens.sentencepiece import parse_sentencepiece
from flax_encoder.data.tokens.tokenizer_files import read_tokenizer

GOLDEN = pathlib.Path(__file__).parent / "golden"
# A text that never changes.
PROSE = [line for line in (GOLDEN.parents[1] / "LICENSE").read_text("utf-8").split("\n") if line.strip()]
FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
LLAMA = ("<|begin_of_text|>", "<|pad|>", "<|end_of_text|>", "<|unk|>", "<|mask|>")
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BY_HAND = [
    "Hello World", "hello world", "  two  spaces  ", "", " ", "\t\n", "tab\tand\nnew\r\nline", "trailing ",
    " leading", "café naïve ÉTÉ", "e\u0301 é n\u0303 ñ", "ABC İI ß ẞ Σς ŉ ǆ",
    "\uff21\uff22 \uff11\uff12 ﬁne ½ ① ㎏ ﷺ", "日本語 テキスト。", "中文分词，混排English和数字123",
    "한국어 조선말", "Привет мир", "שָׁלוֹם", "العَرَبِيَّة", "हिन्दी क्षि", "ไทยภาษา", "x🙂y 🙂🙂 z",
    "👩\u200d👩\u200d👧\u200d👦 👍🏽", "a\u200bb\u200cc\u200dd\ufeffe", "\ufeffhello",
    "\u00a0nbsp\u3000full\u2009thin\u2028line\u2029para", "soft\u00adhyphen",
    "nul\x00 bell\x07 esc\x1b del\x7f c1\x85x\x9f", "private \ue000 \U000f0000 unassigned \U0003ffff",
    "\ufffd \uffff noncharacter", "100, 9, (See also", "1,000.50 3.14e-10 0x1F", "don't ``quote'' it",
    "it's we'll they've I'M", "...!?---___", "#hash @at $x %y ^ & * ~", "https://example.org/a?b=c&d=e#f",
    "user@example.org", "snake_case camelCase SCREAMING kebab-case", "a" * 99, "b" * 100, "c" * 101, "d" * 300,
    "é" * 101, "the " + "ab" * 80 + " end", "the [MASK] of", "the[MASK]of", "[CLS] a [SEP] b", "[PAD][PAD] x",
    "[UNK]", "[mask] [cls]", "[ MASK ]", "<mask>", "a <mask> b", "a<mask>b", "<s>x</s>", "<pad> y <pad>",
    "<unk>", "<MASK>", "<extra_id_0> and <extra_id_1>", "<extra_id_99>", "<|mask|> <|pad|>",
    "a<|begin_of_text|>b", "<|end_of_text|>", "▁under ▁▁score", "Ġspace Ċ", "##s word##s ## #",
    "[NEW] token [new]", "x[NEW]y [OTHER]z", " [NEW] ", "TabNew\tX", "MVLSPADKTNVKAAW GKVGAHAGEYGAEALERM",
    "ACGTACGTNNNN", "{'a': [1, 2]}", "def f(x):\n    return x ** 2\n", "a  b   c    d", "\u0130stanbul",
    "ǅ ﬀ ﬃ", "\u1e9b\u0323", "Å Å", "\u0344", "q\u0307\u0323", "½½½", "①②③", "𝒳𝓎𝓏 𝟙𝟚", "\u202eright\u202c",
    "zero\u2060width",
]  # fmt: skip


@functools.cache
def texts() -> list[str]:
    """Those by hand, lines of prose, and 200 mixed at random of their pieces."""
    r = np.random.default_rng(0)
    pieces = [*(p for text in BY_HAND for p in (text, text.upper())), *PROSE[:60], " ", "", "\n", "  "]
    mixed = ["".join(pieces[i] for i in r.integers(0, len(pieces), r.integers(1, 6))) for _ in range(200)]
    return [*BY_HAND, *PROSE[60:120], *mixed]


def dump(folder: pathlib.Path, **files) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, "utf-8")


def letters() -> list[str]:
    found = sorted({c for text in BY_HAND[:30] + PROSE[:30] for c in text + text.lower() if not c.isspace()})
    return found[::2] + list("abcdefghijklmnopqrstuvwxyz")


def word_piece_vocab(names=BERT) -> list[str]:
    words = {w.strip(".,()") for line in PROSE[:200] for w in line.split()}
    own = [*letters(), *("##" + c for c in letters()), *sorted(words | {w.lower() for w in words} | {"中文", "café"})]
    return list(dict.fromkeys([*names, *(w for w in own if w)]))


def word_piece(lower=True, names=BERT) -> Tokenizer:
    t = Tokenizer(models.WordPiece({w: i for i, w in enumerate(word_piece_vocab(names))}, unk_token=names[1]))
    t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(lowercase=lower), pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.WordPiece()
    t.add_special_tokens(list(names))
    t.post_processor = processors.TemplateProcessing(
        single=f"{names[2]} $A {names[3]}", pair=f"{names[2]} $A {names[3]} $B:1 {names[3]}:1",
        special_tokens=[(names[2], 2), (names[3], 3)],
    )  # fmt: skip
    return t


@functools.cache
def merges() -> list[tuple[str, str]]:
    """The 150 pairs that BPE joins in the prose; of two that are as frequent the first by spelling, so that they are
    the same everywhere."""
    words = Counter(w for line in PROSE for w, _ in pre_tokenizers.ByteLevel(True).pre_tokenize_str(line))
    split, found = {word: list(word) for word in words}, []
    for _ in range(150):
        pairs = Counter()
        for word, parts in split.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        found.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        for parts in split.values():
            at = 0
            while at < len(parts) - 1:
                if (parts[at], parts[at + 1]) == found[-1]:
                    parts[at : at + 2] = ["".join(found[-1])]
                at += 1
    return found


def byte_level(names=FAIRSEQ, prefix=False, llama=False) -> Tokenizer:
    joined = merges()
    tokens = [*names, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in joined)]
    t = Tokenizer(models.BPE({token: i for i, token in enumerate(dict.fromkeys(tokens))}, joined))
    t.add_special_tokens(list(names))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel()
    if llama:
        split = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
        t.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(prefix, use_regex=False)])
    t.post_processor = processors.TemplateProcessing(
        single=f"{names[0]} $A {names[2]}", special_tokens=[(names[0], 0), (names[2], 2)]
    )
    return t


def unigram(first, last=(), unknown=0, normalizer=True, template=None) -> Tokenizer:
    """A SentencePiece-like tokenizer.json; the character map is that of the golden model."""
    model = parse_sentencepiece((GOLDEN / "sentencepiece-unigram.model").read_bytes())
    own = [(p.text, p.score) for p in model.pieces if p.kind == 1]
    t = Tokenizer(models.Unigram([*((n, 0.0) for n in first), *own, *((n, 0.0) for n in last)], unk_id=unknown))
    if normalizer:
        t.normalizer = normalizers.Sequence([normalizers.Precompiled(model.charsmap)])
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.decoder = decoders.Metaspace()
    t.add_special_tokens([*first, *last])
    if template is not None:
        ids = [(name, t.token_to_id(name)) for name in template.split() if name != "$A"]
        t.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return t


def saved(tokenizer: Tokenizer, folder: pathlib.Path, kind: str | None, model_type: str = "", untyped=False, **config):
    content = json.loads(tokenizer.to_str())
    if untyped:
        del content["model"]["type"]
    dump(folder, tokenizer__json=content, config__json={"model_type": model_type})
    if kind is not None:
        dump(folder, tokenizer_config__json={"tokenizer_class": kind} | config)


def bert_json(untyped=False, lower=True, kind="BertTokenizer", **config):
    return lambda folder: saved(word_piece(lower), folder, kind, "bert", untyped, **config)


def bert_files(names=BERT, **config):
    def make(folder):
        dump(folder, vocab__txt="\n".join(word_piece_vocab(names)) + "\n", config__json={"model_type": "bert"})
        if config:
            dump(folder, tokenizer_config__json=config)

    return make


def roberta_files(**config):
    def make(folder):
        byte_level().model.save(str(folder))
        dump(folder, config__json={"model_type": "roberta"}, tokenizer_config__json=config)

    return make


def then(make: Callable, **files):
    """A folder with more files."""

    def made(folder):
        make(folder)
        dump(folder, **files)

    return made


_T5, _XLM = ("<pad>", "</s>", "<unk>"), ("<s>", "<pad>", "</s>", "<unk>")
_ALBERT, _DEBERTA = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"), ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
_EXTRA = tuple(f"<extra_id_{i}>" for i in reversed(range(100)))
_LLAMA_ROLES = {f"{r}_token": n for r, n in zip(("cls", "pad", "sep", "unk", "mask"), LLAMA, strict=True)}
_NEW = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
FOLDERS: dict[str, Callable[[pathlib.Path], None]] = {
    "BERT, tokenizer.json": bert_json(),
    "BERT, tokenizer.json without model.type": bert_json(untyped=True),
    "BERT, cased by tokenizer_config.json": bert_json(do_lower_case=False),
    "BERT, cased, accents stripped": bert_json(lower=False, do_lower_case=False, strip_accents=True),
    "BERT, accents kept": bert_json(strip_accents=False),
    "BERT, Chinese words whole": bert_json(tokenize_chinese_chars=False, kind="BertTokenizerFast"),
    "BERT, cased tokenizer.json, class by model_type": bert_json(lower=False, kind=None),
    "ELECTRA's class, cased": bert_json(kind="ElectraTokenizer", do_lower_case=False),
    "DistilBERT's class": bert_json(kind="DistilBertTokenizer", lower=False),
    "a fast tokenizer, settings of BERT's class": bert_json(kind="PreTrainedTokenizerFast", do_lower_case=False),
    "an unknown class": bert_json(kind="SomeTokenizer", lower=False),
    "BERT, vocab.txt": bert_files(),
    "BERT, vocab.txt, cased": bert_files(do_lower_case=False),
    "BERT, vocab.txt, accents kept": bert_files(strip_accents=False, tokenize_chinese_chars=False),
    "BERT, vocab.txt, other names": bert_files(
        ("<pad>", "[UNK]", "<s>", "</s>", "<mask>"), cls_token="<s>", sep_token="</s>", pad_token="<pad>",
        mask_token="<mask>",
    ),
    "BERT, added_tokens.json": then(bert_files(), added_tokens__json={"[NEW]": len(word_piece_vocab())}),
    "BERT, added_tokens_decoder": bert_json(added_tokens_decoder={
        **{str(i): _NEW | {"content": n} for i, n in enumerate(BERT)},
        str(len(word_piece_vocab())): _NEW | {"content": "[NEW]", "lstrip": True},
    }),
    "BERT, special_tokens_map.json": then(bert_json(), special_tokens_map__json={
        "mask_token": _NEW | {"content": "[MASK]", "lstrip": True}, "additional_special_tokens": ["[NEW]", "[OTHER]"],
    }),
    "BERT, added_tokens.json, an extra token of the older file": then(
        bert_files(), added_tokens__json={"[NEW]": len(word_piece_vocab())},
        special_tokens_map__json={"additional_special_tokens": ["[NEW]"], "mask_token": "[MASK]"},
    ),
    "BERT, added_tokens.json, an extra token of its settings": then(
        bert_files(additional_special_tokens=["[NEW]"]), added_tokens__json={"[NEW]": len(word_piece_vocab())}
    ),
    "ConvBERT's class, which takes the file as it is": bert_json(kind="ConvBertTokenizer", lower=False),
    "RoBERTa, tokenizer.json": lambda f: saved(byte_level(), f, "RobertaTokenizer", "roberta"),
    "RoBERTa, space before": lambda f: saved(byte_level(), f, "RobertaTokenizer", "roberta", add_prefix_space=True),
    "RoBERTa, tokenizer.json without model.type": lambda f: saved(byte_level(), f, None, "roberta", untyped=True),
    "RoBERTa, mask takes the space": lambda f: saved(
        byte_level(), f, "RobertaTokenizer", "roberta", added_tokens_decoder={
            **{str(i): _NEW | {"content": n} for i, n in enumerate(FAIRSEQ)},
            "4": _NEW | {"content": "<mask>", "lstrip": True},
        },
    ),
    "RoBERTa, vocab.json and merges.txt": roberta_files(),
    "RoBERTa, vocab.json and merges.txt, space before": roberta_files(add_prefix_space=True),
    "RoBERTa, a fast tokenizer": lambda f: saved(byte_level(prefix=True), f, "PreTrainedTokenizerFast", "roberta"),
    "EuroBERT, its names": lambda f: saved(
        byte_level(LLAMA, llama=True), f, "PreTrainedTokenizerFast", "eurobert", **_LLAMA_ROLES
    ),
    "ModernBERT": lambda f: saved(byte_level(BERT, llama=True), f, "BertTokenizer", "modernbert"),
    "XLM-R, tokenizer.json": lambda f: saved(
        unigram(_XLM, ("<mask>",), 3, template="<s> $A </s>"), f, "XLMRobertaTokenizer", "xlm-roberta"
    ),
    "XLM-R, no space before, untyped": lambda f: saved(
        unigram(_XLM, ("<mask>",), 3, template="<s> $A </s>"), f, "XLMRobertaTokenizerFast", "bert", untyped=True,
        add_prefix_space=False,
    ),
    "ALBERT, tokenizer.json": lambda f: saved(unigram(_ALBERT, (), 1, template="[CLS] $A [SEP]"), f, None, "albert"),
    "ALBERT, cased, accents kept": lambda f: saved(
        unigram(_ALBERT, (), 1), f, "AlbertTokenizer", "albert", do_lower_case=False, keep_accents=True
    ),
    "T5, tokenizer.json": lambda f: saved(unigram(_T5, _EXTRA, 2, template="$A </s>"), f, "T5Tokenizer", "t5"),
    "T5, tokenizer.json without model.type": lambda f: saved(
        unigram(_T5, _EXTRA, 2, template="$A </s>"), f, None, "t5", untyped=True
    ),
    "T5, its sentinels named": lambda f: saved(
        unigram(_T5, _EXTRA, 2, False, "$A </s>"), f, "T5TokenizerFast", "t5", extra_ids=100,
        additional_special_tokens=list(_EXTRA[::-1]),
    ),
    "DeBERTa-v2, tokenizer.json": lambda f: saved(
        unigram(_DEBERTA, ("[MASK]",), 3, template="[CLS] $A [SEP]"), f, "DebertaV2Tokenizer", "deberta-v2"
    ),
    "DeBERTa-v2, lower case, punctuation apart": lambda f: saved(
        unigram(_DEBERTA, ("[MASK]",), 3, False), f, "DebertaV2TokenizerFast", "deberta-v2", do_lower_case=True,
        split_by_punct=True,
    ),
}  # fmt: skip
"""Kind of folder -> what writes one into an empty folder."""


def make_folder(kind: str, folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    FOLDERS[kind](folder)
    return folder


def ours(folder: pathlib.Path) -> list[list[int]]:
    return [ids.tolist() for ids in read_tokenizer(folder).encode_rows(texts())[0]]


def theirs(folder: pathlib.Path) -> list[list[int]]:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    return transformers.AutoTokenizer.from_pretrained(str(folder))(texts())["input_ids"]


def digest(rows: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def differences(folder: pathlib.Path) -> list[tuple[str, list[int], list[int]]]:
    """(text, our ids, transformers') of the texts that are read otherwise."""
    return [(t, a, b) for t, a, b in zip(texts(), ours(folder), theirs(folder), strict=True) if a != b]
