"""From a row to a record: texts, and the value of each kind, checked.

A function here raises BadRow for a row that does not hold what is wanted.
"""

import itertools
import math
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flax_encoder.config.rules import counted
from flax_encoder.data.sources.records import BadRow, Record, SoftLabel
from flax_encoder.data.sources.words import word_pattern

Row = dict[str, Any]
"""A source's row: what each of its columns holds, as JSON would have it."""


def cell(row: Row, column: str) -> Any:
    """Raises: BadRow: the row has no such column."""
    try:
        return row[column]
    except KeyError:
        raise BadRow(f"every row must have the column {column!r}", f"has {', '.join(row) or 'none'}") from None


def text(row: Row, column: str) -> str:
    """The column's text; nothing where it is null."""
    value = cell(row, column)
    if type(value) is str and value.isascii():  # most texts, quickly
        return value
    return "" if value is None else string(value, column)


def string(value: Any, column: str) -> str:
    try:
        value = value.decode("utf-8") if isinstance(value, bytes) else value
        if isinstance(value, str):
            if not value.isascii():
                value.encode("utf-8")  # JSON can spell half a surrogate pair
            return value
    except UnicodeError as error:
        raise BadRow("a text column must hold Unicode text", f"holds {value[:40]!r}: {error}", column) from None
    raise BadRow("a text column must hold strings", f"holds {_short(value)}", column)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


# --- texts alone, and with a value beside them


def texts(columns: tuple[str, ...], row: Row) -> tuple[str, ...]:
    return tuple([text(row, column) for column in columns])


def texts_of_lists(columns: tuple[str, ...], row: Row) -> tuple[str, ...]:
    """Of columns that hold a text or a list of texts, one after the other."""
    found: list[str] = []
    for column in columns:
        found += _strings(row, column) if isinstance(cell(row, column), list) else [text(row, column)]
    return tuple(found)


def joined_tokens(column: str, row: Row) -> tuple[str, ...]:
    return (" ".join(_strings(row, column)),)


def plain_text(column: str, row: Row) -> Record:
    """The same as `plain` of one column, in half the time."""
    return Record((text(row, column),))


def plain(read: Callable[[Row], tuple[str, ...]], row: Row) -> Record:
    return Record(read(row))


def with_id(make: Callable[[Row], Record], name: str, row: Row) -> Record:
    """A row without an id has an empty one, so that all answers of a file have the same entries."""
    return make(row)._replace(id="" if row.get(name) is None else str(row[name]))


def with_value(read: Callable[[Row], tuple[str, ...]], value: Callable[[Row], Any], row: Row) -> Record:
    return Record(read(row), value(row))


def written(source: str, target: str, row: Row) -> Record:
    """A text, and the text that is to be written for it."""
    both = text(row, source), text(row, target)
    for column, found in zip((source, target), both, strict=True):
        if not found.strip():
            raise BadRow("a source and its target must have text", f"holds {found!r}", column)
    return Record((both[0],), both[1])


# --- conversations

_TEXTS_OF_TURNS = ("content", "value", "text", "utterance")
_SPEAKERS = ("role", "from", "speaker")
_ANSWERING = frozenset(("assistant", "gpt", "chatgpt", "bot", "chatbot", "model"))
_ASKING = frozenset(("user", "human", "prompter", "system", "developer", "tool", "function"))


class Turn(NamedTuple):
    text: str
    speaker: str | None
    """Who says it, in lower case, where the source says so."""


def turns(row: Row, column: str) -> list[Turn]:
    """A conversation, oldest first: texts, lists of texts, or objects with a text and a speaker."""
    value = cell(row, column)
    items = [value] if isinstance(value, str | bytes) else _items(value, column, "turns")
    found = [turn for number, item in enumerate(items, 1) for turn in _turns(item, number, column)]
    for number, turn in enumerate(found, 1):
        if not turn.text.strip():
            raise BadRow("every turn of a conversation must have text", f"holds {turn.text!r} as turn {number}", column)
    return found


def _turns(item: Any, number: int, column: str) -> list[Turn]:
    if isinstance(item, list) and item and all(isinstance(text, str | bytes) for text in item):  # question and answer
        return [Turn(string(text, column), None) for text in item]
    speaker = None
    if isinstance(item, dict):
        speaker = next((str(item[name]).strip().lower() for name in _SPEAKERS if item.get(name) is not None), None)
        item = next((item[name] for name in _TEXTS_OF_TURNS if name in item), item)
    if not isinstance(item, str | bytes):
        raise BadRow(
            "a turn of a conversation is a text, or an object with role and content, or from and value",
            f"holds {_short(item)} as turn {number}", column,
        )  # fmt: skip
    return [Turn(string(item, column), speaker)]


def _is_answer(found: list[Turn]) -> list[bool]:
    """Of each turn: whether a model learns to write it. Where speakers are known by their names these are the
    assistant's, or else all."""
    is_known = any(turn.speaker in _ANSWERING | _ASKING for turn in found)
    return [turn.speaker in _ANSWERING or not is_known for turn in found]


def answered_turns(column: str, every: bool, row: Row) -> tuple[Record, ...]:
    """A conversation's answers, each with the turns before it: every one, or the last alone."""
    found = turns(row, column)
    texts = tuple(turn.text for turn in found)
    answers = [i for i, is_answer in enumerate(_is_answer(found)) if is_answer and i > 0]
    if not answers:
        speakers = ", ".join(dict.fromkeys(turn.speaker for turn in found if turn.speaker is not None))
        raise BadRow(
            "a conversation must have a turn and an answer to it",
            f"holds {counted(len(found), 'turn')}{speakers and f' of {speakers}'}", column,
        )  # fmt: skip
    group = "\x1e".join(text.strip() for text in texts[: answers[0]])
    chosen = answers if every else answers[-1:]
    return tuple(Record((texts[i - 1],), texts[i], history=texts[: i - 1], group=group) for i in chosen)


def asked_turn(column: str, row: Row) -> Record:
    """A conversation as far as it is to be answered: without the answers at its end, where speakers are known."""
    found = turns(row, column)
    if found and not all(_is_answer(found)):
        while found and _is_answer(found)[-1]:
            found.pop()
    if not found:
        raise BadRow("a conversation must have a turn to be answered", "holds none", column)
    *before, newest = (turn.text for turn in found)
    return Record((newest,), history=tuple(before))


def after_turns(history: str, source: str | None, target: str | None, row: Row) -> Record:
    """A text after the turns of a history, of which it is the last where there is no column for it, and its target."""
    before = [turn.text for turn in turns(row, history)]
    if source is None and not before:
        raise BadRow("a conversation must have a turn to be answered", "holds none", history)
    newest = before.pop() if source is None else text(row, source)
    answer = None if target is None else text(row, target)
    for column, found in ((source or history, newest), (target or "", answer)):
        if found is not None and target is not None and not found.strip():
            raise BadRow("a source and its target must have text", f"holds {found!r}", column)
    return Record((newest,), answer, history=tuple(before))


def is_no_label(value: Any, names: list[str] | None) -> bool:
    """Null, not a number, nothing but blanks, or the -1 of a column whose integers have names."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    if isinstance(value, str | bytes):
        return not value.strip()
    return names is not None and value == -1


def class_name(column: str, names: list[str] | None, row: Row) -> str:
    """The label; of an object {label: share}, as `predict --probabilities` writes, a `SoftLabel`."""
    value = cell(row, column)
    if not isinstance(value, dict):
        return _class(value, column, names)
    numbers = [x if _is_share(x) else math.nan for x in value.values() if x is not None]
    if not math.isclose(total := sum(numbers), 1.0, abs_tol=1e-2):
        raise BadRow(
            "shares of labels are at least 0 and add up to 1", f"holds {_short(value)}, of {total:g} in all", column
        )
    return SoftLabel({_class(name, column, names): x / total for name, x in value.items() if x is not None})


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _class(value: Any, column: str, names: list[str] | None) -> str:
    if is_no_label(value, names):
        raise BadRow("every document must have a label", f"holds {value!r}", column)
    if isinstance(value, float) and value.is_integer():  # what a table library makes of integers beside a null
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if names is None:
            return str(value)
        if not 0 <= value < len(names):
            raise BadRow(f"labels are 0 to {len(names) - 1}, as many as have names", f"holds {value}", column)
        return names[value]
    if isinstance(value, bool):
        return str(value)
    if not isinstance(value, str | bytes):
        raise BadRow("a label column must hold strings or integers", f"holds {_short(value)}", column)
    name = string(value, column)
    if names is not None and name not in names:
        # A .csv file has no integers. Names that are numbers themselves are meant as names.
        if name.strip().isdecimal() and int(name) < len(names) and not any(n.strip().isdecimal() for n in names):
            return names[int(name)]
        raise BadRow(f"labels are {', '.join(names)}", f"holds {name!r}", column)
    return name


def class_names(column: str, names: list[str] | None, row: Row) -> tuple[str, ...]:
    value = cell(row, column)
    if not isinstance(value, list):
        raise BadRow(
            "several labels a document are a list, or columns of 0 and 1 that --data.label-column names one by one",
            f"holds {_short(value)}", column,
        )  # fmt: skip
    return tuple(dict.fromkeys(_class(item, column, names) for item in value))


_FLAGS = {0: False, 1: True, "0": False, "1": True, "false": False, "true": True}


def flags(columns: tuple[str, ...], row: Row) -> tuple[str, ...]:
    """The columns that hold a 1."""
    found = []
    for column in columns:
        value = cell(row, column)
        key = value.strip().lower() if isinstance(value, str) else value
        if not isinstance(key, str | int | float) or key not in _FLAGS:
            raise BadRow("each of several label columns must hold 0 or 1", f"holds {_short(value)}", column)
        if _FLAGS[key]:
            found.append(column)
    return tuple(found)


_LARGEST = (2 - 2**-23) * 2.0**127  # of float32


def number(column: str, row: Row) -> float:
    value = cell(row, column)
    try:
        if isinstance(value, bool) or "_" in str(value):  # which float() would take
            raise TypeError
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        raise BadRow("a column of numbers must hold numbers", f"holds {_short(value)}", column) from None
    if not abs(result) <= _LARGEST:
        raise BadRow("numbers must be finite in float32", f"holds {_short(value)}", column)
    return result


# --- words and their tags


def _strings(row: Row, column: str) -> list[str]:
    items = cell(row, column)
    if not isinstance(items, list):
        raise BadRow("a column of lists must hold lists of strings", f"holds {_short(items)}", column)
    return [string(item, column) for item in items]


def tagged(words: str, tags: str, names: list[str] | None, row: Row) -> Record:
    """Tokens joined by one blank, and the place and tag of each."""
    tokens, given = _strings(row, words), cell(row, tags)
    if not isinstance(given, list) or len(given) != len(tokens):
        count = len(given) if isinstance(given, list) else "no"
        raise BadRow("every token has one tag", f"has {len(tokens)} in {words!r} and {count} in {tags!r}")
    return _joined(tokens, [_class(tag, tags, names) for tag in given])


def untagged(words: str, row: Row) -> Record:
    """Tokens joined by one blank, and the place of each, to be tagged."""
    tokens = _strings(row, words)
    return _joined(tokens, [None] * len(tokens))


def _joined(tokens: list[str], tags: Sequence[str | None]) -> Record:
    ends = list(itertools.accumulate(len(token) + 1 for token in tokens))
    places = ((end - 1 - len(token), end - 1, tag) for token, end, tag in zip(tokens, ends, tags, strict=True))
    return Record((" ".join(tokens),), tuple(places))


def _is_amid_character(whole: str, at: int) -> bool:
    """Whether a mark or a joiner stands there, which belongs to what is before it, or a picture that is joined on, as
    in an emoji of several (Unicode's annex 29, rules GB9 and GB11)."""
    if not 0 < at < len(whole):
        return False
    kind, joiner = unicodedata.category(whole[at]), "\u200d"
    return kind[0] == "M" or whole[at] == joiner or (kind == "So" and whole[at - 1] == joiner)


def tagged_spans(column: str, entities: str, row: Row) -> Record:
    """A text's words, cut where an entity begins or ends, with B- and I- and the entity's label, or O."""
    whole = text(row, column)
    spans = sorted(_span(item, entities) for item in _items(cell(row, entities), entities, "entities"))
    end_before = 0
    for begin, end, label in spans:
        if not 0 <= begin < end <= len(whole) or not whole[begin:end].strip():
            raise BadRow(
                f"entities lie within the text of {len(whole)} characters and cover some of it",
                f"has {label!r} from {begin} to {end}", entities,
            )  # fmt: skip
        if any(_is_amid_character(whole, at) for at in (begin, end)):
            raise BadRow(
                "entities begin and end between characters, not between parts of one, such as a letter and its mark",
                f"has {label!r} from {begin} to {end}, {whole[max(begin - 1, 0) : end + 1]!r}", entities,
            )  # fmt: skip
        if begin < end_before:
            found = f"has {label!r} from {begin}, where another ends at {end_before}"
            raise BadRow("entities do not overlap", found, entities)
        end_before = end
    value, at = [], 0
    for begin, end, label in [*spans, (len(whole), len(whole), "")]:
        value += [(m.start(), m.end(), "O") for m in word_pattern().finditer(whole, at, begin)]
        for i, match in enumerate(word_pattern().finditer(whole, begin, end)):
            value.append((match.start(), match.end(), f"{'I' if i else 'B'}-{label}"))
        at = end
    return Record((whole,), tuple(value))


def _items(value: Any, column: str, what: str) -> list:
    """A list's items; or objects of an object of lists, as some libraries keep a list of objects."""
    if value is None:
        return []
    if isinstance(value, dict) and value and all(isinstance(items, list) for items in value.values()):
        if len({len(items) for items in value.values()}) > 1:
            raise BadRow(f"lists of {what} must be of one length", f"holds {_short(value)}", column)
        return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise BadRow(f"a column of {what} must hold lists", f"holds {_short(value)}", column)
    return value


def _span(item: Any, column: str) -> tuple[int, int, str]:
    """(start, end, label) of [start, end, label] or of an object with these names."""
    if isinstance(item, dict):
        item = [item.get("start", item.get("start_offset")), item.get("end", item.get("end_offset")), item.get("label")]
    match item:
        case [int(begin), int(end), str(label)] | (int(begin), int(end), str(label)) if label.strip():
            return begin, end, string(label, column)
    raise BadRow("an entity is [start, end, label] or an object with these", f"holds {_short(item)}", column)


# --- answers and choices


def answered(question: str, context: str, answers: str, name: str | None, row: Row) -> Record:
    """A question, its passage, and the answers where they stand in the passage."""
    pair = text(row, question), text(row, context)
    given = cell(row, answers)
    if isinstance(given, dict) and isinstance(given.get("text"), str):  # a single answer
        given = [given]
    value = tuple(_answer(item, pair[1], answers) for item in _items(given, answers, "answers"))
    identifier = None if name is None or row.get(name) is None else str(row[name])
    return Record(pair, value, id=identifier)


def _answer(item: Any, context: str, column: str) -> tuple[int, str]:
    if not isinstance(item, dict):
        raise BadRow("an answer is an object with text and answer_start", f"holds {_short(item)}", column)
    start, answer = item.get("answer_start"), item.get("text")
    if isinstance(start, bool) or not isinstance(start, int):
        raise BadRow("an answer starts at a character's number", f"holds {start!r}", column)
    answer = string(answer, column)
    if not answer or start < 0 or context[start : start + len(answer)] != answer:
        stands = context[start : start + len(answer)] if start >= 0 else ""
        raise BadRow(
            "an answer stands in the passage where it is said to start",
            f"has {_short(answer)} at {start}, where the passage of {len(context)} characters has {_short(stands)}",
            column,
        )
    return start, answer


def swag(first: str, second: str, endings: tuple[str, ...], row: Row) -> tuple[str, ...]:
    start = text(row, second)
    return text(row, first), *(f"{start} {text(row, ending)}" for ending in endings)


_COPA = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}


def copa(premise: str, question: str, first: str, second: str, row: Row) -> tuple[str, ...]:
    asked = text(row, question)
    if asked not in _COPA:
        raise BadRow("a question asks for cause or effect", f"holds {_short(asked)}", question)
    return f"{text(row, premise)} {_COPA[asked]}", text(row, first), text(row, second)


def choices(context: str, column: str, row: Row) -> tuple[str, ...]:
    return text(row, context), *_strings(row, column)


def with_choice(
    read: Callable[[Row], tuple[str, ...]], label: str, min_texts: int, max_texts: int, row: Row
) -> Record:
    """A context and its choices; the value is the number of the right one, from 0, as a string."""
    found, right = read(row), cell(row, label)
    if not min_texts <= len(found) <= max_texts:
        raise BadRow(f"a context has {min_texts - 1} to {max_texts - 1} choices", f"has {len(found) - 1}")
    if isinstance(right, float) and right.is_integer():
        right = int(right)
    try:
        index = int(string(right, label)) if isinstance(right, str | bytes) else right
    except ValueError:
        index = None
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(found) - 1:
        raise BadRow(f"the right one of {len(found) - 1} choices is a number from 0", f"holds {_short(right)}", label)
    if not found[index + 1].strip():
        raise BadRow("the right choice has some text", f"holds {_short(right)}, which is blank", label)
    return Record(found, str(index))
