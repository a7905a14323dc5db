"""The prepared store: whole or absent, each text once, held-out text apart."""

import shutil

import numpy as np
import pytest

from flax_encoder.data import store as store_module
from flax_encoder.data.sources import DataError, Source
from flax_encoder.data.store import open_store, prepare
from flax_encoder.data.tokenizer import train_wordpiece

WORDS = ["one", "two", "three", "five", "seven", "eleven", "thirteen", "seventeen", "nineteen", "twenty"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([" ".join(WORDS)] * 2, 83)


def random_texts(num_texts, seed=0):
    rng = np.random.default_rng(seed)
    return list(dict.fromkeys(" ".join(rng.choice(WORDS, rng.integers(5, 13))) for _ in range(num_texts)))


def source_of(train, test=None, labels=None, label_names=None, fingerprint="f"):
    """Texts as a source; labels, if any, of train and then of test."""
    def reader(texts, labels):
        records = [{"text": text} for text in texts]
        for record, label in zip(records, labels or [], strict=bool(labels)):
            record["label"] = label
        return lambda: iter(records)

    splits = {"train": reader(train, labels and labels[: len(train)])}
    if test is not None:
        splits["test"] = reader(test, labels and labels[len(train) :])
    return Source(splits, fingerprint, label_names)


def texts_of(split, tokenizer):
    return [tokenizer.decode(ids.tolist()) for ids in np.split(split.tokens, split.offsets[1:-1])]


def folders(cache_dir):
    return sorted(p.name for p in (cache_dir / "stores").iterdir())


def test_a_store_holds_what_was_put_in_and_is_found_again(tokenizer, tmp_path):
    train, test = random_texts(1511), random_texts(53, seed=1)
    store = prepare(source_of(train, test), tokenizer, 0.5, tmp_path)
    assert texts_of(store.train, tokenizer) == train and texts_of(store.test, tokenizer) == test
    assert store.train.tokens.dtype == np.uint16 and store.train.labels is store.label_names is None
    assert store.manifest["splits"]["test"] == {"documents": 53, "tokens": int(store.test.lengths.sum())}

    def unread():
        raise AssertionError("the store was there already")

    again = prepare(Source({"train": unread, "test": unread}, "f"), tokenizer, 0.5, tmp_path)
    np.testing.assert_array_equal(again.train.tokens, store.train.tokens)
    for other in (source_of(train[1:], test, fingerprint="g"), source_of(train, None)):
        prepare(other, tokenizer, 0.25, tmp_path)
    assert len(folders(tmp_path)) == 3


@pytest.mark.parametrize("cleans_up", [True, False])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_killed_preparation_is_never_taken_for_whole(tokenizer, tmp_path, monkeypatch, error, cleans_up):
    texts = random_texts(1511)

    def dies():
        yield from ({"text": t} for t in texts[:1300])  # beyond the first batch that is written
        raise error("killed")

    with monkeypatch.context() as patch:
        if not cleans_up:  # as when the process is killed outright
            patch.setattr(store_module.shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(error, match="killed"):
            prepare(Source({"train": dies}, "f"), tokenizer, 0.1, tmp_path)
    left = folders(tmp_path)
    assert len(left) == (0 if cleans_up else 1)
    store = prepare(source_of(texts), tokenizer, 0.1, tmp_path)
    assert sorted(texts_of(store.train, tokenizer) + texts_of(store.test, tokenizer)) == sorted(texts)
    (new,) = set(folders(tmp_path)) - set(left)
    assert open_store(tmp_path / "stores" / new).manifest == store.manifest


def test_a_store_that_another_process_finished_first_stays(tokenizer, tmp_path):
    texts = random_texts(31)

    def slow():
        prepare(source_of(texts), tokenizer, 0.1, tmp_path)
        yield from ({"text": t} for t in texts)

    store = prepare(Source({"train": slow}, "f"), tokenizer, 0.1, tmp_path)
    assert len(store.train.lengths) + len(store.test.lengths) == 31 and len(folders(tmp_path)) == 1


def test_duplicates_and_empties_are_dropped_and_counted(tokenizer, tmp_path):
    train = ["one two", "", " \n\t", "one two", " one two\n", "three", "one  two", "\u200b"]
    store = prepare(source_of(train, ["three", "five", "five", ""]), tokenizer, 0.0, tmp_path)
    assert texts_of(store.train, tokenizer) == ["one two", "three", "one two"]  # of which one has two blanks
    assert texts_of(store.test, tokenizer) == ["five"]
    assert store.manifest["dropped"] == {"empty": 4, "duplicate": 4}


def test_the_held_out_split_is_a_hash_of_the_text(tokenizer, tmp_path):
    texts = random_texts(2003)
    splits = {}
    for name, order in (("forward", texts), ("backward", texts[::-1]), ("half", texts[::2])):
        store = prepare(source_of(order, fingerprint=name), tokenizer, 0.2, tmp_path)
        splits[name] = set(texts_of(store.train, tokenizer)), set(texts_of(store.test, tokenizer))
    train, test = splits["forward"]
    assert not train & test and train | test == set(texts)
    assert abs(len(test) - 0.2 * len(texts)) < 4 * np.sqrt(0.2 * 0.8 * len(texts))
    assert splits["backward"] == (train, test)
    assert splits["half"] == (train & set(texts[::2]), test & set(texts[::2]))
    more = prepare(source_of(texts), tokenizer, 0.3, tmp_path)
    assert test < set(texts_of(more.test, tokenizer))


def test_nothing_to_train_on_is_an_error(tokenizer, tmp_path):
    for texts, rate in (([""], 0.0), (["one two"], 1.0)):
        with pytest.raises(DataError, match="at least one document to train on"):
            prepare(source_of(texts, fingerprint=str(rate)), tokenizer, rate, tmp_path)


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_truncated_file_is_an_error_that_names_it(tokenizer, tmp_path, name):
    source = source_of(random_texts(31), random_texts(7, seed=1))
    prepare(source, tokenizer, 0.0, tmp_path)
    path = tmp_path / "stores" / folders(tmp_path)[0] / name / "tokens.bin"
    size = path.stat().st_size
    with path.open("r+b") as f:
        f.truncate(size - 2)
    with pytest.raises(DataError, match=rf"{path} has {size - 2} bytes, expected {size}"):
        prepare(source, tokenizer, 0.0, tmp_path)
    shutil.rmtree(path.parent.parent)
    assert len(prepare(source, tokenizer, 0.0, tmp_path).train.lengths) == 31


@pytest.mark.parametrize(
    ("labels", "known", "names", "ids"),
    [
        ([10, 9, 9, 2], None, ["2", "9", "10"], [2, 1, 1, 0]),
        (["b", "a", "c", "b"], None, ["a", "b", "c"], [1, 0, 2, 1]),
        ([True, False, False, True], None, ["False", "True"], [1, 0, 0, 1]),
        ([2, 0, 0, 1], ["z", "y", "x"], ["z", "y", "x"], [2, 0, 0, 1]),
        (["x", "z", "z", "y"], ["z", "y", "x"], ["z", "y", "x"], [2, 0, 0, 1]),
    ],
    ids=["integers", "strings", "booleans", "indices of known names", "known names"],
)
def test_labels_become_indices_of_their_names(tokenizer, tmp_path, labels, known, names, ids):
    source = source_of(WORDS[:3], WORDS[3:4], labels, known)
    store = prepare(source, tokenizer, 0.0, tmp_path)
    assert store.label_names == names
    assert [*store.train.labels, *store.test.labels] == ids and store.train.labels.dtype == np.int32
    settled = prepare(source, tokenizer, 0.0, tmp_path, label_names=names[::-1])
    assert settled.label_names == names[::-1]
    assert [*settled.train.labels, *settled.test.labels] == [len(names) - 1 - i for i in ids]


def test_integers_of_a_source_that_names_its_labels_are_indices_whatever_the_names(tokenizer, tmp_path):
    store = prepare(source_of(WORDS[:4], None, [0, 1, 1, 0], ["1", "2"]), tokenizer, 0.0, tmp_path)
    assert store.train.labels.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("label", ["d", 3, -1])
def test_an_unknown_label_is_an_error_that_lists_the_known(tokenizer, tmp_path, label):
    with pytest.raises(DataError, match=rf"unknown label {label!r}; known are a, b, c"):
        prepare(source_of(WORDS[:2], None, ["a", label]), tokenizer, 0.0, tmp_path, label_names=["a", "b", "c"])
    assert folders(tmp_path) == []


def test_a_document_without_a_label_is_an_error(tokenizer, tmp_path):
    with pytest.raises(DataError, match="every document must have a label"):
        prepare(source_of(WORDS[:3], None, ["a", None, "b"]), tokenizer, 0.0, tmp_path)
