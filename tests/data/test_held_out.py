"""What a run is evaluated on is never trained on, whoever holds it out, and every class has its share."""

import dataclasses
import json

import numpy as np
import pytest

from flax_encoder.config import DataConfig
from flax_encoder.data.pipeline import open_stores
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.tokenizer import train_wordpiece

WORDS = ["rows", "of", "pieces", "are", "packed", "and", "masked", "by", "number", "so", "that", "any", "process"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([" ".join(WORDS)] * 2, 83)


def texts(count, seed):
    rng = np.random.default_rng(seed)
    return list(dict.fromkeys(" ".join(rng.choice(WORDS, 9)) for _ in range(count)))


def write(path, rows, labels=None):
    rows = [{"text": text} for text in rows] if labels is None else [
        {"text": text, "label": label} for text, label in zip(rows, labels, strict=True)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def split_texts(split, tokenizer):
    return [] if split is None else [tokenizer.decode(split.document(i)) for i in range(len(split))]


def labelled(count, seed):
    found = texts(count, seed)
    return found, ["rare" if i % 10 == 0 else "often" for i in range(len(found))]


def test_each_class_has_its_share_held_out(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", *labelled(1000, 0))
    config = DataConfig(source=source, held_out_rate=0.1, cache_dir=str(tmp_path / "cache"))
    _, [store], _ = open_stores(config, Columns("class"), tokenizer=tokenizer)
    train, held_out = (np.bincount(s.values["labels"]) for s in (store.train, store.validation))
    assert held_out.tolist() == [round(0.1 * n) for n in train + held_out]
    _, [plain], _ = open_stores(
        dataclasses.replace(config, held_out_by_class=False), Columns("class"), tokenizer=tokenizer
    )
    assert np.bincount(plain.validation.values["labels"]).tolist() != held_out.tolist()


def test_named_files_are_the_splits_and_training_leaves_their_texts_out(tmp_path, tokenizer):
    train, labels = labelled(300, 1)
    validation, test = labelled(40, 2), labelled(50, 3)
    both = [*train, *validation[0][:7], *test[0][:11]], [*labels, *validation[1][:7], *test[1][:11]]
    config = DataConfig(
        source=write(tmp_path / "train.jsonl", *both), validation=write(tmp_path / "validation.jsonl", *validation),
        test=write(tmp_path / "test.jsonl", *test), cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    _, [store], _ = open_stores(config, Columns("class"), tokenizer=tokenizer)
    assert sorted(split_texts(store.train, tokenizer)) == sorted(train)
    assert sorted(split_texts(store.validation, tokenizer)) == sorted(validation[0])
    assert sorted(split_texts(store.test, tokenizer)) == sorted(test[0])
    assert store.manifest["dropped"]["also held out"] == 18


def test_a_published_test_split_is_kept_whole_and_training_leaves_its_texts_out(tmp_path, tokenizer):
    pytest.importorskip("datasets", reason="reads hf: sources")
    (train, labels), (test, others) = labelled(200, 11), labelled(40, 12)
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", [*train, *test[:9]], [*labels, *others[:9]])
    write(tmp_path / "set" / "test.jsonl", [*test, test[0]], [*others, others[0]])
    config = DataConfig(source=f"hf:{tmp_path / 'set'}", cache_dir=str(tmp_path / "cache"))
    _, [store], _ = open_stores(config, Columns("class"), tokenizer=tokenizer)
    assert store.separate_test is None and store.test is store.validation
    assert sorted(split_texts(store.test, tokenizer)) == sorted([*test, test[0]])
    assert sorted(split_texts(store.train, tokenizer)) == sorted(train)
    assert store.manifest["dropped"]["also held out"] == 9


@pytest.mark.parametrize("value", ["none", "class"])
def test_with_a_test_file_alone_others_are_held_out_to_choose_by(tmp_path, tokenizer, value):
    train, test = labelled(400, 4), labelled(60, 5)
    config = DataConfig(
        source=write(tmp_path / "train.jsonl", *train), test=write(tmp_path / "test.jsonl", *test), held_out_rate=0.1,
        text_column="text", cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    _, [store], _ = open_stores(config, Columns(value), tokenizer=tokenizer)
    assert sorted(split_texts(store.test, tokenizer)) == sorted(test[0])
    chosen = split_texts(store.validation, tokenizer)
    assert 20 < len(chosen) < 70 and set(chosen) < set(train[0])
    assert sorted([*split_texts(store.train, tokenizer), *chosen]) == sorted(train[0])


def test_a_mixture_trains_on_nothing_that_one_of_its_sources_holds_out(tmp_path, tokenizer):
    """The second has the first's texts, too, and its documents fall under the same hash."""
    first, more = texts(300, 6), texts(200, 7)
    config = DataConfig(
        source=(write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", [*more, *first[:150]])),
        held_out_rate=0.2, text_column="text", cache_dir=str(tmp_path / "cache"),
        validation=write(tmp_path / "v.jsonl", [*texts(50, 8), *first[:10], *more[:10]]),
    )  # fmt: skip
    _, stores, _ = open_stores(config, Columns(), tokenizer=tokenizer)
    trained = {text for store in stores for text in split_texts(store.train, tokenizer)}
    held_out = {text for store in stores for text in split_texts(store.validation, tokenizer)}
    assert len(trained) > 200 and len(held_out) > 50 and not trained & held_out


def test_a_text_with_two_labels_is_kept_twice_on_one_side_and_counted(tmp_path, tokenizer):
    found, labels = labelled(200, 9)
    source = write(tmp_path / "a.jsonl", [*found, *found[:30]], [*labels, *["often", "rare"] * 15])
    config = DataConfig(source=source, held_out_rate=0.2, cache_dir=str(tmp_path / "cache"))
    _, [store], _ = open_stores(config, Columns("class"), tokenizer=tokenizer)
    same = sum(a == b for a, b in zip(labels[:30], ["often", "rare"] * 15, strict=True))
    assert store.manifest["contradictory"] == 30 - same and store.manifest["dropped"]["duplicate"] == same
    train, held_out = (set(split_texts(s, tokenizer)) for s in (store.train, store.validation))
    assert not train & held_out


def test_a_label_that_only_held_out_documents_have_names_the_record(tmp_path, tokenizer):
    config = DataConfig(
        source=write(tmp_path / "train.jsonl", *labelled(50, 10)), cache_dir=str(tmp_path / "cache"),
        test=write(tmp_path / "test.jsonl", ["rows of pieces", "so that any"], ["often", "never"]),
    )  # fmt: skip
    with pytest.raises(DataError, match=r"every label must occur in training: 'never' of .*test\.jsonl, line 2"):
        open_stores(config, Columns("class"), tokenizer=tokenizer)
