"""A plan is of the run's own step: its shapes, its bytes, and what devices send one another."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import flax_encoder.plan.run as planning
import flax_encoder.plan.step as planned_step
from flax_encoder.commands.plan import main
from flax_encoder.config import ConfigError, MeshConfig, Phase
from flax_encoder.data.pipeline import open_data
from flax_encoder.plan.collectives import collectives, summary
from flax_encoder.plan.estimate import estimate
from flax_encoder.plan.flops import product_flops
from flax_encoder.plan.rows import sample_data
from flax_encoder.plan.step import StagePlan
from flax_encoder.plan.targets import CHIPS, devices, is_installed, parse_hardware
from flax_encoder.runs.opened import make_learner
from flax_encoder.tasks import TASKS, find_task
from flax_encoder.training.sharding import make_mesh
from tests.runs import TINY, command, tiny, with_fields


@pytest.mark.parametrize(
    ("text", "platform", "chips", "topology"),
    [
        ("tpu-v5e:16x16", "tpu", 256, "v5e:16x16"),
        ("v6e:4x4", "tpu", 16, "v6e:4x4"),
        ("tpu-v5p:4x4x8", "tpu", 128, "v5p:4x4x8"),
        ("h100:8", "gpu", 8, "h100:1x1x8"),
        ("gpu-a100:16", "gpu", 16, "a100:1x2x8"),
        ("h200:1", "gpu", 1, "h200:1x1x1"),
        ("cpu:8", "cpu", 8, "cpu:8"),
    ],
)
def test_hardware_is_a_kind_and_how_many(text, platform, chips, topology):
    found = parse_hardware(text)
    assert (found.platform, found.num_chips, found.topology) == (platform, chips, topology)


@pytest.mark.parametrize(
    "text", ["v5e", "v5e:16", "v5p:4x4", "h100:12", "b200:8", "gpu-v5e:4x4", "tpu-h100:8", "cpu:0", "cpu:2x2", ":8", ""]
)
def test_hardware_that_there_is_not_lists_what_there_is(text):
    with pytest.raises(ConfigError, match=r"tpu-v5e:4x4.*h100:8.*cpu:8|whole hosts"):
        parse_hardware(text)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_without_the_compiler_the_command_that_installs_it_is_named(platform, monkeypatch):
    monkeypatch.setattr("flax_encoder.plan.targets.is_installed", lambda platform: False)
    topology = {"tpu": "v5e:2x2", "gpu": "h100:1x1x8"}[platform]
    with pytest.raises(ConfigError, match=rf"pip install .*\[plan-{platform}\]"):
        devices(platform, topology)


NAMED = "replica_groups=mesh[{}}}"
LIST = "replica_groups={{0,1},{2,3},{4,5},{6,7}}"
PROGRAM = """\
ENTRY %main (p: f32[100,25]) -> f32[100,25] {{
  %p = f32[100,25]{{1,0}} parameter(0)
  ROOT %made = {shape} {opcode}(%p), channel_id=1, {groups}, use_global_device_ids=true
}}
"""


@pytest.mark.parametrize(
    ("opcode", "shape", "groups", "axes", "result", "sent"),
    [
        ("all-reduce", "f32[100,25]{1,0}", LIST, ["tensor"], 10_000, 2 * 1 / 2),
        ("all-reduce", "f32[100,25]{1,0}", "replica_groups=[1,8]<=[8]", ["data", "fsdp", "tensor"], 10_000, 2 * 7 / 8),
        ("all-gather", "f32[100,25]{1,0}", "replica_groups=[4,2]<=[2,4]T(1,0)", ["data"], 10_000, 1 / 2),
        ("all-gather-start", "(f32[25,25]{1,0}, f32[50,25]{1,0})", "replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ["fsdp"],
         5_000, 1 / 2),
        ("reduce-scatter", "f32[25,25]{1,0}", "replica_groups=[2,4]<=[8]", ["fsdp", "tensor"], 2_500, 3),
        ("all-gather", "f32[100,25]{1,0}", NAMED.format("'a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'"), ["fsdp"],
         10_000, 1 / 2),
        ("all-gather", "f32[100,25]{1,0}", NAMED.format("'a'=2,'b'=1,'c'=4] {'a','c':(1)2"), ["data", "fsdp"], 10_000,
         3 / 4),
        ("collective-permute", "f32[100,25]{1,0}", "source_target_pairs={{0,4},{4,0}}", ["data"], 10_000, 1),
    ],
)  # fmt: skip
def test_collectives_are_of_the_axes_along_which_their_devices_lie(opcode, shape, groups, axes, result, sent):
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    chip = CHIPS["v5e"]
    lines = estimate(PROGRAM.format(shape=shape, opcode=opcode, groups=groups), chip).collectives
    [row] = summary(collectives(lines, mesh, chip))
    assert (row["kind"], row["axes"], row["bytes"]) == (opcode.removesuffix("-start"), axes, result)
    assert row["seconds"] == pytest.approx(sent * result / chip.link_bytes_per_second)


def test_products_are_counted_by_their_loops():
    def layers(x, kernels):
        return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0].sum()

    made = jax.make_jaxpr(layers)(np.zeros((5, 7), np.float32), np.zeros((3, 7, 7), np.float32))
    assert product_flops(made.jaxpr) == 3 * 2 * 5 * 7 * 7


def test_made_up_documents_give_the_batches_of_real_ones(corpus, tmp_path):
    """Of every stage: the same fields, shapes and types."""
    config = tiny(
        corpus, tmp_path / "run", steps=20, first_batch_size=4, data__last_row_length=64, data__cache_dir=str(tmp_path),
        model__vocab_size=256,
    )  # fmt: skip
    real = open_data(config, find_task("masked_lm").reading)
    starts = [0, *(stage.end_step for stage in config.stages[:-1])]
    made = sample_data(config)
    assert made.config == config
    # Each of the last stage's four rows of 64 holds a document of 60 tokens between two more.
    assert int(np.count_nonzero(made.batches[-1]["segment_ids"])) == 4 * 62
    for batch, at in zip(made.batches, starts, strict=True):
        assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {
            n: (x.shape, x.dtype) for n, x in real.train[at].items()
        }


def test_every_task_has_batches_to_plan_with():
    for name in TASKS:
        sample = sample_data(dataclasses.replace(TINY, objective=name))
        assert sample.batches[0]["tokens"].shape == (TINY.batch_size, TINY.data.row_length), name


def test_epochs_need_to_know_how_many_texts_there_are():
    config = dataclasses.replace(TINY, epochs=2.0, objective="classification", eval_every="epoch")
    with pytest.raises(ConfigError, match="--texts N"):
        sample_data(config)
    assert sample_data(config, texts=800, document_tokens=12).config.steps == pytest.approx(2 * 800 / 2 / 8, rel=0.1)


def test_a_plan_of_a_run_on_virtual_devices(capsys):
    """What lies on a device is counted exactly, and split by the mesh; the command prints it, for programs too."""
    config = with_fields(TINY, mesh=MeshConfig(data=2, fsdp=4), model__vocab_size=256, data__source="none.txt")
    main(["--hardware", "cpu:8", "--json", "--price-per-chip-hour", "3.6", *command(config)[2:]])
    made = json.loads(capsys.readouterr().out)
    abstract = jax.eval_shape(lambda: make_learner(config, None)[0]())
    sizes = [x.size for x in jax.tree.leaves(jax.tree.map(lambda x: x, abstract)) if x.dtype == np.float32]
    held = made["hbm_bytes_by_use"]
    assert sum(sizes) * 4 / 4 <= held["parameters"] < sum(sizes) * 4
    assert held["optimizer"] == pytest.approx(2 * held["parameters"], rel=0.05)
    assert made["fits"] and made["hbm_bytes_per_device"] == pytest.approx(sum(held.values()) - held["total"])
    [stage] = made["stages"]
    assert {"data", "fsdp"} <= {axis for one in stage["collectives"] for axis in one["axes"]}
    assert "tensor" not in {axis for one in stage["collectives"] for axis in one["axes"]}
    seconds = config.steps * made["estimated_step_seconds"]
    assert made["total_chip_hours"] == pytest.approx(8 * seconds / 3600)
    assert made["total_price"] == pytest.approx(3.6 * made["total_chip_hours"])
    assert made["tokens_per_second"] == pytest.approx(8 * 32 / made["estimated_step_seconds"])
    assert 0 < made["fraction_of_peak"] < 1


def test_stages_of_one_program_and_shape_are_compiled_once_as_in_the_run(monkeypatch, tmp_path):
    """The schedules that the compiler writes meanwhile stay with each."""
    compiled = []

    def compile_step(state, step_fn, batch, mesh, platform):
        compiled.append(batch["tokens"].shape)
        (tmp_path / "1-kernel-2-final_bundles.txt").write_text(str(batch["tokens"].shape))
        return planned_step.Compiled("", {}, 5.0)

    def read(plan, compiled, batch, flops, mesh, chip):
        [schedule] = compiled.schedules.iterdir()
        assert schedule.read_text() == str(batch["tokens"].shape)
        return plan._replace(compile_seconds=compiled.seconds)

    monkeypatch.setattr(planned_step, "compile_step", compile_step)
    monkeypatch.setattr(planned_step, "_read", read)
    phases = tuple(Phase(share=0.25, learning_rate=rate, row_length=n) for rate, n in ((1.0, 32), (0.5, 32), (0.1, 64)))
    config = with_fields(TINY, phases=(*phases, Phase(share=0.25, row_length=32)), model__max_length=64)
    stages = planned_step.plan_stages(sample_data(config), jax.devices()[:1], CHIPS["v5e"], tmp_path)
    assert compiled == [(TINY.batch_size, 32), (TINY.batch_size // 2, 64)]
    assert [stage.compile_seconds for stage in stages] == [5.0, 0.0, 5.0, 0.0]


def test_the_search_ranks_what_fits_by_its_rate_and_tries_each_once(monkeypatch):
    """Of a machine on which only split parameters fit, fewer microbatches are faster, and recomputing is slower."""
    tried = []

    def plan_stages(sample, devices, chip, schedules, *, only_last):
        config = sample.config
        tried.append((config.mesh, config.num_microbatches, config.model.remat))
        rate = 1000 / config.num_microbatches / config.mesh.tensor - 10 * (config.model.remat != "none")
        return [StagePlan(1, 8, 32, config.mesh.fsdp > 1, {"total": 1e9}, 0.1, {}, rate, 0.5)]

    monkeypatch.setattr(planning, "plan_stages", plan_stages)
    config = with_fields(TINY, num_microbatches=2, batch_size=16, mesh=MeshConfig(), model__remat="full")
    with planning.Planner(parse_hardware("cpu:8"), "float32") as planner:
        rows = planner.search(sample_data(config), minutes=10.0)
    assert rows[0] | {"why": ""} == rows[0]
    assert (rows[0]["microbatches"], rows[0]["remat"], rows[0]["fits"]) == (1, "none", True)
    assert rows[0]["mesh"] in ("1 x 8 x 1 x 1",) and not rows[-1]["fits"]
    assert len(set(tried)) == len(tried)


@pytest.mark.skipif(not is_installed("tpu"), reason="needs libtpu: pip install -e '.[plan-tpu]'")
def test_a_plan_for_a_tpu(monkeypatch):
    _plan_for("tpu-v5e:2x2")


@pytest.mark.skipif(not is_installed("gpu"), reason="needs a CUDA compiler: pip install -e '.[plan-gpu]'")
def test_a_plan_for_gpus():
    _plan_for("h100:8")


def _plan_for(hardware):
    config = with_fields(TINY, model__dtype="bfloat16", mesh=MeshConfig())
    with planning.Planner(parse_hardware(hardware), "bfloat16") as planner:
        made = planner.plan(sample_data(config))
    assert made["fits"] and 0 < made["fraction_of_peak"] < 1
    assert [one["axes"] for one in made["stages"][0]["collectives"]] == [["data"]]
