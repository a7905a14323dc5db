"""Columns: guessed by their names, said, and refused where several could be meant; classes, numbers and named sets."""

import math

import pytest

from flax_encoder.config import DataConfig
from flax_encoder.data.sources import named
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.labels import LabelCheck
from flax_encoder.data.sources.opening import open_source
from flax_encoder.data.sources.records import DataError
from tests.data.reading import (
    ANSWERS,
    CHOICES,
    CLASS,
    NUMBER,
    PAIR,
    TAGS,
    TEXT,
    jsonl,
    open_named,
    parquet,
    read,
    texts,
    values,
)

CLASSES = Columns("classes")


def first(tmp_path, row, columns, **options):
    """The record of one row in a file of both kinds, and what the user is told."""
    found = []
    for path in (jsonl(tmp_path / "a.jsonl", row), parquet(tmp_path / "a.parquet", row)):
        source = open_named(DataConfig(source=str(path), **options), tmp_path / "cache", columns)
        (record,) = source.records("train")
        found.append((record._replace(where=""), [note.replace(str(path), "it") for note in source.notes]))
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize(
    ("row", "columns", "texts", "value"),
    [
        ({"sentence": "a", "label": 1, "idx": 7}, CLASS, ("a",), "1"),
        ({"sentence1": "a", "sentence2": "b", "label": 0, "idx": 7}, CLASS, ("a", "b"), "0"),
        ({"question1": "a", "question2": "b", "is_duplicate": True}, CLASS, ("a", "b"), "True"),
        ({"premise": "a", "hypothesis": "b", "label": "x"}, CLASS, ("a", "b"), "x"),
        ({"question": "a", "sentence": "b", "label": 1}, CLASS, ("a", "b"), "1"),
        ({"question": "a", "passage": "b", "idx": "0", "label": 1}, CLASS, ("a", "b"), "1"),
        ({"text": "a", "label-coarse": 4}, CLASS, ("a",), "4"),
        ({"text": "a", "title": "t", "Sentiment": "neg"}, CLASS, ("a",), "neg"),
        ({"Review Text": "a", "Title": "t", "label": 1}, CLASS, ("a",), "1"),
        ({"content": "a", "label": "5"}, CLASS, ("a",), "5"),
        ({"anything": "a", "label": "pos"}, CLASS, ("a",), "pos"),
        ({"text_a": "a", "text_b": "b", "score": 2.5, "genre": "x"}, NUMBER, ("a", "b"), 2.5),
        ({"sentence_A": "a", "sentence_B": "b", "relatedness_score": 3}, NUMBER, ("a", "b"), 3.0),
        ({"text": "a", "stars": 4, "label": "x"}, NUMBER, ("a",), 4.0),
        ({"text": "a", "labels": ["x", "y"]}, CLASSES, ("a",), ("x", "y")),
        ({"anchor": "a", "positive": "b"}, PAIR, ("a", "b"), None),
        ({"tokens": ["a", "b"], "ner_tags": ["O", "X"]}, TEXT, ("a b",), None),
    ],
)
def test_columns_are_guessed_by_the_names_that_data_sets_use_and_said(tmp_path, row, columns, texts, value):
    record, notes = first(tmp_path, row, columns)
    assert (record.texts, record.value) == (texts, value)
    (note,) = notes
    assert note.startswith("it: columns taken by their names: ") and "--data.text-column" in note


def test_nothing_is_said_of_text_and_label(tmp_path):
    assert first(tmp_path, {"text": " a ", "label": 1}, CLASS)[1] == []
    assert first(tmp_path, {"text": " a "}, TEXT)[0].texts == (" a ",)


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"review": "a", "comment": "b", "label": 1}, CLASS, r"which column is the text\? .*review, comment could be"),
        ({"title": "a", "subject": "b", "label": 1}, CLASS, r"the text\? .* has title, subject, label\. "),
        ({"text": "a", "topic": "b", "intent": "c"}, CLASS, r"the label\? .*topic, intent could be.*--data\.label"),
        ({"text": "a", "length": 3}, CLASS, r"no column 'label' in .* text, length\..*--data\.label-column"),
        ({"text": "a", "sentence1": "a", "sentence2": "b", "label": 1}, CLASS, r"sentence1 with sentence2, or text c"),
        ({"sentence1": "a", "sentence2": "b"}, TEXT, r"which column is the text"),
        ({"question": "a", "sentence": "b"}, TEXT, r"which column is the text"),
        ({"text": "a", "title": "b"}, PAIR, r"no names belong together\. Name two with --data\.text-column and"),
        ({"text": "a", "score": 1, "stars": 2}, NUMBER, r"score, stars could be"),
        ({"tokens": ["a"], "ner_tags": [1], "pos_tags": [2]}, TAGS, r"ner_tags, pos_tags could be"),
        ({"word": "a", "pos": "b"}, TAGS, r"that is called \.conll: .* has word, pos\. Name a column"),
    ],
)
def test_what_is_not_clear_is_refused_with_the_columns_and_the_option(tmp_path, row, columns, message):
    for path in (jsonl(tmp_path / "a.jsonl", row), parquet(tmp_path / "a.parquet", row)):
        with pytest.raises(DataError, match=message):
            read(path, tmp_path, columns)


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"text": "a", "score": "n/a"}, NUMBER, r"must hold numbers: column 'score' of .* holds 'n/a'"),
        ({"text": "a", "labels": "x"}, CLASSES, r"a list, or columns of 0 and 1 .*: column 'labels' of .* holds 'x'"),
        ({"tokens": ["a"], "tags": "O"}, TAGS, r"every token has one tag: .* has 1 in 'tokens' and no in 'tags'"),
        ({"text": "a", "entities": "x"}, TAGS, r"entities must hold lists: column 'entities' of .* holds 'x'"),
        ({"text": "a", "label": ["x"]}, CLASS, r"must hold strings or integers: column 'label' of .* holds \['x'\]"),
    ],
)
def test_a_column_that_is_called_so_and_holds_something_else_is_said_by_its_row(tmp_path, row, columns, message):
    for path in (jsonl(tmp_path / "a.jsonl", row), parquet(tmp_path / "a.parquet", row)):
        with pytest.raises(DataError, match=message):
            read(path, tmp_path, columns)


def test_a_pair_is_taken_only_where_it_is_known_or_named(tmp_path):
    row = {"text": "a", "title": "b", "label": 1}
    assert first(tmp_path, row, CLASS)[0].texts == ("a",)
    assert first(tmp_path, row, CLASS, text_column="title")[0].texts == ("b",)
    options = {"text_column": "title", "text_pair_column": "text"}
    assert first(tmp_path, row, CLASS, **options)[0].texts == ("b", "a")
    with pytest.raises(DataError, match=r"leave out --data\.text-pair-column text"):
        first(tmp_path, row, TEXT, **options)
    with pytest.raises(DataError, match=r"no column 'x' in .*--data\.text-pair-column"):
        first(tmp_path, row, CLASS, text_column="text", text_pair_column="x")
    with pytest.raises(DataError, match=r"give --data\.text-column with --data\.text-pair-column x"):
        first(tmp_path, row, CLASS, text_pair_column="x")


def test_several_columns_of_flags_are_labels_of_which_a_document_may_have_several(tmp_path):
    row = {"text": "a", "toxic": 1, "kind": 0, "long": 1}
    record, _ = first(tmp_path, row, CLASSES, label_column=("toxic", "kind", "long"))
    assert record.value == ("toxic", "long")
    (tmp_path / "a.csv").write_text("text,x,y\na,1,0\nb,TRUE,1\nc,0,0\n")
    config = DataConfig(source=str(tmp_path / "a.csv"), label_column=("x", "y"))
    source = open_named(config, tmp_path, CLASSES)
    assert [r.value for r in source.records("train")] == [("x",), ("x", "y"), ()] and source.label_names == ["x", "y"]
    (tmp_path / "a.csv").write_text("text,x,y\na,1,2\n")
    with pytest.raises(DataError, match=r"must hold 0 or 1: column 'y' of .*a\.csv, row 1 \(line 2\) holds '2'"):
        read(tmp_path / "a.csv", tmp_path, CLASSES, label_column=("x", "y"))
    with pytest.raises(DataError, match="several label columns are for documents with several labels"):
        first(tmp_path, row, CLASS, label_column=("toxic", "kind"))


def test_a_string_of_several_labels_is_refused_not_split(tmp_path):
    with pytest.raises(DataError, match=r"are a list, or columns of 0 and 1 .* holds 'x\|y'"):
        first(tmp_path, {"text": "a", "labels": "x|y"}, CLASSES, label_column="labels")


@pytest.mark.parametrize("value", ["x", None, True, "1_0", "", math.nan, math.inf, 1e39, [1]])
def test_a_number_that_is_none_is_an_error_that_names_its_row(tmp_path, value):
    path = jsonl(tmp_path / "a.jsonl", {"text": "a", "score": 1}, {"text": "b", "score": value})
    with pytest.raises(DataError, match=r"numbers? must .*: column 'score' of .*a\.jsonl, line 2 holds "):
        read(path, tmp_path, NUMBER, label_column="score")


def test_numbers_of_a_table_of_fields_are_read_as_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na, 1.5\nb,-2e3\n")
    assert [r.value for r in read(tmp_path / "a.csv", tmp_path, NUMBER)] == [1.5, -2000.0]


@pytest.mark.parametrize("value", [None, "", " ", math.nan])
def test_a_document_without_a_label_is_an_error_that_names_its_row(tmp_path, value):
    path = jsonl(tmp_path / "a.jsonl", {"text": "a", "label": "x"}, {"text": "b", "label": value})
    with pytest.raises(DataError, match=r"must have a label: column 'label' of .*a\.jsonl, line 2 holds "):
        read(path, tmp_path, CLASS)


def test_names_of_integers_can_be_given(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,1\nb,0\nc,yes\n")
    for path in (tmp_path / "a.csv", jsonl(tmp_path / "a.jsonl", *(
        {"text": t, "label": v} for t, v in (("a", 1), ("b", 0), ("c", "yes"))
    ))):  # fmt: skip
        config = DataConfig(source=str(path), label_names=("no", "yes"))
        source = open_named(config, tmp_path, CLASS)
        assert [r.value for r in source.records("train")] == ["yes", "no", "yes"]
        assert source.label_names == ["no", "yes"]
        with pytest.raises(DataError, match=r"line [12]"):
            read(path, tmp_path, CLASS, label_names=("no",))
    (tmp_path / "b.csv").write_text("text,label\na,1\n")
    assert values(read(tmp_path / "b.csv", tmp_path, CLASS, label_names=("1", "2"))) == [("a", "1")]


def test_integers_that_became_floats_beside_a_null_are_integers(tmp_path):
    assert first(tmp_path, {"text": "a", "label": 2.0}, CLASS)[0].value == "2"


def test_a_column_that_the_first_row_lacks_is_found_and_the_row_named(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"id": 1}, {"text": "a"})
    with pytest.raises(DataError, match=r"must have the column 'text': .*a\.jsonl, line 1 has id"):
        read(path, tmp_path)
    assert texts(read(path, tmp_path, skip_bad_rows=True)) == ["a"]


def test_labels_that_are_likely_meant_as_one_are_told_with_their_records():
    check = LabelCheck()
    for i, name in enumerate(["pos", "pos ", "neg", "POS", "neg", "1", "True", "0"]):
        check.add(name, f"a.csv, row {i + 1}")
    assert check.problems() == [
        "labels that differ only by blanks or case are different classes: 'pos' (a.csv, row 1) and 'pos ' (a.csv, row "
        "2) and 'POS' (a.csv, row 4).",
        "labels that mean the same are different classes: 'True' (a.csv, row 7) and '1' (a.csv, row 6).",
    ]
    check = LabelCheck()
    for name in ["0", "1", "2", "a b", "ab", "true story"]:
        check.add(name, "")
    assert check.problems() == []


# --- sets by name


@pytest.fixture(scope="module")
def toy_set(tmp_path_factory):
    from tests.data import toy_sets  # noqa: F401 - registers it

    return tmp_path_factory.mktemp("cache")


def test_a_tensorflow_data_set_gives_values_of_every_kind(toy_set):
    def opened(columns, **options):
        return open_named(DataConfig(source="tfds:toy_rows", **options), toy_set, columns)

    pairs = {"text_column": "sentence1"}
    source = opened(CLASS, text_pair_column="sentence2", **pairs)
    assert [(r.texts, r.value) for r in source.records("train")] == [
        ((f"train {i}", "née"), ["no", "yes"][i % 2]) for i in range(3)
    ]
    assert source.label_names == ["no", "yes"]
    assert [p.split for p in source.parts] == ["train", "validation"]
    assert source.notes[-1] == "tfds:toy_rows: evaluates on validation; leaves out test (has no labels)."
    scores = [r.value for r in opened(NUMBER, label_column="score", **pairs).records("test")]
    assert scores == [0.0, 0.5, 1.0]
    tagged = opened(TAGS)
    assert tagged.label_names == ["O", "B-X", "I-X"]
    assert list(tagged.records("train"))[1][:2] == (("a née",), ((0, 1, "B-X"), (2, 5, "I-X")))
    assert [r.value for r in opened(ANSWERS).records("validation")] == [(), ((0, "née"),), ((0, "née"),)]
    (record, *_) = opened(CLASS, **pairs).records("validation")
    assert record.where == "tfds:toy_rows, validation[0]"


SPLITS = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")


def labelled(*splits):
    return {split: [0, 1] for split in splits}


@pytest.fixture
def hub_set(monkeypatch, tmp_path):
    """A function that makes a set of the Hub: the labels of each of its splits."""
    datasets = pytest.importorskip("datasets", reason="needs the extra flax-encoder[hf]")
    features = datasets.Features(
        {
            "premise": datasets.Value("string"), "hypothesis": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["yes", "no"]),
        }
    )  # fmt: skip

    def make(labels_of_splits, columns=CLASS, **options):
        loaded = datasets.DatasetDict({
            split: datasets.Dataset.from_dict(
                {"premise": [f"{split} {i}" for i in range(len(labels))], "hypothesis": ["b"] * len(labels)}
                | {"label": labels},
                features,
            )
            for split, labels in labels_of_splits.items()
        })  # fmt: skip
        monkeypatch.setattr(named, "_load_hf", lambda name, cache_dir: loaded)
        return open_named(DataConfig(source="hf:toy", **options), tmp_path, columns)

    return make


def splits_read(source):
    roles = dict.fromkeys(part.split for part in source.parts)
    return {role: next(source.records(role)).texts[0].split()[0] for role in roles}


@pytest.mark.parametrize(
    ("labels", "options", "splits"),
    [
        (labelled(*SPLITS[:3]) | {"test_matched": [-1], "test_mismatched": [-1, -1]}, {},
         {"train": "train", "validation": "validation_matched"}),
        (labelled(*SPLITS[:3]), {"validation_split": "validation_mismatched"},
         {"train": "train", "validation": "validation_mismatched"}),
        (labelled("train", "validation", "test"), {}, {"train": "train", "validation": "validation", "test": "test"}),
        (labelled("train", "test"), {}, {"train": "train", "test": "test"}),
        (labelled("train", "validation"), {}, {"train": "train", "validation": "validation"}),
        ({"train": [0], "validation": [1], "test": [-1]}, {}, {"train": "train", "validation": "validation"}),
        ({"train": [0], "test": [-1]}, {}, {"train": "train"}),
    ],
)  # fmt: skip
def test_a_set_is_evaluated_on_its_validation_and_its_labelled_test_split(hub_set, labels, options, splits):
    source = hub_set(labels, **options)
    assert splits_read(source) == splits and source.label_names == ["yes", "no"]
    assert [r.value for r in source.records("train")] == [["yes", "no"][i] for i in labels["train"]]
    left_out = set(labels) - set(splits.values())
    assert all(any(split in note for note in source.notes) for split in left_out)


def test_a_record_without_a_label_in_a_split_with_some_is_an_error_that_names_it(hub_set):
    source = hub_set({"train": [0, 1], "test": [0, -1]})
    with pytest.raises(DataError, match=r"must have a label: column 'label' of hf:toy, test\[1\] holds -1"):
        list(source.records("test"))
    source = hub_set({"train": [0, 1], "test": [0, -1]}, skip_bad_rows=True)
    assert len(list(source.records("test"))) == 1


def test_the_validation_split_is_one_that_can_be_evaluated_on(hub_set, tmp_path):
    for asked in ("gone", "train", "test"):
        with pytest.raises(DataError, match=rf"got {asked}, and of hf:toy these are validation\."):
            hub_set({"train": [0], "validation": [1], "test": [-1]}, validation_split=asked)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"needs a tfds: or hf: source.*--data\.validation\."):
        read(tmp_path / "a.txt", tmp_path, validation_split="validation")
    other = DataConfig(source="hf:toy", validation_split="validation", test=str(tmp_path / "a.txt"))
    assert texts(open_source(other.test, other, TEXT, tmp_path).records("train")) == ["a"]
    with pytest.raises(DataError, match="must have a split named train: it has test"):
        hub_set({"test": [0]})


# --- choices

SWAG = {"sent1": "A.", "sent2": "She", "ending0": "w", "ending1": "x", "ending2": "y", "ending3": "z", "label": 3}


@pytest.mark.parametrize(
    ("row", "texts", "value"),
    [
        (SWAG, ("A.", "She w", "She x", "She y", "She z"), "3"),
        ({"premise": "It fell.", "question": "cause", "choice1": "w", "choice2": "x", "label": 1},
         ("It fell. What was the cause of this?", "w", "x"), "1"),
        ({"premise": "It fell.", "question": "effect", "choice1": "w", "choice2": "x", "label": "0"},
         ("It fell. What happened as a result?", "w", "x"), "0"),
        ({"context": "C", "choices": ["a", "b", "c"], "label": 2}, ("C", "a", "b", "c"), "2"),
        ({"ctx": "C", "endings": ["a", "b"], "label": "1"}, ("C", "a", "b"), "1"),
    ],
)  # fmt: skip
def test_a_context_and_its_choices_are_read_from_the_layouts_of_benchmarks(tmp_path, row, texts, value):
    record, _ = first(tmp_path, row, CHOICES)
    assert record[:2] == (texts, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 2}, r"the right one of 2 choices is a number from 0: column 'label' of .* holds 2"),
        ({"label": -1}, "holds -1"), ({"label": "A"}, "holds 'A'"), ({"label": None}, "holds None"),
        ({"choices": ["a"]}, r"a context has 2 to 26 choices: .* line 1 has 1"),
        ({"choices": "a"}, r"column 'choices'"),
    ],
)  # fmt: skip
def test_choices_that_are_none_are_errors_that_name_their_row(tmp_path, change, message):
    path = jsonl(tmp_path / "a.jsonl", {"context": "C", "choices": ["a", "b"], "label": 1} | change)
    with pytest.raises(DataError, match=message):
        read(path, tmp_path, CHOICES)
