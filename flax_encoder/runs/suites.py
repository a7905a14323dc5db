"""The suites that encoders are compared by, a row a task: where it stands, what it learns, what the papers report.

Files are those of each set's own archive, or of the same names with the columns of TensorFlow Datasets and the Hub.

Where the names of sets were looked up, on 2026-11-30. TensorFlow Datasets: its builders, 4.9.10, and how they read an
archive (tests/suites/test_named_sets.py); those of super_glue and wikiann need TensorFlow, and WNUT 2017 is not there.
The Hub: names, columns and splits by the sets' pages and by projects that load them. datasets 4 runs no scripts, which
is all that leondz/wnut_17 and eriktks/conll2003 hold, so copies of them in Parquet are taken. Nothing was loaded.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flax_encoder.data.sources.records import BadRow, DataError
from flax_encoder.data.sources.values import Row, cell
from flax_encoder.runs.score_file import Scored
from flax_encoder.tasks.metrics import sklearn_metrics

Metric = Callable[[Scored], float]


class ColumnNames(NamedTuple):
    """Of a text or of a pair, and its label; numbers from 1 are those of a file without a header."""

    text: str
    pair: str | None
    label: str

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(name for name in self if name is not None)


@dataclass(frozen=True)
class SuiteTask:
    name: str
    objective: str
    metrics: Mapping[str, Metric]
    learning_rate: float
    batch_texts: int
    epochs: int
    columns: tuple[ColumnNames, ...] = ()
    """Of sets by name, and of the archive's files: the first that are all there; none are guessed."""
    tfds: str | None = None
    hf: str | None = None
    folders: tuple[str, ...] = ()
    """What its folder may be called, beside its name."""
    files: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _FILES)
    """What the files of each split are called before their kind's suffix."""
    reported: Mapping[str, str] = field(default_factory=lambda: {"": "validation"})
    """The splits that results are of, and what the names of metrics end in for each."""
    score: str | None = None
    """The metric that counts; None is the mean of all."""
    start: str | None = None
    """The task from whose model it starts, where that is trained too."""
    row_length: int = 128
    flatten: Callable[[Row], Iterator[Row]] | None = None
    """Rows of text_a, text_b and label of a row of the set."""
    skip_bad_rows: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the run, where another value than its default suits."""
    not_served: str | None = None
    """Why no task here can learn it."""


_FILES = {"train": ("train",), "validation": ("validation", "dev", "val", "valid"), "test": ("test",)}
_FLAT = ColumnNames("text_a", "text_b", "label")
# What the label of pairs that mean the same, or of answers that are right, is called: in files, and by name.
_POSITIVE = ("1", "True", "true", "equivalent", "duplicate")


# --- metrics


def of(name: str) -> Metric:
    """One of the task's own scores."""
    return lambda found: found.scores[name]


def _positive(golds: list[str], answers: list[str]) -> str:
    names = {name for name in (*golds, *answers) if name in _POSITIVE}
    if len(names) > 1:
        raise DataError(f"one label stands for yes, of {', '.join(_POSITIVE)}: the data has {', '.join(names)}.")
    return next(iter(names), _POSITIVE[0])


def positive_f1(found: Scored) -> float:
    """F1 of the pairs that mean the same, or of the answers that are right (scikit-learn)."""
    answers = [answer["label"] for answer in found.answers]
    yes = _positive(found.golds, answers)
    wanted, given = ([label == yes for label in labels] for labels in (found.golds, answers))
    return float(sklearn_metrics().f1_score(wanted, given, zero_division=0))


def question_exact_match(found: Scored) -> float:
    """The share of questions all of whose answers are told right; a question is the first text of a pair."""
    is_right: dict[str, bool] = defaultdict(lambda: True)
    for record, answer, gold in zip(found.records, found.answers, found.golds, strict=True):
        is_right[record.texts[0]] &= answer["label"] == gold
    return sum(is_right.values()) / max(len(is_right), 1)


# --- rows that are no pairs yet


def _inner(row: Row, column: str) -> Any:
    """A column that holds an object."""
    found = cell(row, column)
    if not isinstance(found, dict):
        raise BadRow("the column must hold an object", f"holds {found!r:.60}", column)
    return found


def flatten_multirc(row: Row) -> Iterator[Row]:
    """A pair of each answer: the question with its passage, and the answer. (A pair too long for a row loses the end of
    its longer text, so the question stands first.)"""
    if isinstance(row.get("passage"), dict):  # the archive's: all questions of a passage
        for asked in cell(row["passage"], "questions"):
            for answer in cell(asked, "answers"):
                yield _multirc(cell(row["passage"], "text"), cell(asked, "question"), cell(answer, "text"), answer)
    else:
        yield _multirc(cell(row, "paragraph"), cell(row, "question"), cell(row, "answer"), row)


def _multirc(passage: str, question: str, answer: str, labelled: Row) -> Row:
    return {"text_a": f"{question} {passage}", "text_b": answer, "label": _truth(cell(labelled, "label"))}


def flatten_wic(row: Row) -> Iterator[Row]:
    """The two sentences, the word before the first."""
    text = f"{cell(row, 'word')}: {cell(row, 'sentence1')}"
    yield {"text_a": text, "text_b": cell(row, "sentence2"), "label": _truth(cell(row, "label"))}


def flatten_wsc(row: Row) -> Iterator[Row]:
    """The text with the pronoun between asterisks, and the noun that it may stand for."""
    marks = _inner(row, "target") if "target" in row else row
    words, at, pronoun = cell(row, "text").split(" "), cell(marks, "span2_index"), cell(marks, "span2_text")
    size = len(pronoun.split(" "))
    marked = [*words[:at], f"*{' '.join(words[at : at + size])}*", *words[at + size :]]
    yield {"text_a": " ".join(marked), "text_b": cell(marks, "span1_text"), "label": _truth(cell(row, "label"))}


_TRUTH = {0: "0", 1: "1", "0": "0", "1": "1", "false": "0", "true": "1", "False": "0", "True": "1"}


def _truth(label: Any) -> str:
    """0 and 1, false and true as one pair of names."""
    if isinstance(label, str | int | float) and label in _TRUTH:
        return _TRUTH[label]
    raise BadRow("a label is 0 or 1, false or true", f"holds {label!r:.60}", "label")


# --- GLUE: learning rates, texts an update and epochs are MosaicBERT-base's (Portes et al., arXiv 2312.17482)

_ACCURACY = {"accuracy": of("accuracy")}
_PAIR = {"accuracy": of("accuracy"), "f1": positive_f1}


def _glue(name: str, rate: float, texts: int, epochs: int, metrics, *columns: ColumnNames, folder: str, **fields):
    return SuiteTask(
        name, fields.pop("objective", "classification"), metrics, rate, texts, epochs, columns, f"tfds:glue/{name}",
        f"hf:nyu-mll/glue:{name}", (folder,), **fields,
    )  # fmt: skip


GLUE = (
    _glue(
        "mnli", 5e-5, 48, 3, _ACCURACY, ColumnNames("premise", "hypothesis", "label"),
        ColumnNames("sentence1", "sentence2", "gold_label"), folder="MNLI",
        files={
            "train": ("train",), "validation_matched": ("validation_matched", "dev_matched"),
            "validation_mismatched": ("validation_mismatched", "dev_mismatched"),
        },
        reported={"_matched": "validation_matched", "_mismatched": "validation_mismatched"},
    ),
    _glue(
        "qqp", 3e-5, 16, 5, _PAIR, ColumnNames("question1", "question2", "label"),
        ColumnNames("question1", "question2", "is_duplicate"), folder="QQP", skip_bad_rows=True,  # some lines are torn
    ),
    _glue("qnli", 1e-5, 16, 10, _ACCURACY, ColumnNames("question", "sentence", "label"), folder="QNLI"),
    _glue("sst2", 3e-5, 16, 3, _ACCURACY, ColumnNames("sentence", None, "label"), folder="SST-2"),
    _glue(
        "cola", 5e-5, 32, 10, {"matthews": of("matthews")}, ColumnNames("sentence", None, "label"),
        ColumnNames("4", None, "2"), folder="CoLA",
    ),
    _glue(
        "mrpc", 8e-5, 32, 10, _PAIR, ColumnNames("sentence1", "sentence2", "label"),
        ColumnNames("#1 String", "#2 String", "Quality"), folder="MRPC", start="mnli",
    ),
    _glue(
        "stsb", 3e-5, 32, 10, {"pearson": of("pearson"), "spearman": of("spearman")},
        ColumnNames("sentence1", "sentence2", "label"), ColumnNames("sentence1", "sentence2", "score"), folder="STS-B",
        start="mnli", objective="regression",
    ),
    _glue("rte", 1e-5, 16, 3, _ACCURACY, ColumnNames("sentence1", "sentence2", "label"), folder="RTE", start="mnli"),
)  # fmt: skip


# --- SuperGLUE: RoBERTa's for GLUE (Liu et al., arXiv 1907.11692, table 10), since no encoder's own are published


def _superglue(name: str, folder: str, metrics, *columns: ColumnNames, **fields):
    return SuiteTask(
        name, fields.pop("objective", "classification"), metrics, 1e-5, 32, 10, columns, f"tfds:super_glue/{name}",
        f"hf:aps/super_glue:{name}", (folder,), row_length=256, **fields,
    )  # fmt: skip


SUPERGLUE = (
    _superglue("boolq", "BoolQ", _ACCURACY, ColumnNames("question", "passage", "label")),
    _superglue(
        "cb", "CB", {"accuracy": of("accuracy"), "macro_f1": of("macro_f1")},
        ColumnNames("premise", "hypothesis", "label"),
    ),
    _superglue("copa", "COPA", _ACCURACY, objective="multiple_choice"),
    _superglue(
        "multirc", "MultiRC", {"answer_f1": positive_f1, "exact_match": question_exact_match}, _FLAT,
        flatten=flatten_multirc,
    ),
    _superglue("rte", "RTE", _ACCURACY, ColumnNames("premise", "hypothesis", "label")),
    _superglue("wic", "WiC", _ACCURACY, _FLAT, flatten=flatten_wic),
    _superglue("wsc", "WSC", _ACCURACY, _FLAT, flatten=flatten_wsc),
    _superglue(
        "record", "ReCoRD", {}, objective="multiple_choice",
        not_served="its choices are a passage's entities, each with the whole passage, which no row holds together",
    ),
)  # fmt: skip


# --- entities, by seqeval on the test split; and answers, by SQuAD's rules on the validation split

_NER_COLUMNS = tuple(ColumnNames("tokens", None, tags) for tags in ("ner_tags", "tags", "ner"))


def _ner(name: str, tfds: str | None, hf: str, *folders: str, files=None):
    files = {split: (*names, *(files or {}).get(split, ())) for split, names in _FILES.items()}
    metrics = {name: of(name) for name in ("f1", "precision", "recall")}
    return SuiteTask(
        name, "token_classification", metrics, 5e-5, 32, 3, _NER_COLUMNS, tfds, hf, folders, files, {"": "test"}, "f1",
    )  # fmt: skip


NER = (
    _ner(
        "conll2003", "tfds:conll2003", "hf:tomaarsen/conll2003", "CoNLL2003", "conll03",
        files={"train": ("eng.train",), "validation": ("eng.testa", "testa"), "test": ("eng.testb", "testb")},
    ),
    _ner(
        "wnut_17", None, "hf:flaitenberger/wnut_17", "wnut17", "WNUT17",
        files={
            "train": ("wnut17train",), "validation": ("emerging.dev",),
            "test": ("emerging.test.annotated", "emerging.test"),
        },
    ),
    _ner("wikiann_en", "tfds:wikiann/en", "hf:unimelb-nlp/wikiann:en", "wikiann"),
)  # fmt: skip


def _qa(name: str, version: str, texts: int, epochs: int, **fields):
    files = {"train": (f"train-{version}", "train"), "validation": (f"dev-{version}", *_FILES["validation"])}
    return SuiteTask(
        name, "question_answering", {"f1": of("f1"), "exact_match": of("exact_match")}, 5e-5, texts, epochs,
        tfds=f"tfds:squad/{version}", hf=f"hf:rajpurkar/{name}", folders=("SQuAD", version), files=files, score="f1",
        row_length=384, **fields,
    )  # fmt: skip


# Devlin et al., arXiv 1810.04805, sections 4.2 and 4.3.
QA = (_qa("squad", "v1.1", 32, 3), _qa("squad_v2", "v2.0", 48, 2))

SUITES: dict[str, tuple[SuiteTask, ...]] = {"glue": GLUE, "superglue": SUPERGLUE, "ner": NER, "qa": QA}
