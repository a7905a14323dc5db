"""The prepared store: whole or absent, each text once, held-out text apart, and finished after any interruption."""

import dataclasses
import functools
import gzip
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from filelock import FileLock

from flax_encoder.config import DataConfig
from flax_encoder.data.pipeline import open_stores, prepare_stores
from flax_encoder.data.sources import files
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.opening import Source, open_source
from flax_encoder.data.sources.records import DataError, Part, Record
from flax_encoder.data.store import merging
from flax_encoder.data.store import prepare as prepare_module
from flax_encoder.data.store.prepare import prepare
from flax_encoder.data.store.store import MANIFEST, open_store, partial_folder
from flax_encoder.data.store.tokenizing import HeldOut, is_held_out, text_digest
from flax_encoder.data.tokens.tokenizer import TextTokenizer, train_wordpiece

WORDS = ["one", "two", "three", "five", "seven", "eleven", "thirteen", "seventeen", "nineteen", "twenty"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([" ".join(WORDS)] * 2, 83)


def random_texts(num_texts, seed=0):
    rng = np.random.default_rng(seed)
    return list(dict.fromkeys(" ".join(rng.choice(WORDS, rng.integers(5, 13))) for _ in range(num_texts)))


def source_of(train, test=None, labels=None, label_names=None, fingerprint="f", parts=1):
    """Texts as a source; labels, if any, of train and then of test."""
    def cut(split, texts, labels):
        records = [Record((text,)) for text in texts]
        if labels:
            records = [r._replace(value=label) for r, label in zip(records, labels, strict=True)]
        groups = [g.tolist() for g in np.array_split(np.arange(len(records)), parts)]
        return [Part(split, len(g), functools.partial(iter, [records[i] for i in g])) for g in groups]

    both = cut("train", train, labels and labels[: len(train)])
    if test is not None:
        both += cut("test", test, labels and labels[len(train) :])
    return Source(both, fingerprint, label_names)


def texts_of(split, tokenizer):
    return [tokenizer.decode(split.document(i).tolist()) for i in range(len(split))]


def put(source, tokenizer, folder, rate=0.0, value="none", **options):
    return prepare(source, tokenizer, folder / "store", Columns(value), held_out=HeldOut(rate), workers=1, **options)


@pytest.mark.parametrize("parts", [1, 7])
def test_a_store_holds_what_was_put_in_and_is_found_again(tokenizer, tmp_path, parts):
    train, test = random_texts(1511), random_texts(53, seed=1)
    store = put(source_of(train, test, parts=parts), tokenizer, tmp_path, 0.5)
    assert texts_of(store.train, tokenizer) == train and texts_of(store.validation, tokenizer) == test
    assert store.train.tokens[0].dtype == np.uint16 and store.train.values == {} and store.label_names is None
    counts = {"documents": 53, "tokens": int(store.validation.lengths.sum()), "unknown": 0, "shards": 1}
    assert store.manifest["splits"]["validation"] == counts
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]

    def unread():
        raise AssertionError("the store was there already")

    again = put(Source([Part("train", 1, unread), Part("test", 1, unread)], "f"), tokenizer, tmp_path, 0.5)
    np.testing.assert_array_equal(again.train.tokens[0], store.train.tokens[0])
    for other in (source_of(train[1:], test, fingerprint="g"), source_of(train)):
        with pytest.raises(DataError, match="holds another text, or one by another tokenizer or held-out rate"):
            put(other, tokenizer, tmp_path, 0.25)


def test_the_hash_is_of_the_contents_wherever_and_however_they_were_prepared(tokenizer, tmp_path):
    texts = random_texts(211)
    one = put(source_of(texts), tokenizer, tmp_path / "a", 0.1)
    many = put(source_of(texts, fingerprint="elsewhere", parts=5), tokenizer, tmp_path / "b", 0.1)
    assert one.hash == many.hash
    assert one.hash != put(source_of(texts[1:]), tokenizer, tmp_path / "c", 0.1).hash


@pytest.mark.parametrize("shard_tokens", [50, 1000])
def test_shards_end_between_documents_and_hold_the_same(tokenizer, tmp_path, monkeypatch, shard_tokens):
    texts = random_texts(503)
    whole = put(source_of(texts), tokenizer, tmp_path / "a")
    monkeypatch.setattr(merging, "SHARD_TOKENS", shard_tokens)
    monkeypatch.setattr(merging, "_COPIED_AT_ONCE", 3)
    store = put(source_of(texts, parts=4), tokenizer, tmp_path / "b")
    assert len(store.train.tokens) > 3 and max(map(len, store.train.tokens)) <= shard_tokens
    assert texts_of(store.train, tokenizer) == texts_of(whole.train, tokenizer) == texts
    joined = [np.unpackbits(w, bitorder="little")[: len(t)] for w, t in zip(store.train.words, store.train.tokens)]  # noqa: B905
    expected = np.unpackbits(whole.train.words[0], bitorder="little")[: len(whole.train.tokens[0])]
    np.testing.assert_array_equal(np.concatenate(joined), expected)
    sent = pickle.loads(pickle.dumps(store.train))  # by its folder's name
    assert len(pickle.dumps(store.train)) < 2_000 and texts_of(sent, tokenizer) == texts


def test_word_starts_are_the_pre_tokenizers(tokenizer, tmp_path):
    text = "seventeenone two, two-three nineteenten"
    store = put(source_of([text]), tokenizer, tmp_path)
    tokens = [tokenizer.token(i) for i in store.train.document(0)]
    starts = np.unpackbits(store.train.words[0], bitorder="little")[: len(tokens)]
    assert [bool(s) for s in starts] == [not t.startswith("##") for t in tokens]


@pytest.mark.parametrize("bits", [0, 2])
@pytest.mark.parametrize("parts", [1, 4])
def test_duplicates_are_found_across_parts_in_ranges_of_hashes(tokenizer, tmp_path, monkeypatch, parts, bits):
    rng = np.random.default_rng(0)
    texts = [random_texts(97)[i] for i in rng.integers(0, 90, 400)]
    monkeypatch.setattr(merging, "_HASHES_AT_ONCE", 400 >> bits)
    store = put(source_of(texts, parts=parts), tokenizer, tmp_path)
    assert texts_of(store.train, tokenizer) == list(dict.fromkeys(texts))
    assert store.manifest["dropped"]["duplicate"] == 400 - len(set(texts))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("leaves_debris", [True, False])
def test_an_interrupted_preparation_goes_on_from_the_parts_that_are_done(
    tokenizer, tmp_path, monkeypatch, error, leaves_debris
):
    texts = random_texts(301)
    whole = source_of(texts, parts=5)
    read = []

    def counted(part, number):
        read.append(number)
        yield from part.read()

    def dies():
        yield from (Record((t,)) for t in texts[:20])
        raise error("killed")

    parts = [dataclasses.replace(p, read=functools.partial(counted, p, i)) for i, p in enumerate(whole.parts)]
    with monkeypatch.context() as patch:
        if leaves_debris:  # as when the process is killed outright
            patch.setattr(prepare_module.shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(error, match="killed"):
            put(Source([*parts[:3], Part("train", 0, dies), *parts[4:]], "f"), tokenizer, tmp_path, 0.1)
    assert sorted(read) == [0, 1, 2, 4]
    with pytest.raises(DataError, match=r"was interrupted\. The same prepare command finishes it"):
        open_store(tmp_path / "store")
    with pytest.raises(DataError, match="begun from another text, tokenizer or held-out rate"):
        put(whole, tokenizer, tmp_path, 0.2)
    read.clear()
    store = put(Source(parts, "f"), tokenizer, tmp_path, 0.1)
    assert read == [3]
    assert store.hash == put(whole, tokenizer, tmp_path / "fresh", 0.1).hash
    assert not partial_folder(tmp_path / "store").exists()


def test_shards_of_the_work_make_the_same_store_whoever_is_last(tokenizer, tmp_path):
    source = source_of(random_texts(211), parts=5)
    messages = []
    assert put(source, tokenizer, tmp_path, 0.1, shard=(1, 3), progress=messages.append) is None
    assert messages[-1] == "3 of 5 parts are left to the other shards"
    assert put(source, tokenizer, tmp_path, 0.1, shard=(2, 3)) is None
    store = put(source, tokenizer, tmp_path, 0.1, shard=(0, 3))
    assert store.hash == put(source, tokenizer, tmp_path / "alone", 0.1).hash


def test_two_processes_that_prepare_one_folder_are_an_error_or_wait(tokenizer, tmp_path):
    source = source_of(random_texts(31))
    work = partial_folder(tmp_path / "store")
    work.mkdir()
    with FileLock(work / "lock-0-of-1"), pytest.raises(DataError, match=r"another is preparing .*/store\. Wait"):
        put(source, tokenizer, tmp_path)

    def slow():  # another that was first finishes while this one has begun
        put(source, tokenizer, tmp_path, shard=(1, 2), progress=lambda m: None)
        put(source, tokenizer, tmp_path, shard=(0, 2), progress=lambda m: None)
        yield from source.records("train")

    store = put(Source([Part("train", 1, slow)], "f"), tokenizer, tmp_path, wait=True)
    assert len(store.train) == 31


def test_a_full_disk_is_an_error_that_says_what_is_kept(tokenizer, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging.np, "save", full)
    with pytest.raises(DataError, match=r"No space left on device\. The parts that are done are kept"):
        put(source_of(random_texts(31)), tokenizer, tmp_path)


def test_duplicates_and_empties_are_dropped_and_counted(tokenizer, tmp_path):
    train = ["one two", "", " \n\t", "one two", " one two\n", "three", "one  two", "\u200b"]
    store = put(source_of(train, ["three", "five", "five", ""]), tokenizer, tmp_path)
    assert texts_of(store.train, tokenizer) == ["one two", "three", "one two"]  # of which one has two blanks
    assert texts_of(store.validation, tokenizer) == ["five"]
    assert store.manifest["dropped"] == {"empty": 4, "duplicate": 4}


def test_the_held_out_split_is_a_hash_of_the_text(tokenizer, tmp_path):
    texts = random_texts(2003)
    splits = {}
    for name, order in (("forward", texts), ("backward", texts[::-1]), ("half", texts[::2])):
        store = put(source_of(order, fingerprint=name), tokenizer, tmp_path / name, 0.2)
        splits[name] = set(texts_of(store.train, tokenizer)), set(texts_of(store.validation, tokenizer))
    train, test = splits["forward"]
    assert not train & test and train | test == set(texts)
    assert abs(len(test) - 0.2 * len(texts)) < 4 * np.sqrt(0.2 * 0.8 * len(texts))
    assert splits["backward"] == (train, test)
    assert splits["half"] == (train & set(texts[::2]), test & set(texts[::2]))
    more = put(source_of(texts), tokenizer, tmp_path / "more", 0.3)
    assert test < set(texts_of(more.validation, tokenizer))


def test_nothing_to_train_on_is_an_error(tokenizer, tmp_path):
    for texts, rate in (([""], 0.0), (["one two"], 1.0)):
        with pytest.raises(DataError, match="at least one document to train on"):
            put(source_of(texts), tokenizer, tmp_path / str(rate), rate)


@pytest.mark.parametrize("name", ["train/tokens-00000.bin", "validation/words-00000.bin", "train/offsets.npy"])
def test_a_file_of_another_size_is_an_error_that_names_it(tokenizer, tmp_path, name):
    put(source_of(random_texts(31), random_texts(17, seed=1)), tokenizer, tmp_path)
    path = tmp_path / "store" / name
    size = path.stat().st_size
    os.truncate(path, size - 2)
    with pytest.raises(DataError, match=rf"{path} has {size - 2} bytes, expected {size}"):
        open_store(tmp_path / "store")
    path.unlink()
    with pytest.raises(DataError, match=rf"damaged: .*{path}"):
        open_store(tmp_path / "store")


def test_verify_names_a_file_whose_contents_changed(tokenizer, tmp_path):
    store = put(source_of(random_texts(31)), tokenizer, tmp_path)
    store.verify()
    path = tmp_path / "store" / "train" / "tokens-00000.bin"
    raw = bytearray(path.read_bytes())
    raw[7] ^= 1
    path.write_bytes(raw)
    expected = store.manifest["files"]["train/tokens-00000.bin"]["sha256"]
    with pytest.raises(DataError, match=rf"{path} has SHA-256 \w+, expected {expected}"):
        open_store(tmp_path / "store").verify()
    config = DataConfig(source=str(tmp_path / "store"), verify=True)
    with pytest.raises(DataError, match="as it was written"):
        open_stores(config, Columns())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 2}'])
def test_a_manifest_that_is_none_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(DataError, match=f"{tmp_path}|damaged"):
        open_store(tmp_path)


@pytest.mark.parametrize(
    ("labels", "known", "names", "ids"),
    [
        (["10", "9", "2", "9"], None, ["2", "9", "10"], [2, 1, 0, 1]),
        (["b", "a", "c", "b"], None, ["a", "b", "c"], [1, 0, 2, 1]),
        (["True", "False", "False", "True"], None, ["False", "True"], [1, 0, 0, 1]),
        (["x", "z", "y", "z"], ["z", "y", "x"], ["z", "y", "x"], [2, 0, 1, 0]),
    ],
    ids=["integers", "strings", "booleans", "known names"],
)
def test_labels_become_indices_of_their_names(tokenizer, tmp_path, labels, known, names, ids):
    source = source_of(WORDS[:3], WORDS[3:4], labels, known)
    store = put(source, tokenizer, tmp_path, value="class")
    assert store.label_names == names
    found = [*store.train.values["labels"], *store.validation.values["labels"]]
    assert found == ids and store.train.values["labels"].dtype == np.int32
    settled = put(source, tokenizer, tmp_path / "settled", label_names=names[::-1], value="class")
    assert settled.label_names == names[::-1]
    assert [*settled.train.values["labels"], *settled.validation.values["labels"]] == [len(names) - 1 - i for i in ids]


@pytest.mark.parametrize("label", ["d", "3"])
def test_an_unknown_label_is_an_error_that_lists_the_known(tokenizer, tmp_path, label):
    with pytest.raises(DataError, match=rf"unknown label {label!r} in a record; known are a, b, c"):
        put(source_of(WORDS[:2], None, ["a", label]), tokenizer, tmp_path, label_names=["a", "b", "c"], value="class")
    assert not (tmp_path / "store").exists()


def test_a_document_without_a_label_is_an_error(tokenizer, tmp_path):
    with pytest.raises(DataError, match="every document must have a label"):
        put(source_of(WORDS[:3], None, ["a", None, "b"]), tokenizer, tmp_path, value="class")


@pytest.fixture
def corpus(tmp_path):
    """Two files of lines, one compressed."""
    texts = random_texts(2003)
    (tmp_path / "a.txt").write_text("\n".join(texts[:1500]))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("\n".join(texts[1500:]).encode()))
    return tmp_path


def arguments(corpus, tokenizer, out, *more):
    (corpus / "tokenizer.json").write_text(tokenizer.json)
    command = [sys.executable, "-m", "flax_encoder", "prepare", "--out", str(out)]
    return [*command, "--data.source", str(corpus / "a.txt"), "--data.text-unit", "line", "--data.tokenizer",
            str(corpus / "tokenizer.json"), *more]  # fmt: skip


def test_worker_processes_make_the_same_store_as_one(tokenizer, corpus, monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 10_000)
    config = DataConfig(source=str(corpus / "a.txt"), text_unit="line")
    source = open_source(config.source, config, Columns(), corpus)
    assert len(source.parts) > 5
    stores = [
        prepare(source, tokenizer, corpus / str(n), Columns(), held_out=HeldOut(0.1), workers=n)
        for n in (1, 2)
    ]
    assert stores[0].hash == stores[1].hash


def endless():
    while True:
        yield Record(("one two three",))
        time.sleep(0.0001)


def broken():
    yield Record(("one",))
    raise DataError("a file cannot be read to its end")


def test_one_part_that_cannot_be_read_ends_all(tokenizer, tmp_path):
    """The others are not waited for, who may have hours to go."""
    source = Source([Part("train", 9, endless), Part("train", 1, broken)], "f", None)
    began = time.monotonic()
    with pytest.raises(DataError, match="cannot be read to its end"):
        prepare(source, tokenizer, tmp_path / "out", Columns(), held_out=HeldOut(0.1), workers=2)
    assert time.monotonic() - began < 60


def test_a_tokenizer_is_not_trained_on_what_is_held_out(tmp_path):
    texts = random_texts(300)
    held_out = [text for text in texts if is_held_out(text_digest(text), 0.3)]
    assert 50 < len(held_out) < 150
    lines = [text.replace("o", "ø") for text in texts]  # a letter of its own for either side
    lines = [line for line in lines if is_held_out(text_digest(line), 0.3)] + [t for t in texts if t not in held_out]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    config = DataConfig(source=str(tmp_path / "a.txt"), text_unit="line", held_out_rate=0.3, vocab_size=100)
    tokenizer, (store,), _ = open_stores(dataclasses.replace(config, cache_dir=str(tmp_path / "cache")), Columns())
    assert "ø" not in tokenizer.json and len(store.validation) > 50


def test_a_store_is_not_prepared_again(tokenizer, corpus):
    prepare(source_of(random_texts(20)), tokenizer, corpus / "store", Columns(), held_out=HeldOut(0.1))
    config = DataConfig(source=str(corpus / "store"))
    with pytest.raises(DataError, match=r"store is one. Train with --data.source .*store\."):
        prepare_stores(config, corpus / "out", Columns(), workers=1, shard=(0, 1), progress=lambda m: None)


@pytest.mark.slow
def test_preparing_survives_kill_9_at_any_time(tokenizer, tmp_path):
    """Killed five times, a little later each; then it finishes what the others left, and leaves no process behind."""
    text = "\n".join(random_texts(20_011) * 3)
    (tmp_path / "a.txt").write_text(text)
    small = (
        "import flax_encoder.data.sources.files as f; f.PART_BYTES = 100_000; "
        "from flax_encoder.commands import main; main()"
    )
    command = arguments(tmp_path, tokenizer, tmp_path / "out", "--workers", "2")
    command[1:3] = ["-c", small]
    for seconds in (2.5, 3.0, 3.5, 4.0, 4.5):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    store = open_store(tmp_path / "out")
    store.verify()
    whole = sorted(texts_of(store.train, tokenizer) + texts_of(store.validation, tokenizer))
    assert whole == sorted(set(random_texts(20_011)))


def test_a_run_reads_a_store_a_mixture_or_a_source_alike(tokenizer, corpus):
    (corpus / "tokenizer.json").write_text(tokenizer.json)
    config = DataConfig(
        source=(str(corpus / "a.txt"), str(corpus / "b.txt.gz")), weights=(3.0, 1.0), text_unit="line",
        tokenizer=str(corpus / "tokenizer.json"), cache_dir=str(corpus / "cache"),
    )  # fmt: skip
    options = {"columns": Columns(), "workers": 1, "shard": (0, 1), "progress": lambda m: None}
    stores = prepare_stores(config, corpus / "out", **options)
    _, direct, weights = open_stores(config, Columns())
    mixture = dataclasses.replace(config, source=str(corpus / "out"), weights=None)
    _, mixed, mixed_weights = open_stores(mixture, Columns())
    assert [s.hash for s in stores] == [s.hash for s in direct] == [s.hash for s in mixed]
    assert weights == [3.0, 1.0] and mixed_weights == [0.75, 0.25]
    found, single, _ = open_stores(DataConfig(source=str(stores[1].folder)), Columns())
    assert found == tokenizer and single[0].hash == stores[1].hash  # the store brings its tokenizer


def test_a_store_by_another_tokenizer_is_an_error_that_names_both(tokenizer, tmp_path):
    put(source_of(random_texts(31)), tokenizer, tmp_path)
    other = train_wordpiece(["a b c"] * 2, 41)
    with pytest.raises(DataError, match=f"was with {tokenizer.hash}, the run has {other.hash}"):
        open_stores(DataConfig(source=str(tmp_path / "store")), Columns(), tokenizer=TextTokenizer(other.json))


def test_a_store_is_never_overwritten_by_a_mixture_nor_the_other_way(tokenizer, corpus):
    (corpus / "tokenizer.json").write_text(tokenizer.json)
    one = DataConfig(source=str(corpus / "a.txt"), text_unit="line", tokenizer=str(corpus / "tokenizer.json"))
    two = dataclasses.replace(one, source=(str(corpus / "a.txt"), str(corpus / "b.txt.gz")))
    options = {"columns": Columns(), "workers": 1, "shard": (0, 1), "progress": lambda m: None}
    (corpus / "empty").mkdir()
    prepare_stores(one, corpus / "empty", **options)  # an empty folder is as good as none
    with pytest.raises(DataError, match=r"empty is a store\. Name another --out"):
        prepare_stores(two, corpus / "empty", **options)
    prepare_stores(two, corpus / "mixture", **options)
    with pytest.raises(DataError, match=r"mixture is a mixture\. Name another --out"):
        prepare_stores(one, corpus / "mixture", **options)
    with pytest.raises(DataError, match=r"needs --data\.weights, one for each"):
        open_stores(dataclasses.replace(one, source=(str(corpus / "mixture"), str(corpus / "empty"))), Columns())
    with pytest.raises(DataError, match="was prepared with none"):
        open_stores(dataclasses.replace(one, source=str(corpus / "empty")), Columns("class"))
    (corpus / "mixture" / MANIFEST).unlink()
    partial_folder(corpus / "mixture").mkdir()
    with pytest.raises(DataError, match="was interrupted"):
        open_stores(dataclasses.replace(one, source=str(corpus / "mixture")), Columns())


def test_labels_of_a_store_must_be_the_models_in_their_order(tokenizer, tmp_path):
    put(source_of(WORDS[:4], WORDS[4:6], ["b", "a", "b", "a", "b", "a"]), tokenizer, tmp_path, value="class")
    config = DataConfig(source=str(tmp_path / "store"))
    open_stores(config, Columns("class"), label_names=["a", "b"])
    with pytest.raises(DataError, match=r"has \['a', 'b'\], the model \['b', 'a'\]"):
        open_stores(config, Columns("class"), label_names=["b", "a"])


def test_what_a_kill_left_beside_a_whole_store_is_removed(tokenizer, tmp_path):
    source = source_of(random_texts(31))
    put(source, tokenizer, tmp_path)
    (partial_folder(tmp_path / "store") / "000000").mkdir(parents=True)
    put(source, tokenizer, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]


def test_prepare_refuses_settings_that_say_how_a_run_reads(tokenizer, corpus):
    command = arguments(corpus, tokenizer, corpus / "out", "--data.row-length", "64")
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1 and "--data.row-length says how a run reads them" in failed.stderr
    command = arguments(corpus, tokenizer, corpus / "out", "--shard", "2/2")
    assert "--shard is i/n with i from 0 to below n: got 2/2" in subprocess.run(
        command, capture_output=True, text=True).stderr  # fmt: skip


def test_inspect_tells_what_is_in_a_store(tokenizer, corpus):
    made = subprocess.run([*arguments(corpus, tokenizer, corpus / "out"), "--json"], capture_output=True, text=True)
    manifest = json.loads(made.stdout)[0]
    command = [sys.executable, "-m", "flax_encoder", "inspect", str(corpus / "out"), "--verify"]
    told = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    summary = json.loads(told.stdout)
    assert summary["splits"] == manifest["splits"] and summary["hash"] == manifest["hash"]
    assert sum(b["documents"] for b in summary["length_histogram"]) == manifest["splits"]["train"]["documents"]
    assert all(0.9 < row["fill_rate"] <= 1 for row in summary["packing"])
    for kind in ("token", "whole_word", "span"):
        shown = subprocess.run(
            [*command, "--kind", kind, "--rate", "0.3", "--plot", str(corpus / "a.png")],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert "every file is as it was written" in shown and "[CLS]" in shown and "[MASK]⟨" in shown
    assert (corpus / "a.png").stat().st_size > 10_000
    shutil.rmtree(corpus / "out" / "validation")
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1 and "prepared text is damaged" in failed.stderr


def test_text_in_which_nothing_can_be_predicted_is_refused_and_unknown_tokens_are_counted(tokenizer, tmp_path, caplog):
    foreign = [f"ж{'ж' * i} ш" for i in range(9)]
    with pytest.raises(DataError, match=r"of the 18 in the train split of .* 18 are unknown and the others special"):
        put(source_of(foreign), tokenizer, tmp_path)
    with pytest.raises(DataError, match=r"in the validation split .* or hold out more, by --data.held-out-rate"):
        put(source_of(random_texts(9), foreign), tokenizer, tmp_path / "held-out")
    store = put(source_of([*random_texts(5), *foreign], random_texts(3, 1)), tokenizer, tmp_path / "mixed")
    assert [store.manifest["splits"][split]["unknown"] for split in ("train", "validation")] == [18, 0]
    (tmp_path / "t.txt").write_text("\n\n".join([*random_texts(5), *foreign]))
    (tmp_path / "tokenizer.json").write_text(tokenizer.json)
    config = DataConfig(source=str(tmp_path / "t.txt"), tokenizer=str(tmp_path / "tokenizer.json"), held_out_rate=0.0)
    prepare_stores(config, tmp_path / "out", Columns(), workers=1, shard=(0, 1), progress=lambda message: None)
    assert "tokens (" in caplog.text and "are [UNK], of which a model learns nothing" in caplog.text
