"""Tags of words and answers in passages: every offset is that of the characters it is about."""

import itertools
import json
import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_encoder.config import DataConfig
from flax_encoder.data.sources.records import DataError
from tests.data.reading import ANSWERS, CLASS, TAGS, TEXT, jsonl, open_named, parquet, read, texts

few = settings(max_examples=30, deadline=None, derandomize=True)
WORD = st.text(st.characters(exclude_categories=["Cs", "Zs", "Zl", "Zp", "Cc"]), min_size=1, max_size=5)
WORDS = st.lists(WORD.filter(lambda w: w[0] not in "#\ufeff" and w.split() == [w]), min_size=1)
TEXTS = st.text(st.sampled_from("ab1 é\u0301\u0928\u093f_-.\n\U0001f600"), max_size=20)


def tagged(text, value):
    return [(text[start:end], tag) for start, end, tag in value]


@given(sentences=st.lists(WORDS, min_size=1, max_size=4), separator=st.sampled_from(["\t", " ", " x "]))
@few
def test_words_and_tags_are_those_of_the_file_in_every_format(sentences, separator):
    rows = [(words, [f"B-{len(w)}" if i % 2 else "O" for i, w in enumerate(words)]) for words in sentences]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        named = [{"tokens": words, "tags": tags} for words, tags in rows]
        lines = "\n\n".join("\n".join(f"{w}{separator}{t}" for w, t in zip(*row, strict=True)) for row in rows)
        for name in ("a.conll", "a.bio"):
            (folder / name).write_text(lines + "\n", "utf-8")
        for path in (jsonl(folder / "a.jsonl", *named), parquet(folder / "a.parquet", *named), folder / "a.conll",
                     folder / "a.bio"):  # fmt: skip
            records = read(path, folder, TAGS)
            assert [tagged(r.texts[0], r.value) for r in records] == [list(zip(*row, strict=True)) for row in rows]
            assert texts(records) == texts(read(path, folder)) == [" ".join(words) for words, _ in rows]


@st.composite
def texts_with_entities(draw):
    text = draw(TEXTS)
    between = [i for i in range(len(text) + 1) if not text[i : i + 1] or unicodedata.category(text[i])[0] != "M"]
    edges = sorted(draw(st.lists(st.sampled_from([0, *between]), unique=True, max_size=6)))
    spans = [(a, b, "XY"[i % 2]) for i, (a, b) in enumerate(itertools.pairwise(edges))]
    return text, [span for span in spans if text[span[0] : span[1]].strip() and draw(st.booleans())]


@given(texts_with_entities())
@few
def test_words_cover_a_text_and_entities_begin_and_end_with_them(example):
    text, entities = example
    with tempfile.TemporaryDirectory() as folder:
        objects = [{"start": a, "end": b, "label": label} for a, b, label in entities]
        rows = [{"text": text, "entities": [*map(list, entities)]}, {"text": text, "spans": objects[::-1]}]
        lists = {name: [entity[i] for entity in entities] for i, name in enumerate(("start", "end", "label"))}
        rows.append({"text": text, "entities": lists})
        records = [read(jsonl(Path(folder) / f"{i}.jsonl", row), Path(folder), TAGS)[0] for i, row in enumerate(rows)]
    record = records[0]
    assert records == [record._replace(where=other.where) for other in records] and record.texts == (text,)
    covered = [i for start, end, _ in record.value for i in range(start, end)]
    assert covered == [i for i, sign in enumerate(text) if not sign.isspace()]
    found = []
    for start, end, tag in record.value:
        if tag[0] == "B":
            found.append([start, end, tag[2:]])
        elif tag[0] == "I":
            assert found[-1][2] == tag[2:]
            found[-1][1] = end
    for (start, end, label), (a, b, name) in zip(found, entities, strict=True):
        assert (text[start:end], label) == (text[a:b].strip(), name) and a <= start < end <= b


def test_a_word_is_a_run_of_letters_and_digits_with_its_marks_or_one_other_sign(tmp_path):
    text = "it's 3.5 cafe\u0301s \u0939\u093f\u0928\u094d\u0926\u0940 a_b"
    path = jsonl(tmp_path / "a.jsonl", {"text": text, "entities": [[0, 1, "X"]]})
    (record,) = read(path, tmp_path, TAGS)
    assert [text[a:b] for a, b, _ in record.value] == [
        "i", "t", "'", "s", "3", ".", "5", "cafe\u0301s", "\u0939\u093f\u0928\u094d\u0926\u0940", "a", "_", "b"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("entities", "message"),
    [
        ([[0, 2, "A"], [1, 3, "B"]], r"entities do not overlap: column 'entities' of .*line 2 has 'B' from 1"),
        ([[0, 9, "A"]], r"within the text of 4 characters.* line 2 has 'A' from 0 to 9"),
        ([[-1, 2, "A"]], "from -1 to 2"), ([[2, 2, "A"]], "from 2 to 2"), ([[2, 1, "A"]], "from 2 to 1"),
        ([[3, 4, "A"]], "from 3 to 4"), ([[0, 1]], r"an entity is \[start, end, label\]"), ("A", "must hold lists"),
        ([{"start": 0, "end": 1}], "an entity is"), ([[0, 1.5, "A"]], "an entity is"),
        ({"start": [0], "end": [1, 2], "label": ["A"]}, "must be of one length"),
    ],
)  # fmt: skip
def test_entities_that_cannot_be_are_errors_that_name_their_row(tmp_path, entities, message):
    path = jsonl(tmp_path / "a.jsonl", {"text": "abc ", "entities": []}, {"text": "abc ", "entities": entities})
    with pytest.raises(DataError, match=message):
        read(path, tmp_path, TAGS, label_column="entities")
    assert len(read(path, tmp_path, TAGS, label_column="entities", skip_bad_rows=True)) == 1


@pytest.mark.parametrize("entity", [[0, 1, "A"], [1, 3, "A"], [3, 4, "A"], [6, 7, "A"], [8, 9, "A"]])
def test_an_entity_that_cuts_a_character_of_several_codes_names_its_row(tmp_path, entity):
    text = "e\u0301 \u0928\u093f \U0001f469\u200d\U0001f467"  # two letters with marks, and a family of two joined
    rows = ({"text": text, "entities": [own]} for own in ([0, 2, "A"], entity))
    with pytest.raises(DataError, match=r"between characters.* of .*line 2 has 'A' from"):
        read(jsonl(tmp_path / "a.jsonl", *rows), tmp_path, TAGS)


@pytest.mark.parametrize("row", [
    {"tokens": ["a", "b"], "tags": ["O"]}, {"tokens": ["a"], "tags": [None]}, {"tokens": ["a", 3], "tags": ["O", "O"]},
    {"tokens": "a", "tags": ["O"]}, {"tokens": ["a"], "tags": "O"}, {"tokens": ["a"]},
])  # fmt: skip
def test_tokens_and_tags_that_do_not_match_are_errors_that_name_their_row(tmp_path, row):
    path = jsonl(tmp_path / "a.jsonl", {"tokens": ["a"], "tags": ["O"]}, row)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 "):
        read(path, tmp_path, TAGS)


CONLL = "-DOCSTART- -X- -X- O\n\n# id 7\nEU NNP B-NP B-ORG\n# NN O O\n\n\nno DT B-NP O\n"
CONLLU = (
    "# text = vámonos ya\n1-2\tvámonos\t_\t_\t_\t_\t_\t_\t_\t_\n1\tvamos\tir\tVERB\t_\t_\t0\troot\t_\t_\n"
    "2\tnos\tyo\tPRON\t_\t_\t1\tobj\t_\t_\n2.1\tx\t_\tX\t_\t_\t_\t_\t_\t_\n3\tde facto\tya\tADV\t_\t_\t1\tadv\t_\t_\n\n"
)


def test_sentences_of_tagged_words_are_read_as_their_formats_write_them(tmp_path):
    (tmp_path / "a.conll").write_text(CONLL)
    (tmp_path / "a.conllu").write_text(CONLLU)
    records = read(tmp_path / "a.conll", tmp_path, TAGS)
    assert [tagged(r.texts[0], r.value) for r in records] == [[("EU", "B-ORG"), ("#", "O")], [("no", "O")]]
    assert [r.where for r in records] == [f"{tmp_path / 'a.conll'}, line {n}" for n in (4, 8)]
    for column in ("2", "-3"):
        tags = [t for _, _, t in read(tmp_path / "a.conll", tmp_path, TAGS, label_column=column)[0].value]
        assert tags == ["NNP", "NN"]
    (record,) = read(tmp_path / "a.conllu", tmp_path, TAGS)
    assert tagged(record.texts[0], record.value) == [("vamos", "VERB"), ("nos", "PRON"), ("de facto", "ADV")]
    with pytest.raises(DataError, match=r"has 4, got --data\.label-column 5"):
        read(tmp_path / "a.conll", tmp_path, TAGS, label_column="5")
    with pytest.raises(DataError, match="numbers from 1, or from -1"):
        read(tmp_path / "a.conll", tmp_path, TAGS, label_column="tag")
    with pytest.raises(DataError, match="has no other labels"):
        read(tmp_path / "a.conll", tmp_path, CLASS)
    (tmp_path / "b.conll").write_text("a O\nb\n\nc O\n")
    with pytest.raises(DataError, match=r"in 2 columns.*b\.conll, line 2 has 1"):
        read(tmp_path / "b.conll", tmp_path, TAGS)
    assert texts(read(tmp_path / "b.conll", tmp_path, TAGS, skip_bad_rows=True)) == ["c"]


def squad(*questions, context=" The cat, née Tom, sat. "):
    asked = [{"id": str(i), "question": "who?", "answers": a, "is_impossible": not a} for i, a in enumerate(questions)]
    return {"version": "v2.0", "data": [{"title": "T", "paragraphs": [{"context": context, "qas": asked}]}]}


@given(context=TEXTS.filter(len), data=st.data())
@few
def test_answers_are_where_they_stand_in_the_passage_in_every_layout(context, data):
    starts = data.draw(st.lists(st.integers(0, len(context) - 1), max_size=3))
    answers = [(s, context[s : data.draw(st.integers(s + 1, len(context)))]) for s in starts]
    objects = [{"text": text, "answer_start": start} for start, text in answers]
    lists = {"text": [t for _, t in answers], "answer_start": [s for s, _ in answers]}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "a.json").write_text(json.dumps(squad(objects, context=context)), "utf-8")
        (folder / "b.json").write_text(json.dumps(squad(objects, context=context), indent=2), "utf-8")
        flat = {"id": "0", "title": "T", "question": "who?", "context": context}
        paths = [folder / "a.json", folder / "b.json", jsonl(folder / "a.jsonl", flat | {"answers": lists})]
        paths.append(parquet(folder / "a.parquet", flat | {"answers": lists}))
        paths.append(jsonl(folder / "b.jsonl", flat | {"answers": objects}))
        for path in paths:
            (record,) = read(path, folder, ANSWERS)
            assert record.texts == ("who?", context) and record.value == tuple(answers) and record.id == "0"
            assert all(record.texts[1][start : start + len(text)] == text for start, text in record.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"text": "cat", "answer_start": 4}, r"where it is said to start: column 'answers' of .*item 2 has 'cat' at 4"),
        ({"text": "cat", "answer_start": -20}, "at -20"), ({"text": "cat", "answer_start": 99}, "at 99"),
        ({"text": "", "answer_start": 1}, "has '' at 1"), ({"text": "cat"}, "holds None"), ("cat", "holds 'cat'"),
        ({"text": "cat", "answer_start": "5"}, "holds '5'"),
    ],
)  # fmt: skip
def test_an_answer_that_is_not_where_it_is_said_to_be_is_an_error_that_names_its_row(tmp_path, answer, message):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(squad([], [answer], [{"text": "née", "answer_start": 10}])))
    with pytest.raises(DataError, match=message):
        read(path, tmp_path, ANSWERS)
    (part,) = open_named(DataConfig(source=str(path), skip_bad_rows=True), tmp_path, ANSWERS).parts
    assert [(r.id, r.value) for r in part.read()] == [("0", ()), ("2", ((10, "née"),))]


def test_passages_of_questions_are_documents_of_their_own_for_language_models(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(squad([], [])))
    assert texts(read(tmp_path / "a.json", tmp_path, TEXT)) == [" The cat, née Tom, sat. "]


def test_questions_whose_answers_are_kept_back_are_not_taken_for_unanswerable(tmp_path):
    content = squad([])
    del content["data"][0]["paragraphs"][0]["qas"][0]["answers"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert [r.value for r in read(tmp_path / "a.json", tmp_path, ANSWERS)] == [()]  # it says that it is impossible
    del content["data"][0]["paragraphs"][0]["qas"][0]["is_impossible"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"no column 'answers'"):
        read(tmp_path / "a.json", tmp_path, ANSWERS)
