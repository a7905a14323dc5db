"""The corpus that every interpreter carries: sizes of its classes, and that nothing leaks into the held-out part."""

from collections import Counter

import pytest

from flax_encoder.config import DataConfig
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.opening import open_source
from flax_encoder.data.sources.python_docs import AREAS, documents
from flax_encoder.data.sources.python_docs import test_modules as held_out_modules


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(config, column) -> split -> records."""
    cache_dir = tmp_path_factory.mktemp("cache")
    found = {}
    for config in ("text", "topics"):
        for column in ("text", "module"):
            data = DataConfig(source=f"tfds:python_docs/{config}", text_column=column)
            source = open_source(data.source, data, Columns("class" if config == "topics" else "none"), cache_dir)
            found[config, column] = {split: list(source.records(split)) for split in ("train", "test")}
            assert source.label_names == (list(AREAS) if config == "topics" else None)
    return found


def values(records, name="text"):
    return [record.texts[0] if name == "text" else record.value for record in records]


def test_every_area_is_a_learnable_class(corpus):
    train, test = (corpus["topics", "text"][split] for split in ("train", "test"))
    counts = Counter(values(train, "label"))
    assert len(AREAS) >= 8 and set(counts) == set(AREAS)
    shares = [count / len(train) for count in counts.values()]
    assert min(shares) >= 0.02 and max(shares) <= 0.25
    assert set(values(test, "label")) == set(counts)


@pytest.mark.parametrize("config", ["text", "topics"])
@pytest.mark.parametrize("column", ["text", "module"])
def test_no_text_and_no_module_is_in_both_splits(corpus, config, column):
    train, test = (values(corpus[config, column][split]) for split in ("train", "test"))
    assert train and test and not set(train) & set(test)
    if column == "text":
        assert len(set(train + test)) == len(train + test)
        assert all(text == text.strip() and len(text) >= 40 for text in train + test)


def test_both_configs_agree_on_the_split(corpus):
    for column in ("text", "module"):
        for split in ("train", "test"):
            of_text, of_topics = (set(values(corpus[config, column][split])) for config in ("text", "topics"))
            assert of_topics < of_text or (split == "test" and of_topics <= of_text)


def test_labels_are_the_areas_of_their_modules(corpus):
    area_of = {module: area for area, modules in AREAS.items() for module in modules.split()}
    for split in ("train", "test"):
        for record in corpus["topics", "module"][split]:
            assert area_of[record.texts[0].split(".")[0]] == record.value


def test_a_module_stands_in_one_area():
    listed = Counter(module for modules in AREAS.values() for module in set(modules.split()))
    assert [module for module, times in listed.items() if times > 1] == []


def test_about_a_tenth_is_held_out_and_never_much_more_of_any_area(corpus):
    train, test = (Counter(values(corpus["topics", "text"][split], "label")) for split in ("train", "test"))
    assert 0.08 < test.total() / (test.total() + train.total()) < 0.12
    for area in AREAS:
        assert test[area] / (test[area] + train[area]) <= 0.12, area


def test_the_choice_of_held_out_modules_depends_on_counts_alone():
    texts, held_out = documents()
    counts = Counter(module for module, _ in texts)
    assert held_out_modules(dict(reversed(counts.items()))) == held_out
    assert held_out < set(counts)
