"""A published folder's tokenizer, whatever files it is in, as a `TextTokenizer` that reads text as transformers does.

Files, in the order in which they are looked for: tokenizer.json; a SentencePiece model; vocab.json and merges.txt
(byte-level BPE, as GPT-2 and RoBERTa have); vocab.txt (BERT's WordPiece). What stands beside them counts:
tokenizer_config.json (which class reads the files, with which settings and special tokens; `classes` has the classes),
special_tokens_map.json, added_tokens.json, and the model_type of config.json.
"""

import hashlib
import json
import logging
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, processors

from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.classes import (
    AS_IT_IS,
    BERT_NAMES,
    CLASSES,
    FAIRSEQ_NAMES,
    ROLES,
    Names,
    Parts,
    TokenizerClass,
    byte_level,
    class_name,
    frame_of,
    parts_of,
    plain_name,
    put_around,
    word_piece,
)
from flax_encoder.data.tokens.sentencepiece import LAYOUTS, SENTENCEPIECE_FILES, sentencepiece_tokenizer
from flax_encoder.data.tokens.tokenizer import SETTINGS, TextTokenizer, check_ids, load_tokenizer

logger = logging.getLogger(__name__)

SENTENCE_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Settings of tokenizer_config.json that are read, beside those of its length and of the names of special tokens.
SETTINGS_READ = (
    "do_lower_case", "strip_accents", "tokenize_chinese_chars", "keep_accents", "add_prefix_space", "split_by_punct",
    "extra_ids",
)  # fmt: skip
# Settings of tokenizer_config.json that have one value here; any other would change the ids.
_FIXED = {"split_special_tokens": (False,)}
# Likewise, where there is no tokenizer.json; beside one, transformers reads them no more.
_FIXED_OF_FILES = {
    "do_basic_tokenize": (True,), "never_split": (None, []), "do_subword_tokenize": (True,), "remove_space": (True,),
    "word_tokenizer_type": ("basic",), "subword_tokenizer_type": ("wordpiece",), "sp_model_kwargs": (None, {}),
    "wordpieces_prefix": ("##",), "split_by_punct": (False,),
}  # fmt: skip
# Our role -> theirs, in the order in which they are looked for.
_THEIR_ROLES = {
    "pad": ("pad",), "unknown": ("unk",), "first": ("cls", "bos"), "last": ("sep", "eos"), "mask": ("mask",),
}  # fmt: skip
_MOST_EXTRA_IDS = 10**5  # T5 has 100
_NO_LIMIT = 2**31  # tokens; what sets no limit is written as 10**30
_OF_IDS = ("normalizer", "pre_tokenizer", "model", "added_tokens")  # members of a tokenizer.json that make the ids


def read_tokenizer(path: str | pathlib.Path, num_rows: int | None = None) -> TextTokenizer:
    """Read the tokenizer of a published folder, or of a file.

    A tokenizer.json is read with the files beside it, whether `path` is the folder or the file; a file of another name
    is read alone. A tokenizer.json without other files is taken as it is; if it has no template, runs put [CLS] and
    [SEP], or <s> and </s>, around a text if the vocabulary has them.

    Args:
      num_rows: rows of the embedding that the ids are for. Special tokens that a folder names and its vocabulary lacks
        get the next ids; if the embedding has no row for one, it is left out, and a log line names it.

    Raises:
      DataError: there are no such files (the message lists those looked for), a file cannot be decoded, tokens share an
        id, an added token has another id than the files say, a setting that changes ids is not understood, or a
        template has more than one token on a side.

    Example:
      >>> tokenizer = read_tokenizer("bert")
      >>> ids, num_cut = tokenizer.encode_rows(["a b"], None)
      >>> [tokenizer.token(i) for i in ids[0].tolist()]
      ['[CLS]', 'a', 'b', '[SEP]']
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        if path.name != "tokenizer.json" or not path.exists():
            return _settled(load_tokenizer(path), None, _Beside(path.parent, "", "", {}, {}, is_published=False))
        path = path.parent
    try:
        beside = _Beside.of(path)
        _check_served(beside)
        file = load_tokenizer(path) if beside.file.is_file() else None
        if file is not None and not beside.is_published:
            return _settled(file, None, beside)
        return _settled(file, _built(None if file is None else file.json, beside, num_rows), beside)
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exception for anything malformed
        raise DataError(f"no tokenizer can be made of the files in {path}: {error}.") from None


def _check_served(beside: "_Beside") -> None:
    extra = beside.config.get("extra_ids", 0)
    if type(extra) is not int or not 0 <= extra < _MOST_EXTRA_IDS:
        raise DataError(
            f"{beside.folder / 'tokenizer_config.json'}: extra_ids is a number of tokens from 0 to below "
            f"{_MOST_EXTRA_IDS:,}: got {extra!r}."
        )
    for name, served in (_FIXED | ({} if beside.file.is_file() else _FIXED_OF_FILES)).items():
        if beside.config.get(name, served[0]) not in served:
            raise DataError(
                f"{beside.folder / 'tokenizer_config.json'}: {name} must be {served[0]!r}, the only way it is done "
                f"here: got {beside.config[name]!r}. Other values would give other ids."
            )


def published_files(
    tokenizer: TextTokenizer, *, max_tokens: int | None = None, has_types: bool = False
) -> dict[str, Any]:
    """File name -> text or JSON content: what other tools need to read texts as `tokenizer` and runs do.

    Args:
      max_tokens: what the model takes, special tokens included; None is no limit. The tokenizer's own counts too.
      has_types: the model tells the second text of a pair from the first.
    """
    named = {
        f"{theirs[0]}_token": tokenizer.token(tokenizer.special(role))
        for role, theirs in _THEIR_ROLES.items()
        if tokenizer.find(role) is not None
    }
    text = tokenizer.plain_json
    own = frame_of(json.loads(text).get("post_processor"))
    if own is None or tuple(next(iter(ids), None) for ids in own) != tokenizer.frame:
        made = Tokenizer.from_str(text)
        made.post_processor = _template(tokenizer, ":1" if has_types else "")
        text = made.to_str(pretty=True)
    # By default some versions make token types for models that take none, and others none for those that do.
    inputs = ["input_ids", *["token_type_ids"] * has_types, "attention_mask"]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs}
    limits = [n for n in (max_tokens, tokenizer.max_tokens) if n is not None]
    settings |= {"model_max_length": min(limits)} if limits else {}
    settings |= {"truncation_side": "left"} if tokenizer.truncation_side == "left" else {}
    return {
        "tokenizer.json": text,
        "tokenizer_config.json": settings | named,
        "special_tokens_map.json": named,
    }


def _template(tokenizer: TextTokenizer, second: str) -> processors.TemplateProcessing:
    """What runs put around a text; `second` marks the type of a pair's second text."""
    special = {f"{i}": (tokenizer.token(i), i) for i in tokenizer.frame if i is not None}
    first, last = ("" if i is None else tokenizer.token(i) for i in tokenizer.frame)
    end = f" {last}{second}" if last else ""
    return processors.TemplateProcessing(
        single=f"{first} $A {last}".strip(),
        pair=f"{first} $A {last} $B{second}{end}".strip(),
        special_tokens=list(special.values()),
    )


def sentence_arguments(folder: pathlib.Path) -> dict[str, Any]:
    """What a sentence-transformers folder hands to the tokenizer: it wins over tokenizer_config.json."""
    content = next((found for name in SENTENCE_FILES if (found := _json(folder / name))), {})
    given = [content.get(name) for name in ("tokenizer_args", "processor_kwargs")]
    return {k: v for own in given if isinstance(own, dict) for k, v in own.items()}


class _Beside(NamedTuple):
    """What a folder says of its tokenizer beside the vocabulary."""

    folder: pathlib.Path
    class_name: str
    told: str
    """The class as the folder names it, or else the model's type."""
    config: dict[str, Any]
    """tokenizer_config.json's, with what older folders say in special_tokens_map.json."""
    added: dict[int, AddedToken]
    is_published: bool
    """Rather than a run, a store, or a tokenizer.json alone."""

    @property
    def file(self) -> pathlib.Path:
        return self.folder / "tokenizer.json"

    @classmethod
    def of(cls, folder: pathlib.Path) -> "_Beside":
        config = _json(folder / "tokenizer_config.json")
        published = _json(folder / "config.json")
        older = _json(folder / "special_tokens_map.json")
        settings = sentence_arguments(folder)
        is_published = bool(config or older) or "model_type" in published or not (folder / "tokenizer.json").is_file()
        config |= settings
        if "added_tokens_decoder" in config:
            added = {int(i): _added(token) for i, token in config["added_tokens_decoder"].items()}
        else:
            # As extra ones those count that the older file does not call by their older name.
            special = set(map(_text, [*_extra(config), *(older.get("extra_special_tokens") or [])]))
            config |= older | settings
            special |= {_text(config[key]) for key in _special_keys(config)}
            listed = _json(folder / "added_tokens.json")
            added = {
                i: AddedToken(text, normalized=text not in special, special=text in special)
                for text, i in listed.items()
            }
            added |= {token["id"]: _added(token) for token in _json(folder / "tokenizer.json").get("added_tokens", [])}
        told = config.get("tokenizer_class") or published.get("tokenizer_class") or published.get("model_type", "")
        return cls(folder, class_name(config, published), str(told), config, added, is_published)

    @property
    def tokenizer_class(self) -> TokenizerClass | None:
        return CLASSES.get(self.class_name)

    def names(self, default: Mapping[str, str]) -> Names:
        """Role -> special token, the folder's or else the default."""
        given = {role: self.config[f"{role}_token"] for role in ROLES if f"{role}_token" in self.config}
        return {
            role: _text(given.get(role, default.get(role)))
            for role in ROLES
            if given.get(role, default.get(role)) is not None
        }


def _special_keys(config: Mapping[str, Any]) -> list[str]:
    """The settings that name a special token: those of the roles, then those that only this folder has."""
    known = [f"{role}_token" for role in ROLES]
    own = [key for key, value in config.items() if key.endswith("_token") and key not in known and _is_token(value)]
    return [key for key in known if config.get(key) is not None] + own


def _extra(config: Mapping[str, Any]) -> list[Any]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return list(extra.values()) if isinstance(extra, dict) else list(extra)


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and "content" in value)


def _text(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _added(token: Any, **more: bool) -> AddedToken:
    flags = ("special", "normalized", "lstrip", "rstrip", "single_word")
    return AddedToken(_text(token), **{flag: bool(token[flag]) for flag in flags if flag in token} | more)


def _built(text: str | None, beside: _Beside, num_rows: int | None) -> Tokenizer:
    """The tokenizer as the folder's class makes it, with all its special and added tokens and its template."""
    own = beside.tokenizer_class
    processor = None
    if own is None and beside.class_name not in AS_IT_IS:
        what = "its files are" if text is None else "the file is"
        logger.warning("%s: the class %r is unknown: %s taken as it is", beside.folder, beside.class_name, what)
    if text is None:
        tokenizer, default, template = _of_files(beside)
        if template is not None:
            put_around(tokenizer, beside.names(default), template)
    else:
        tokenizer, content = Tokenizer.from_str(text), json.loads(text)
        _check_stated(tokenizer, {t["id"]: t["content"] for t in content["added_tokens"]}, beside.file)
        if own is not None and not isinstance(tokenizer.model, own.model):
            logger.warning(
                "%s: the class %r needs a %s, but the file has a %s: it is taken as it is",
                beside.file, beside.class_name, own.model.__name__, type(tokenizer.model).__name__,
            )  # fmt: skip
            own = None
        default, template = ({}, None) if own is None else (own.names, own.template)
        if own is not None:
            processor = tokenizer.post_processor
            tokenizer = own.build(parts_of(content), beside.config, beside.names(default))
            if own.keeps_template and processor is not None:
                template = None
    # A name that only the class has and the vocabulary lacks would get an id that no model knows.
    names = beside.names({role: name for role, name in default.items() if tokenizer.token_to_id(name) is not None})
    _add_tokens(tokenizer, beside, names, 0 if own is None else own.num_extra_ids, num_rows)
    if template is not None:
        put_around(tokenizer, beside.names(default), template)
    elif processor is not None:
        tokenizer.post_processor = processor
    return tokenizer


def _of_files(beside: _Beside) -> tuple[Tokenizer, Names, str | None]:
    """(tokenizer, names of special tokens, template) of the files that stand in for a tokenizer.json."""
    folder, config = beside.folder, beside.config
    model = next((folder / name for name in SENTENCEPIECE_FILES if (folder / name).is_file()), None)
    if model is not None:
        family = plain_name(beside.told)
        if family not in LAYOUTS:
            raise DataError(
                f"{folder}: a SentencePiece model's ids depend on the family in tokenizer_config.json "
                f"(tokenizer_class) or config.json (model_type): got {beside.told!r}; known are {', '.join(LAYOUTS)}."
            )
        layout = LAYOUTS[family]
        return sentencepiece_tokenizer(model, config, layout), layout.names, layout.template
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab, names = _json(folder / "vocab.json"), beside.names(FAIRSEQ_NAMES)
        check_ids(vocab.values())
        template = "bert" if names["cls"] == "[CLS]" else "roberta"
        has_frame = {names["cls"], names["sep"]} <= vocab.keys()
        parts = Parts(vocab, _merges(folder / "merges.txt", vocab), None)
        return byte_level(parts, config, names), FAIRSEQ_NAMES, template if has_frame else None
    if (folder / "vocab.txt").is_file():
        parts = Parts(_lines(folder / "vocab.txt"), [], None)
        return word_piece(parts, config, beside.names(BERT_NAMES)), BERT_NAMES, "bert"
    raise DataError(
        f"no tokenizer in {folder}: looked for tokenizer.json, {', '.join(SENTENCEPIECE_FILES)}, vocab.json "
        f"with merges.txt, and vocab.txt."
    )


def _add_tokens(
    tokenizer: Tokenizer, beside: _Beside, names: Names, num_extra_ids: int, num_rows: int | None
) -> None:
    """Special and added tokens, in the order in which transformers adds them: ids go by it."""
    config = beside.config
    known = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    missing = [token for _, token in sorted(beside.added.items()) if repr(token) not in known]
    there = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    there |= {token.content for token in missing}
    named = [config.get(f"{role}_token", name) for role, name in names.items()]
    named += [config[key] for key in _special_keys(config) if key.removesuffix("_token") not in ROLES]
    extra = _extra(config) or [f"<extra_id_{i}>" for i in range(config.get("extra_ids", num_extra_ids))]
    size, left_out = tokenizer.get_vocab_size() + sum(tokenizer.token_to_id(t.content) is None for t in missing), []
    for token in [*named, *extra]:
        if (text := _text(token)) in there:
            continue
        there.add(text)
        is_new = tokenizer.token_to_id(text) is None
        if is_new and num_rows is not None and size >= num_rows:
            left_out.append(text)
            continue
        size += is_new
        missing.append(_added(token if isinstance(token, dict) else {"content": token}, special=True))
    if left_out:
        logger.warning(
            "%s: left out the special tokens %s, which are not in the vocabulary and have no row in the embedding",
            beside.folder, ", ".join(left_out),
        )  # fmt: skip
    special = {*map(_text, named)}
    for token in missing:
        token.special |= token.content in special
    tokenizer.add_tokens(missing)
    _check_stated(tokenizer, {i: token.content for i, token in beside.added.items()}, beside.folder)


def _check_stated(tokenizer: Tokenizer, stated: Mapping[int, str], where: pathlib.Path) -> None:
    """Each added token must have the id that the folder says, and each token an id of its own."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    for token_id, text in sorted(stated.items()):
        if (got := vocab.get(text)) != token_id:
            before = tokenizer.get_vocab(with_added_tokens=False)
            raise DataError(
                f"{where}: the added token {text!r} must have the id {token_id}: "
                f"{'the vocabulary has it at' if text in before else 'the next free id is'} {got}, which every tool "
                f"would give it. Write that there, or put the token into the vocabulary."
            )
    if len({*vocab.values()}) < len(vocab):
        of_id: dict[int, str] = {}
        first, second = next((of_id[i], t) for t, i in vocab.items() if of_id.setdefault(i, t) != t)
        both = f"{first!r} and {second!r} have {vocab[first]}"
        raise DataError(f"{where}: each token must have an id of its own: {both}.")


def _settled(file: TextTokenizer | None, tokenizer: Tokenizer | None, beside: _Beside) -> TextTokenizer:
    """The file as it is where nothing beside it changes anything; else what reads alike, with settings.

    Args:
      file: tokenizer.json; None is no such file.
      tokenizer: as the folder's class makes it; None is the file's own.
    """
    if tokenizer is None and file.settings:
        return file  # of a run or a store
    raw = read = own = None
    if file is not None:
        raw = file.plain_json
        read = json.loads(raw)
        own = file.parts | {"truncation": read.get("truncation")}
    made = own if tokenizer is None else json.loads(tokenizer.to_str())
    is_same = own is not None and all(own[member] == made[member] for member in _OF_IDS)
    is_whole, content = is_same, read if is_same else made | {"truncation": None, "padding": None}
    frame = frame_of(made["post_processor"])
    if tokenizer is not None and frame is None:
        frame = [], []  # a published tokenizer without a template adds nothing
        moves_offsets = tokenizer.post_processor
        nothing = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
        tokenizer.post_processor = nothing if moves_offsets is None else processors.Sequence([moves_offsets, nothing])
        made["post_processor"] = json.loads(tokenizer.to_str())["post_processor"]
    if own is not None and frame_of(own["post_processor"]) != frame:
        is_whole = is_whole and content.get("post_processor", "none") == made["post_processor"]
        content["post_processor"] = made["post_processor"]
    if frame is not None and max(map(len, frame)) > 1:
        raise DataError(
            f"{beside.folder}: at most one special token stands on each side of a text here: the template has "
            f"{len(frame[0])} before and {len(frame[1])} after it."
        )
    if is_whole:
        plain = TextTokenizer(raw) if file.settings else file
    else:
        plain = TextTokenizer(json.dumps(content, ensure_ascii=False))
    settings = _settings(plain, frame, _THEIR_ROLES if tokenizer is not None else {}, beside, (own or {}))
    if not settings:
        return plain
    if is_same:
        settings["text_hash"] = hashlib.sha256(raw.encode()).hexdigest()
    content["model"][SETTINGS] = settings
    return TextTokenizer(json.dumps(content, ensure_ascii=False))


def _settings(
    plain: TextTokenizer, frame: tuple[list[int], list[int]] | None, their_roles: Mapping[str, Iterable[str]],
    beside: _Beside, own: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """What a folder says that `plain`, its text alone, does not."""
    default = {} if beside.tokenizer_class is None else beside.tokenizer_class.names
    names, settings = beside.names(default), {}
    roles = {}
    for role, theirs in their_roles.items():
        name = next((names[their] for their in theirs if their in names), None)
        if name is not None and (token_id := plain.id_of(name)) is not None and token_id != plain.find(role):
            roles[role] = name
    if roles:
        settings["roles"] = roles
    if frame is not None and tuple(next(iter(ids), None) for ids in frame) != plain.frame:
        settings["frame"] = [next(iter(ids), None) for ids in frame]
    side = beside.config.get("truncation_side") or ((own.get("truncation") or {}).get("direction") or "right").lower()
    if side not in ("left", "right"):
        raise DataError(f"{beside.folder}: truncation_side must be left or right: got {side!r}.")
    if side != "right":
        settings["truncation_side"] = side
    limit = beside.config.get("model_max_length", beside.config.get("max_len"))
    if isinstance(limit, (int, float)) and not isinstance(limit, bool) and 0 < limit < _NO_LIMIT:
        settings["max_tokens"] = int(limit)
    return settings


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8: {error.reason} at byte {error.start}.") from None


def _json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is no JSON: {error}.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold an object: got a {type(content).__name__}.")
    return content


def _lines(path: pathlib.Path) -> dict[str, int]:
    """A vocabulary of a token a line."""
    vocab: dict[str, int] = {}
    for i, line in enumerate(_read(path).removesuffix("\n").split("\n")):
        if (first := vocab.setdefault(line.rstrip("\r"), i)) != i:
            raise DataError(f"{path}: a vocabulary has each token once: {line!r} is on lines {first + 1} and {i + 1}.")
    return vocab


def _merges(path: pathlib.Path, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = tuple(line.rstrip("\r").split(" "))
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise DataError(f"{path}: line {number} must merge tokens of vocab.json: got {line!r}.")
        merges.append(pair)
    return merges
