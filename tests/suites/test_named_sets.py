"""Sets by name: what TensorFlow Datasets' own builders make of each archive is what the archive's files give."""

import pathlib
import shutil

import pytest

from flax_encoder.data.sources.named import named_columns
from flax_encoder.data.sources.opening import open_source
from flax_encoder.data.sources.records import DataError
from flax_encoder.runs.suite_data import open_place
from flax_encoder.runs.suites import SUITES
from flax_encoder.tasks import find_task
from tests.suites import made_sets

BUILT = {
    task.name: (suite, task) for suite, tasks in SUITES.items() for task in tasks
    if task.tfds is not None and suite != "superglue" and task.name != "wikiann_en"  # whose builders need TensorFlow
}  # fmt: skip
CONLL = {"eng.train": "train.txt", "eng.testa": "valid.txt", "eng.testb": "test.txt"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    """Archives as TensorFlow Datasets downloads them: with test files too, and names of its own."""
    folder = tmp_path_factory.mktemp("sets")
    for suite in ("glue", "ner", "qa"):
        getattr(made_sets, f"write_{suite}")(folder / suite)
    for path in list((folder / "glue").rglob("dev*.tsv")):
        shutil.copy(path, path.with_name(path.name.replace("dev", "test")))
    qqp = folder / "glue/QQP/train.tsv"  # its torn line is for the reader of files
    qqp.write_text("\n".join(line for line in qqp.read_text().splitlines() if "without the rest" not in line) + "\n")
    for theirs, name in CONLL.items():
        shutil.copy(folder / "ner/conll2003" / theirs, folder / "ner/conll2003" / name)
    (folder / "glue/CoLA/test.tsv").write_text("index\tsentence\n0\ta sentence\n")  # the only one with a header
    return folder


def place_of(task, made, suite, monkeypatch, tmp_path):
    """The task's data by name, its archive being the one that was made."""
    tfds = pytest.importorskip("tensorflow_datasets")
    home = made / suite
    ids = [line.split("\t")[1:3] for line in (made / "glue/MRPC/dev.tsv").read_text("utf-8").splitlines()[1:]]
    whole, rows = tmp_path / "msr.txt", [(made / f"glue/MRPC/{s}.tsv").read_text("utf-8") for s in ("train", "dev")]
    renamed = [line.split("\t") for line in rows[1].splitlines()[1:]]
    moved = ["\t".join([quality, f"9{a}", f"9{b}", *texts]) for quality, a, b, *texts in renamed]
    whole.write_text(rows[0] + "\n".join(moved) + "\n", "utf-8")
    (tmp_path / "ids.tsv").write_text("".join(f"9{a}\t9{b}\n" for a, b in ids))

    def found(url):
        if isinstance(url, dict):
            return {name: found(part) for name, part in url.items()}
        names = {"mrpc_dev_ids": tmp_path / "ids.tsv", "msr_paraphrase": whole}
        if match := next((path for part, path in names.items() if part in str(url)), None):
            return match
        local = {"conll2003": home / "conll2003", "SQuAD": home / task.name / str(url).rpartition("/")[2]}
        return next((path for part, path in local.items() if part in str(url)), home)

    manager = tfds.download.DownloadManager
    monkeypatch.setattr(manager, "download", lambda self, url: found(url))
    monkeypatch.setattr(manager, "download_and_extract", lambda self, url: found(url))
    return open_place(task, None, "tfds", tmp_path / "named")


def documents_of(place, task, tmp_path):
    """Of each split its texts with their values. Classes, whose names differ, are the sets of texts that have each."""
    columns, found = find_task(task.objective).reading.columns, {}
    for name, (config, split) in {"train": (place.train, "train"), **place.reported}.items():
        source = open_source(config.sources[0], config, columns, tmp_path)
        records = list(source.records(split or "train"))
        assert len(records) > 0
        found[name] = sorted((record.texts, record.value) for record in records)
        if columns.value == "class":
            of_class = {value: {texts for texts, v in found[name] if v == value} for _, value in found[name]}
            found[name] = sorted(map(sorted, of_class.values()))
    return found


@pytest.mark.parametrize("name", BUILT)
def test_a_set_by_name_is_its_archive(made, tmp_path, monkeypatch, name):
    suite, task = BUILT[name]
    monkeypatch.setenv("FLAX_ENCODER_CACHE", str(tmp_path / "cache"))
    by_name = place_of(task, made, suite, monkeypatch, tmp_path)
    from_files = open_place(task, made / suite, "tfds", tmp_path / "files")
    assert documents_of(by_name, task, tmp_path) == documents_of(from_files, task, tmp_path)


def test_a_name_that_cannot_be_had_is_said_in_a_line(tmp_path):
    with pytest.raises(DataError, match=r"no set of this name\. Names like it: glue\.$"):
        named_columns("tfds:glu/cola", tmp_path)
    try:
        import tensorflow as _  # noqa: F401
    except ImportError:
        with pytest.raises(DataError, match=r"needs tensorflow\. pip install tensorflow, or take the set from hf:"):
            named_columns("tfds:super_glue/boolq", tmp_path)
