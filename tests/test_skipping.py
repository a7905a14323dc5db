"""Updates that are left out: the state stays as it was, the run goes on, and the same is left out of a resumed run."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

import flax_encoder.runs.train as loop
from flax_encoder.config import ConfigError
from flax_encoder.runs.step_log import Diverged
from flax_encoder.runs.train import train
from flax_encoder.training.checkpoint import read_params
from flax_encoder.training.run_log import read_metrics
from tests.runs import assert_same_losses, losses, tiny

QUICK = {"steps": 12, "log_every": 1, "checkpoint_every": 6, "eval_batches": 1}


def poison(monkeypatch, factors: dict[int, float], start: int = 0) -> None:
    """Multiply the weights of some steps' targets, those of every other row by the factor's negative: the loss is a sum
    by a count of about 1 then, and so is its gradient."""
    count, real = [start], loop.put_batch

    def put(rows, mesh):
        count[0] += 1
        weights = rows["target_weights"].copy()
        if count[0] in factors:
            weights *= np.float32(factors[count[0]])
            weights[1::2] *= -1
        return real(rows | {"target_weights": weights}, mesh)

    monkeypatch.setattr(loop, "put_batch", put)


def on_one_device(patch) -> None:
    devices = jax.devices()
    patch.setattr(jax, "devices", lambda *args: devices[:1])


def params_of(config):
    return jax.tree.leaves(read_params(pathlib.Path(config.run_dir, "checkpoints", str(config.steps))))


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    """A run that nothing happens to, with no update that can be skipped."""
    config = tiny(corpus, tmp_path_factory.mktemp("plain") / "run", **QUICK)
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        train(config)
    return config


def test_a_run_that_may_skip_and_need_not_is_the_same_but_for_rounding(plain, tmp_path, one_device):
    """It is another program, which may round elsewhere."""
    config = dataclasses.replace(plain, run_dir=str(tmp_path / "run"), max_skipped=3)
    train(config)
    assert_same_losses(tmp_path / "run", pathlib.Path(plain.run_dir))
    assert all(line["skipped_updates"] == 0 for line in read_metrics(tmp_path / "run") if "loss" in line)


def test_a_bad_step_is_as_if_its_rows_had_been_left_out(plain, tmp_path, monkeypatch, one_device):
    poison(monkeypatch, {4: np.nan, 9: np.nan})
    config = dataclasses.replace(plain, run_dir=str(tmp_path / "bad"), max_skipped=2)
    train(config)
    monkeypatch.undo()
    on_one_device(monkeypatch)
    named = dataclasses.replace(plain, run_dir=str(tmp_path / "named"), skip_rows=(4, 9))
    train(named)
    for got, want in zip(params_of(config), params_of(named), strict=True):
        np.testing.assert_array_equal(got, want)
    assert losses(tmp_path / "bad") == losses(tmp_path / "named")
    assert not {4, 9} & losses(tmp_path / "bad").keys()
    assert [line["skipped_updates"] for line in read_metrics(tmp_path / "bad") if "loss" in line][-1] == 2


def test_one_more_than_may_be_skipped_stops_the_run_which_goes_on_without_those_rows(
    plain, tmp_path, monkeypatch, one_device
):
    poison(monkeypatch, {4: np.nan, 8: np.nan, 9: np.nan})
    config = dataclasses.replace(plain, run_dir=str(tmp_path / "run"), max_skipped=2)
    with pytest.raises(Diverged, match=r"steps 4, 8, 9 .*step 9: \d+.* --skip-rows 4 8 9 leaves") as error:
        train(config)
    assert "holds step 6" in str(error.value)
    resumed = dataclasses.replace(config, skip_rows=(4, 8, 9))
    poison(monkeypatch, {8: np.nan, 9: np.nan}, start=6)
    train(resumed)
    assert {4, 8, 9}.isdisjoint(losses(tmp_path / "run")) and 12 in losses(tmp_path / "run")


def test_a_norm_far_above_the_median_is_skipped_also_after_a_resume(plain, tmp_path, monkeypatch, one_device):
    longer = {"steps": 30, "checkpoint_every": 21, "max_skipped": 2, "max_norm_factor": 5.0}
    seen = {}
    for name, stops in (("whole", ()), ("resumed", (21,))):
        config = dataclasses.replace(plain, run_dir=str(tmp_path / name), **longer)
        for stop in stops:  # as if killed after the save
            monkeypatch.setattr(loop, "is_evaluation_due", lambda config, rows, step, at=stop: kill(step, at))
            poison(monkeypatch, {19: 1e4, 25: 1e4})
            with pytest.raises(KeyboardInterrupt):
                train(config)
            monkeypatch.undo()
            on_one_device(monkeypatch)
        poison(monkeypatch, {19: 1e4, 25: 1e4}, start=max(stops, default=0))
        train(config)
        seen[name] = losses(tmp_path / name), [np.asarray(x) for x in params_of(config)]
    assert {19, 25}.isdisjoint(seen["whole"][0])
    assert seen["whole"][0] == seen["resumed"][0]
    jax.tree.map(np.testing.assert_array_equal, seen["whole"][1], seen["resumed"][1])


def kill(step: int, at: int) -> bool:
    if step == at + 1:
        raise KeyboardInterrupt
    return False


def test_what_skips_is_refused_where_it_means_nothing(plain):
    for fields, rule in (
        ({"max_norm_factor": 5.0}, "may skip updates"),
        ({"max_norm_factor": 0.5, "max_skipped": 1}, "above 1"),
        ({"max_skipped": -1}, "counts updates"),
        ({"skip_rows": (0,)}, "counted from 1"),
    ):
        with pytest.raises(ConfigError, match=rule):
            dataclasses.replace(plain, **fields)
