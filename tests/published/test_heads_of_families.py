"""What is taught from a masked-LM run takes the head that its family publishes, so that it can be exported."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from flax_encoder.commands import main
from flax_encoder.config import ConfigError, DataConfig, HeadConfig, RunConfig
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from flax_encoder.published.weights import read_weights, write_weights
from flax_encoder.runs.as_published import export_note, published_config
from flax_encoder.runs.exchange import export_run, import_folder
from flax_encoder.runs.load import load, read_origin
from flax_encoder.runs.start import like_origin
from flax_encoder.runs.train import train
from flax_encoder.tasks import TASKS
from tests.runs import tiny, with_fields

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FOLDERS = sorted(path.name for path in GOLDEN.glob("*-masked_lm"))
HEADED = [name for name, task in TASKS.items() if task.head not in (None, "masked_lm")]


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> pathlib.Path:
    """A masked-LM run of each family's folder."""
    home, tokenizer = tmp_path_factory.mktemp("families"), train_wordpiece(["the list holds a value"] * 3, 43)
    for name in FOLDERS:
        shutil.copytree(GOLDEN / name, home / f"{name}-published")
        (home / f"{name}-published/tokenizer.json").write_text(tokenizer.json)
        import_folder(home / f"{name}-published", home / name)
    return home


@pytest.mark.parametrize("name", FOLDERS)
def test_every_head_that_a_family_has_is_exported_from_its_masked_lm_run(imported, name):
    model_type = json.loads((GOLDEN / name / "config.json").read_text())["model_type"]
    record, _ = read_origin(imported / name, "masked_lm")
    length = DataConfig(row_length=9)
    for objective in HEADED:
        config = like_origin(RunConfig(objective=objective, data=length), record, has_head=False)
        head = TASKS[objective].head
        try:
            family, published, _ = published_config(config, model_type, head)
        except ConfigError as error:
            reasons = f"{model_type} has no {head} head", f"the {head} head of {model_type} is of another objective"
            assert any(reason in str(error) for reason in reasons)
            continue
        assert family.model_type == model_type and published["architectures"] == [family.heads[head].architectures[0]]
        assert export_note(config) is None
        # One that is asked for stays.
        asked = RunConfig(objective=objective, data=length, head=HeadConfig(out_bias=False))
        assert like_origin(asked, record, has_head=False).head == asked.head


def test_a_masked_lm_head_in_the_old_spelling_is_left_out_by_other_tasks(imported, tmp_path):
    """As of Google's first folders, whose norms have gamma and beta."""
    folder = pathlib.Path(shutil.copytree(imported / "bert-masked_lm-published", tmp_path / "old"))
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {
        next((name.replace(new, before) for new, before in old.items() if name.endswith(new)), name): value
        for name, value in read_weights(folder).items()
    }
    assert any(name.startswith("cls.") and name.endswith("gamma") for name in tensors)
    (folder / "model.safetensors").unlink()
    write_weights(folder, tensors, "float32")
    assert read_origin(folder, "classification")[0].config.objective == "classification"


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("bert-classification", {"classification"}),
        ("xlm-roberta-token_classification", {"token_classification"}),
    ],
)
def test_a_folder_is_asked_by_its_own_head_alone(tmp_path, name, own):
    """Heads of a family give their tensors one name: BERT's classes and tags are both `classifier`."""
    folder = pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    (folder / "tokenizer.json").write_text(train_wordpiece(["the list holds a value"] * 3, 43).json)
    asked = set()
    for objective in TASKS:
        try:
            run = load(folder, objective=objective)
        except ConfigError as error:
            refused = f"{folder} has a ", f" asked for is {objective}. Leave --objective out; or `train --objective"
            assert all(part in str(error) for part in refused) or " has no " in str(error)
            continue
        asked |= set() if run.fresh else {objective}
    assert asked - {"contrastive"} == own  # which has no head
    record, params = read_origin(folder, "multiple_choice")
    assert record.label_names is None and "out" not in params.get("head", {})


def test_a_run_is_asked_what_it_learned(imported, corpus, capsys):
    run, headless = imported / "bert-masked_lm", imported / "bert-headless"
    with pytest.raises(ConfigError, match=r"is a run of masked_lm, and the objective asked for is classification. Lea"):
        load(run, objective="classification")
    export_run(imported / "bert-masked_lm-published", headless, encoder_only=True)
    with pytest.raises(SystemExit):
        main(["evaluate", str(headless), "--data.source", str(corpus / "lines.txt")])
    assert "asked by the head that it was trained with: the folder has no head." in capsys.readouterr().err


def test_a_head_that_no_family_has_is_said_before_training(imported):
    record, _ = read_origin(imported / "bert-masked_lm", "masked_lm")
    config = RunConfig(objective="classification", pooling="mean", data=DataConfig(row_length=9))
    note = export_note(like_origin(config, record, has_head=False))
    assert note is not None and "not exported whole" in note and "pooling mean (there cls)" in note
    modern, _ = read_origin(imported / "modernbert-masked_lm", "masked_lm")
    assert export_note(like_origin(config, modern, has_head=False)) is None
    late = RunConfig(objective="classification", pooling="late", data=DataConfig(row_length=9))
    assert "pooling late (there cls)" in str(export_note(like_origin(late, modern, has_head=False)))
    # No family has the encoder: that is no news of this run's.
    assert export_note(RunConfig(objective="classification", pooling="mean")) is not None
    assert export_note(with_fields(config, model__position="sinusoidal", model__norm_placement="pre")) is None


def test_a_classifier_of_a_masked_lm_run_answers_the_same_once_exported(imported, corpus, tmp_path, one_device):
    config = tiny(corpus, tmp_path / "run", objective="classification", steps=2, init_from=str(imported / FOLDERS[-2]))
    config = with_fields(config, data__source=str(corpus / "rows.jsonl"), data__row_length=64)
    train(config)
    export_run(tmp_path / "run", tmp_path / "out")
    texts = ["the list holds a value", "a value"]
    ours, theirs = (list(load(tmp_path / folder).predict(texts)) for folder in ("run", "out"))
    for mine, again in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.pop("probability"), again.pop("probability"), rtol=1e-5)
        assert mine["label"] == again["label"]
