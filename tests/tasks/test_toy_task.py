"""A task is one record: one that is made up here trains, resumes, evaluates and predicts, with no edit elsewhere."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_encoder.commands import main
from flax_encoder.commands.recipe import parse_run_config
from flax_encoder.config import ConfigError, RunConfig
from flax_encoder.data.reading import Reading
from flax_encoder.data.sources.columns import Columns
from flax_encoder.nn.encoder import Encoder
from flax_encoder.nn.heads import ClassificationHead, gather_rows
from flax_encoder.runs.load import load
from flax_encoder.tasks import TASKS, Task, check_task
from flax_encoder.tasks.loss import LossSum
from flax_encoder.training.run_log import read_metrics
from tests.runs import losses, tiny
from tests.test_train import Stops
from train import train


class LengthModel(nnx.Module):
    """Tells how many tokens a document has, from its first token's vector."""

    def __init__(self, config, *, rngs):
        self.encoder = Encoder(config, rngs=rngs)
        self.head = ClassificationHead(config, 1, rngs=rngs)

    def __call__(self, batch, *, key=None):
        rows = (batch["tokens"], batch["segment_ids"], batch["positions"])
        return self.head(gather_rows(self.encoder(*rows, key=key), batch["target_positions"]))[..., 0]

    def loss(self, batch, *, key=None):
        error = jnp.square(self(batch, key=key) - batch["targets"] / 10) * batch["target_weights"]
        return LossSum(error.sum(), batch["target_weights"].sum(), {})

    def outputs(self, batch):
        return {"length": self(batch) * 10}


def count_tokens(documents, max_pieces, rows):
    shape = (len(rows.address), max_pieces)
    batch = {"target_positions": np.zeros(shape, np.int32), "targets": np.zeros(shape, np.float32)}
    batch |= {"target_weights": np.zeros(shape, np.float32), "owners": np.full(shape, -1, np.int32)}
    row, column = np.nonzero((rows.batch["positions"] == 0) & (rows.batch["segment_ids"] > 0))
    slot = rows.batch["segment_ids"][row, column] - 1
    batch["target_positions"][row, slot] = column
    batch["targets"][row, slot] = rows.pieces.length
    batch["target_weights"][row, slot] = 1
    batch["owners"][row, slot] = documents.documents(rows.pieces)
    return batch


TOY = Task(
    reading=Reading(Columns(), lambda inputs: functools.partial(count_tokens, inputs.documents, inputs.max_pieces)),
    make_model=lambda config, labels: lambda rngs: LengthModel(config.model, rngs=rngs),
    report=lambda total: {"loss": float(total.sum) / max(float(total.count), 1.0)},
    headline="error",
    answer=lambda question: {"length": float(question.outputs[0]["length"][0])},
    gold=lambda split, document, labels: int(split.lengths[document]),
    score=lambda answers, golds, labels: {
        "error": float(np.mean([abs(a["length"] - g) for a, g in zip(answers, golds, strict=True)]))
    },
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(TASKS, "length", TOY)


def test_a_toy_task_trains_resumes_evaluates_and_predicts(corpus, tmp_path, one_device, monkeypatch, toy):
    whole = tiny(corpus, tmp_path / "whole", objective="length", steps=30, log_every=1)
    metrics = train(whole)
    cut = dataclasses.replace(whole, run_dir=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        patch.setattr("flax_encoder.runs.train.StopSignals", lambda: Stops(11))
        assert train(cut) is None
    assert train(cut) == metrics
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    first, *_, last = (loss for loss, _ in losses(tmp_path / "whole").values())
    assert last < first
    [evaluation] = [line for line in read_metrics(tmp_path / "whole") if "eval/error" in line]
    assert evaluation["eval/error"] == metrics["eval/error"] and metrics["eval/loss"] > 0

    run = load(tmp_path / "whole")
    texts = [line for line in (corpus / "lines.txt").read_text().splitlines()[:40]]
    answers = list(run.predict(texts))
    assert len(answers) == 40
    for text, answer in zip(texts[:5], answers, strict=False):
        np.testing.assert_allclose(next(run.predict([text]))["length"], answer["length"], rtol=1e-4)


def test_asking_the_same_run_twice_compiles_once(corpus, tmp_path, one_device, toy):
    train(tiny(corpus, tmp_path / "run", objective="length", steps=3))
    run = load(tmp_path / "run")
    list(run.predict(["the list returns a value"]))
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(LengthModel, "__call__", None)  # traced again, it would be called
        assert len(list(run.predict(["each item in order"]))) == 1


SETTINGS = [f"{section.name}{inner}" for section in dataclasses.fields(RunConfig) for inner in (
    [f".{f.name}" for f in dataclasses.fields(section.default_factory)] if dataclasses.is_dataclass(
        section.default_factory) else [""])]  # fmt: skip


def test_a_setting_of_other_tasks_is_refused_by_every_task():
    """Each setting that some task reads, changed from its default, is refused by each task that does not read it."""
    from flax_encoder.tasks.task import check_settings

    of_some = frozenset(s for task in TASKS.values() for s in task.reads)
    named = [s for s in SETTINGS if any(s == own or (own.endswith(".") and s.startswith(own)) for own in of_some)]
    assert len(named) > 10, "there must be some for this to show anything"
    assert all(any(s == own or (own.endswith(".") and s.startswith(own)) for s in SETTINGS) for own in of_some)
    refused = 0
    for name, task in TASKS.items():
        for setting in named:
            config = with_another_value(RunConfig(objective=name), setting)
            reads = any(setting == own or (own.endswith(".") and setting.startswith(own)) for own in task.reads)
            if reads or config is None:
                continue
            with pytest.raises(ConfigError, match=rf"{setting} is not read by the objective {name}"):
                check_settings(task, name, config, of_some)
            refused += 1
    assert refused > len(TASKS)


def with_another_value(config, setting):
    """The config with this setting changed, past the rules that join it to others; None if no value is known."""
    section, _, inner = setting.rpartition(".")
    owner = getattr(config, section) if section else config
    value = getattr(owner, inner)
    other = (not value) if isinstance(value, bool) else value + 0.25 if isinstance(value, float) else (
        value + 1 if isinstance(value, int) else 7 if value is None else f"{value}s")  # fmt: skip
    changed = dataclasses.replace(owner)
    object.__setattr__(changed, inner, other)
    if not section:
        return changed
    whole = dataclasses.replace(config)
    object.__setattr__(whole, section, changed)
    return whole


def test_an_objective_that_is_not_known_lists_the_known(tmp_path, capsys):
    with pytest.raises(ConfigError, match="no objective 'ner'; known are masked_lm, classification"):
        train(RunConfig(run_dir=str(tmp_path), objective="ner"))
    with pytest.raises(SystemExit):
        main(["prepare", "--objective", "ner", "--out", str(tmp_path / "s"), "--data.source", "x.txt"])
    assert "no objective 'ner'" in capsys.readouterr().err


def test_another_objective_than_the_recipes_leaves_its_own_settings_out():
    """The quickstart masks 0.4 of the words, which no classifier does; what is asked for by name is still refused."""
    recipe = str(pathlib.Path(__file__).parents[2] / "configs/quickstart.py")
    config = parse_run_config(["--objective", "classification"], default=recipe)
    assert config.masking == RunConfig().masking and config.model.num_layers == 3
    check_task(config)
    asked = parse_run_config(["--objective", "classification", "--masking.rate", "0.3"], default=recipe)
    with pytest.raises(ConfigError, match=r"masking\.rate is not read by the objective classification"):
        check_task(asked)
    assert parse_run_config([], default=recipe).masking.rate == 0.4


def test_steps_that_are_asked_for_are_not_overruled_by_the_recipes_epochs():
    recipe = str(pathlib.Path(__file__).parents[2] / "configs/regression.py")
    config = parse_run_config([], default=recipe)
    assert config.epochs and parse_run_config(["--epochs", "2"], default=recipe).epochs == 2
    short = parse_run_config(["--steps", "5", "--batch-size", "4"], default=recipe)
    assert (short.steps, short.epochs, short.batch_size, short.batch_texts) == (5, None, 4, None)
