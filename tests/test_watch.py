"""A run that makes no step any more ends and says where it stood; where its time went is said too."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import pytest

from flax_encoder.config import ConfigError, RunConfig
from flax_encoder.runs.goodput import Goodput
from flax_encoder.runs.train import train
from flax_encoder.runs.watch import STALLED, Profile, Watchdog
from flax_encoder.training.run_log import read_metrics
from tests.runs import ROOT, tiny

STALL = """
import time
from flax_encoder.runs.goodput import Goodput
from flax_encoder.runs.watch import Watchdog

def where_it_hangs():
    time.sleep(60)

goodput = Goodput()
with Watchdog(0.5, goodput):
    for step in range(1, 4):
        goodput.made(step)
        time.sleep(0.2)
    with goodput.during("data_wait"):
        where_it_hangs()
"""


def test_a_stalled_run_says_where_every_thread_stands_and_ends_with_its_own_status():
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", STALL], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True,
        text=True, timeout=59,
    )  # fmt: skip
    assert done.returncode == STALLED == 86, done.stderr
    assert "the last one sent to the device was 3" in done.stderr and "waiting in: data wait" in done.stderr
    assert "where_it_hangs" in done.stderr
    assert time.monotonic() - began < 59


def test_a_run_that_makes_steps_is_left_alone():
    goodput = Goodput()
    with Watchdog(0.4, goodput):
        for step in range(10):
            goodput.made(step)
            time.sleep(0.1)
    time.sleep(0.6)  # the dog is gone


def test_every_second_is_accounted_once():
    goodput = Goodput()
    goodput.enter("step")
    with goodput.during("evaluation"):
        time.sleep(0.02)
        with goodput.during("save"):
            time.sleep(0.04)
    shares = goodput.shares()
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["save"] > shares["evaluation"] > 0


def test_a_trace_is_of_the_steps_asked_for_alone(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(f"start {pathlib.Path(folder).name}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    for last, want in ((9, [1, 2, "start profile", 3, 4, "stop", 5]), (3, [1, 2, "start profile", 3, "stop"])):
        calls.clear()
        with Profile("3:4", tmp_path) as profile:
            for step in range(1, min(last, 5) + 1):
                profile.before(step)
                calls.append(step)
                profile.after(step, jax.numpy.zeros(()))
        assert calls == want


def test_a_run_says_where_its_time_went_and_writes_its_trace(corpus, tmp_path, one_device, capsys):
    options = {"steps": 12, "log_every": 1, "checkpoint_every": 6, "eval_batches": 1, "profile": "3:4"}
    config = tiny(corpus, tmp_path / "run", **options)
    train(config)
    [line] = [line for line in read_metrics(tmp_path / "run") if "goodput/step" in line]
    shares = {name: share for name, share in line.items() if name != "step"}
    assert sum(shares.values()) == pytest.approx(1.0) and line["step"] == 12
    assert {"goodput/compile", "goodput/data_wait", "goodput/save", "goodput/open"} <= shares.keys()
    assert "time went of" in capsys.readouterr().out
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))

    # What a run that died had made after its last checkpoint is lost work when it is made again.
    metrics = tmp_path / "run/metrics.jsonl"
    lines = [json.dumps(line) for line in read_metrics(tmp_path / "run")]
    longer = dataclasses.replace(config, run_dir=str(tmp_path / "other"), profile=None)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/metrics.jsonl").write_text("".join(f"{line}\n" for line in lines[:7]))
    train(longer)
    [line] = [line for line in read_metrics(tmp_path / "other") if "goodput/step" in line]
    assert line["goodput/lost_work"] > 0 and metrics.exists()


def test_settings_that_watch_are_checked():
    for fields in ({"profile": "5:3"}, {"profile": "0:3"}, {"profile": "all"}, {"stall_seconds": 0.0}):
        with pytest.raises(ConfigError, match=r"profile|stall_seconds"):
            RunConfig(**fields)
