"""The real thing, end to end: train, stop, kill, resume, shard, fine-tune, ask."""

import dataclasses
import json
import pathlib
import random
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from flax_encoder.commands import main
from flax_encoder.config import ConfigError, EncoderConfig, MeshConfig, OptimizerConfig, RunConfig
from flax_encoder.runs.load import load_run
from flax_encoder.tasks.samples import GAP
from flax_encoder.training.checkpoint import CheckpointError
from flax_encoder.training.run_log import SAMPLES, read_metrics
from tests.runs import (
    ROOT,
    assert_same_losses,
    command,
    environment,
    losses,
    run,
    start,
    tiny,
    wait_for_step,
    with_fields,
)
from train import Diverged, train


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> tuple[RunConfig, dict]:
    config = tiny(corpus, tmp_path_factory.mktemp("whole") / "run", steps=120, model__dropout_rate=0.1)
    run(command(config))
    return config, losses(pathlib.Path(config.run_dir))


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_resume_after_a_signal_is_bitwise_identical(uninterrupted, tmp_path, signal_number):
    config = dataclasses.replace(uninterrupted[0], run_dir=str(tmp_path / "run"))
    process = start(config)
    wait_for_step(process, tmp_path / "run", 9)
    process.send_signal(signal_number)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    stopped_at = load_run(tmp_path / "run").step
    assert 9 <= stopped_at < config.steps, "it must stop before its end for this to show anything"
    assert f"after step {stopped_at}" in output
    run(command(config))
    assert losses(tmp_path / "run") == uninterrupted[1]


@pytest.mark.slow
def test_resume_after_kill_at_any_moment_is_bitwise_identical(uninterrupted, tmp_path):
    rng = random.Random(11)
    config = dataclasses.replace(uninterrupted[0], run_dir=str(tmp_path / "run"))
    for _ in range(4):
        process = start(config)
        time.sleep(rng.uniform(0.5, 12.0))  # from imports to, on a quick machine, the last step
        process.kill()
        process.communicate()
    run(command(config))
    assert losses(tmp_path / "run") == uninterrupted[1]
    assert load_run(tmp_path / "run").step == config.steps


def test_a_second_start_loads_what_the_first_compiled(corpus, tmp_path):
    """And computes the same, to the bit. The step of another model is compiled."""
    shared = {"steps": 3, "log_every": 1, "model__num_layers": 3, "model__scan_layers": False}
    reported = {}
    for name, more in {"first": {}, "second": {}, "other": {"model__mlp_dim": 68}}.items():
        output = run(command(tiny(corpus, tmp_path / name, **shared, **more)))
        [(how, seconds)] = re.findall(r"(compiled|loaded) the step for 8 rows of 32 tokens in ([\d.]+) s", output)
        reported[name] = how, float(seconds)
        assert "cpu_aot_loader" not in output
    assert [how for how, _ in reported.values()] == ["compiled", "loaded", "compiled"]
    assert reported["second"][1] < reported["first"][1]
    assert losses(tmp_path / "first") == losses(tmp_path / "second") != losses(tmp_path / "other")


def test_a_finished_run_reports_again_and_trains_no_more(corpus, tmp_path, one_device):
    config = tiny(corpus, tmp_path / "run", steps=6)
    first = train(config)
    before = (tmp_path / "run/metrics.jsonl").read_text()
    assert train(config) == first
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def test_metrics_and_run_folder_are_complete(corpus, tmp_path, one_device):
    config = tiny(corpus, tmp_path / "run", eval_every=12, eval_batches=2)
    train(config)
    lines = read_metrics(tmp_path / "run")
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(3, 25, 3))
    names = {"loss", "accuracy", "perplexity", "grad_norm", "learning_rate", "tokens_per_second", "data_wait_fraction"}
    assert all(names <= set(line) for line in training)
    if pathlib.Path("/proc/self/statm").exists():
        assert all(0.1 < line["process_memory_gb"] < 100 for line in training)
    spent = [line["spent_seconds"] for line in training]
    assert spent == sorted(spent) and spent[0] > 0
    evaluations = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [12, 24]
    assert {"eval/loss", "eval/accuracy", "eval/perplexity"} <= set(evaluations[0])
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"config.json", "tokenizer.json", "checkpoints", "metrics.jsonl"} <= files
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert json.loads((tmp_path / "run/config.json").read_text())["model"]["vocab_size"] == 256
    first, last = read_metrics(tmp_path / "run", SAMPLES)
    assert (first["step"], last["step"]) == (12, 24)
    assert [sample["text"] for sample in first["samples"]] == [sample["text"] for sample in last["samples"]]
    run = load_run(tmp_path / "run")
    for sample in last["samples"]:  # what was filled in last is what the run fills in
        filled = run.fill_mask(sample["text"].replace(GAP, "[MASK]"), 1)
        assert [word["token"] for [word] in filled] == sample["says"]
    train(with_fields(config, run_dir=str(tmp_path / "blind"), eval_every=None))
    assert losses(tmp_path / "blind") == losses(tmp_path / "run") and not (tmp_path / "blind" / SAMPLES).exists()


def test_a_checkpoint_stands_alone(corpus, tmp_path, one_device):
    config = tiny(corpus, tmp_path / "run", steps=6)
    train(config)
    (tmp_path / "run/checkpoints/6").rename(tmp_path / "alone")
    loaded = load_run(tmp_path / "alone")
    assert loaded.step == 6 and loaded.config.steps == 6
    assert len(loaded.fill_mask("the list returns a [MASK] of each item")[0]) == 5


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sharded_training_equals_single_device(corpus, tmp_path, optimizer):
    config = tiny(corpus, tmp_path / "one", steps=9, optimizer__name=optimizer)
    run(command(config))
    sharded = with_fields(config, run_dir=str(tmp_path / "many"), mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    output = run(command(sharded), devices=8)
    assert "data 2 x fsdp 2 x tensor 2" in output
    assert_same_losses(tmp_path / "many", tmp_path / "one")


@pytest.mark.slow
def test_resume_on_another_mesh(corpus, tmp_path):
    whole = tiny(corpus, tmp_path / "whole", steps=12)
    run(command(whole))
    config = with_fields(whole, run_dir=str(tmp_path / "run"))
    process = start(config)
    wait_for_step(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    run(command(with_fields(config, mesh=MeshConfig(data=1, fsdp=2, context=2))), devices=4)
    assert_same_losses(tmp_path / "run", tmp_path / "whole")


def elaborate(corpus, run_dir, **fields):
    """Two sources mixed, whole words at a falling rate, and rows that grow during the run."""
    config = tiny(
        corpus, run_dir, masking__kind="whole_word", masking__rate=0.4, masking__last_rate=0.2,
        data__last_row_length=64, data__last_rate=0.5, **fields,
    )  # fmt: skip
    both = (str(corpus / "lines.txt"), str(corpus / "rows.jsonl"))
    return with_fields(with_fields(config, data__source=both), data__weights=(2.0, 1.0))


def test_rows_grow_in_a_run_that_is_stopped_and_resumed(corpus, tmp_path, one_device, monkeypatch):
    whole = elaborate(corpus, tmp_path / "whole", checkpoint_every=9)
    train(whole)
    cut = with_fields(whole, run_dir=str(tmp_path / "cut"))
    for steps in (5, 12):  # before and after the rows have grown
        with monkeypatch.context() as patch:
            patch.setattr("flax_encoder.runs.train.StopSignals", lambda steps=steps: Stops(steps))
            assert train(cut) is None
    train(cut)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    other = with_fields(cut, data__weights=(1.0, 1.0))
    with pytest.raises(ConfigError, match=r"data.weights: \(2.0, 1.0\) before, \(1.0, 1.0\) now"):
        train(other)


def test_batches_grow_in_a_run_that_is_stopped_and_resumed(corpus, tmp_path, one_device, monkeypatch, capsys):
    growing = {"first_batch_size": 2, "batch_warmup_rate": 0.5, "checkpoint_every": 9, "model__num_layers": 1}
    whole = tiny(corpus, tmp_path / "whole", **growing)
    train(whole)
    said = " ".join(capsys.readouterr().out.split())
    assert "2 rows of 32 up to step 4, 4 rows of 32 up to step 12, 8 rows of 32 up to step 24" in said
    assert "the step is compiled for 3 shapes" in said and said.count("the step for ") == 3
    cut = with_fields(whole, run_dir=str(tmp_path / "cut"))
    for steps in (3, 6):  # before the first growth, and between the two
        with monkeypatch.context() as patch:
            patch.setattr("flax_encoder.runs.train.StopSignals", lambda steps=steps: Stops(steps))
            assert train(cut) is None
    train(cut)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


class Ticks:
    """A clock that goes on by one second whenever it is read."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def test_a_budget_of_time_ends_a_run_that_resumes_with_what_it_spent(corpus, tmp_path, one_device, monkeypatch):
    config = tiny(corpus, tmp_path / "run", steps=10_000, budget_minutes=5.0, log_every=1, checkpoint_every=1000)
    config = with_fields(config, optimizer__warmup_rate=0.0, model__num_layers=1)
    monkeypatch.setattr("flax_encoder.training.run_log.time.monotonic", Ticks())
    with monkeypatch.context() as patch:
        patch.setattr("flax_encoder.runs.train.StopSignals", lambda: Stops(5))
        assert train(config) is None
    metrics = train(config)
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    rates = np.array([line["learning_rate"] for line in lines])
    assert [line["step"] for line in lines] == [*range(1, len(lines) + 1)] and 5 < len(lines) < 300
    assert rates[0] > 0.9 * config.optimizer.learning_rate and rates[-1] == 0  # straight down over the time
    assert (np.diff(rates[:-3]) < 0).all()
    assert rates[4] > rates[5] > rates[4] - 0.3 * config.optimizer.learning_rate  # resumed where it was
    assert train(config) == metrics, "a run whose budget is spent reports again and trains no more"
    assert [line for line in read_metrics(tmp_path / "run") if "loss" in line] == lines
    assert sum("eval/loss" in line for line in read_metrics(tmp_path / "run")) == 1


@pytest.mark.parametrize("name", ["schedule_free", "soap", "adafactor"])
def test_each_optimizers_state_is_saved_and_resumed_to_the_bit(corpus, tmp_path, one_device, monkeypatch, name):
    constant = {"schedule": "wsd", "decay_rate": 0.0}  # what schedule_free asks for
    config = tiny(corpus, tmp_path, steps=8, log_every=1, model__num_layers=1)
    config = with_fields(config, optimizer=OptimizerConfig(name, soap_every=3, **constant))
    whole, cut = (dataclasses.replace(config, run_dir=str(tmp_path / part)) for part in ("whole", "cut"))
    metrics = train(whole)
    with monkeypatch.context() as patch:
        patch.setattr("flax_encoder.runs.train.StopSignals", lambda: Stops(5))
        assert train(cut) is None
    assert train(cut) == metrics
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


class Stops:
    """A signal that comes during the n-th step from now: the loop asks once a step."""

    def __init__(self, steps):
        self.steps = steps

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        pass

    @property
    def requested(self):
        self.steps -= 1
        return "SIGTERM" if self.steps <= 0 else None


def test_a_run_reads_a_prepared_store_by_worker_processes(corpus, tmp_path, one_device):
    main(["prepare", "--data.source", str(corpus / "lines.txt"), "--data.text-unit", "line", "--data.vocab-size", "256",
          "--data.held-out-rate", "0.1", "--out", str(tmp_path / "store")])  # fmt: skip
    config = tiny(corpus, tmp_path / "run", steps=6, checkpoint_every=6)
    train(config)
    train(with_fields(
        config, run_dir=str(tmp_path / "again"), data__source=str(tmp_path / "store"), data__workers=2,
        data__verify=True))  # fmt: skip
    assert losses(tmp_path / "run") == losses(tmp_path / "again")


def test_evaluations_that_a_signal_stops_are_made_by_the_next_start(corpus, tmp_path, one_device, monkeypatch):
    whole = tiny(corpus, tmp_path / "whole", steps=8, eval_every=2, checkpoint_every=9)
    train(whole)
    cut = with_fields(whole, run_dir=str(tmp_path / "cut"))
    for asked in (3, 4, 2):  # in the evaluation of step 2, in the one that makes up for it, in step 4
        with monkeypatch.context() as patch:
            patch.setattr("flax_encoder.runs.train.StopSignals", lambda asked=asked: Stops(asked))
            assert train(cut) is None
    train(cut)

    def evaluations(config):
        return [(x["step"], x["eval/loss"]) for x in read_metrics(pathlib.Path(config.run_dir)) if "eval/loss" in x]

    assert evaluations(cut) == evaluations(whole) and len(evaluations(cut)) == 4
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    for _ in range(2):  # and again as the finished run reports anew
        assert (tmp_path / "cut" / SAMPLES).read_text() == (tmp_path / "whole" / SAMPLES).read_text()
        train(cut)


def test_stages_of_one_length_have_their_own_numbers_of_targets(corpus, tmp_path, one_device):
    """A bucket's batch has one shape of tokens in both, but slots for as many targets as its stage's rows may have."""
    config = tiny(
        corpus, tmp_path / "run", steps=12, first_batch_size=4, batch_warmup_rate=0.25, data__packing="one-per-row",
        data__buckets=(16,), data__last_row_length=64, data__last_rate=0.4,
    )  # fmt: skip
    assert train(config) is not None


def test_divergence_stops_the_run_and_names_the_steps(corpus, tmp_path, one_device):
    config = tiny(corpus, tmp_path / "run", optimizer__learning_rate=1e30, optimizer__clip_norm=None)
    with pytest.raises(Diverged, match=r"at step \d+; it broke after step \d+"):
        train(config)


def test_nothing_is_saved_that_has_diverged(corpus, tmp_path, one_device):
    """Not even where no metrics were to be logged since."""
    config = tiny(corpus, tmp_path / "run", log_every=20, optimizer__learning_rate=1e30, optimizer__clip_norm=None)
    with pytest.raises(Diverged, match=r"at step 6; it broke after step 0\. no checkpoint was made yet"):
        train(config)
    assert not list((tmp_path / "run/checkpoints").glob("[0-9]*"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config", "configs/nothing.py"], "recipes in configs/ are: configs/albert_base.py, "),
        (["--data.source", "nothing/*.txt"], "no file matches data.source 'nothing/*.txt'"),
        (["--init-from", "nothing"], "no folder at nothing. Give a run folder, a checkpoint or"),
        (["--mesh.tensor", "3"], "is 3, and there are 1"),
        (["--batch-size", "10", "--num-microbatches", "4"], "got 4 for 10; 2 and 5 do"),
        (["--model.num-heads", "5"], "got 5 for 256; 4 and 8 do"),
        (["--model.colour", "blue"], "--model.colour"),
    ],
)
def test_bad_settings_end_with_a_message(tmp_path, arguments, expected):
    done = subprocess.run(
        [sys.executable, "train.py", "--run-dir", str(tmp_path / "run"), *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    said = " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert done.returncode not in (0, -9) and expected in said, said
    assert "Traceback" not in said


def offered(output: str, name: str) -> list[str]:
    """The words after `python` of the command of this name that a run said to type next."""
    return next(shlex.split(line)[1:] for line in output.splitlines() if f" -m flax_encoder {name} " in line)


@pytest.mark.slow
def test_the_quickstart_path_small(tmp_path):
    """Both recipes on the real corpus, cut to seconds, with every command that the report gives."""
    run_dir, tuned_dir = str(tmp_path / "pretrained"), str(tmp_path / "tuned")
    small = ["--model.num-layers", "2", "--model.embed-dim", "64", "--model.mlp-dim", "64"]
    output = run([sys.executable, "train.py", "--run-dir", run_dir, "--steps", "40", *small])
    for expected in (
        "most frequent token",
        "guess from two neighbours",
        "this model",
        "the model says",
        "fill-mask",
        "--init-from",
    ):
        assert expected in output
    ask = [sys.executable, "-m", "flax_encoder"]
    guesses = json.loads(run([*ask, "fill-mask", run_dir, "Return the [MASK] of the list.", "--json"]))
    assert len(guesses) == 5 and set(guesses[0]) == {"token", "probability"}
    assert "probability" in run([sys.executable, *offered(output, "fill-mask")])  # a sentence of the held-out text
    assert "at least one [MASK]" in run([*ask, "fill-mask", run_dir, "Return the list."], status=1)

    recipe = [
        "--config",
        "configs/quickstart_classify.py",
        "--run-dir",
        tuned_dir,
        "--init-from",
        run_dir,
        "--steps",
        "20",
    ]
    output = run([sys.executable, "train.py", *recipe])
    for expected in ("majority class", "same model from scratch", "fine-tuned", "macro f1"):
        assert expected in output
    labels = json.loads(run([sys.executable, *offered(output, "classify"), "--json"]))
    assert len(labels) >= 8 and set(labels[0]) == {"label", "probability"}
    assert "needs a classification run" in run([*ask, "classify", run_dir, "text"], status=1)
    run([*ask, "plot", run_dir, tuned_dir, "--out", str(tmp_path / "curve.png")])
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_a_checkpoint_folder_without_checkpoints_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_run(tmp_path)


def test_a_recurrent_encoder_trains_and_is_asked_like_any_other(corpus, tmp_path, one_device):
    model = EncoderConfig(layer="lstm", num_layers=1, embed_dim=32, position="none", embedding_norm=False)
    train(tiny(corpus, tmp_path / "run", model=model, steps=9, optimizer__learning_rate=1e-2))
    first, *_, last = (loss for loss, _ in losses(tmp_path / "run").values())
    assert last < first
    assert len(load_run(tmp_path / "run").fill_mask("the list [MASK] a value")[0]) == 5
