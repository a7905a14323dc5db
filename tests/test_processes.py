"""Several processes: those that train together agree, and those that do not stay out of each other's folder."""

import concurrent.futures
import itertools
import json
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import fsspec
import jax
import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flax_encoder.commands import main
from flax_encoder.config import ConfigError, MeshConfig, RunConfig
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from flax_encoder.runs import ask_file, processes
from flax_encoder.runs.ask_file import AnswerFile, output_file
from flax_encoder.runs.load import load_run
from flax_encoder.training.roll_call import LOST
from flax_encoder.training.run_log import SAMPLES, read_metrics
from tests.runs import (
    ROOT,
    TINY,
    WORDS,
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
from tests.toy import save_run
from train import train


def test_one_process_trains_in_a_folder_at_a_time(corpus, tmp_path):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run/lock"), pytest.raises(ConfigError, match="one process trains in a folder at a time"):
        train(tiny(corpus, tmp_path / "run", mesh=MeshConfig()))


def start_all(config: RunConfig, count: int, **axes: int) -> list[subprocess.Popen]:
    """So many processes of one device each, rows split over them unless `axes` of the mesh say otherwise."""
    config = with_fields(config, mesh=MeshConfig(num_processes=count, **axes))
    return [start(config, **variables) for variables in addressed(count)]


def addressed(count: int) -> list[dict[str, str]]:
    """What tells each of so many processes where the first is, and which it is."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [{"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(i)} for i in range(count)]


def finished(processes: list[subprocess.Popen]) -> list[str]:
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert {process.returncode for process in processes} == {0}, outputs
    return outputs


@pytest.mark.slow
def test_two_processes_train_as_one_and_stop_together(corpus, tmp_path):
    whole = tiny(corpus, tmp_path / "whole", steps=120)
    run(command(whole))
    config = with_fields(whole, run_dir=str(tmp_path / "run"))
    processes = start_all(config, 2)
    wait_for_step(processes[0], tmp_path / "run", 6)
    processes[1].send_signal(signal.SIGTERM)  # to one alone
    outputs = finished(processes)
    stopped_at = load_run(tmp_path / "run").step
    assert 6 <= stopped_at < config.steps and f"by another process's signal after step {stopped_at}" in outputs[0]
    shutil.copytree(tmp_path / "run", tmp_path / "resumed_by_one")
    run(command(with_fields(config, run_dir=str(tmp_path / "resumed_by_one"))))
    outputs = finished(start_all(config, 2))
    assert "held-out text" in outputs[0] and "held-out text" not in outputs[1]
    for name in ("run", "resumed_by_one"):
        assert_same_losses(tmp_path / name, tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_that_share_rows_train_as_one(corpus, tmp_path):
    whole = tiny(corpus, tmp_path / "whole", steps=9, eval_every=9)
    run(command(whole))
    outputs = finished(start_all(with_fields(whole, run_dir=str(tmp_path / "run")), 2, data=1, tensor=2))
    assert "tensor 2" in outputs[0]
    assert_same_losses(tmp_path / "run", tmp_path / "whole")
    folders = tmp_path / "run", tmp_path / "whole"
    got, want = ([line["eval/loss"] for line in read_metrics(folder) if "eval/loss" in line] for folder in folders)
    assert got == pytest.approx(want, rel=1e-5)
    assert read_metrics(folders[0], SAMPLES) == read_metrics(folders[1], SAMPLES) != []


def test_processes_that_cannot_be_found_are_an_error(tmp_path):
    said = run([sys.executable, "train.py", "--run-dir", str(tmp_path / "run"), "--mesh.num-processes", "2"], status=1)
    assert "they could not join" in said and "JAX_COORDINATOR_ADDRESS" in said and "Traceback" not in said


@pytest.mark.faults
def test_four_processes_that_are_killed_go_on_as_two_and_then_as_one(corpus, tmp_path):
    whole = tiny(corpus, tmp_path / "whole", steps=90, log_every=1, mesh__data=-1)
    run(command(whole))
    config, run_dir = with_fields(whole, run_dir=str(tmp_path / "run")), tmp_path / "run"
    for count, step in ((4, 25), (2, 55)):
        processes = start_all(config, count)
        wait_for_step(processes[0], run_dir, step)
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()
        saved = load_run(run_dir).step
        print(f"{count} processes killed after step {max(losses(run_dir))}; step {saved} is saved")
        assert saved >= step - 2 * config.checkpoint_every - 2
    run(command(config))
    assert_same_losses(run_dir, tmp_path / "whole")


@pytest.mark.faults
def test_when_a_process_is_killed_the_others_say_which_and_end_and_fewer_go_on(corpus, tmp_path):
    whole = tiny(corpus, tmp_path / "whole", steps=90, log_every=1, batch_size=6, mesh__data=-1)
    run(command(whole))
    config = with_fields(whole, run_dir=str(tmp_path / "run"))
    processes = start_all(config, 3)
    wait_for_step(processes[0], tmp_path / "run", 12)
    processes[1].kill()
    began = time.monotonic()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    print(f"the others ended {time.monotonic() - began:.0f} s later")
    for i in (0, 2):
        said = outputs[i]
        assert processes[i].returncode == LOST, said
        assert f"process 1 of 3 (pid {processes[1].pid} on" in said and "Traceback" not in said
    run(command(config))
    assert_same_losses(tmp_path / "run", tmp_path / "whole")


@pytest.mark.faults
def test_what_one_process_fails_by_ends_the_others_with_its_error(corpus, tmp_path):
    config = tiny(corpus, tmp_path / "run", steps=5000, mesh__data=-1, mesh__num_processes=2)
    first, second = addressed(2)
    there = tmp_path / "there"
    there.mkdir()
    processes = [start(config, **first), start(config, **second, FLAX_ENCODER_CACHE=str(there / "file" / "cache"))]
    (there / "file").write_text("no folder")
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [LOST, 1], outputs
    assert "process 1 of 2 failed: " in outputs[0] and "Traceback" not in "".join(outputs)


ROWS = [{"text": " ".join(WORDS[i % 7 : i % 7 + 2 + i % 9]) + " !" * (i % 3), "label": "ab"[i % 2]} for i in range(150)]


@pytest.fixture(autouse=True)
def quick_compilation(monkeypatch):
    """As in conftest.py; the programs that are started here too."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """(folder with rows.jsonl and two runs, {output: what one process gives of it}, the commands)."""
    folder = tmp_path_factory.mktemp("asked")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer = train_wordpiece([row["text"] for row in ROWS], 120)
    for objective, labels in (("classification", ["a", "b"]), ("masked_lm", None)):
        config = with_fields(TINY, objective=objective, run_dir=str(folder / objective), model__num_layers=1)
        save_run(config, tokenizer, labels)

    def commands(out, more):
        rows, classes = str(folder / "rows.jsonl"), str(folder / "classification")
        return [
            ["predict", classes, "--input", rows, "--output", f"{out}.jsonl", "--probabilities", *more],
            ["embed", classes, "--input", rows, "--output", f"{out}.npy", *more],
            ["evaluate", classes, "--data.source", rows, "--json", *more],
            ["evaluate", str(folder / "masked_lm"), "--data.source", rows, "--json", *more],
        ]

    return folder, commands


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", text)]


def interrupted(argv: list[str], patch: pytest.MonkeyPatch) -> None:
    """A predict that Ctrl-C ends when 80 answers are kept."""
    line, made = AnswerFile._line, itertools.count()

    def until_100(self, answer):
        if next(made) == 100:
            raise KeyboardInterrupt
        return line(self, answer)

    patch.setattr(ask_file, "_KEPT_EVERY", 40)
    patch.setattr(AnswerFile, "_line", until_100)
    with pytest.raises(SystemExit):
        main(argv)


def test_two_processes_answer_embed_and_score_as_one(asked, tmp_path, capsys, monkeypatch):
    _, commands = asked
    with monkeypatch.context() as patch:
        interrupted(commands(tmp_path / "two", [])[0], patch)
    argv = json.dumps(commands(tmp_path / "two", ["--num-processes", "2"]))
    processes = [
        subprocess.Popen([sys.executable, "-m", "tests.ask_together", argv], cwd=ROOT, env=environment() | variables,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for variables in addressed(2)
    ]  # fmt: skip
    for one in commands(tmp_path / "one", []):
        main(one)
    scores = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    theirs, errors = zip(*(process.communicate(timeout=200) for process in processes), strict=True)
    assert [process.returncode for process in processes] == [0, 0], errors
    assert "continuing after 80 answers" in errors[0]
    assert "wrote" not in theirs[1] and "{" not in theirs[1]  # the first writes and tells
    their_scores = [line for line in theirs[0].splitlines() if line.startswith("{")]
    assert len(scores) == len(their_scores) == 2
    for one, two in zip(scores, their_scores, strict=True):
        np.testing.assert_allclose(numbers(two), numbers(one), rtol=1e-5)
    one, two = ((tmp_path / f"{name}.jsonl").read_text() for name in ("one", "two"))
    assert re.sub(r"\d+\.\d+(?:e-?\d+)?", "N", one) == re.sub(r"\d+\.\d+(?:e-?\d+)?", "N", two)
    np.testing.assert_allclose(numbers(two), numbers(one), rtol=1e-5)
    one, two = (np.load(tmp_path / f"{name}.npy") for name in ("one", "two"))
    np.testing.assert_allclose(two, one, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.{kind}" for name in ("one", "two") for kind in ("jsonl", "npy")
    )


@pytest.fixture
def as_one_of(monkeypatch):
    """Runs a function as each of several processes would, one thread each, which gather by a barrier."""

    def run_all(count, function):
        barrier, told, index = threading.Barrier(count, timeout=30), [b""] * count, threading.local()

        def gathered(value: bytes) -> list[bytes]:
            told[index.number] = value
            barrier.wait()
            found = list(told)
            barrier.wait()
            return found

        monkeypatch.setattr(processes.jax, "process_count", lambda: count)
        monkeypatch.setattr(processes.jax, "process_index", lambda: index.number)
        monkeypatch.setattr(processes, "gathered", gathered)

        def one(number):
            index.number = number
            try:
                return function(number)
            except Exception as error:
                return error

        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            return list(pool.map(one, range(count)))

    return run_all


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 5), size=st.integers(1, 4), items=st.integers(0, 43), done=st.integers(0, 9))
def test_blocks_of_all_processes_are_the_streams_in_order_and_each_is_worked_on_once(
    as_one_of, count, size, items, done
):
    worked = []

    def work(block):
        worked.extend(block)
        return [-item for item in block]

    def ask(number):
        stream = itertools.islice(range(items), done, None)
        return [(first, block) for first, block in processes.blocks_of_all(stream, work, size)]

    for found in as_one_of(count, ask):
        assert [x for _, block in found for x in block] == [-x for x in range(done, items)]
        assert [first for first, _ in found] == list(range(0, max(items - done, 0), size))
    assert sorted(worked) == list(range(done, items))


def test_what_one_process_cannot_do_ends_them_all_with_its_error(as_one_of):
    def work(block):
        if 5 in block:
            raise DataError("record 5 has no text")
        return block

    found = as_one_of(3, lambda number: list(processes.blocks_of_all(range(9), work, 2)))
    assert [type(error) for error in found] == [DataError] * 3
    assert [str(error) for error in found] == ["process 2 of 3 failed: DataError: record 5 has no text"] * 2 + [
        "record 5 has no text"
    ]


def test_an_answer_file_is_written_by_one_command_at_a_time(asked, tmp_path):
    _, commands = asked
    [predict, *_] = commands(tmp_path / "one", [])
    said = "--num-processes for several that share the work"
    with output_file(predict[5]), pytest.raises(ConfigError, match=said), output_file(predict[5]):
        pass
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="Make it first"), output_file(str(tmp_path / "absent/a.jsonl")):
        pass


def test_standard_input_is_read_by_one_process(asked, capsys):
    folder, _ = asked
    with pytest.raises(SystemExit):
        main(["predict", str(folder / "classification"), "--input", "-", "--output", "-", "--num-processes", "2"])
    assert "give --input FILE" in capsys.readouterr().err


def test_questions_and_answers_may_be_elsewhere(asked, tmp_path, monkeypatch):
    folder, commands = asked
    memory = fsspec.filesystem("memory")
    memory.pipe("/asked/rows.jsonl", (folder / "rows.jsonl").read_bytes())
    predict, embed, evaluate, _ = commands(tmp_path / "here", [])
    for here in (predict, embed):
        out = f"memory://answers/deep/{pathlib.Path(here[5]).name}"
        main([*here[:3], "memory://asked/rows.jsonl", here[4], out, *here[6:]])
        main(here)
        assert memory.cat_file(out) == pathlib.Path(here[5]).read_bytes()
    main([*evaluate[:3], "memory://asked/rows.jsonl", "--json"])
    for path in memory.find("/answers"):
        memory.rm(path)
