"""Trackers get each line of metrics.jsonl, and none of them can end a run."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

from flax_encoder.commands.recipe import parse_run_config
from flax_encoder.config import ConfigError
from flax_encoder.training import trackers
from flax_encoder.training.run_log import RunLog
from flax_encoder.training.trackers import Tracker, WeightsAndBiases, make_trackers

ROOT = pathlib.Path(__file__).parents[2]


class Kept:
    """A tracker that keeps what it is told, and raises at a step."""

    def __init__(self, raises_at: int | None = None):
        self.told, self.raises_at = [], raises_at

    def begin(self, run_dir, config, resume_step):
        self.told.append(("begin", config, resume_step))

    def log(self, step, values):
        if step == self.raises_at:
            raise ConnectionError("the service is away")
        self.told.append(("log", step, values))

    def end(self):
        self.told.append(("end",))


def write(run_dir, first, last, *them):
    with RunLog(run_dir, steps=9, resume_step=first, trackers=them, config={"seed": 4}) as log:
        for step in range(first + 1, last + 1):
            log.write(step, {"loss": 1.0 / step})


def test_a_tracker_is_begun_told_every_line_and_ended_also_when_a_run_goes_on(tmp_path):
    kept = Kept()
    assert isinstance(kept, Tracker)
    write(tmp_path, 0, 3, kept)
    assert kept.told[0] == ("begin", {"seed": 4}, 0) and kept.told[-1] == ("end",)
    write(tmp_path, 2, 5, kept)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = [{"step": step} | values for kind, step, values in (x for x in kept.told if x[0] == "log")]
    assert told == [*lines[:2], {"step": 3, "loss": 1 / 3}, *lines[2:]]
    assert ("begin", {"seed": 4}, 2) in kept.told


def test_a_tracker_that_raises_is_left_out_and_the_others_go_on(tmp_path, caplog):
    away, there = Kept(raises_at=2), Kept()
    write(tmp_path, 0, 4, away, there)
    assert [x[1] for x in there.told if x[0] == "log"] == [1, 2, 3, 4] and there.told[-1] == ("end",)
    assert [x[0] for x in away.told] == ["begin", "log"]
    assert "Kept failed, gets no more: ConnectionError: the service is away" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_resumed_run_goes_on_with_its_run_of_weights_and_biases(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    write(tmp_path, 0, 1, WeightsAndBiases())
    write(tmp_path, 1, 2, WeightsAndBiases())
    begun = [x for x in calls if isinstance(x, dict)]
    assert begun[0]["id"] == begun[1]["id"] and begun[0]["resume"] == "allow" and begun[0]["config"] == {"seed": 4}
    assert [x for x in calls if not isinstance(x, dict)] == [(1, {"loss": 1.0}), "finish", (2, {"loss": 0.5}), "finish"]


def test_a_tracker_whose_library_is_not_there_is_refused_with_the_command_to_type(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'flax-encoder\[wandb\]'"):
        make_trackers(["wandb"])
    assert parse_run_config(["--trackers", "wandb", "tensorboard"], "quickstart").trackers == ("wandb", "tensorboard")
    assert parse_run_config(["--trackers"], "quickstart").trackers == ()


def test_weights_and_biases_itself_keeps_every_line_offline(tmp_path):
    """Its own library, in a process of its own, with no network and no account; a resumed run has the same name."""
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("needs wandb: pip install -e '.[wandb]'")
    code = "\n".join([
        "import pathlib, sys",
        "from flax_encoder.training.trackers import make_trackers",
        "from tests.training.test_trackers import write",
        "folder, start = pathlib.Path(sys.argv[1]), int(sys.argv[2])",
        "write(folder, start, start + 2, *make_trackers(['wandb']))",
    ])  # fmt: skip
    offline = {"WANDB_MODE": "offline", "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    for start in ("0", "2"):
        command = [sys.executable, "-c", code, str(tmp_path / "run"), start]
        (tmp_path / "run").mkdir(exist_ok=True)
        done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0 and "gets no more" not in done.stderr, done.stderr
    first, second = (path.read_bytes() for path in sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb")))
    name = (tmp_path / "run/wandb-id").read_text().strip().encode()
    for content, steps in ((first, (1, 2)), (second, (3, 4))):
        assert name in content and b"seed" in content
        assert all(json.dumps(1.0 / step).encode() in content for step in steps)
