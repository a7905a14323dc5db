"""Which columns of a source give what a run wants: those the user names, else those with names that data sets use."""

import functools
import re
from collections.abc import Callable
from dataclasses import replace

from flax_encoder.config import DataConfig
from flax_encoder.data.sources import values
from flax_encoder.data.sources.columns import Columns, Layout, Table
from flax_encoder.data.sources.records import DataError, Record
from flax_encoder.data.sources.values import Row

# Names that data sets use, in lower case with _ for - and blanks.
_TEXT = (
    "sentence", "content", "review", "body", "document", "article", "comment", "tweet", "review_body", "review_text",
    "abstract", "headline", "utterance", "message",
)  # fmt: skip
_PAIRS = (
    ("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"), ("question", "sentence"),
    ("question", "passage"), ("question", "context"), ("text_a", "text_b"), ("text1", "text2"), ("text", "text_pair"),
    ("sentence_a", "sentence_b"), ("query", "passage"), ("query", "document"), ("anchor", "positive"),
    ("source", "target"), ("text", "summary"), ("document", "summary"), ("article", "highlights"),
    ("dialogue", "summary"),
)  # fmt: skip
_ANCHORS = (("query", "positive"), ("question", "positive"), ("question", "answer"), ("query", "answer"))
_NEGATIVE = re.compile(r"(?:hard_)?negatives?_?(\d*)")
_LABELS = {
    "class": (
        "labels", "class", "category", "sentiment", "topic", "intent", "emotion", "target", "gold_label",
        "label_coarse", "coarse_label", "label_fine", "fine_label", "polarity", "is_duplicate",
    ),
    "classes": ("labels", "label", "classes", "categories", "topics", "genres", "emotions"),
    "number": (
        "label", "score", "similarity", "similarity_score", "relatedness_score", "stars", "star_rating", "rating",
        "sentiment",
    ),
    "tags": ("tags", "ner_tags", "pos_tags", "chunk_tags", "upos", "labels", "ner"),
    "answers": ("answers", "answer"),
    "choices": ("label", "answer"),
}  # fmt: skip
_MARGINS = ("margin", "score_difference")
_CONVERSATIONS = (
    "turns", "dialog", "dialogue", "utterances", "conversation", "conversations", "messages",
)  # fmt: skip
_HISTORIES = ("history", "dialogue_history", "dialog_history")
_ASKED = ("query", "question", "prompt", "instruction", "input", "message", "utterance", "text", "source")
_REPLIES = ("response", "reply", "answer", "output", "target")
_SPANS = ("entities", "spans", "label", "labels")
_ENTITIES = {"list[dict]", "list[list]", "list[null]", "dict"}
_TOKENS = ("tokens", "words")
_SCALARS = {"str", "int", "bool", "float", "null"}
_IDENTIFIERS = {"id", "idx", "guid", "uid", "uuid", "index", "label", "labels"}
_OPTION = {
    "text": "--data.text-column", "second text": "--data.text-pair-column", "label": "--data.label-column",
    "pair of texts": "--data.text-column and --data.text-pair-column",
    "context and choices": "--data.text-column and --data.text-pair-column",
    "list of turns": "--data.history-column", "turns before the source": "--data.history-column",
    "target": "--data.text-pair-column", "source and target": "--data.text-column and --data.text-pair-column",
}  # fmt: skip


def choose_columns(table: Table, config: DataConfig, wanted: Columns) -> Layout:
    """The columns that give what is wanted: those that `config` names, else those with names that data sets use.

    Raises:
      DataError: a column that is named is not there, or several could be meant; lists the columns and the option.
    """
    chooser = _Chooser(table, config, wanted)
    if wanted.value == "tags":
        layout = _tags(chooser)
    elif wanted.value == "answers":
        layout = _answers(chooser)
    elif wanted.has_turns:
        layout = _dialogue(chooser) or (_texts_and_value if wanted.value == "none" else _written)(chooser)
    elif wanted.value == "text":
        layout = _written(chooser)
    elif wanted.min_texts > 2:
        layout = _choices(chooser)
    else:
        layout = _texts_and_value(chooser)
    if doubled := table.doubled.intersection(layout.columns):
        raise DataError(
            f"a column that is read must have a name of its own: {table.where} has several named {min(doubled)!r}. "
            f"Rename them."
        )
    return replace(layout, pair=chooser.read_pair)


def _settings_of_turns(config: DataConfig) -> list[str]:
    """What is set of conversations, as options."""
    default = DataConfig()
    given = {name: getattr(config, name) for name in ("history_column", "target_turns", "turn_separator")}
    return [f"--data.{n.replace('_', '-')} {value!r}" for n, value in given.items() if value != getattr(default, n)]


class _Chooser:
    """Finds columns by role, and keeps account of which were guessed."""

    def __init__(self, table: Table, config: DataConfig, wanted: Columns):
        self.table, self.kinds, self.wanted, self.config = table, table.kinds, wanted, config
        own = not table.is_fixed
        self.text, self.pair = (config.text_column, config.text_pair_column) if own else (None, None)
        label = config.label_column if own else None
        self.label = label[0] if isinstance(label, tuple) and len(label) == 1 else label
        self._by_key = {_key(name): name for name in reversed(self.kinds)}
        self._guessed: dict[str, tuple[str, ...]] = {}
        self.read_pair: tuple[str, str] | None = None
        self.history = config.history_column if own else None
        if not wanted.has_turns and (unread := _settings_of_turns(config)):
            raise DataError(f"a conversation is for a task that writes the answers: leave out {' and '.join(unread)}.")
        if self.pair is not None and wanted.max_texts < 2 and wanted.value != "text":
            raise DataError(f"one text a document is read here: leave out --data.text-pair-column {self.pair}.")
        if isinstance(self.label, tuple) and wanted.value != "classes":
            raise DataError(
                f"several label columns are for documents with several labels, 0 or 1 in each column: got "
                f"{', '.join(self.label)}. Name one with --data.label-column."
            )

    def known(self, names: tuple[str, ...], is_fit: Callable[[str], bool] = lambda kind: True) -> list[str]:
        """The columns that are called so and hold what is wanted."""
        found = (self._by_key.get(name) for name in names)
        return [name for name in found if name is not None and is_fit(self.kinds[name])]

    def named(self, name: str, role: str) -> str:
        if name not in self.kinds:
            raise no_column(name, list(self.kinds), self.table.where, role)
        return name

    def one(self, role: str, asked: str | None, names: tuple[str, ...], is_fit=lambda kind: True) -> str:
        """The column asked for, else the only one of these names; where none of them holds what is wanted, the only
        one that is called so, whose rows then say what they hold."""
        if asked is not None:
            return self.named(asked, role)
        found = self.known(names, is_fit) or self.known(names)
        if len(found) == 1:
            return self.guessed(role, found[0])
        if not found:
            raise no_column(names[0], list(self.kinds), self.table.where, role)
        raise self.unclear(role, f"{', '.join(found)} could be")

    def guessed(self, role: str, *names: str) -> str:
        self._guessed[role] = names
        return names[0]

    def unclear(self, role: str, why: str = "") -> DataError:
        columns = ", ".join(self.kinds) or "none"
        return DataError(
            f"which column is the {role}? {self.table.where} has {columns}{why and ': ' + why}. "
            f"Name one with {_OPTION[role]}."
        )

    def plain(self, columns: tuple[str, ...], make: Callable[[Row], Record]) -> Layout:
        """The layout of documents without a value."""
        if self.wanted.keeps_id and (name := next(iter(self.known(("id",))), None)) not in (None, *columns):
            columns, make = (*columns, name), functools.partial(values.with_id, make, name)
        return Layout(columns, make, is_plain=len(columns) == 1 and self.wanted.value == "none", notes=self.notes)

    @property
    def notes(self) -> tuple[str, ...]:
        if self.table.is_fixed or all(names == (role,) for role, names in self._guessed.items()):
            return self.table.notes  # `text` and `label` are what the settings' help promises
        taken = ", ".join(f"{role} {' and '.join(map(repr, names))}" for role, names in self._guessed.items())
        options = " and ".join(dict.fromkeys(_OPTION[role] for role in self._guessed if role in _OPTION))
        others = f"; {options} name others" * bool(options)
        return *self.table.notes, f"{self.table.where}: columns taken by their names: {taken}{others}."


def _key(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def _is_number(kind: str) -> bool:
    return kind in ("int", "float")


def _is_list(kind: str) -> bool:
    return kind.startswith("list")


def _is_turns(kind: str) -> bool:
    return _is_list(kind) or kind == "dict"  # of lists, as some libraries keep a list of objects


def no_column(name: str, columns: list[str], where: str, role: str = "text") -> DataError:
    return DataError(
        f"there is no column {name!r} in {where}; the columns are {', '.join(columns)}. Name one with {_OPTION[role]}."
    )


def _texts_and_value(chooser: _Chooser) -> Layout:
    wanted, kinds = chooser.wanted, chooser.kinds
    has_value = wanted.value != "none"
    label = _label(chooser) if has_value and not wanted.is_optional else None
    labels = label if isinstance(label, tuple) else () if label is None else (label,)
    texts = _texts(chooser, labels)
    if has_value and wanted.is_optional:
        label = _optional_label(chooser, texts)
        labels = () if label is None else (label,)
    read = functools.partial(values.joined_tokens, texts[0])
    if len(texts) > 1 and any(_is_list(kinds[name]) for name in texts):
        read = functools.partial(values.texts_of_lists, texts)
    elif len(texts) > 1 or not _is_list(kinds[texts[0]]):
        read = functools.partial(values.texts, texts)
    names = list(chooser.config.label_names) if chooser.config.label_names else None
    if len(texts) > 1:
        chooser.read_pair = texts[0], texts[1]
    if label is None:
        make = functools.partial(values.plain, read)
        if wanted.keeps_words and read.func is values.joined_tokens:
            make = functools.partial(values.untagged, texts[0])
        if read.func is values.texts and len(texts) == 1:
            make = functools.partial(values.plain_text, texts[0])
        return chooser.plain(texts, make)
    if not isinstance(label, tuple):
        names = names or chooser.table.names.get(label)
    if wanted.value == "number":
        value, names = functools.partial(values.number, label), None
    elif wanted.value == "class":
        value = functools.partial(values.class_name, label, names)
    elif isinstance(label, tuple):
        value, names = functools.partial(values.flags, label), list(label)
    else:
        value = functools.partial(values.class_names, label, names)
    make = functools.partial(values.with_value, read, value)
    is_plain = len(texts) == 1 and wanted.value == "class"
    return Layout((*texts, *labels), make, label, names, is_plain, notes=chooser.notes)


def _label(chooser: _Chooser) -> str | tuple[str, ...]:
    value, asked = chooser.wanted.value, chooser.label
    if isinstance(asked, tuple):
        return tuple(chooser.named(name, "label") for name in asked)
    if asked is None and value == "class" and "label" in chooser.kinds:
        return chooser.guessed("label", "label")
    fits = {"class": {*_SCALARS, "dict"}.__contains__, "number": _is_number, "classes": _is_list}[value]
    return chooser.one("label", asked, (*(("label",) if value == "class" else ()), *_LABELS[value]), fits)


def _optional_label(chooser: _Chooser, texts: tuple[str, ...]) -> str | None:
    """The column of numbers, if there is one that is called so and texts that it can be of: two, or three with a
    margin."""
    names = {2: _LABELS["number"], 3: _MARGINS}.get(len(texts), ())
    if chooser.label is None and not chooser.known(names, _is_number):
        return None
    if not names:
        raise DataError(
            f"a number is of a pair of texts, or of an anchor, a positive and a negative: {chooser.table.where} is "
            f"read as {len(texts)} a row, {', '.join(texts)}. Leave out --data.label-column {chooser.label}, or name "
            f"two with --data.text-column and --data.text-pair-column."
        )
    return str(_label(chooser) if len(texts) == 2 else chooser.one("label", chooser.label, names, _is_number))


def _texts(chooser: _Chooser, labels: tuple[str, ...]) -> tuple[str, ...]:
    """One column, or two: a pair only if it was named, or if both names belong together. Where a document may have
    more than two, those that are called negatives follow."""
    if chooser.wanted.max_texts <= 2:
        return _text_or_pair(chooser, labels, _PAIRS)
    numbered = ((name, _NEGATIVE.fullmatch(_key(name))) for name, kind in chooser.kinds.items()
                if kind in ("str", "list[str]"))  # fmt: skip
    negatives = sorted((int(match[1] or 0), name) for name, match in numbered if match)
    texts = _text_or_pair(chooser, (*labels, *(name for _, name in negatives)), (*_PAIRS, *_ANCHORS))
    if len(texts) != 2 or not negatives:
        return texts
    chooser.guessed("negatives", *(name for _, name in negatives))  # which no option names
    return (*texts, *(name for _, name in negatives))


def _text_or_pair(
    chooser: _Chooser, others: tuple[str, ...], known_pairs: tuple[tuple[str, str], ...]
) -> tuple[str, ...]:
    kinds, wanted = chooser.kinds, chooser.wanted
    strings = [name for name, kind in kinds.items() if kind == "str" and name not in others]
    pairs = [pair for names in known_pairs if len(pair := [n for n in chooser.known(names) if n in strings]) == 2]
    if chooser.text is not None:
        first = chooser.named(chooser.text, "text")
        if chooser.pair is not None:
            return first, chooser.named(chooser.pair, "second text")
        if wanted.min_texts < 2:
            return (first,)
        seconds = [second for name, second in pairs if name == first]
        if len(seconds) != 1:
            raise chooser.unclear("second text")
        return first, chooser.guessed("second text", *seconds)
    if chooser.pair is not None:
        raise DataError(f"a second text needs a first: give --data.text-column with --data.text-pair-column "
                        f"{chooser.pair}.")  # fmt: skip
    if pairs and wanted.max_texts >= 2:
        others = [n for n in chooser.known(("text", *_TEXT)) if n in strings and n not in pairs[0]]
        if len(pairs) > 1 or others:
            found = [f"{a} with {b}" for a, b in pairs] + others
            raise chooser.unclear("text", f"{', or '.join(found)} could be")
        chooser.guessed("pair of texts", *pairs[0])
        return pairs[0][0], pairs[0][1]
    if wanted.min_texts >= 2:
        raise DataError(
            f"two texts a document are needed: {chooser.table.where} has {', '.join(kinds)}, among which no names "
            f"belong together. Name two with --data.text-column and --data.text-pair-column."
        )
    if "text" in kinds:
        return (chooser.guessed("text", "text"),)
    known = [name for name in chooser.known(("text", *_TEXT)) if name in strings]
    others = [name for name in strings if _key(name) not in _IDENTIFIERS]
    tokens = chooser.known(_TOKENS, "list[str]".__eq__)
    for found in (strings, others, known if not pairs else [], tokens if not others else []):
        if len(found) == 1:
            return (chooser.guessed("text", found[0]),)
    raise chooser.unclear("text", f"{', '.join(known)} could be" if len(known) > 1 else "")


def _tags(chooser: _Chooser) -> Layout:
    """Tokens with a tag each, or a text with entities at offsets of characters."""
    asked, names = chooser.label, chooser.config.label_names
    tokens = [chooser.text] if chooser.text is not None else chooser.known(_TOKENS, _is_list)
    if tokens and _is_list(chooser.kinds[chooser.named(tokens[0], "text")]):
        words = chooser.one("text", chooser.text, _TOKENS, _is_list)
        tags = chooser.one("label", asked, _LABELS["tags"], lambda kind: kind in ("list[str]", "list[int]"))
        names = list(names) if names else chooser.table.names.get(tags)
        return Layout((words, tags), functools.partial(values.tagged, words, tags, names), tags, names,
                      notes=chooser.notes)  # fmt: skip
    if asked is None and not chooser.known(_SPANS):
        raise DataError(
            f"tags stand in lists of tokens and tags, in the entities of a text, or a line a word in a file that is "
            f"called .conll: {chooser.table.where} has {', '.join(chooser.kinds)}. Name a column with "
            f"--data.label-column."
        )
    entities = chooser.one("label", asked, _SPANS, _ENTITIES.__contains__)
    (text,) = _texts(chooser, (entities,))
    make = functools.partial(values.tagged_spans, text, entities)
    return Layout((text, entities), make, entities, notes=chooser.notes)


def _answers(chooser: _Chooser) -> Layout:
    question = chooser.one("text", chooser.text, ("question", "query"))
    context = chooser.one("second text", chooser.pair, ("context", "passage", "paragraph"))
    answers = chooser.one("label", chooser.label, _LABELS["answers"])
    chooser.read_pair = question, context
    name = next(iter(chooser.known(("id",))), None)
    columns = (question, context, answers, *(() if name is None else (name,)))
    make = functools.partial(values.answered, question, context, answers, name)
    return Layout(columns, make, answers, notes=chooser.notes)


def _choices(chooser: _Chooser) -> Layout:
    """A context and its choices, as SWAG, COPA, or a column of text beside one of lists of texts have them."""
    endings = chooser.known(tuple(f"ending{i}" for i in range(26)))
    if chooser.text is None and endings and len(chooser.known(("sent1", "sent2"))) == 2:
        columns = ("sent1", "sent2", *endings)
        texts = functools.partial(values.swag, *chooser.known(("sent1", "sent2")), tuple(endings))
        chooser.guessed("context and choices", *columns)
    elif chooser.text is None and len(chooser.known(("premise", "question", "choice1", "choice2"))) == 4:
        columns = tuple(chooser.known(("premise", "question", "choice1", "choice2")))
        texts = functools.partial(values.copa, *columns)
        chooser.guessed("context and choices", *columns)
    else:
        columns = (
            chooser.one("text", chooser.text, ("context", "ctx", "question", "premise"), "str".__eq__),
            chooser.one("second text", chooser.pair, ("choices", "endings", "options"), _is_list),
        )
        texts = functools.partial(values.choices, *columns)
        chooser.read_pair = columns
    wanted = chooser.wanted
    if wanted.value == "none":
        return chooser.plain(columns, functools.partial(values.plain, texts))
    label = chooser.one("label", chooser.label, _LABELS["choices"], _SCALARS.__contains__)
    make = functools.partial(values.with_choice, texts, label, wanted.min_texts, wanted.max_texts)
    return Layout((*columns, label), make, label, notes=chooser.notes)


def _source_and_target_pairs(chooser: _Chooser) -> list[list[str]]:
    """Two columns whose names belong together, the first being the source that was named, if any was."""
    strings = [name for name, kind in chooser.kinds.items() if kind == "str"]
    pairs = [pair for names in _PAIRS if len(pair := [n for n in chooser.known(names) if n in strings]) == 2]
    return pairs if chooser.text is None else [p for p in pairs if p[0] == chooser.named(chooser.text, "text")]


def _written(chooser: _Chooser) -> Layout:
    """A source and its target: two columns that were named, or whose names belong together."""
    pairs = _source_and_target_pairs(chooser)
    if unread := _settings_of_turns(chooser.config):
        raise DataError(
            f"{' and '.join(unread)} would not be read without conversations: {chooser.table.where} has "
            f"{', '.join(chooser.kinds)}, none of which is recognized as a list of turns. Name the column with "
            f"--data.history-column, or leave the setting out."
        )
    if chooser.text is not None and chooser.pair is not None:
        source, target = chooser.text, chooser.named(chooser.pair, "target")
    elif chooser.pair is None and len(pairs) == 1:
        chooser.guessed("source and target", *pairs[0])
        source, target = pairs[0]
    else:
        raise chooser.unclear("source and target", f"{', or '.join(f'{a} with {b}' for a, b in pairs)} could be"
                              if len(pairs) > 1 else "")  # fmt: skip
    chooser.read_pair = source, target
    make = functools.partial(values.written, source, target)
    return Layout((source, target), make, target, notes=chooser.notes)


def _dialogue(chooser: _Chooser) -> Layout | None:
    """A column of turns that is a conversation, or a history beside a source, a target or both; None: there is none."""
    has_target = chooser.wanted.value == "text"
    pairs, asked = _source_and_target_pairs(chooser), chooser.history
    pairs = [pair for pair in pairs if chooser.pair in (None, pair[1])]
    is_named = (chooser.text, chooser.pair) != (None, None)
    if asked is not None:
        history = chooser.named(asked, "list of turns")
        is_whole = _key(asked) in _CONVERSATIONS and not is_named
    else:
        whole = [] if is_named else chooser.known(_CONVERSATIONS, _is_turns)
        before = chooser.known(_HISTORIES, _is_turns)
        if len(found := [*whole, *before]) > 1 or (whole and pairs):
            could = [*found, *(" with ".join(pair) for pair in pairs)]
            raise chooser.unclear("list of turns", f"{', or '.join(could)} could be")
        if not found:
            return None
        history, is_whole = found[0], bool(whole)
    others = [name for name, kind in chooser.kinds.items() if kind in ("str", "null") and name != history]
    source, targets = chooser.text, [n for n in chooser.known(_REPLIES) if n in others and n != chooser.text]
    targets = [chooser.named(chooser.pair, "target")] if chooser.pair is not None else targets
    if not is_whole and source is None:
        sources = [pair[0] for pair in pairs] or [n for n in chooser.known(_ASKED) if n in others and n not in targets]
        if len(sources) > 1:
            raise chooser.unclear("text", f"{', '.join(sources)} could be")
        source = chooser.guessed("text", *sources) if sources else None
    if not is_whole and chooser.pair is None:
        targets = [pair[1] for pair in pairs] or targets
        is_whole = not targets and source is None and asked is not None
    if asked is None:
        chooser.guessed("list of turns" if is_whole else "turns before the source", history)
    if is_whole:
        if not has_target:
            return chooser.plain((history,), functools.partial(values.asked_turn, history))
        every = chooser.config.target_turns == "every"
        make = functools.partial(values.answered_turns, history, every)
        return Layout((history,), make, history, makes_several=True, notes=chooser.notes)
    columns = (history,) if source is None else (history, source)
    if not has_target:
        return chooser.plain(columns, functools.partial(values.after_turns, history, source, None))
    if len(targets) != 1:
        raise chooser.unclear("target", f"{', '.join(targets)} could be" if targets else "")
    if chooser.config.target_turns != "every":
        raise DataError(
            f"--data.target-turns needs a column that holds a whole conversation: {chooser.table.where} has a history "
            f"{history!r} beside its target {targets[0]!r}. Leave it out."
        )
    target = targets[0] if chooser.pair is not None else chooser.guessed("target", targets[0])
    make = functools.partial(values.after_turns, history, source, target)
    return Layout((*columns, target), make, target, notes=chooser.notes)
