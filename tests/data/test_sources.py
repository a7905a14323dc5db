"""Files and data sets as documents, and what is said when they cannot be read."""

import gzip
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flax_encoder.config import DataConfig
from flax_encoder.data.sources import files, streams
from flax_encoder.data.sources.records import DataError, Record
from tests.data.reading import CLASS, PAIR, TEXT, jsonl, open_named, parquet, read, texts, values

WRITTEN = "First line.\r\nSecond line.\n\n \t\nThird, née alone.\n\n\n  indented\nlast without an end"


def both_kinds(tmp_path, *rows):
    return jsonl(tmp_path / "a.jsonl", *rows), parquet(tmp_path / "a.parquet", *rows)


@pytest.mark.parametrize(
    ("unit", "documents"),
    [
        ("paragraph", ["First line.\nSecond line.", "Third, née alone.", "  indented\nlast without an end"]),
        ("line", ["First line.", "Second line.", "Third, née alone.", "  indented", "last without an end"]),
        ("file", [WRITTEN]),
    ],
)
def test_txt_units(tmp_path, unit, documents):
    (tmp_path / "a.txt").write_bytes(WRITTEN.encode())
    found = [record.texts[0] for record in read(tmp_path / "a.txt", tmp_path, text_unit=unit)]
    assert [text for text in found if text.strip()] == documents


def test_a_glob_reads_its_files_in_order_of_their_names(tmp_path):
    for name in ("b", "a", "sub/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    (tmp_path / "z.txt").mkdir()
    assert [r.texts[0] for r in read(tmp_path / "*.txt", tmp_path)] == ["text of a", "text of b"]
    assert [r.texts[0] for r in read(tmp_path / "**/*.txt", tmp_path)] == ["text of a", "text of b", "text of sub/c"]


def test_jsonl_and_parquet_give_the_same_records(tmp_path):
    rows = [{"text": "née", "label": 3}, {"text": None, "label": 1}, {"text": "two\nlines", "label": 3}]
    sources = both_kinds(tmp_path, *rows)
    sources[0].write_text(sources[0].read_text("utf-8") + "\n  \n", "utf-8")
    for source in sources:
        assert read(source, tmp_path) == [Record((row["text"] or "",)) for row in rows]
        labelled = read(source, tmp_path, CLASS)
        assert values(labelled) == [(row["text"] or "", str(row["label"])) for row in rows]


def test_the_text_is_the_column_asked_for_else_text_else_the_only_strings(tmp_path):
    for source in both_kinds(tmp_path, {"text": "a", "body": "b", "stars": 5}):
        assert texts(read(source, tmp_path)) == ["a"]
        assert texts(read(source, tmp_path, text_column="body")) == ["b"]
        labelled = read(source, tmp_path, CLASS, text_column="body", label_column="stars")
        assert values(labelled) == [("b", "5")]
        with pytest.raises(DataError, match=r"must hold strings: column 'stars' of .* holds 5"):
            read(source, tmp_path, text_column="stars")
    for source in both_kinds(tmp_path, {"body": "b", "stars": 5}):
        assert texts(read(source, tmp_path)) == ["b"]


def test_a_missing_column_is_an_error_that_lists_the_columns(tmp_path):
    for source in both_kinds(tmp_path, {"title": "a", "subject": "b", "stars": 5}):
        with pytest.raises(DataError, match=r"which column is the text\? .* has title, subject, stars.*text-column"):
            read(source, tmp_path)
        with pytest.raises(DataError, match=r"no column 'txt' in .*a\.\w+.*; the columns are title, subject, stars"):
            read(source, tmp_path, text_column="txt")
        with pytest.raises(DataError, match=r"no column 'label' in .*; the columns are title, subject, stars"):
            read(source, tmp_path, CLASS, text_column="subject")


def test_files_that_are_missing_mixed_or_of_another_kind_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"no file matches data\.source '.*gone\.txt'"):
        read(tmp_path / "gone.txt", tmp_path)
    (tmp_path / "a.txt").write_text("a")
    jsonl(tmp_path / "a.jsonl", {"text": "a"})
    (tmp_path / "b.doc").write_text("a")
    with pytest.raises(DataError, match=r"files of one kind, \.txt, \.jsonl, .*: got \.jsonl, \.txt"):
        read(tmp_path / "a.*", tmp_path)
    with pytest.raises(DataError, match=r"got \.doc"):
        read(tmp_path / "b.doc", tmp_path)


@pytest.mark.parametrize("unit", ["paragraph", "line", "file"])
def test_undecodable_bytes_are_an_error_that_names_file_and_offset(tmp_path, unit):
    good = "née\nsecond ".encode()
    (tmp_path / "a.txt").write_bytes(good + b"caf\xe9 au lait\n")
    with pytest.raises(DataError, match=rf"{tmp_path / 'a.txt'} has byte 0xe9 at offset {len(good) + 3}\."):
        read(tmp_path / "a.txt", tmp_path, text_unit=unit)


@pytest.mark.parametrize("line", ['{"text": "cut', "[1, 2]", "3", "[" * 100_000, '{"n": ' + "7" * 5000 + "}"])
def test_a_bad_json_line_is_an_error_that_names_the_line(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=rf"must be a JSON object: {tmp_path / 'a.jsonl'}, line 3"):
        read(tmp_path / "a.jsonl", tmp_path)


def test_a_parquet_file_that_is_none_is_an_error_that_names_it(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not this")
    with pytest.raises(DataError, match=rf"not a Parquet file: {tmp_path / 'a.parquet'}"):
        read(tmp_path / "a.parquet", tmp_path)


def test_a_damaged_parquet_page_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"text {i} of many" for i in range(500)]})
    pq.write_table(table, path, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    at = data.index(b"text 77 of many")
    data[at - 4 : at] = b"\xff\xff\xff\x7f"  # a length past the page
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"cannot be read to its end: {path}"):
        read(path, tmp_path)


def test_txt_with_labels_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for columns in (CLASS, PAIR):
        with pytest.raises(DataError, match=r"a \.txt file has no labels"):
            read(tmp_path / "a.txt", tmp_path, columns)


def test_an_unknown_data_set_is_an_error_that_names_it(tmp_path):
    with pytest.raises(DataError, match="TensorFlow Datasets cannot give 'no_such_data_set'"):
        read("tfds:no_such_data_set", tmp_path)


def test_the_fingerprint_changes_with_the_files_and_with_what_is_read_of_them(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "a", "body": "b", "label": 1})

    def fingerprint(columns=TEXT, **options):
        config = DataConfig(source=str(path), **options)
        return open_named(config, tmp_path, columns).fingerprint

    first = fingerprint()
    assert first == fingerprint(vocab_size=97, row_length=31)
    assert len({first, fingerprint(CLASS), fingerprint(text_column="body"), fingerprint(text_unit="line")}) == 4
    os.utime(path, ns=(1, 1))
    assert fingerprint() != first


def compressed(path, content):
    """The content beside `path`, packed in both ways."""
    gz, zst = path.with_name(path.name + ".gz"), path.with_name(path.name + ".zst")
    gz.write_bytes(gzip.compress(content[: len(content) // 2]) + gzip.compress(content[len(content) // 2 :]))
    with pa.OSFile(str(zst), "wb") as raw, pa.CompressedOutputStream(raw, "zstd") as f:
        f.write(content)
    return gz, zst


@pytest.mark.parametrize("unit", ["paragraph", "line", "file"])
def test_compressed_files_read_as_what_is_in_them(tmp_path, unit):
    (tmp_path / "a.txt").write_bytes(WRITTEN.encode())
    expected = read(tmp_path / "a.txt", tmp_path, text_unit=unit)
    for path in compressed(tmp_path / "a.txt", WRITTEN.encode()):
        assert read(path, tmp_path, text_unit=unit) == expected
    rows = jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": "née"})
    for path in compressed(rows, rows.read_bytes()):
        assert texts(read(path, tmp_path)) == ["a", "née"]


def test_a_compressed_file_that_is_cut_off_or_damaged_is_an_error_that_names_it(tmp_path):
    content = np.random.default_rng(0).integers(97, 123, 5000).astype(np.uint8).tobytes() + b"\n"
    for path in compressed(tmp_path / "a.txt", content):
        raw = path.read_bytes()
        damaged = [raw[:50] + b"????" + raw[54:]] if path.suffix == ".gz" else []  # this .zst has no checksum
        for bad in (raw[:-40], b"not this", *damaged):
            path.write_bytes(bad)
            with pytest.raises(DataError, match=rf"cannot be read to its end: {path}"):
                read(path, tmp_path)


def test_undecodable_bytes_in_a_compressed_file_are_named_by_their_place_in_the_text(tmp_path):
    for path in compressed(tmp_path / "a.txt", b"good\ncaf\xe9\n"):
        with pytest.raises(DataError, match=rf"{path} has byte 0xe9 at offset 8 of its unpacked text"):
            read(path, tmp_path)


@pytest.mark.parametrize("part_bytes", [1, 2, 7, 23, 64, 10_000])
def test_parts_of_any_size_give_every_document_once_and_in_order(tmp_path, monkeypatch, part_bytes):
    rng = np.random.default_rng(0)
    lines = ["".join(rng.choice(list("ab é"), rng.integers(0, 9))).strip() for _ in range(60)]
    (tmp_path / "a.txt").write_text("\n".join(lines), "utf-8", newline="\r\n")
    rows = jsonl(tmp_path / "a.jsonl", *({"text": line, "label": i} for i, line in enumerate(lines)))
    expected = {unit: read(tmp_path / "a.txt", tmp_path, text_unit=unit) for unit in ("line", "paragraph")}
    monkeypatch.setattr(files, "PART_BYTES", part_bytes)
    for unit, records in expected.items():
        config = DataConfig(source=str(tmp_path / "a.txt"), text_unit=unit)
        source = open_named(config, tmp_path)
        assert len(source.parts) == -(-(tmp_path / "a.txt").stat().st_size // part_bytes)
        assert list(source.records("train")) == records
        sent = pickle.loads(pickle.dumps(source.parts[0]))  # as to a worker
        assert list(sent.read()) == list(source.parts[0].read())
        assert sum(part.size for part in source.parts) == (tmp_path / "a.txt").stat().st_size
    assert [r.value for r in read(rows, tmp_path, CLASS)] == list(map(str, range(60)))
    rows.write_text(rows.read_text("utf-8") + "{", "utf-8")
    with pytest.raises(DataError, match="line 61"):
        read(rows, tmp_path)


def test_a_long_text_without_blank_lines_is_an_error_that_tells_the_other_units(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "_PARAGRAPH_BYTES", 1000)
    monkeypatch.setattr(files, "PART_BYTES", 500)
    (tmp_path / "a.txt").write_text("a line of text\n" * 200)
    with pytest.raises(DataError, match=r"none from offset 0 to 1,005\. --data.text-unit line takes each line"):
        read(tmp_path / "a.txt", tmp_path)
    assert len(read(tmp_path / "a.txt", tmp_path, text_unit="line")) == 200


def test_a_parquet_file_has_a_part_for_each_row_group(tmp_path):
    table = pa.Table.from_pylist([{"text": f"text {i}"} for i in range(23)])
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    source = open_named(DataConfig(source=str(tmp_path / "a.parquet")), tmp_path)
    assert len(source.parts) == 5
    assert [r.texts[0] for r in source.records("train")] == [f"text {i}" for i in range(23)]


def test_an_empty_file_has_no_documents(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).touch()
        assert read(tmp_path / name, tmp_path) == []


def test_hugging_face_datasets_are_read_by_name_their_test_split_apart(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="needs the extra flax-encoder[hf]")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl(folder / "train.jsonl", *({"body": f"text {i}", "label": i % 3} for i in range(37)))
    jsonl(folder / "test.jsonl", *({"body": f"held out {i}", "label": 1} for i in range(5)))
    source = open_named(DataConfig(source=f"hf:{folder}"), tmp_path / "cache", CLASS)
    assert values(source.records("train")) == [(f"text {i}", str(i % 3)) for i in range(37)]
    assert len(list(source.records("test"))) == 5 and source.has_held_out
    sent = pickle.loads(pickle.dumps(source.parts[-1]))
    assert next(sent.read())[:2] == (("held out 0",), "1")
    with pytest.raises(DataError, match=r"no column 'title' in hf:.*; the columns are body, label"):
        open_named(DataConfig(source=f"hf:{folder}", text_column="title"), tmp_path / "cache")
    with pytest.raises(DataError, match="Hugging Face datasets cannot give"):
        open_named(DataConfig(source=f"hf:{tmp_path / 'nothing'}"), tmp_path / "cache")
