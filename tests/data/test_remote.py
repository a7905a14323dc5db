"""Text that is elsewhere is read as if it were here, and what goes wrong on the way is said."""

import gzip
import json
import os
import pathlib
import shutil

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flax_encoder.commands import main
from flax_encoder.config import ConfigError, DataConfig
from flax_encoder.data.pipeline import open_stores
from flax_encoder.data.sources import files, remote
from flax_encoder.data.sources.opening import open_source
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.store import copied
from tests.data.reading import CLASS, TAGS, TEXT
from tests.web import serve

ROWS = [{"text": f"row {i} of the corpus, é" + " more" * (i % 7), "label": "ab"[i % 2]} for i in range(300)]
LINES = "".join(row["text"] + "\n" for row in ROWS)


def _write(folder: pathlib.Path) -> None:
    (folder / "lines.txt").write_text(LINES)
    (folder / "wide.txt").write_bytes(LINES.encode("utf-16"))
    (folder / "packed.txt.gz").write_bytes(gzip.compress(LINES.encode()))
    (folder / "packed.txt.zst").write_bytes(pa.compress(LINES.encode(), "zstd", asbytes=True))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "rows.csv").write_text("text,label\n" + "".join(f'"{r["text"]}",{r["label"]}\n' for r in ROWS))
    (folder / "rows.tsv").write_text("text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=70)
    (folder / "words.conll").write_text("a X\nb Y\n\n" * 200)


FILES = ["lines.txt", "wide.txt", "packed.txt.gz", "packed.txt.zst", "rows.jsonl", "rows.json", "rows.csv", "rows.tsv",
         "rows.parquet", "words.conll"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    _write(folder)
    return folder


@pytest.fixture(scope="module")
def web(folder):
    pytest.importorskip("aiohttp", reason="http:// needs it: pip install 'flax-encoder[http]'")
    with serve(folder) as web:
        yield web


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "_PAUSES_SECONDS", (0.0, 0.0, 0.0))


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 1000)


def opened(name, cache, columns=TEXT, **options):
    options.setdefault("text_unit", "line")
    config = DataConfig(source=str(name), **options)
    return open_source(config.source, config, columns, cache)


def columns_of(name):
    return TAGS if name.endswith(".conll") else CLASS if name.startswith("rows") else TEXT


def told(records):
    """Without the place, by which each record is named."""
    return [(r.texts, r.value, r.where.rpartition("/")[2]) for r in records]


@pytest.mark.parametrize("place", ["memory", "http", "http without ranges"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_elsewhere_gives_the_records_of_the_same_file_here(
    name, place, folder, memory, request, tmp_path, small_parts
):
    if place == "memory":
        memory.pipe(f"/in/{name}", (folder / name).read_bytes())
        url = f"memory://in/{name}"
    else:
        web = request.getfixturevalue("web")
        web.has_ranges = place == "http"
        url = f"{web.url}/{name}"
    here, there = (opened(path, tmp_path, columns_of(name)) for path in (folder / name, url))
    assert told(there.records("train")) == told(here.records("train")) and list(here.records("train"))
    assert len(there.parts) == (1 if place == "http without ranges" else len(here.parts))


def test_a_pattern_and_a_folder_elsewhere_stand_for_their_files(folder, memory, tmp_path):
    for name in ("in/a.txt", "in/b.txt", "in/deep/c.txt", "in/.hidden/d.txt", "in/.e.txt", "in/f[1].txt"):
        memory.pipe(f"/{name}", f"{name}\n".encode())

    def read(name):
        return sorted(record.texts[0] for record in opened(name, tmp_path).records("train"))

    assert read("memory://in/?.txt") == ["in/a.txt", "in/b.txt"]
    assert read("memory://in/") == read("memory://in") == ["in/a.txt", "in/b.txt", "in/deep/c.txt", "in/f[1].txt"]
    assert read("memory://in/**/c.txt") == ["in/deep/c.txt"]
    assert read("memory://in/f[1].txt") == ["in/f[1].txt"]  # what there is is meant as it is written
    memory.pipe("/in/test.txt", b"x\n")
    with pytest.raises(DataError, match="a folder is training text, all of it"):
        read("memory://in")


def test_a_pattern_of_a_web_servers_listing_is_found(web, tmp_path):
    web.has_ranges = True
    assert len(list(opened(f"{web.url}/lin*.txt", tmp_path).records("train"))) == len(ROWS)


def test_a_query_belongs_to_no_name(web, tmp_path):
    assert len(list(opened(f"{web.url}/rows.csv?download=1", tmp_path, CLASS).records("train"))) == len(ROWS)


@pytest.mark.parametrize(("url", "said"), [
    ("memory://in/absent.txt", "no file matches data.source 'memory://in/absent.txt'"),
    ("memory://absent/*.txt", "no file matches"),
    ("nowhere://in/a.txt", "begins with a place that fsspec knows: got nowhere://in/a.txt"),
    ("memory://in/a.exe", "must match files of one kind"),
])  # fmt: skip
def test_what_is_not_elsewhere_is_said_as_if_it_were_here(url, said, memory, tmp_path):
    memory.pipe("/in/a.exe", b"x")
    with pytest.raises(DataError) as error:
        opened(url, tmp_path)
    assert said in str(error.value)


def test_a_server_that_is_not_there_is_told_from_a_file_that_is_not(web, tmp_path):
    with pytest.raises(DataError, match="no file matches"):
        opened(f"{web.url}/absent.txt", tmp_path)
    with pytest.raises(DataError, match=r"cannot be reached: .*Refused"):
        opened("http://127.0.0.1:9/a.txt", tmp_path)


def test_a_driver_that_is_not_installed_is_named_with_what_to_type(monkeypatch, tmp_path):
    def missing(name, **_):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(DataError, match=r"pip install 'flax-encoder\[gcs\]'"):
        opened("gs://bucket/a.txt", tmp_path)


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("name", ["lines.txt", "packed.txt.gz", "rows.parquet"])
def test_an_answer_that_is_cut_is_asked_for_again_and_never_taken_for_the_end(name, has_ranges, folder, web, tmp_path):
    web.has_ranges = has_ranges
    source = opened(f"{web.url}/{name}", tmp_path, columns_of(name))
    want = told(opened(folder / name, tmp_path, columns_of(name)).records("train"))
    try:
        web.cuts_left = 2
        assert told(source.records("train")) == want and web.cuts_left == 0
        web.cuts_left = 1000
        with pytest.raises(DataError, match=f"{web.url}/{name}"):
            list(source.records("train"))
    finally:
        web.cuts_left = 0


def test_a_file_elsewhere_that_changes_is_another_source(memory, web, folder, tmp_path):
    memory.pipe("/in/a.txt", b"one\n")
    first = opened("memory://in/a.txt", tmp_path).fingerprint
    assert opened("memory://in/a.txt", tmp_path).fingerprint == first
    memory.pipe("/in/a.txt", b"two\n")
    assert opened("memory://in/a.txt", tmp_path).fingerprint != first
    for web.has_dates in (True, False):  # without them the server says nothing of a file but its size
        (folder / "b.txt").write_text("one\n")
        os.utime(folder / "b.txt", (1e9, 1e9))
        first = opened(f"{web.url}/b.txt", tmp_path).fingerprint
        assert opened(f"{web.url}/b.txt", tmp_path).fingerprint == first
        (folder / "b.txt").write_text("two\n")
        assert opened(f"{web.url}/b.txt", tmp_path).fingerprint != first
    (folder / "b.txt").unlink()
    web.has_dates = True


def prepared(out, *sources, options=()):
    main(["prepare", "--out", out, "--data.source", *map(str, sources), "--data.text-unit", "line",
          "--data.vocab-size", "120", "--data.held-out-rate", "0.1", *options])  # fmt: skip


def stores(name, cache, **options):
    return open_stores(DataConfig(source=name, cache_dir=str(cache), **options), TEXT)


@pytest.fixture
def store(folder, memory, tmp_path, monkeypatch):
    """A mixture of two stores, which was prepared to memory://stores/mixture; a store is one of its members."""
    monkeypatch.setenv("FLAX_ENCODER_CACHE", str(tmp_path / "cache"))
    memory.pipe("/in/b.txt", "".join(f"line {i} is another\n" for i in range(90)).encode())
    prepared("memory://stores/mixture", folder / "lines.txt", "memory://in/b.txt", options=["--data.weights", "1", "3"])
    return "memory://stores/mixture"


def test_a_store_elsewhere_is_copied_once_and_is_the_store_that_was_prepared(store, memory, tmp_path, monkeypatch):
    [here] = (tmp_path / "cache/prepared").iterdir()
    _, want, weights = stores(str(here), tmp_path / "own")
    for name, wanted in ((store, want), (f"{store}/01", want[1:])):
        _, got, their_weights = stores(name, tmp_path / "own", verify=True)
        assert [s.hash for s in got] == [s.hash for s in wanted]
    assert weights == [0.25, 0.75] and their_weights is None
    monkeypatch.setattr(copied, "_copy", None)  # which is not called again
    assert stores(store, tmp_path / "own")[2] == weights


def test_a_copy_that_was_interrupted_goes_on(store, memory, tmp_path, monkeypatch):
    copy, done = copied._copy, []

    def interrupted(url, path, about):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(url)
        copy(url, path, about)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(copied, "_copy", interrupted)
        stores(store, tmp_path / "own")
    again = []
    monkeypatch.setattr(copied, "_copy", lambda *a: again.append(a[0]) or copy(*a))
    assert len(stores(store, tmp_path / "own")[1]) == 2
    assert again and not set(again) & set(done)


@pytest.mark.parametrize("damage", ["byte", "cut", "gone"])
def test_a_store_elsewhere_that_is_damaged_is_refused(damage, store, memory, tmp_path):
    path = "/stores/mixture/01/train/tokens-00000.bin"
    content = memory.cat_file(path)
    memory.rm(path)
    if damage != "gone":
        memory.pipe(path, content[:-2] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(DataError, match=r"01/train/tokens-00000.bin"):
        stores(store, tmp_path / "own")


@pytest.mark.parametrize("name", ["../out", "/etc/out", "train/../../out", "", "manifest.json", "a\\b"])
def test_a_store_elsewhere_writes_nothing_outside_its_folder(name, store, memory, tmp_path):
    path = "/stores/mixture/00/manifest.json"
    manifest = json.loads(memory.cat_file(path))
    manifest["files"] = {name: {"bytes": 1, "sha256": "0" * 64}}
    memory.pipe(path, json.dumps(manifest).encode())
    with pytest.raises(DataError, match="a store has files in its own folder"):
        stores(f"{store}/00", tmp_path / "own")


def test_a_store_is_prepared_into_a_new_folder_elsewhere_too(store, folder, memory, tmp_path, capsys):
    before = memory.cat_file("/stores/mixture/01/manifest.json")
    shutil.rmtree(tmp_path / "cache/prepared")  # as another machine would find it
    refused = {
        ("memory://stores/mixture/01",): "memory://stores/mixture/01 holds another",
        ("http://127.0.0.1:9/x",): "can be read and not written to",
        ("memory://stores/new", "--shard", "0/2"): "leave --shard out",
    }
    for (out, *options), said in refused.items():
        with pytest.raises(SystemExit):
            prepared(out, folder / "lines.txt", options=options)
        assert said in capsys.readouterr().err
    assert memory.cat_file("/stores/mixture/01/manifest.json") == before and not memory.exists("/stores/new")


def test_nothing_is_asked_of_a_network_for_a_local_path(monkeypatch, folder, tmp_path):
    monkeypatch.setattr(remote, "open_file_system", None)
    assert list(opened(folder / "lines.txt", tmp_path).records("train"))
    with pytest.raises((DataError, ConfigError)):
        opened("tfds:no_such_set", tmp_path)
