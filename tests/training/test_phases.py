"""Phases: what changes during a run, from the settings to the last bit of a resumed one."""

import contextlib
import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_encoder.commands.plan import _report as report
from flax_encoder.config import (
    ConfigError,
    DataConfig,
    EncoderConfig,
    MaskingConfig,
    OptimizerConfig,
    Phase,
    RunConfig,
    from_dict,
    to_dict,
)
from flax_encoder.config.phases import describe_phase
from flax_encoder.data.pipeline import open_data
from flax_encoder.data.reading import MASKED_TEXT
from flax_encoder.data.rows.targets import HOST_FIELDS
from flax_encoder.pages.story import read_stories
from flax_encoder.plan.rows import sample_data
from flax_encoder.plan.run import Planner
from flax_encoder.plan.targets import parse_hardware
from flax_encoder.runs.load import load_run, read_origin
from flax_encoder.runs.record import read_record
from flax_encoder.runs.start import settle
from flax_encoder.tasks import TASKS, check_task
from flax_encoder.training.checkpoint import checkpoint_steps
from flax_encoder.training.run_log import Clock, read_metrics
from tests.runs import ROOT, losses, tiny, with_fields
from tests.test_train import Stops
from train import train

RUNS = ROOT / "tests/golden/runs"
ROPE = EncoderConfig(position="rope")
THREE = (
    Phase(share=0.4, batch_size=(4, 8), masking_rate=(0.4, 0.2)),
    Phase(share=0.4, row_length=64, rope_theta=1e5, weights=(1.0, 3.0), learning_rate=2e-3),
    Phase(share=0.2, masking_rate=0.1, num_microbatches=2, learning_rate=(2e-3, 0.0),
          learning_rate_shape="one_minus_sqrt"),
)  # fmt: skip


def shapes(config):
    return [(s.end_step, s.batch_size, s.row_length, s.phase) for s in config.stages]


def stages_of_before(steps, batch_size, first, warmup_rate, row_length, last_length, last_rate):
    """The rule of the versions that had no phases."""
    sizes = [first or batch_size]
    while sizes[-1] < batch_size:
        sizes.append(min(2 * sizes[-1], batch_size))
    growing = steps * warmup_rate
    starts = [round(growing * (size - sizes[0]) / max(batch_size - sizes[0], 1)) for size in sizes]
    stages = [(end, size, row_length) for end, size in zip(starts[1:], sizes[:-1], strict=True)]
    if last_length is not None:
        stages.append((steps - round(steps * last_rate), batch_size, row_length))
    stages.append((steps, batch_size * row_length // (last_length or row_length), last_length or row_length))
    ends = [0, *(end for end, _, _ in stages)]
    return [stage for start, stage in zip(ends, stages, strict=False) if start < stage[0]]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5000), st.sampled_from([4, 12, 24, 96]), st.sampled_from([None, 1, 3, 4]), st.floats(0, 1),
    st.sampled_from([None, 16, 32, 128]), st.floats(0, 1),
)  # fmt: skip
def test_settings_of_before_come_to_the_stages_of_before(steps, batch_size, first, warmup_rate, last_length, last_rate):
    if warmup_rate + last_rate > 1:
        warmup_rate = 1 - last_rate
    data = DataConfig(row_length=64, last_row_length=last_length, last_rate=last_rate)
    config = RunConfig(steps=steps, batch_size=batch_size, first_batch_size=first, batch_warmup_rate=warmup_rate,
                       data=data)  # fmt: skip
    wanted = stages_of_before(steps, batch_size, first, warmup_rate, 64, last_length, last_rate)
    assert [stage[:3] for stage in shapes(config)] == wanted


def test_phases_follow_each_other_and_what_one_changes_stays():
    config = RunConfig(steps=100, batch_size=8, model=ROPE, data=DataConfig(source=("a", "b")), phases=THREE)
    assert shapes(config) == [(40, 4, 128, 0), (80, 16, 64, 1), (100, 16, 64, 2)]
    assert [s.rope_theta for s in config.stages] == [1e4, 1e5, 1e5]
    assert [s.weights for s in config.stages] == [None, (1.0, 3.0), (1.0, 3.0)]
    assert [s.num_microbatches for s in config.stages] == [1, 1, 2]
    assert [(s.masking_rate.first, s.masking_rate.last) for s in config.stages] == [(0.4, 0.2), (0.2, 0.2), (0.1, 0.1)]
    assert config.after(0).model.rope_theta == config.after(40).model.rope_theta == 1e4
    assert config.after(41).model.rope_theta == config.after(100).model.rope_theta == 1e5
    assert config.row_lengths[-1] == 64


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.lists(
    st.tuples(st.integers(0, 20), st.sampled_from([None, 16, 64, (4, 16), (3, 64)]), st.sampled_from([None, 32, 128])),
    min_size=1, max_size=6,
))  # fmt: skip
def test_the_stages_of_any_phases_follow_each_other_to_the_runs_end(steps, drawn):
    whole = sum(part for part, *_ in drawn)
    if whole == 0:
        return
    phases = tuple(
        Phase(share=part / whole, batch_size=size or (16 if length else None), row_length=length)
        for part, size, length in drawn
    )
    config = RunConfig(steps=steps, batch_size=16, phases=phases)
    stages = config.stages
    assert [stage.start_step for stage in stages] == [0, *(stage.end_step for stage in stages[:-1])]
    assert stages[-1].end_step == steps and all(stage.start_step < stage.end_step for stage in stages)
    timeline = config.timeline
    assert [timeline.stage_of(number) for number in range(steps)] == [
        stage for stage in stages for _ in range(stage.start_step, stage.end_step)]  # fmt: skip
    assert list(timeline.phase_ends) == sorted(timeline.phase_ends)


def test_a_phase_may_be_a_share_steps_or_tokens():
    shared = RunConfig(steps=100, batch_size=8, phases=(Phase(share=0.25), Phase(share=0.75, batch_size=16)))
    counted = dataclasses.replace(shared, phases=(Phase(steps=25), Phase(tokens=75.0 * 16 * 128, batch_size=16)))
    assert shapes(shared) == shapes(counted) == [(25, 8, 128, 0), (100, 16, 128, 1)]
    # Batches that grow straight from 4 to 16 rows have 4 for a third of the way and 8 for the rest.
    growing = RunConfig(steps=30, batch_size=16, phases=(Phase(tokens=30 * 128 * 20 / 3, batch_size=(4, 16)),))
    assert shapes(growing) == [(10, 4, 128, 0), (30, 8, 128, 0)]


def test_a_run_too_short_for_a_phase_leaves_it_out():
    config = RunConfig(steps=4, phases=(Phase(share=0.95), Phase(share=0.05, row_length=64)))
    assert shapes(config) == [(4, 32, 128, 0)] and config.row_lengths[-1] == 64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"phases": (Phase(share=0.5), Phase(share=0.4))}, r"add up to 1: got 0\.5 \+ 0\.4 = 0\.9\. Give .* 0\.5"),
        ({"phases": (Phase(share=0.5), Phase(steps=500))}, r"all phases have share, or none has: got share \[0\.5, N"),
        ({"phases": (Phase(steps=10), Phase(steps=500))}, "got 10 \\+ 500 = 510 steps for steps 1,000. .*--steps 510"),
        ({"phases": (Phase(share=1.0),), "first_batch_size": 4}, "got first_batch_size 4 beside them"),
        ({"phases": (Phase(share=1.0),), "data": DataConfig(last_row_length=64)}, "got data.last_row_length 64 beside"),
        ({"phases": (Phase(share=1.0, masking_rate=0.3),), "masking": MaskingConfig(last_rate=0.1)}, "masking.last"),
        ({"phases": (Phase(share=1.0, rope_theta=1e5),)}, "rotary positions: got phases with 100000.0, .* learned"),
        ({"phases": (Phase(share=1.0, row_length=1024),)}, "reach max_length: got data.row_length 1024 .* at most 512"),
        ({"phases": (Phase(share=1.0, row_length=100),)}, "4096 tokens, not a multiple of phases.0.row_length 100"),
        ({"phases": (Phase(share=1.0, weights=(1.0, 2.0)),)}, r"phases.0.weights \(1.0, 2.0\) for 1 of data.source"),
        ({"phases": (Phase(share=1.0, batch_size=9, num_microbatches=2),)}, "got 2 for 9 rows in phases.0"),
        ({"phases": (Phase(steps=1000),), "epochs": 2.0}, "got epochs 2.0 and phases in steps"),
        ({"phases": (Phase(minutes=1.0), Phase(steps=9))}, r"have minutes, or none has: got minutes \[1\.0, None"),
        ({"phases": (Phase(minutes=1.0), Phase(minutes=2.0))}, "= 3 for budget_minutes None. Give --budget-minutes 3"),
        ({"phases": (Phase(share=1.0, row_length=64),), "epochs": 2.0}, "phases of another shape"),
        ({"phases": (Phase(share=1.0, learning_rate=1e-4),), "budget_minutes": 1.0}, "got budget_minutes 1.0"),
        ({"phases": (Phase(share=1.0, learning_rate=1e-4),), "optimizer": OptimizerConfig(learning_rate=0.0)}, "above"),
    ],
)
def test_phases_that_cannot_be_are_refused_with_their_values(values, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "one of share, steps, tokens, minutes, at least 0: got none"),
        ({"share": 0.5, "steps": 3}, r"got \{'share': 0.5, 'steps': 3\}"),
        ({"share": -0.5}, "at least 0: got .*-0.5"),
        ({"share": 1.0, "row_length": 2}, "got row_length 2"),
        ({"minutes": 1.0, "batch_size": (4, 8)}, "minutes .* one value of each setting.* and two of batch_size"),
        ({"share": 1.0, "batch_size": (8, 4)}, r"grow within a phase: got batch_size \(8, 4\)"),
        ({"share": 1.0, "batch_size": 0}, "batch_size is above 0: got 0"),
        ({"share": 1.0, "masking_rate": 1.5}, "at most 1: got 1.5"),
        ({"share": 1.0, "weights": (0.0, 0.0)}, r"one of them above: got \(0.0, 0.0\)"),
        ({"share": 1.0, "learning_rate_shape": "cosine"}, "needs two learning rates: got cosine with"),
        ({"share": 1.0, "learning_rate": (1e-3, 0.0), "learning_rate_shape": "inverse_sqrt"}, r"got \(0.001, 0.0\)"),
        ({"share": 1.0, "num_layers": 3}, "changes only row_length, .*: got num_layers. Set it "),
        ({"share": 1.0, "embed_dim": 3, "vocab_size": 5}, "got embed_dim, vocab_size"),
    ],
)
def test_a_phase_that_cannot_be_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Phase(**values)
    with pytest.raises(ConfigError, match=message):
        from_dict(RunConfig, {"phases": [values]})


def test_phases_survive_the_way_through_json():
    config = RunConfig(steps=50, batch_size=8, model=ROPE, data=DataConfig(source=("a", "b")), phases=THREE)
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(ConfigError, match=r"phases\.0\.row_length must be int \| None: got '64'"):
        from_dict(RunConfig, {"phases": [{"share": 1.0, "row_length": "64"}]})


def test_a_phase_changes_what_the_objective_reads():
    config = RunConfig(objective="classification", phases=(Phase(share=1.0, row_length=64, batch_size=8),))
    with pytest.raises(ConfigError, match=r"phases\.0\.row_length is not read by the objective classification"):
        check_task(config)
    check_task(dataclasses.replace(config, phases=(Phase(share=1.0, batch_size=8),)))


def texts_and_rates(config):
    data = open_data(config, MASKED_TEXT)
    mask = data.tokenizer.special("mask")
    ordinary = np.setdiff1d(np.arange(data.tokenizer.vocab_size), data.tokenizer.special_ids)
    for number in range(len(data.train)):
        batch = data.train[number]
        maskable = np.isin(batch["tokens"], ordinary) | (batch["tokens"] == mask)
        yield batch, batch["target_weights"].sum() / maskable.sum()


def test_phases_give_the_batches_of_the_settings_that_they_stand_for(corpus):
    config = tiny(corpus, "none", steps=20, masking__rate=0.4, masking__last_rate=0.2)
    old = with_fields(config, first_batch_size=2, batch_warmup_rate=0.5, data__last_row_length=64, data__last_rate=0.25)
    phases = (Phase(share=0.5, batch_size=(2, 8)), Phase(share=0.25, batch_size=8), Phase(share=0.25, row_length=64))
    new = dataclasses.replace(config, phases=phases)
    assert [s[:3] for s in old.stages] == [s[:3] for s in new.stages]
    for (was, _), (now, _) in zip(texts_and_rates(old), texts_and_rates(new), strict=True):
        assert was.keys() == now.keys()
        for name in was:
            np.testing.assert_array_equal(was[name], now[name])


def test_the_masking_rate_follows_its_phases(corpus):
    third = 1 / 3
    phases = Phase(share=third, masking_rate=(0.5, 0.2)), Phase(share=third), Phase(share=third, masking_rate=0.1)
    config = tiny(corpus, "none", steps=30, batch_size=64, phases=phases)
    rates = [rate for _, rate in texts_and_rates(config)]
    wanted = [*np.linspace(0.5, 0.2, 10), *[0.2] * 10, *[0.1] * 10]
    np.testing.assert_allclose(rates, wanted, atol=0.02)
    slots = [batch["target_weights"].shape[1] for batch, _ in texts_and_rates(config)]
    assert slots == [16] * 10 + [7] * 10 + [4] * 10  # of rows of 32: a stage computes what its rate needs


def test_a_run_whose_batches_rows_and_masks_change_has_the_losses_of_its_day(tmp_path, one_device):
    """Of before there were phases: batches of 4 and 8 rows, then rows of half the length, and a falling rate."""
    config = read_record(RUNS / "masked_lm").config
    data = dataclasses.replace(
        config.data, source=str(RUNS / "rows.jsonl"), tokenizer=str(RUNS / "masked_lm/tokenizer.json"),
        last_row_length=16, last_rate=0.25, cache_dir=str(tmp_path),
    )  # fmt: skip
    masking = dataclasses.replace(config.masking, rate=0.4, last_rate=0.1)
    train(dataclasses.replace(
        config, run_dir=str(tmp_path / "run"), steps=20, batch_size=8, first_batch_size=4, batch_warmup_rate=0.5,
        data=data, masking=masking,
    ))  # fmt: skip
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line or "eval/loss" in line]
    want = json.loads((RUNS / "ramps_whole.json").read_text())
    assert len(lines) == len(want) == 21
    for got, line in zip(lines, want, strict=True):
        for name, value in line.items():
            np.testing.assert_allclose(got[name], value, rtol=2e-5, err_msg=f"{name} of step {line['step']}")


@pytest.fixture(scope="module")
def both(corpus):
    return str(corpus / "lines.txt"), str(corpus / "rows.jsonl")


def phased(corpus, run_dir, both) -> RunConfig:
    config = tiny(corpus, run_dir, steps=20, log_every=1, checkpoint_every=50, model__num_layers=1,
                  model__dropout_rate=0.1)  # fmt: skip
    return with_fields(config, data__source=both, phases=THREE)


@pytest.fixture(scope="module")
def whole(corpus, both, tmp_path_factory):
    """A run of three phases, and what it said."""
    config, said = phased(corpus, tmp_path_factory.mktemp("phases") / "whole", both), []
    devices = jax.devices()
    jax.config.update("jax_disable_most_optimizations", True)  # as in the tests of this folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args: devices[:1])
        patch.setattr("flax_encoder.training.run_log.RunLog.say", lambda self, message: said.append(message))
        metrics = train(config)
    return config, metrics, said


def test_the_log_says_when_a_phase_begins(whole, tmp_path):
    config, _, said = whole
    begun = [line.removeprefix("begins ") for line in said if line.startswith("begins ")]
    assert begun == [describe_phase(config.phases, config.timeline, number) for number in range(3)]
    assert begun[1] == (
        "phase 2 of 3, steps 9 to 16: 4 rows of 64, rope theta 100000, weights 1 3, learning rate 0.002"
    )
    assert any(line.startswith("\n".join(begun)) for line in said), "all are listed at the start"
    lines = [line for line in read_metrics(pathlib.Path(config.run_dir)) if "loss" in line]
    assert [line["phase"] for line in lines] == [1] * 8 + [2] * 8 + [3] * 4
    rates = [line["learning_rate"] for line in lines]
    np.testing.assert_allclose(rates[8:16], 2e-3, rtol=1e-6)
    np.testing.assert_allclose(rates[16:], 2e-3 * (1 - np.sqrt(np.arange(4) / 4)), rtol=1e-5)


def test_a_model_is_opened_as_its_last_phase_left_it(whole):
    """The scores of the run's end are those of the model that is loaded."""
    config, metrics, _ = whole
    run = load_run(config.run_dir)
    assert run.config.model.rope_theta == 1e5 and run.row_length == 64
    data = open_data(run.config, run.task.reading, tokenizer=run.tokenizer)
    loss = jax.jit(run.model.loss)
    totals = [loss({k: x for k, x in data.evaluation[i].items() if k not in HOST_FIELDS})
              for i in range(len(data.evaluation))]  # fmt: skip
    total = sum(float(x.sum) for x in totals) / sum(float(x.count) for x in totals)
    assert total == pytest.approx(metrics["eval/loss"], rel=1e-5)
    assert read_record(config.run_dir).config.model.rope_theta == 1e4, "the record is of the run as it was asked for"
    assert read_origin(config.run_dir, "masked_lm")[0].config.model.rope_theta == 1e5


def test_a_run_of_phases_resumes_to_the_bit_at_and_inside_every_phase(
    corpus, both, whole, tmp_path, one_device, monkeypatch
):
    """Stopped after steps 3, 8, where the first phase ends, 11, 16, where the second does, and 18."""
    cut = phased(corpus, tmp_path / "cut", both)
    for stop, steps in ((3, 3), (8, 5), (11, 3), (16, 5), (18, 2)):
        with monkeypatch.context() as patch:
            patch.setattr("flax_encoder.runs.train.StopSignals", lambda steps=steps: Stops(2 * steps))
            assert train(cut) is None and max(checkpoint_steps(tmp_path / "cut")) == stop
    metrics = train(cut)
    assert losses(tmp_path / "cut") == losses(pathlib.Path(whole[0].run_dir))
    assert metrics == whole[1]
    other = (*cut.phases[:2], dataclasses.replace(cut.phases[2], masking_rate=0.2))
    with pytest.raises(ConfigError, match=r"(?s)these differ:.*phases: "):
        train(dataclasses.replace(cut, phases=other))
    with pytest.raises(ConfigError, match="was begun for 20 steps with phases"):
        train(dataclasses.replace(cut, steps=30))


class SecondAStep(Clock):
    """As if each step took a second."""

    def __init__(self, spent_seconds=0.0):
        super().__init__(spent_seconds)
        self.before, self.steps_made = spent_seconds, 0

    @property
    def spent_seconds(self):
        return self.before + self.steps_made

    @contextlib.contextmanager
    def waiting(self):  # once a step
        self.steps_made += 1
        yield


def test_phases_in_minutes_are_ended_by_the_clock_and_are_then_phases_of_so_many_steps(
    corpus, both, tmp_path, one_device, monkeypatch, capsys
):
    """To the bit, also where a run is stopped in its second phase, which another row length and mixture begin. What is
    read and trained is told once."""
    monkeypatch.setattr("flax_encoder.runs.train.Clock", SecondAStep)
    minutes = (
        Phase(minutes=0.1), Phase(minutes=0.1, row_length=64, weights=(1.0, 3.0)), Phase(minutes=0.05, masking_rate=0.1)
    )  # fmt: skip
    config = dataclasses.replace(phased(corpus, tmp_path / "run", both), phases=minutes, budget_minutes=0.25, steps=900)
    metrics = train(config)
    said = capsys.readouterr().out
    assert [said.count(line) for line in (" an epoch", "model: ", "resuming", "begins phase")] == [1, 1, 0, 3]
    phases = read_record(tmp_path / "run").config.phases
    steps = [phase.steps for phase in phases]
    assert steps == [8, 6, None] and max(checkpoint_steps(tmp_path / "run")) == 17
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert [line["phase"] for line in lines] == [1] * 8 + [2] * 6 + [3] * 3
    assert load_run(tmp_path / "run").row_length == 64

    cut = dataclasses.replace(config, run_dir=str(tmp_path / "cut"))
    stops = Stops(22)  # in the second phase
    with monkeypatch.context() as patch:
        patch.setattr("flax_encoder.runs.train.StopSignals", lambda: stops)
        assert train(cut) is None and max(checkpoint_steps(tmp_path / "cut")) not in (8, 14, 17)
    assert train(cut) == metrics and losses(tmp_path / "cut") == losses(tmp_path / "run")

    known = dataclasses.replace(config, run_dir=str(tmp_path / "known"), phases=phases)
    assert train(known) == metrics and losses(tmp_path / "known") == losses(tmp_path / "run")


def test_a_page_of_a_run_has_a_band_a_phase(whole):
    [story] = read_stories([pathlib.Path(whole[0].run_dir)])
    assert story.bands() == [{"end": 8, "label": "phase 1"}, {"end": 16, "label": "phase 2"},
                             {"end": 20, "label": "phase 3"}]  # fmt: skip


def test_a_plan_lists_phases_and_compiles_a_step_of_each(corpus, both, capsys):
    config = with_fields(phased(corpus, pathlib.Path("none"), both), model__vocab_size=256)
    shapes = [batch["tokens"].shape for batch in sample_data(config).batches]
    assert shapes == [(4, 32), (4, 64), (4, 64)]
    sample = sample_data(with_fields(config, phases=(*THREE[:1], dataclasses.replace(THREE[1], share=0.6))))
    with Planner(parse_hardware("cpu:1"), "float32") as planner:
        made = planner.plan(sample)
    assert [(s["phase"], s["steps"], s["rows"], s["row_length"]) for s in made["stages"]] == [
        (1, 8, 4, 32), (2, 12, 4, 64)]  # fmt: skip
    assert "stage 2 (phase 2): 12 steps of 4 rows of 64 tokens" in report(made, "float32", "cpu")


@pytest.fixture
def copying(monkeypatch):
    """A task with masked_lm's model: to say the tokens that are shown at the masked places."""
    reading = dataclasses.replace(MASKED_TEXT, targets=copied)
    monkeypatch.setitem(TASKS, "copying", dataclasses.replace(TASKS["masked_lm"], reading=reading))


def copied(inputs):
    return functools.partial(_copied, MASKED_TEXT.targets(inputs))


def _copied(targets, rows):
    made = targets(rows)
    shown = np.take_along_axis(made["tokens"], made["target_positions"], 1)
    return made | {"targets": shown}


def test_a_phase_may_have_another_objective_with_the_same_parameters(
    corpus, copying, tmp_path, one_device, monkeypatch
):
    phases = (Phase(share=0.5, objective="copying"), Phase(share=0.5, objective="masked_lm"))
    fields = {"steps": 16, "log_every": 1, "checkpoint_every": 50, "model__num_layers": 1, "phases": phases}
    whole = tiny(corpus, tmp_path / "whole", **fields, optimizer__learning_rate=2e-2)
    check_task(whole)
    metrics = train(whole)
    found = [loss for loss, _ in losses(tmp_path / "whole").values()]
    assert found[7] < found[0] - 1 and found[8] > found[7] + 1, "what was learned was no masked word"
    cut = with_fields(whole, run_dir=str(tmp_path / "cut"))
    for steps in (3, 5):
        with monkeypatch.context() as patch:
            patch.setattr("flax_encoder.runs.train.StopSignals", lambda steps=steps: Stops(2 * steps))
            assert train(cut) is None
    assert train(cut) == metrics and losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert load_run(tmp_path / "whole").config.objective == "masked_lm"


def test_an_objective_with_other_parameters_is_refused():
    causal = Phase(share=0.3, objective="causal_lm"), Phase(share=0.7, objective="masked_lm")
    check_task(RunConfig(model=ROPE, phases=causal))
    phases = (Phase(share=0.5, objective="classification"), Phase(share=0.5, objective="masked_lm"))
    with pytest.raises(ConfigError, match=r"got phases\.0\.objective classification in a run of masked_lm"):
        check_task(RunConfig(phases=phases))
    with pytest.raises(ConfigError, match="no objective 'nothing'"):
        check_task(RunConfig(phases=(Phase(share=0.5, objective="nothing"), phases[1])))
    with pytest.raises(ConfigError, match="got classification in the last phase of a run of masked_lm"):
        RunConfig(phases=phases[:1] * 2)


def test_another_runs_context_is_extended_by_the_settings_of_a_command(whole, tmp_path):
    """Longer rows and another rope_theta than the model came with; a table of positions cannot be made longer."""
    config = RunConfig(init_from=whole[0].run_dir, data=DataConfig(row_length=2048), steps=5)
    said: list[str] = []
    settled, *_ = settle(config, tmp_path, 0, said.append)
    assert (settled.model.rope_theta, settled.model.max_length) == (1e5, 2048)
    settled, *_ = settle(with_fields(config, model__rope_theta=5e5), tmp_path, 0, said.append)
    assert settled.model.rope_theta == 5e5
    assert any(line.startswith("model.rope_theta is 500000, from the config; ") for line in said)
    longer = (Phase(share=0.5), Phase(share=0.5, row_length=4096, batch_size=8, rope_theta=7e5))
    settled, *_ = settle(dataclasses.replace(config, phases=longer), tmp_path, 0, said.append)
    assert settled.model.max_length == 4096 and settled.after(5).model.rope_theta == 7e5


def test_a_table_of_positions_is_not_made_longer(tmp_path, monkeypatch):
    record = read_record(RUNS / "masked_lm")
    learned = dataclasses.replace(record.config.model, position="learned", max_length=32)
    record = record.replace(config=dataclasses.replace(record.config, model=learned))
    monkeypatch.setattr("flax_encoder.runs.start.read_origin", lambda *_: (record, {"encoder": {}}))
    config = RunConfig(init_from="FOLDER", data=DataConfig(row_length=64))
    with pytest.raises(ConfigError, match=r"row_length 64 for model\.max_length 32\. Give rows of at most 32, or"):
        settle(config, tmp_path, 0, print)
