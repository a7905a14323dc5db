"""Runs and models at URLs: what is trained here is kept there, and goes on from there on another machine."""

import dataclasses
import json
import pathlib
import shutil

import fsspec
import jax.numpy as jnp
import numpy as np
import pytest

from flax_encoder.config import ConfigError, RunConfig
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from flax_encoder.nn.partition import flatten, round_up_vocab
from flax_encoder.runs import elsewhere
from flax_encoder.runs.elsewhere import local_folder, working_folder
from flax_encoder.runs.embed import load_embedder
from flax_encoder.runs.load import load, read_origin
from flax_encoder.runs.loaded import model_factory
from flax_encoder.runs.record import RunRecord
from flax_encoder.runs.train import train
from flax_encoder.training.checkpoint import CheckpointError, Checkpoints, checkpoint_steps
from flax_encoder.training.run_log import RunLog
from flax_encoder.training.step import TrainState
from tests.runs import (
    ROOT,
    TINY,
    WORDS,
    assert_same_losses,
    command,
    losses,
    run,
    start,
    tiny,
    wait_for_step,
    with_fields,
)
from tests.toy import split_model

URL = "memory://runs/mine"
TOKENIZER = train_wordpiece([" ".join(WORDS)] * 3, 120)
CONFIG = with_fields(
    TINY, model__vocab_size=round_up_vocab(TOKENIZER.vocab_size), model__num_layers=1, model__embed_dim=16,
    model__mlp_dim=8, keep_checkpoints=2, run_dir=URL,
)  # fmt: skip


@pytest.fixture
def memory():
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield memory
    memory.store.clear()


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Moves to another machine, by its name: one with a cache of its own."""
    monkeypatch.setattr(elsewhere, "_SECONDS_BETWEEN_LOOKS", 0.01)

    def move(name):
        monkeypatch.setenv("FLAX_ENCODER_CACHE", str(tmp_path / name))

    move("first")
    return move


@pytest.fixture(scope="module")
def params():
    return split_model(model_factory(CONFIG, None))[1]


def go_on(config: RunConfig, params, steps: int) -> list[int]:
    """As training does, without the training: resume, log and save so many steps more. What was resumed and saved."""
    run_dir = pathlib.Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps({"objective": config.objective, "keep_best": config.keep_best}))
    with Checkpoints(run_dir, config.keep_checkpoints, config.keep_every) as checkpoints:
        begun = checkpoints.resumable_step() or 0
        with RunLog(run_dir, steps=begun + steps, resume_step=begun) as log:
            for step in range(begun + 1, begun + steps + 1):
                log.write(step, {"loss": 1.0 / step})
                state = TrainState(jnp.asarray(step, jnp.int32), params, {})
                checkpoints.save(state, step, RunRecord(CONFIG, TOKENIZER, None, step=step).to_json())
    return [begun, *sorted(checkpoint_steps(run_dir))]


def train_there(params, steps, **options):
    with working_folder(dataclasses.replace(CONFIG, **options), lambda message: None) as config:
        return go_on(config, params, steps)


def steps_there(memory) -> dict[int, bool]:
    """The checkpoints at the URL, and whether each is whole."""
    names = [path.removeprefix("/runs/mine/checkpoints/") for path in memory.find("/runs/mine/checkpoints")]
    steps = {int(name.split("/")[0]) for name in names}
    return {step: f"{step}/manifest.json" in names for step in steps}


def test_a_run_is_kept_at_its_url_and_goes_on_from_there_on_another_machine(params, memory, machine):
    assert train_there(params, 3) == [0, 2, 3]
    assert steps_there(memory) == {2: True, 3: True}
    machine("second")
    assert train_there(params, 2) == [3, 4, 5]
    machine("first")  # which has steps 2 and 3, and takes what is newer
    assert train_there(params, 1) == [5, 5, 6]
    assert steps_there(memory) == {5: True, 6: True}
    lines = memory.cat_file("/runs/mine/metrics.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert not [path for path in memory.find("/runs") if path.endswith(("lock", ".partial", ".saving"))]


def test_what_is_kept_for_good_stays_at_the_url_though_another_machine_goes_on_without_it(params, memory, machine):
    options = {"checkpoint_every": 1, "keep_every": 2}
    assert train_there(params, 5, **options) == [0, 2, 4, 5]
    machine("second")
    train_there(params, 2, **options)
    assert steps_there(memory) == {2: True, 4: True, 6: True, 7: True}


def test_what_was_copied_by_half_is_no_checkpoint(params, memory, machine):
    train_there(params, 3)
    memory.rm("/runs/mine/checkpoints/3/manifest.json")
    machine("second")
    assert train_there(params, 1) == [2, 2, 3]
    assert steps_there(memory) == {2: True, 3: True}


def test_what_a_killed_run_had_not_copied_yet_is_gone_on_with_where_it_is(params, memory, machine):
    train_there(params, 2)
    [folder] = [p for p in pathlib.Path(elsewhere.cache_folder(CONFIG.data), "runs").iterdir() if p.is_dir()]
    go_on(dataclasses.replace(CONFIG, run_dir=str(folder)), params, 1)  # and is killed
    assert train_there(params, 1) == [3, 3, 4]
    assert steps_there(memory) == {3: True, 4: True}


def test_a_place_that_cannot_be_written_to_is_an_error_and_the_run_is_whole(params, memory, machine, monkeypatch):
    def full(self, local, path, **_):
        raise OSError("quota exceeded")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"is whole, and its copy at .*quota"):
        patch.setattr(type(memory), "put_file", full)
        train_there(params, 2)
    assert not steps_there(memory)
    assert train_there(params, 1) == [2, 2, 3]
    assert steps_there(memory) == {2: True, 3: True}


def test_the_error_of_a_run_is_heard_even_where_its_copy_fails_too(params, memory, machine, monkeypatch):
    monkeypatch.setattr(type(memory), "put_file", None)
    with pytest.raises(ZeroDivisionError), working_folder(CONFIG, lambda message: None) as config:
        go_on(config, params, 1)
        raise ZeroDivisionError


def test_a_run_at_a_url_is_opened_like_one_that_is_here(params, memory, machine):
    train_there(params, 3)
    machine("second")
    opened = load(URL)
    assert opened.step == 3
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(flatten(opened.params)[path], leaf)
    assert read_origin(URL, "masked_lm")[0].step == 3
    assert load_embedder(URL).embed_dim == 16
    copy = local_folder(URL)
    assert local_folder(URL) == copy and checkpoint_steps(pathlib.Path(copy)) == {3}  # the newest alone
    assert local_folder(URL + "/") == copy
    train_there(params, 1)
    assert load(URL).step == 4


def test_a_published_folder_at_a_url_is_opened_without_what_nothing_reads(memory, machine):
    for path in (ROOT / "tests/golden/bert-masked_lm").iterdir():
        memory.put_file(str(path), f"/models/bert/{path.name}")
    for name in ("pytorch_model.bin", "tf_model.h5", "onnx/model.onnx"):
        memory.pipe(f"/models/bert/{name}", b"another format")
    copy = pathlib.Path(local_folder("memory://models/bert"))
    assert not {"pytorch_model.bin", "tf_model.h5", "onnx"} & {path.name for path in copy.iterdir()}
    assert (copy / "config.json").read_bytes() == (ROOT / "tests/golden/bert-masked_lm/config.json").read_bytes()


@pytest.mark.parametrize(("fields", "said"), [
    ({"seeds": 2}, "one run, at a place that can be written to"),
    ({"run_dir": "https://host/run"}, "one run, at a place that can be written to"),
])  # fmt: skip
def test_a_run_that_cannot_be_at_a_url_is_refused(fields, said, machine):
    with (
        pytest.raises(ConfigError, match=said),
        working_folder(dataclasses.replace(CONFIG, **fields), lambda message: None),
    ):
        pass


def test_a_url_is_never_taken_for_a_folder_of_this_machine(machine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="a run lies in a local folder"):
        train(CONFIG)
    assert not (tmp_path / "memory:").exists()


@pytest.mark.faults
def test_a_run_that_is_killed_goes_on_bitwise_the_same_from_its_url_alone(corpus, tmp_path, monkeypatch):
    whole = tiny(corpus, tmp_path / "whole", steps=400, log_every=1)
    run(command(whole))
    config = with_fields(whole, run_dir=f"file://{tmp_path}/there")
    for number in range(2):
        monkeypatch.setenv("FLAX_ENCODER_CACHE", str(tmp_path / f"machine-{number}"))
        process = start(config)
        wait_for_step(process, tmp_path / "there", max(losses(tmp_path / "there"), default=0) + 7)
        process.kill()
        process.communicate()
        print(f"killed with {sorted(p.name for p in (tmp_path / 'there/checkpoints').iterdir())} at the URL")
        shutil.rmtree(tmp_path / f"machine-{number}")
    run(command(config))
    assert losses(tmp_path / "there") == losses(tmp_path / "whole")
    assert_same_losses(tmp_path / "there", tmp_path / "whole")
