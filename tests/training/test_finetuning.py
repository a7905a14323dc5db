"""Fine-tuning as people expect it: epochs, the best checkpoint, adapters, several seeds; each stopped and resumed."""

import dataclasses
import json
import logging
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from flax_encoder.config import ConfigError, LoraConfig
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from flax_encoder.nn.partition import flatten
from flax_encoder.runs.best import Best, best_evaluation, is_less_better
from flax_encoder.runs.length import epochs_after, is_evaluation_due, settle_length
from flax_encoder.runs.load import load_run
from flax_encoder.runs.seeds import train_seeds
from flax_encoder.training.run_log import read_metrics
from tests.runs import ROOT, losses, tiny, with_fields
from tests.test_train import Stops
from train import train

SMALL = {"model__num_layers": 2, "model__scan_layers": True, "log_every": 1, "checkpoint_every": 3}


def classifier(corpus, run_dir, **fields):
    config = tiny(corpus, run_dir, **(SMALL | {"objective": "classification"} | fields))
    return with_fields(config, data__source=str(corpus / "rows.jsonl"))


def other_rows(corpus, folder) -> pathlib.Path:
    """Texts to test on, none of which is trained on."""
    rows = [json.loads(line) for line in (corpus / "rows.jsonl").read_text().splitlines()[:50]]
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps(row | {"text": f"again {row['text']}"}) + "\n" for row in rows))
    return path


def params_of(run) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flatten(nnx.to_pure_dict(nnx.state(run.model))).items()}


def evaluations(run_dir) -> dict[int, float]:
    return {line["step"]: line["eval/loss"] for line in read_metrics(pathlib.Path(run_dir)) if "eval/loss" in line}


WAYS = {
    "average, layer decay, head rate, frozen names": {
        "steps": 8, "optimizer__average": 0.9, "optimizer__layer_decay": 0.5, "optimizer__head_learning_rate": 0.01,
        "optimizer__freeze": ("encoder.embedding", "encoder.layers.0.attention"),
    },
    "adapters": {"steps": 8, "lora": LoraConfig(rank=2, alpha=4.0, targets=("query", "value", "down"))},
    "epochs, texts, the best": {
        "epochs": 0.09, "batch_texts": 6, "eval_every": 2, "keep_best": "eval/loss", "patience": 20,
    },
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_goes_on_to_the_bit(corpus, tmp_path, one_device, monkeypatch, way):
    whole, cut = (classifier(corpus, tmp_path / name, **WAYS[way]) for name in ("whole", "cut"))
    metrics = train(whole)
    with monkeypatch.context() as patch:
        patch.setattr("flax_encoder.runs.train.StopSignals", lambda: Stops(5))
        assert train(cut) is None
    assert train(cut) == metrics
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert evaluations(tmp_path / "cut") == evaluations(tmp_path / "whole")
    first, second = (load_run(tmp_path / name) for name in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, params_of(first), params_of(second))


def test_epochs_are_steps_that_read_all_rows_so_often(corpus, tmp_path, one_device, capsys):
    config = classifier(corpus, tmp_path / "run", epochs=1.5, batch_texts=64, eval_every="epoch", model__num_layers=1)
    train(config)
    said = " ".join(capsys.readouterr().out.split())
    [rows] = {int(line.split(" rows an epoch")[0].split()[-1]) for line in [said] if "rows an epoch" in line}
    run = load_run(tmp_path / "run")
    documents = 0.9 * len((corpus / "rows.jsonl").read_text().splitlines())
    per_update = run.config.batch_size * documents / rows
    assert abs(per_update - 64) < documents / rows + 3, "within a row of what was asked for"
    assert run.config.steps == run.step == int(np.ceil(1.5 * rows / run.config.batch_size))
    assert f"steps are {run.step}: 1.5 epochs of {rows} rows" in said
    lines = [line for line in read_metrics(tmp_path / "run") if "epoch" in line]
    assert lines[-1]["epoch"] == run.step * run.config.batch_size / rows >= 1.5
    assert sorted(evaluations(tmp_path / "run")) == [int(np.ceil(rows / run.config.batch_size)), run.step]
    with pytest.raises(ConfigError, match=rf"has gone 100% of its way to step {run.step}, .* --extend begins a new"):
        train(dataclasses.replace(config, epochs=3.0))
    with pytest.raises(ConfigError, match=r"epochs: 1.5 before, None now"):
        train(dataclasses.replace(config, epochs=None, steps=run.step))
    train(dataclasses.replace(config, epochs=3.0, extend=True))
    assert load_run(tmp_path / "run").step == 2 * run.step


@pytest.mark.parametrize(
    ("epochs", "rows", "texts", "unit"), [(3.0, 100, 100, 1), (0.3, 7, 50, 2), (2.0, 1000, 10**6, 8)]
)
def test_lengths_follow_from_the_text(epochs, rows, texts, unit):
    from tests.runs import TINY

    config = settle_length(dataclasses.replace(TINY, epochs=epochs, batch_texts=40), rows, texts, unit=unit)
    assert config.batch_size % unit == 0
    nearest = min((n for n in range(unit, 20 * unit * 40, unit)), key=lambda n: abs(n * texts / rows - 40))
    assert abs(config.batch_size * texts / rows - 40) == abs(nearest * texts / rows - 40)
    assert (config.steps - 1) * config.batch_size < epochs * rows <= config.steps * config.batch_size
    assert settle_length(TINY, rows, texts, unit=unit) == TINY


def test_each_epoch_is_evaluated_once_also_where_rows_change_length():
    from tests.runs import TINY

    config = with_fields(TINY, steps=30, eval_every="epoch", data__last_row_length=64, data__last_rate=0.5)
    ends = [step for step in range(31) if is_evaluation_due(config, 10, step)]
    assert [int(epochs_after(config, 10, step)) for step in ends] == list(range(1, len(ends) + 1))
    assert len(ends) == int(epochs_after(config, 10, 30)) > 10


@pytest.mark.parametrize(
    ("metric", "is_less"),
    [("eval/loss", True), ("eval/f1", False), ("eval/macro_f1", False), ("eval/calibration_error", True),
     ("eval/perplexity", True), ("eval/accuracy", False), ("eval/mse", True), ("eval/matthews", False)],
)  # fmt: skip
def test_the_best_is_the_most_but_of_losses_and_errors(metric, is_less):
    assert is_less_better(metric) == is_less
    found = {2: {metric: 0.5}, 4: {metric: 0.25}, 6: {metric: 0.75}, 8: {metric: 0.25}, 9: {"eval/other": 0.0}}
    assert best_evaluation(found, metric) == (Best(4, 0.25, 2) if is_less else Best(6, 0.75, 1))
    assert best_evaluation(found, None) is None and best_evaluation(found, "eval/none") is None


def scripted(monkeypatch, values):
    """Evaluations give these values in turn, whatever the model; returns what they were asked with."""
    asked, given = [], iter(values)

    def evaluate(task, batches, step, config, labels, tokenizer, *, say, is_stopped, samples, most=None):
        if most is not None:
            return {"f1": 0.0}
        asked.append(batches)
        step(batches[0])
        return {"f1": next(given), "loss": 1.0}

    monkeypatch.setattr("flax_encoder.runs.evaluate.evaluate", evaluate)
    return asked


def test_the_best_checkpoint_is_kept_and_is_what_the_run_ends_with(corpus, tmp_path, one_device, monkeypatch, capsys):
    """Of evaluations after each step from 2 on it is that after step 4; no improvement in two ends the run."""
    config = classifier(
        corpus, tmp_path / "run", steps=40, eval_every=2, keep_best="eval/f1", patience=2, keep_checkpoints=1,
        checkpoint_every=1, model__num_layers=1, optimizer__learning_rate=0.01,
    )  # fmt: skip
    config = with_fields(config, data__test=str(other_rows(corpus, tmp_path)))
    scripted(monkeypatch, [0.3, 0.8, 0.8, 0.1, 0.55])  # steps 2, 4, 6, 8; then the test
    metrics = train(config)
    assert metrics == {"eval/f1": 0.8, "eval/loss": 1.0, "test/f1": 0.55, "test/loss": 1.0}
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == {"4", "8"}
    assert "eval/f1 was best after step 4, of 4 evaluations" in capsys.readouterr().out
    best, last = load_run(tmp_path / "run"), load_run(tmp_path / "run/checkpoints/8")
    assert (best.step, last.step) == (4, 8)
    assert repr(best).endswith("step 4, held-out f1 0.8000, the best)")
    assert repr(last).endswith("step 8, held-out f1 0.1000)")
    assert not np.array_equal(params_of(best)["head.out.kernel"], params_of(last)["head.out.kernel"])
    # Started again it is finished, by its metrics alone: the last evaluation and the test are made again.
    before = (tmp_path / "run/metrics.jsonl").read_text()
    scripted(monkeypatch, [0.1, 0.55])
    assert train(config) == metrics
    assert (tmp_path / "run/metrics.jsonl").read_text() == before
    tuned = with_fields(config, run_dir=str(tmp_path / "tuned"), init_from=str(tmp_path / "run"), steps=1,
                        patience=None, keep_best=None, eval_every=None, optimizer__learning_rate=0.0)  # fmt: skip
    scripted(monkeypatch, [0.5, 0.5])
    train(tuned)
    jax.tree.map(np.testing.assert_array_equal, params_of(load_run(tmp_path / "tuned")), params_of(best))


def test_the_test_is_of_the_best_parameters(corpus, tmp_path, one_device, monkeypatch):
    """What was chosen on is never what is reported as the test, and what is tested is what was chosen."""
    config = classifier(
        corpus, tmp_path / "run", steps=6, eval_every=2, keep_best="eval/loss", optimizer__learning_rate=0.05,
        model__num_layers=1,
    )  # fmt: skip
    config = with_fields(config, data__test=str(other_rows(corpus, tmp_path)))
    metrics = train(config)
    logged = [line for line in read_metrics(tmp_path / "run") if "eval/loss" in line]
    best = min(logged, key=lambda line: line["eval/loss"])
    assert {k: v for k, v in metrics.items() if k.startswith("eval/")} == {
        k: v for k, v in best.items() if k != "step"}  # fmt: skip
    run = load_run(tmp_path / "run")
    assert run.step == best["step"]
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    answers = [answer["label"] for answer in run.predict([row["text"] for row in rows])]
    right = np.mean([a == row["label"] for a, row in zip(answers, rows, strict=True)])
    np.testing.assert_allclose(metrics["test/accuracy"], right, atol=1e-6)


def test_a_metric_that_is_none_is_refused_before_the_first_step(corpus, tmp_path, one_device):
    config = classifier(corpus, tmp_path / "run", eval_every=2, keep_best="eval/f3", model__num_layers=1)
    with pytest.raises(ConfigError, match=r"'eval/f3' is none of eval/loss, eval/accuracy, eval/macro_f1"):
        train(config)
    assert not read_metrics(tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_best": "f1", "eval_every": 2}, "such as eval/loss: got 'f1'"),
        ({"keep_best": "eval/f1"}, "give eval_every"),
        ({"patience": 2, "eval_every": 2}, "--keep-best eval/loss"),
        ({"epochs": 2.0, "first_batch_size": 4}, "give steps and batch_size"),
        ({"epochs": 0.0}, "epochs must be above 0"),
        ({"lora": {"alpha": 3.0}}, "which lora.rank makes"),
        ({"optimizer__average": 1.0}, "average is a decay between 0 and 1"),
        ({"optimizer__layer_decay": 0.0}, "layer_decay is above 0"),
        ({"seeds": 3, "compare_with_scratch": True}, "compare_with_scratch is of one run"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_a_way_out(fields, message):
    from tests.runs import TINY

    with pytest.raises(ConfigError, match=message):
        fields = {name: LoraConfig(**value) if name == "lora" else value for name, value in fields.items()}
        with_fields(TINY, **fields)


def test_adapters_leave_the_encoder_and_are_in_its_kernels_when_loaded(corpus, tmp_path, one_device, capsys):
    train(classifier(corpus, tmp_path / "base", steps=3))
    lora = LoraConfig(rank=2, alpha=6.0, targets=("query", "out"))
    tuned = classifier(
        corpus, tmp_path / "tuned", steps=4, lora=lora, init_from=str(tmp_path / "base"),
        optimizer__learning_rate=0.05,
    )  # fmt: skip
    capsys.readouterr()
    train(tuned)
    base, run = (load_run(tmp_path / name) for name in ("base", "tuned"))
    from flax_encoder.training.checkpoint import read_params

    before, after, kept = params_of(base), params_of(run), flatten(read_params(tmp_path / "tuned"))
    assert before.keys() == after.keys()
    count = sum(np.size(x) for path, x in kept.items() if path.startswith(("lora.", "head.")))
    total = sum(np.size(x) for x in kept.values())
    assert f"{total:,} parameters, {count:,} of them trained" in capsys.readouterr().out
    for path, was in before.items():
        if path.startswith("encoder."):
            np.testing.assert_array_equal(kept[path], was, err_msg=path)
        if path in ("encoder.layers.attention.query.kernel", "encoder.layers.attention.out.kernel"):
            a, b = (np.asarray(kept[f"lora.{path.removesuffix('kernel')}{name}"], np.float64) for name in "ab")
            L, r = b.shape[:2]
            want = was + 3.0 * (a.reshape(L, -1, r) @ b.reshape(L, r, -1)).reshape(was.shape)
            np.testing.assert_allclose(after[path], want, rtol=0, atol=1e-6)
            assert np.abs(want - was).max() > 1e-3
        elif path.startswith("encoder."):
            np.testing.assert_array_equal(after[path], was, err_msg=path)
    with pytest.raises(ConfigError, match=r"'queri' is none; there are key, out, query, value, "):
        train(with_fields(tuned, run_dir=str(tmp_path / "other"), lora=LoraConfig(rank=2, targets=("queri",))))


@pytest.mark.parametrize("way", [{"optimizer__average": 0.99}, {"optimizer__name": "schedule_free",
                                 "optimizer__schedule": "wsd", "optimizer__decay_rate": 0.0}])  # fmt: skip
def test_an_average_starts_from_what_the_run_starts_from(corpus, tmp_path, one_device, way):
    """Not from the random parameters that were there before: with nothing learned, what comes out is what went in."""
    train(classifier(corpus, tmp_path / "base", steps=2, model__num_layers=1))
    config = classifier(corpus, tmp_path / "tuned", steps=3, init_from=str(tmp_path / "base"), model__num_layers=1,
                        optimizer__learning_rate=0.0)  # fmt: skip
    for name, value in way.items():
        config = with_fields(config, **{name: value}) if name != "optimizer__name" else with_fields(
            config, optimizer=dataclasses.replace(config.optimizer, name=value, schedule="wsd", decay_rate=0.0))
    train(config)
    got, want = (params_of(load_run(tmp_path / name)) for name in ("tuned", "base"))
    for path, x in want.items():
        np.testing.assert_allclose(got[path], x, rtol=1e-6, atol=1e-7, err_msg=path)


def test_seeds_are_runs_of_their_own_and_one_table(corpus, tmp_path, one_device, monkeypatch, capsys, caplog):
    """From a published folder without such a head each seed draws its own, as a run of that seed alone does."""
    folder = pathlib.Path(shutil.copytree(ROOT / "tests/golden/bert-masked_lm", tmp_path / "published"))
    (folder / "tokenizer.json").write_text(train_wordpiece(["the list of a value"] * 3, 43).json)
    config = classifier(corpus, tmp_path / "run", steps=3, seeds=2, init_from=str(folder), data__row_length=15,
                        optimizer__learning_rate=0.0)  # fmt: skip
    with monkeypatch.context() as patch:  # stopped in the second
        stops = iter([Stops(1000), Stops(2)])
        patch.setattr("flax_encoder.runs.train.StopSignals", lambda: next(stops))
        assert train_seeds(config, train) is None
    assert not (tmp_path / "run/seeds.json").exists()
    with caplog.at_level(logging.WARNING):
        summary = train_seeds(config, train)
    written = json.loads((tmp_path / "run/seeds.json").read_text())
    assert written == {"seeds": [0, 1], "metrics": summary}
    values = [evaluations(tmp_path / f"run/seed-{i}")[3] for i in range(2)]
    assert summary["eval/loss"] == {
        "median": float(np.median(values)), "min": min(values), "max": max(values), "values": values}  # fmt: skip
    assert len(set(values)) == 2 and [load_run(tmp_path / f"run/seed-{i}").config.seed for i in range(2)] == [0, 1]
    said = capsys.readouterr().out
    assert "2 seeds" in said and "median" in said and f"{np.median(values):,.4f}" in said

    train(with_fields(config, run_dir=str(tmp_path / "alone"), seed=1, seeds=1))
    first, second, alone = (params_of(load_run(tmp_path / name)) for name in ("run/seed-0", "run/seed-1", "alone"))
    assert losses(tmp_path / "run/seed-1") == losses(tmp_path / "alone")
    jax.tree.map(np.testing.assert_array_equal, second, alone)
    other = {path for path in first if not np.array_equal(first[path], second[path])}
    assert other == {"head.dense.kernel", "head.out.kernel"}  # biases begin at zero, and nothing is learned
    assert "new parameters: head.dense.bias, head.dense.kernel, head.out" in said and "initialized" not in caplog.text
