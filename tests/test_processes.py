"""Several processes: those that train together agree, and those that do not stay out of each other's folder."""

import shutil
import signal
import socket
import subprocess
import sys

import pytest
from filelock import FileLock

from flax_encoder.config import ConfigError, MeshConfig, RunConfig
from flax_encoder.runs.load import load_run
from flax_encoder.training.run_log import read_metrics
from tests.runs import assert_same_losses, command, run, start, tiny, wait_for_step, with_fields
from train import train


def test_one_process_trains_in_a_folder_at_a_time(corpus, tmp_path):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run/lock"), pytest.raises(ConfigError, match="one process trains in a folder at a time"):
        train(tiny(corpus, tmp_path / "run", mesh=MeshConfig()))


def start_two(config: RunConfig, **axes: int) -> list[subprocess.Popen]:
    """Two processes of one device each, rows split over them unless `axes` of the mesh say otherwise."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    config = with_fields(config, mesh=MeshConfig(num_processes=2, **axes))
    return [start(config, JAX_COORDINATOR_ADDRESS=address, JAX_PROCESS_ID=str(i)) for i in range(2)]


def finished(processes: list[subprocess.Popen]) -> list[str]:
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs


@pytest.mark.slow
def test_two_processes_train_as_one_and_stop_together(corpus, tmp_path):
    whole = tiny(corpus, tmp_path / "whole", steps=120)
    run(command(whole))
    config = with_fields(whole, run_dir=str(tmp_path / "run"))
    processes = start_two(config)
    wait_for_step(processes[0], tmp_path / "run", 6)
    processes[1].send_signal(signal.SIGTERM)  # to one alone
    outputs = finished(processes)
    stopped_at = load_run(tmp_path / "run").step
    assert 6 <= stopped_at < config.steps and f"by another process's signal after step {stopped_at}" in outputs[0]
    shutil.copytree(tmp_path / "run", tmp_path / "resumed_by_one")
    run(command(with_fields(config, run_dir=str(tmp_path / "resumed_by_one"))))
    outputs = finished(start_two(config))
    assert "held-out text" in outputs[0] and "held-out text" not in outputs[1]
    for name in ("run", "resumed_by_one"):
        assert_same_losses(tmp_path / name, tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_that_share_rows_train_as_one(corpus, tmp_path):
    whole = tiny(corpus, tmp_path / "whole", steps=9)
    run(command(whole))
    outputs = finished(start_two(with_fields(whole, run_dir=str(tmp_path / "run")), data=1, tensor=2))
    assert "tensor 2" in outputs[0]
    assert_same_losses(tmp_path / "run", tmp_path / "whole")
    folders = tmp_path / "run", tmp_path / "whole"
    got, want = ([line["eval/loss"] for line in read_metrics(folder) if "eval/loss" in line] for folder in folders)
    assert got == pytest.approx(want, rel=1e-5)


def test_processes_that_cannot_be_found_are_an_error(tmp_path):
    said = run([sys.executable, "train.py", "--run-dir", str(tmp_path / "run"), "--mesh.num-processes", "2"], status=1)
    assert "they could not join" in said and "JAX_COORDINATOR_ADDRESS" in said and "Traceback" not in said
