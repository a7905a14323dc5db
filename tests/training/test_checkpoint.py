"""Checkpoints: what was saved comes back, bitwise, anywhere; what was not finished never was."""

import pathlib
import resource
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flax_encoder.config import MeshConfig
from flax_encoder.training.checkpoint import CheckpointError, Checkpoints, read_params, read_run
from flax_encoder.training.sharding import make_mesh
from flax_encoder.training.step import TrainState

RUN = {"config": {"steps": 7}, "tokenizer": "{}", "label_names": None}
SPECS = {"token": PartitionSpec("tensor", "fsdp"), "norm": {"scale": PartitionSpec()}}


def make_state(seed=0, mesh=None):
    generator = np.random.default_rng(seed)
    params = {"token": generator.standard_normal((16, 8)), "norm": {"scale": generator.standard_normal(5)}}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    if mesh is not None:
        params = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, SPECS)
    state = TrainState(jnp.int32(seed), params, optax.adamw(0.1).init(params))
    return jax.tree.map(lambda x: x + x.dtype.type(seed), state)


def as_numpy(tree):
    return jax.tree.map(np.array, tree)


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, as_numpy(got), want)
    assert jax.tree.structure(got) == jax.tree.structure(want)


def save(run_dir, *steps, keep=2, state=make_state, keep_every=None):
    with Checkpoints(run_dir, keep, keep_every) as checkpoints:
        for step in steps:
            checkpoints.save(state(step), step, RUN)
        checkpoints.wait()


def restore(run_dir, step, like):
    with Checkpoints(run_dir, 2) as checkpoints:
        assert checkpoints.latest_step() == step
        return checkpoints.restore(step, like)


def step_folders(run_dir: pathlib.Path):
    return sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit())


def test_restored_is_bitwise_what_was_saved(tmp_path):
    save(tmp_path, 3)
    assert_same(restore(tmp_path, 3, make_state(0)), as_numpy(make_state(3)))
    assert read_run(tmp_path) == RUN | {"step": 3}
    assert_same(read_params(tmp_path), as_numpy(make_state(3).params))
    assert_same(read_params(tmp_path / "checkpoints" / "3"), as_numpy(make_state(3).params))


def test_the_newest_are_kept_and_those_of_steps_that_keep_every_divides(tmp_path):
    save(tmp_path, 2, 3, 4, 5, 6, 7, keep=1, keep_every=3)
    assert step_folders(tmp_path) == [3, 6, 7]


def test_a_save_holds_the_values_of_its_step_though_the_state_is_donated_at_once(tmp_path):
    state = make_state(1)
    want = as_numpy(state)
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x * 3 + 1, state), donate_argnums=0)
    advance(make_state(2))
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(state, 1, RUN)
        for _ in range(5):
            state = advance(state)
        jax.block_until_ready(state)
        checkpoints.wait()
    assert_same(restore(tmp_path, 1, make_state(0)), want)


@pytest.mark.parametrize("saved", [None, MeshConfig(fsdp=8)])
@pytest.mark.parametrize("restored", [None, MeshConfig(data=2, fsdp=2, tensor=2)])
def test_a_checkpoint_is_restored_on_another_mesh(tmp_path, saved, restored):
    before, after = (None if mesh is None else make_mesh(mesh) for mesh in (saved, restored))
    save(tmp_path, 3, state=lambda step: make_state(step, before))
    like = make_state(0, after)
    got = restore(tmp_path, 3, like)
    assert_same(got, as_numpy(make_state(3)))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(like), strict=True):
        assert g.sharding.is_equivalent_to(w.sharding, g.ndim)
    assert_same(read_params(tmp_path, like.params), as_numpy(make_state(3).params))
    assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(read_params(tmp_path)))


def test_only_the_last_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 5, keep=2)
    assert step_folders(tmp_path) == [3, 5]
    assert read_run(tmp_path)["step"] == 5
    assert read_run(tmp_path / "checkpoints" / "3")["step"] == 3


def test_a_step_that_is_saved_already_is_not_saved_again(tmp_path):
    save(tmp_path, 3)
    save(tmp_path, 3, state=lambda step: make_state(9))
    assert_same(restore(tmp_path, 3, make_state(0)), as_numpy(make_state(3)))


def test_a_save_that_was_killed_never_was(tmp_path):
    save(tmp_path, 3)
    killed = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "3", killed)
    assert read_run(tmp_path)["step"] == 3
    assert_same(read_params(tmp_path), as_numpy(make_state(3).params))
    assert_same(restore(tmp_path, 3, make_state(0)), as_numpy(make_state(3)))
    save(tmp_path, 7)
    assert read_run(tmp_path)["step"] == 7
    assert not killed.exists()


@pytest.mark.parametrize("read", [read_run, read_params])
def test_a_folder_without_checkpoints_says_what_to_give(tmp_path, read):
    with pytest.raises(CheckpointError, match=rf"no checkpoint in {tmp_path}\. Give a run folder"):
        read(tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path):
    save(tmp_path, 3)
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "params")
    (tmp_path / "checkpoints" / "3" / "params").mkdir()
    with pytest.raises(CheckpointError, match=r"checkpoints/3 could not be read: "):
        read_params(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoints/3 could not be read: "):
        restore(tmp_path, 3, make_state(0))


UNWRITABLE = """
import pathlib, sys
import jax.numpy as jnp
from flax_encoder.training.checkpoint import CheckpointError, Checkpoints
from flax_encoder.training.step import TrainState

run_dir = pathlib.Path(sys.argv[1])
try:
    with Checkpoints(run_dir, 2) as checkpoints:
        for step in (1, 3):
            checkpoints.save(TrainState(jnp.int32(step), {"w": jnp.ones(5)}, ()), step, {})
            checkpoints.wait()
            (run_dir / "checkpoints").rename(run_dir / "moved")
            (run_dir / "checkpoints").write_text("a file where the folder was")
except CheckpointError as error:
    print(error, flush=True)
"""


def test_a_place_that_cannot_be_written_is_a_checkpoint_error_and_the_program_ends(tmp_path):
    command = [sys.executable, "-c", UNWRITABLE, str(tmp_path)]
    program = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert program.returncode == 0, program.stderr
    assert "could not be written" in program.stdout


def test_a_full_disk_is_a_checkpoint_error_and_the_older_checkpoint_stays(tmp_path):
    """A disk is full when a file may not grow: here past 64 KiB, for a state of 4 MiB."""
    save(tmp_path, 3)
    large = TrainState(jnp.int32(7), {"w": jax.random.normal(jax.random.key(0), (1024, 1024))}, ())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    says = r"checkpoints/7 could not be written, the last whole one is step 3; free some space"
    with Checkpoints(tmp_path, 2) as checkpoints, pytest.raises(CheckpointError, match=says):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        try:
            checkpoints.save(large, 7, RUN)
            checkpoints.save(large, 9, RUN)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_run(tmp_path)["step"] == 3
    assert_same(restore(tmp_path, 3, make_state(0)), as_numpy(make_state(3)))


def test_what_a_failed_save_reports_too_late_is_not_printed(tmp_path, monkeypatch):
    """A wholly full disk gives a traceback a file, by this hook, which nothing here can fill at will."""
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    late, other = (types.SimpleNamespace(object=None, exc_value=RuntimeError(text))
                   for text in ("Event loop is closed", "another"))  # fmt: skip
    with Checkpoints(tmp_path, 1):
        sys.unraisablehook(late)
        sys.unraisablehook(other)
    assert shown == [other] and sys.unraisablehook == shown.append


def test_what_a_run_says_of_itself_is_json(tmp_path):
    run = RUN | {"tokenizer": "ünï \u2028 code", "label_names": ["b", "a"]}
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(make_state(1), 1, run)
        checkpoints.wait()
    assert read_run(tmp_path) == run | {"step": 1}
