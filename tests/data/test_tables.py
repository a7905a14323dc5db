"""Tables and texts in files, however they are written: the same rows give the same records."""

import codecs
import csv
import gzip
import json
import os
import pickle
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_encoder.config import DataConfig
from flax_encoder.data.sources import files
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.records import DataError
from tests.data.reading import CLASS, TAGS, TEXT, jsonl, open_named, parquet, read, texts, values

few = settings(max_examples=40, deadline=None, derandomize=True)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
# With what separates, quotes and ends rows in all formats.
SIGNS = st.text(st.sampled_from('",;\t|\n\r\'\\ a1é\u2028\ufeff\x00'), max_size=8)
LABELS = st.sampled_from(["001", "1", "pos", " true", "1.0"])
ROWS = st.lists(st.tuples(UNICODE | SIGNS, LABELS), min_size=1, max_size=7)


def written_by_csv(path, rows, delimiter):
    with path.open("w", encoding="utf-8", newline="") as f:
        csv.writer(f, delimiter=delimiter).writerows([("text", "label"), *rows])


def written_by_arrow(path, rows, delimiter):
    table = pa.table({"text": [r[0] for r in rows], "label": [r[1] for r in rows]})
    pyarrow.csv.write_csv(table, path, pyarrow.csv.WriteOptions(delimiter=delimiter))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("write", [written_by_csv, written_by_arrow])
@given(rows=ROWS)
@few
def test_what_is_written_as_a_table_of_fields_is_read_again(name, write, rows):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        write(path, rows, "\t" if name == "a.tsv" else ",")
        assert values(read(path, Path(folder), CLASS)) == rows


@given(rows=ROWS)
@few
def test_what_is_written_as_json_or_parquet_is_read_again(rows):
    with tempfile.TemporaryDirectory() as folder:
        named, folder = [{"text": text, "label": label} for text, label in rows], Path(folder)
        paths = jsonl(folder / "a.jsonl", *named), parquet(folder / "a.parquet", *named), folder / "a.json"
        paths[2].write_text(json.dumps(named, indent=1), "utf-8")
        for path in (*paths, jsonl(folder / "b.json", *named), jsonl(folder / "c.ndjson", *named)):
            assert values(read(path, folder, CLASS)) == rows


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("packing", ["", ".gz"])
def test_a_text_file_of_any_encoding_mark_gives_the_same_documents(tmp_path, mark, packing):
    contents = {
        "a.txt": "née\n\nzwei, \U0001f600\n", "a.csv": "text,label\nnée,1\n", "a.tsv": "text\tlabel\nnée\t1\n",
        "a.jsonl": '{"text": "née", "label": 1}\n', "a.json": '[{"text": "née", "label": 1}]', "a.conll": "née X\n",
    }  # fmt: skip
    marks = {"utf-16-be": codecs.BOM_UTF16_BE, "utf-32-be": codecs.BOM_UTF32_BE}
    pack = gzip.compress if packing else bytes
    for name, content in contents.items():
        plain, marked = tmp_path / name, tmp_path / "marked" / f"{name}{packing}"
        marked.parent.mkdir(exist_ok=True)
        plain.write_bytes(content.encode())
        marked.write_bytes(pack(marks.get(mark, b"") + content.encode(mark)))
        for unit in ("paragraph", "line", "file"):
            assert read(marked, tmp_path, text_unit=unit) == read(plain, tmp_path, text_unit=unit) != []


def test_text_that_does_not_go_on_in_the_encoding_of_its_mark_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16") + b"\x00")
    with pytest.raises(DataError, match=r"a\.txt begins as utf-16.* and does not go on so"):
        read(tmp_path / "a.txt", tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.JSONL", "a.csv", "a.json", "a.conll"])
def test_a_packed_file_is_known_by_its_first_bytes(tmp_path, name):
    content = {
        "a.txt": "a X", "a.conll": "a X", "a.csv": "text\na", "a.JSONL": '{"text": "a"}', "a.json": '[{"text": "a"}]',
    }  # fmt: skip
    plain = tmp_path / name
    plain.write_text(content[name])
    expected = read(plain, tmp_path)
    plain.write_bytes(gzip.compress(content[name].encode()))
    assert read(plain, tmp_path) == expected != []
    with pa.OSFile(str(plain), "wb") as raw, pa.CompressedOutputStream(raw, "zstd") as f:
        f.write(content[name].encode())
    assert read(plain, tmp_path) == expected


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs the program zstd to write a long window")
def test_a_long_zstandard_window_is_read_or_refused_with_the_way_out(tmp_path):
    (tmp_path / "a.txt").write_text("text\n" * 1000)
    command = ["zstd", "-q", "--ultra", "-22", "--long=31", "-o", str(tmp_path / "b.txt.zst")]
    with (tmp_path / "a.txt").open("rb") as f:
        subprocess.run(command, stdin=f, check=True)
    try:
        assert len(read(tmp_path / "b.txt.zst", tmp_path, text_unit="line")) == 1000
    except DataError as error:
        assert "zstd -d --long=31" in str(error)


@pytest.mark.parametrize("part_bytes", [1, 7, 64, 10_000])
def test_parts_of_any_size_name_the_same_lines(tmp_path, monkeypatch, part_bytes):
    rows = [{"text": "é" * (i % 5), "label": i} for i in range(40)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    path.write_text(path.read_text("utf-8").replace("\n", "\n\n", 7), "utf-8")
    words = tmp_path / "a.conll"
    words.write_text("-DOCSTART- O\n\n" + "\n\n".join(f"a{i} O\nb X" for i in range(20)))
    whole = [read(path, tmp_path, CLASS), read(words, tmp_path, TEXT._replace(value="tags"))]
    monkeypatch.setattr(files, "PART_BYTES", part_bytes)
    cut = [read(path, tmp_path, CLASS), read(words, tmp_path, TEXT._replace(value="tags"))]
    assert cut == whole and [len(records) for records in cut] == [40, 20]
    lines = path.read_text("utf-8").split("\n")
    for record in cut[0]:
        assert json.loads(lines[int(record.where.split("line ")[1]) - 1])["label"] == int(record.value)
    assert words.read_text().split("\n")[int(cut[1][7].where.split("line ")[1]) - 1] == "a7 O"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,1\nb\n", r"a field for each of the 2 columns: .*a\.csv, row 2 \(line 3\) has 1\."),
        ('text,label\n"a\n",1\nb,2,3\n', r"row 2 \(line 4\) has 3\. --data\.skip-bad-rows"),
        ('text,label\n"a" b,1\n', r"quotes enclose whole fields \(--data\.no-csv-quotes .* row 1 \(line 2\)"),
        ('text,label\na,1\n"b,2\n', r"row 2 \(line 3\) does not parse: unexpected end"),
        ("text,label\ra,1\r", r"rows end in \\n or \\r\\n \(`tr "),
        ("text,label\na,\n", r"every document must have a label: column 'label' of .*row 1 \(line 2\) holds ''"),
        ("text,text,label\na,b,1\n", r"several named 'text'"),
        ("text;label\na, b;\n", r"must have a label: column 'label' of .*row 1 \(line 2\) holds ''"),
    ],
)
def test_a_bad_row_of_a_table_is_an_error_that_names_it(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode())
    with pytest.raises(DataError, match=message):
        read(path, tmp_path, CLASS)


def as_numpy(values: list) -> str:
    """As pandas writes a column of arrays, which is what `datasets` gives it."""
    flat = not any(isinstance(value, list) for value in values)
    return str(np.array(values, object)) if flat else repr(values)


@pytest.mark.parametrize("spell", [json.dumps, repr, as_numpy])  # as programs write them, and as pandas does
def test_a_cell_that_spells_a_list_is_that_list(tmp_path, spell):
    rows = [
        {"text": 'a, "b"', "labels": ["x", "y"], "tokens": ["a", "é"], "tags": ["O", "X"], "entities": [[0, 1, "P"]]},
        {"text": "[c]", "labels": [], "tokens": [], "tags": [], "entities": []},
    ]
    for path in (tmp_path / "a.csv", tmp_path / "a.tsv"):
        with path.open("w", encoding="utf-8", newline="") as f:
            writer = csv.writer(f, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(rows[0])
            writer.writerows([[x if isinstance(x, str) else spell(x) for x in row.values()] for row in rows])
        assert values(read(path, tmp_path, Columns("classes"))) == [('a, "b"', ("x", "y")), ("[c]", ())]
        whole = jsonl(tmp_path / "a.jsonl", *rows)
        for text, label in (("tokens", "tags"), ("text", "entities")):
            options = {"text_column": text, "label_column": label}
            got, want = (read(file, tmp_path, TAGS, **options) for file in (path, whole))
            assert [record._replace(where="") for record in got] == [record._replace(where="") for record in want]
    path.write_text("text\tlabels\na\t[]\n" + "b\t['x']\n" * 150 + "c\tx y\n", "utf-8")
    with pytest.raises(DataError, match=r"a list, or columns of 0 and 1.*: column 'labels' of .*row 152 .*holds 'x y'"):
        read(path, tmp_path, Columns("classes"))


@pytest.mark.parametrize(
    "cell", ["{{}}", "{[1]: 2}", "[" * 100_000, "[" + "-" * 100_000 + "1]", "[1" + "+1" * 100_000 + "]", "[lambda: 1]"]
)
def test_a_cell_that_only_begins_like_a_list_is_a_text(tmp_path, cell):
    """In no time: some of these are what parsers crash of."""
    (tmp_path / "a.csv").write_text(f"text,labels\na,['\\d']\n{cell},[]\n", "utf-8")
    assert values(read(tmp_path / "a.csv", tmp_path, Columns("classes"))) == [("a", ("\\d",)), (cell, ())]


def test_bad_rows_are_skipped_and_counted_where_asked_for(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\na,1\nb\n"c" d,2\ne,\nf,3\n')
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b"}\n[]\n{\n{"text": "f", "label": "3"}\n')
    rows = [{"text": text, "label": label} for text, label in (("a", "1"), ("b", None), ("f", "3"))]
    parquet(tmp_path / "a.parquet", *rows)
    for name, skipped in (("a.csv", 3), ("a.jsonl", 3), ("a.parquet", 1)):
        config = DataConfig(source=str(tmp_path / name), skip_bad_rows=True)
        (part,) = open_named(config, tmp_path, CLASS).parts
        counts = []

        def counted(part=part, counts=counts):
            counts.append((yield from part.read()))

        assert values(counted()) == [("a", "1"), ("f", "3")] and counts == [skipped]
        with pytest.raises(DataError, match=r"--data\.skip-bad-rows"):
            read(tmp_path / name, tmp_path, CLASS)


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_a_csv_file_without_a_comma_in_its_header_says_what_separates_it(tmp_path, delimiter):
    path = tmp_path / "a.csv"
    path.write_text(f'text{delimiter}label\n"a{delimiter}\nb, c"{delimiter}1\n')
    source = open_named(DataConfig(source=str(path)), tmp_path, CLASS)
    assert values(source.records("train")) == [(f"a{delimiter}\nb, c", "1")]
    assert f"separated by {delimiter!r}" in source.notes[0]


def test_a_single_column_of_sentences_is_not_split_at_their_signs(tmp_path):
    (tmp_path / "a.csv").write_text("sentence\nOne; two\nThree\n")
    assert texts(read(tmp_path / "a.csv", tmp_path)) == ["One; two", "Three"]


def test_quotes_of_a_tsv_file_that_do_not_pair_are_text(tmp_path):
    rows = [('"The word', "he said"), ('said "no"', 'a "quote"'), ('"', "x")]
    path = tmp_path / "a.tsv"
    path.write_text("sentence1\tsentence2\tlabel\n" + "".join(f"{a}\t{b}\t1\n" for a, b in rows))
    source = open_named(DataConfig(source=str(path)), tmp_path, CLASS)
    assert [r.texts for r in source.records("train")] == rows and "quotes are text" in source.notes[0]
    path = path.rename(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"--data\.no-csv-quotes"):
        read(path, tmp_path, CLASS)
    assert [r.texts for r in read(path, tmp_path, CLASS, csv_quotes=False)] == rows


def test_columns_of_a_table_without_a_header_have_numbers(tmp_path):
    (tmp_path / "a.csv").write_text('3,"A title","Some text"\n1,"B","Other, text"\n')
    options = {"has_header": False, "text_column": "3", "label_column": "1"}
    assert values(read(tmp_path / "a.csv", tmp_path, CLASS, **options)) == [("Some text", "3"), ("Other, text", "1")]


def test_a_field_may_be_longer_than_pythons_own_limit(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "a" * 200_000 + ",1\n")
    assert [len(text) for text in texts(read(tmp_path / "a.csv", tmp_path, CLASS))] == [200_000]


def test_parquet_columns_of_strings_in_any_form_are_text(tmp_path):
    plain, path = pa.array(["née", None, "b"]), tmp_path / "a.parquet"
    for column in (plain, plain.cast(pa.large_string()), plain.cast(pa.string_view()), plain.dictionary_encode()):
        pq.write_table(pa.table({"body": column, "n": [1, 2, 3]}), path)
        assert texts(read(path, tmp_path)) == ["née", "", "b"]


def test_a_parquet_column_that_is_read_has_a_name_of_its_own(tmp_path):
    column = pa.array(["a"])
    pq.write_table(pa.Table.from_arrays([column, column, column], ["text", "x", "x"]), tmp_path / "a.parquet")
    assert texts(read(tmp_path / "a.parquet", tmp_path)) == ["a"]
    with pytest.raises(DataError, match=r"has several named 'x'"):
        read(tmp_path / "a.parquet", tmp_path, text_column="x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": ', r"must parse: .*a\.json does not"),
        ("3", r"a list of objects"),
        ('{"data": 3}', r"a list of objects"),
        ('[{"text": "a"}, 3]', r"must be an object: .*a\.json, item 2 is 3"),
        ('{"data": [{"paragraphs": [{}]}]}', r"SQuAD's files have .* lacks 'context'"),
    ],
)
def test_a_json_file_of_another_form_is_an_error(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.json", tmp_path)


def test_json_files_may_be_a_list_one_object_or_rows_in_data(tmp_path):
    for content in ('[{"text": "a"}]', '{"text": "a"}', '{"data": [{"text": "a"}]}', '\n\n{"text": "a"}\n'):
        (tmp_path / "a.json").write_text(content)
        assert texts(read(tmp_path / "a.json", tmp_path)) == ["a"]


def test_a_folder_is_the_files_in_it_if_they_are_of_one_kind(tmp_path):
    folder = tmp_path / "set"
    for name in ("b.jsonl", "a.jsonl", "more/c.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        jsonl(folder / name, {"text": name})
    (folder / ".hidden").write_text("no text")
    assert texts(read(folder, tmp_path)) == ["a.jsonl", "b.jsonl", "more/c.jsonl"]
    (folder / "README.md").write_text("about")
    with pytest.raises(DataError, match=r"files of one kind.* got \.jsonl, \.md"):
        read(folder, tmp_path)
    (folder / "README.md").rename(folder / "test.jsonl")
    with pytest.raises(DataError, match=r"has files named test\. .*--data\.test"):
        read(folder, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file matches"):
        read(tmp_path / "empty", tmp_path)


def test_what_exists_is_meant_as_it_is_written_and_patterns_begin_after_it(tmp_path, monkeypatch):
    folder = tmp_path / "run [1]"
    folder.mkdir()
    (folder / "a[b].txt").write_text("literal")
    (folder / "ab.txt").write_text("other")
    assert texts(read(folder / "a[b].txt", tmp_path)) == ["literal"]
    assert texts(read(folder / "*.txt", tmp_path)) == ["literal", "other"]
    assert texts(read(folder / "a[xb].txt", tmp_path)) == ["other"]
    with pytest.raises(DataError, match=r"In a pattern \[ab\] stands for a or b; .*c\[\[\]d"):
        read(folder / "c[d].txt", tmp_path)
    monkeypatch.setenv("HOME", str(folder))
    assert texts(read("~/ab.txt", tmp_path)) == ["other"]


def test_a_file_that_replaces_one_of_its_size_and_time_has_another_fingerprint(tmp_path):
    path, first = tmp_path / "a.txt", None
    for content in ("one text", "txet eno", "one text"):
        path.unlink(missing_ok=True)
        path.write_text(content)
        os.utime(path, ns=(10**18, 10**18))
        fingerprint = open_named(DataConfig(source=str(path)), tmp_path / "cache").fingerprint
        first = first or fingerprint
        assert (fingerprint == first) == (content == "one text")
    path.chmod(0o600)  # another time of change, the same contents
    assert open_named(DataConfig(source=str(path)), tmp_path / "cache").fingerprint == first
    assert open_named(DataConfig(source=str(path)), tmp_path / "none" / "yet").fingerprint == first


def test_parts_of_every_kind_can_be_sent_to_another_process(tmp_path):
    rows = [{"text": f"text {i}", "label": str(i)} for i in range(5)]
    jsonl(tmp_path / "a.jsonl", *rows), parquet(tmp_path / "a.parquet", *rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    written_by_csv(tmp_path / "a.csv", [tuple(row.values()) for row in rows], ",")
    for name in ("a.jsonl", "a.parquet", "a.json", "a.csv"):
        (part,) = open_named(DataConfig(source=str(tmp_path / name)), tmp_path, CLASS).parts
        assert values(pickle.loads(pickle.dumps(part)).read()) == [tuple(row.values()) for row in rows]
