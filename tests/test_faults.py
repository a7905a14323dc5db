"""Faults at random times and places, with printed seeds: pytest -m faults -n 0 -s. What was lost is counted.

Each round starts the run, hurts it, and starts it again until it has ended; its losses must then be those of a run that
nothing has happened to, to the bit, and no step may be lost but those since the last whole checkpoint.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time
import types

import pytest

from flax_encoder.training.checkpoint import verify_checkpoints
from tests.runs import ROOT, command, environment, losses, run, start, tiny

pytestmark = pytest.mark.faults
STEPS, EVERY, ROUNDS = 120, 6, 6
SAVING_FAULTS = 100
SEED = int(os.environ.get("FAULT_SEED") or random.SystemRandom().randrange(2**32))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    options = {"steps": STEPS, "checkpoint_every": EVERY, "log_every": 1, "keep_checkpoints": 3}
    config = tiny(corpus, tmp_path_factory.mktemp("whole") / "run", **options)
    run(command(config))
    return config, losses(pathlib.Path(config.run_dir))


def kill(config, rng: random.Random) -> str:
    """SIGKILL at any time after its first step; half of them while a checkpoint is being written."""
    process, run_dir = start(config), pathlib.Path(config.run_dir)
    begun = len(losses(run_dir))
    while process.poll() is None and len(losses(run_dir)) <= begun:
        time.sleep(0.01)
    if rng.random() < 0.5:
        while process.poll() is None and not list(run_dir.glob("checkpoints/*.saving*")):
            time.sleep(0.0005)
    else:
        time.sleep(rng.uniform(0, 1.5))
    process.kill()
    process.communicate()
    return f"killed with {sorted(p.name for p in run_dir.glob('checkpoints/*'))}"


def corrupt(config, rng: random.Random) -> str:
    """One file of the newest checkpoint gets another byte, another length, or goes; there is a whole one before it."""
    found = checkpoints(pathlib.Path(config.run_dir))
    if sum(hasattr(result, "files") for _, result in found) < 2:
        return "nothing that would be left to go on from"
    newest = found[-1][0]
    path = rng.choice([p for p in sorted(newest.rglob("*")) if p.is_file() and p.stat().st_size])
    content, how = bytearray(path.read_bytes()), rng.choice(["byte", "cut", "gone", "longer"])
    at = rng.randrange(len(content))
    content[at] ^= rng.randrange(1, 256)
    {"byte": lambda: path.write_bytes(content), "cut": lambda: path.write_bytes(content[:at]), "gone": path.unlink,
     "longer": lambda: path.write_bytes(content + b"x")}[how]()  # fmt: skip
    return f"{path.relative_to(newest.parent)}: {how} at {at} of {len(content)}"


def fill(config, rng: random.Random) -> str:
    """The disk is full for all files past some size, from the start of the run on."""
    limit = rng.choice([1 << 12, 1 << 15, 1 << 17])
    done = subprocess.run(
        command(config), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return f"no file above {limit} bytes: exit {done.returncode}: {done.stderr.strip()[-200:]}"


def cut_log(config, rng: random.Random) -> str:
    path = pathlib.Path(config.run_dir, "metrics.jsonl")
    if not path.exists():
        return "no log to cut"
    content = path.read_bytes()
    size = len(content) - rng.randrange(min(len(content), 60))  # what a killed write may leave; the rest is on the disk
    path.write_bytes(content[:size])
    return f"metrics.jsonl cut to {size} of {len(content)} bytes"


def stop(config, rng: random.Random) -> str:
    process, run_dir = start(config), pathlib.Path(config.run_dir)
    begun = len(losses(run_dir))
    while process.poll() is None and len(losses(run_dir)) <= begun:
        time.sleep(0.01)
    number = rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    process.send_signal(number)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return f"stopped by {number.name}"


@pytest.mark.parametrize("number", range(3))
def test_whatever_happens_the_run_ends_with_the_losses_of_one_that_nothing_happened_to(whole, tmp_path, number):
    rng, config = random.Random(SEED + number), dataclasses.replace(whole[0], run_dir=str(tmp_path / "run"))
    print(f"\nFAULT_SEED={SEED}, test {number}")
    redone = 0
    for fault in [kill, *(rng.choice([kill, corrupt, fill, cut_log, stop]) for _ in range(ROUNDS - 1))]:
        before = max(losses(tmp_path / "run"), default=0)
        what = fault(config, rng)
        whole_steps = [int(p.name) for p, found in checkpoints(tmp_path / "run") if hasattr(found, "files")]
        lost = max(0, max(before, *losses(tmp_path / "run"), 0) - max(whole_steps, default=0))
        redone += lost
        print(f"  {fault.__name__}: {what}; {lost} steps to do again")
        if fault is kill:
            # An uncommitted save at most is lost, of one interval, and the one before it, which is being written.
            assert lost <= 2 * EVERY + 2
    run(command(config))
    assert losses(tmp_path / "run") == whole[1]
    print(f"  ended whole; {redone} steps were done again in all")


class Saving:
    """Rounds of `saving_worker.py` in one folder."""

    def __init__(self, folder: pathlib.Path):
        self.run_dir, self._log = folder / "run", folder / "log"
        self._worker = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/saving_worker.py")], env=environment() | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._worker.stdout.readline() == "ready\n"

    def begin(self, file_limit: int | None = None) -> int:
        """A round's process, once it has said where it goes on from, or failed."""
        self._log.write_text("")
        asked = {"run_dir": str(self.run_dir), "log": str(self._log), "file_limit": file_limit}
        print(json.dumps(asked), file=self._worker.stdin, flush=True)
        pid = int(self._worker.stdout.readline())
        self._wait_for_lines(1)
        return pid

    def wait_for_saves(self, count: int) -> None:
        """Until so many have begun since it said where from."""
        self._wait_for_lines(1 + count)

    def _wait_for_lines(self, count: int) -> None:
        deadline = time.monotonic() + 120
        while len(self.lines()) < count:
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def end(self, pid: int | None) -> None:
        """Kill it, or wait for it."""
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        assert self._worker.stdout.readline() == "ended\n"

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self._log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def close(self) -> None:
        self._worker.stdin.close()
        self._worker.wait(60)
        self._worker.stdout.close()


def test_of_a_hundred_faults_while_checkpoints_are_saved_none_loses_one_and_none_goes_unnoticed(tmp_path):
    """One save after another: killed at any moment, the disk full, or the newest checkpoint damaged after that."""
    print(f"\nFAULT_SEED={SEED}")
    with contextlib.closing(Saving(tmp_path)) as saving:
        _hurt(saving, random.Random(SEED))


def _hurt(saving: Saving, rng: random.Random) -> None:
    counts: collections.Counter[str] = collections.Counter()
    newest, damaged, set_aside = 0, None, 0
    for _ in range(SAVING_FAULTS):
        kind = rng.choice(["kill", "kill", "corrupt", "fill"])
        pid = saving.begin(rng.choice([1 << 12, 1 << 16, 1 << 20]) if kind == "fill" else None)
        begun = saving.lines()[0]
        # From the newest that is whole, which has what was saved; what was damaged was noticed and kept.
        assert (begun["start"], begun["is_right"]) == (newest, True)
        assert damaged is None or f"checkpoints/{damaged} is damaged" in " ".join(begun["said"])
        set_aside, damaged = set_aside + (damaged is not None), None
        if kind == "fill":
            saving.end(None)
            assert "could not be written" in saving.lines()[-1]["error"]
        else:
            saving.wait_for_saves(rng.randrange(4))
            time.sleep(rng.uniform(0, 0.3))
            saving.end(pid)
        begun_last = max((line["saving"] for line in saving.lines() if "saving" in line), default=newest)
        is_whole = {int(p.name): hasattr(found, "files") for p, found in checkpoints(saving.run_dir)}
        assert all(is_whole.values()), is_whole
        # A save begins when the one before it is whole.
        steps = sorted(is_whole)
        newest = max(steps, default=0)
        assert newest >= begun_last - 1
        if kind == "corrupt" and len(steps) > 1:
            corrupt(types.SimpleNamespace(run_dir=saving.run_dir), rng)
            damaged, newest = newest, steps[-2]
        counts[kind] += 1
    print(f"  {dict(counts)}; {set_aside} damaged checkpoints were noticed and kept; no other was lost")
    assert set_aside == len(list(saving.run_dir.glob("checkpoints/*.damaged*")))


def checkpoints(run_dir: pathlib.Path):
    is_there = any(p.name.isdecimal() for p in run_dir.glob("checkpoints/*"))
    return list(verify_checkpoints(run_dir)) if is_there else []
