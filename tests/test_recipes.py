"""The published recipes: as large, as long and with such rates as their papers say; and, shrunken, a step of each."""

import dataclasses
import math
import pathlib
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from flax_encoder.commands.recipe import load_recipe
from flax_encoder.config import ConfigError, DistillationConfig, MeshConfig
from flax_encoder.data.rows.targets import HOST_FIELDS
from flax_encoder.nn.partition import abstract_model, flatten
from flax_encoder.plan.rows import sample_data
from flax_encoder.runs.loaded import model_factory
from flax_encoder.runs.opened import make_learner
from flax_encoder.runs.programs import Programs
from flax_encoder.tasks import check_task
from flax_encoder.training.parameters import trained
from flax_encoder.training.schedule import share_of_update
from flax_encoder.training.step import abstract_train_state, init_train_state

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def linear(peak, warmup, steps, last=0.0):
    return lambda step: peak * (step / warmup if step < warmup else 1 - (1 - last) * (step - warmup) / (steps - warmup))


def cosine(peak, warmup, steps, last):
    fallen = lambda step: (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2  # noqa: E731
    return lambda step: peak * (step / warmup if step < warmup else last + (1 - last) * fallen(step))


def inverse_sqrt(peak, warmup):
    return lambda step: peak * min(step / warmup, (warmup / max(step, 1)) ** 0.5)


def by_tokens(*parts):
    """(the tokens that it ends with, in thousands of millions; its first and last rate; by which root it goes)."""

    def rate(billions):
        start = 0.0
        for end, first, last, power in parts:
            if billions < end:
                return first + (last - first) * ((billions - start) / (end - start)) ** power
            start = end
        return last

    return rate


# The parameters that are published of each (in millions, of what is counted there), the tokens of the run (in
# thousands of millions), and the learning rate: of a step, or, of a run whose paper counts tokens, of the tokens that
# are behind it. transformers counts BertForMaskedLM 109,514,298, RobertaForMaskedLM 124,697,433, ElectraForPreTraining
# 13,549,057, ModernBertForMaskedLM 149,655,232 (with mmBERT's vocabulary 307,786,240), AlbertForPreTraining 11,813,810,
# T5ForConditionalGeneration 222,903,552, DistilBertForMaskedLM 66,985,530 and DebertaV2Model 141,304,320, which has one
# table of the two that are trained (98,380,800 each).
PUBLISHED = {
    "bert_base": (109.514298, "", 1_000_000 * 131_072 / 1e9, linear(1e-4, 10_000, 1_000_000)),
    "roberta_base": (124.697433, "", 500_000 * 8192 * 512 / 1e9, linear(6e-4, 24_000, 500_000)),
    "albert_base": (11.813810, "", 125_000 * 4096 * 512 / 1e9, linear(0.00176, 3_125, 125_000)),
    "electra_small": (13.549057, "encoder. head.", 1_000_000 * 128 * 128 / 1e9, linear(5e-4, 10_000, 1_000_000)),
    "deberta_v3_small": (141.304320 + 98.3808, "encoder.", 500_000 * 8192 * 512 / 1e9, linear(5e-4, 10_000, 500_000)),
    "distilbert": (66.985530, "", None, linear(5e-4, 50, 1000)),  # of as many steps as three epochs have
    "t5_base": (222.903552, "", 34.359738, lambda step: max(step, 10_000) ** -0.5),
    "transformer_base": (65, "", 100_000 * 25_000 / 1e9, inverse_sqrt(512**-0.5 * 4_000**-0.5, 4_000)),
    "minilm_contrastive": (22.7, "", None, linear(2e-5, 500, 100_000)),
    "mosaicbert_base": (137, "", 70_000 * 4096 * 128 / 1e9, linear(5e-4, 4_200, 70_000, 0.02)),
    "crammed_bert": (None, "", None, linear(1e-3, 30_000, 60_000)),
    "neobert": (None, "", 1_000_000 * 2048 * 1024 / 1e9, cosine(6e-4, 2_000, 1_000_000, 0.1)),
    "modernbert_base": (149.655232, "", 2019, by_tokens(
        (3, 0, 8e-4, 1), (1719, 8e-4, 8e-4, 1), (1969, 3e-4, 3e-4, 1), (2019, 3e-4, 3e-7, 0.5))),
    "mmbert_base": (307.786240, "", 3000, by_tokens((3, 0, 8e-4, 1), (2900, 8e-4, 8e-4, 1), (3000, 8e-4, 1.6e-5, 0.5))),
}  # fmt: skip
COMPILED = ("modernbert_base", "t5_base", "deberta_v3_small")  # a step each, which takes some seconds
ROUNDED = {"transformer_base": 0.035}  # of "about" 37,000 tokens' vocabulary and 25,000 of a batch
IN_TOKENS = ("modernbert_base", "mmbert_base")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_is_as_large_and_as_long_as_its_paper_says(name):
    millions, parts, billions, rate = PUBLISHED[name]
    config = load_recipe(CONFIGS / f"{name}.py")
    check_task(config)
    _, params = abstract_model(model_factory(config, None))
    sizes = {path: math.prod(leaf.shape) for path, leaf in flatten(nnx.to_pure_dict(params)).items()}
    count = sum(size for path, size in sizes.items() if path.startswith(tuple(parts.split()) or ""))
    if millions is not None:
        exact = millions != round(millions, 1)
        np.testing.assert_allclose(count / 1e6, millions, rtol=1e-9 if exact else ROUNDED.get(name, 0.02))
    start, tokens, behind = 0, 0, {}
    for stage in config.stages:
        middle = (start + stage.end_step) // 2
        behind[middle] = (tokens + (middle - start) * stage.batch_size * stage.row_length) / 1e9
        tokens += (stage.end_step - start) * stage.batch_size * stage.row_length
        start = stage.end_step
    if billions is not None:
        np.testing.assert_allclose(tokens / 1e9, billions, rtol=5e-3 if name in ROUNDED else 1e-3)
    steps = [int(step) for step in np.linspace(0, config.steps, 10, endpoint=False)]
    for step in behind if name in IN_TOKENS else steps:
        share = share_of_update(config.optimizer, step, config.steps, 0.0, config.timeline.learning_rates)
        got = config.optimizer.learning_rate * float(share)
        wanted, rtol = (rate(behind[step]), 1e-3) if name in IN_TOKENS else (rate(step), 1e-4)
        np.testing.assert_allclose(got, wanted, rtol=rtol, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("modernbert_base", [(768, 1024, 1e4, 0.3), (4608, 1024, 1e4, 0.3), (576, 8192, 16e4, 0.3)]),
        ("mmbert_base", [(384, 1024, 1e4, 0.3), (4608, 1024, 1e4, 0.3), (4608, 8192, 16e4, 0.15),
                         (4608, 8192, 16e4, 0.05)]),
        ("bert_base", [(1024, 128, 1e4, 0.15), (256, 512, 1e4, 0.15)]),
        ("crammed_bert", [(128, 128, 1e4, 0.25), (8192, 128, 1e4, 0.25)]),
    ],
)  # fmt: skip
def test_the_phases_of_a_published_recipe_have_the_batches_of_its_paper(name, wanted):
    config = load_recipe(CONFIGS / f"{name}.py")
    found = [(s.batch_size, s.row_length, s.rope_theta, s.masking_rate.last) for s in config.stages]
    assert found[0] == wanted[0] and found[-1] == wanted[-1] and set(wanted) <= set(found)


def shrunken(config):
    """The recipe with everything small, of which an update or two of each phase is left."""
    model, phases = config.model, []
    for phase in config.phases:
        row_length = None if phase.row_length is None else max(16, phase.row_length // 64)
        sizes = phase.batch_size and (8, 16) if isinstance(phase.batch_size, tuple) else phase.batch_size and 16
        phases.append(dataclasses.replace(
            phase, share=1 / len(config.phases), steps=None, tokens=None, row_length=row_length, batch_size=sizes,
            num_microbatches=phase.num_microbatches and 2))  # fmt: skip
    model = dataclasses.replace(
        model, vocab_size=1024, num_layers=3 if model.num_layer_groups is None else 2, embed_dim=32, num_heads=2,
        mlp_dim=48, attention_head_dim=None, max_length=128, dtype="float32", window=model.window and 4,
        embedding_dim=model.embedding_dim and 16, remat="none",
    )  # fmt: skip
    data = dataclasses.replace(
        config.data, row_length=max(16, config.data.row_length // 64), vocab_size=1024, last_row_length=None,
        target_length=config.data.target_length and 16,
    )  # fmt: skip
    return dataclasses.replace(
        config, steps=4 * max(1, len(phases)), epochs=None, eval_every=None, batch_texts=None, batch_size=16,
        model=model, distillation=DistillationConfig(), num_microbatches=2, phases=tuple(phases), data=data,
        mesh=MeshConfig(data=1),
        decoder=dataclasses.replace(config.decoder, num_layers=config.decoder.num_layers and 2),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_step_of_a_shrunken_recipe_is_made(name, one_device):
    """With its own optimizer and objective, in its last phase: traced for all, and for some a finite loss and new
    parameters."""
    jax.config.update("jax_disable_most_optimizations", True)  # conftest.py undoes it
    config = shrunken(load_recipe(CONFIGS / f"{name}.py"))
    check_task(config)
    sample = sample_data(config)
    make_model, tx = make_learner(sample.config, None)
    make_state = init_train_state if name in COMPILED else abstract_train_state
    graphdef, state, _ = make_state(make_model, tx)
    programs = Programs(sample.config, None, graphdef, tx, None, trained(sample.config.trained_by, state.params))
    batch = {field: x for field, x in sample.batches[-1].items() if field not in HOST_FIELDS}
    if name not in COMPILED:
        out, metrics = programs.of(sample.config.stages[-1]).step_fn.lower(state, batch).out_info
        assert jax.tree.map(lambda x: (x.shape, x.dtype), out) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
        assert metrics.loss.sum.shape == ()
        return
    before = jax.tree.map(np.asarray, state.params)
    for _ in range(2):  # a first rate may be 0
        state, metrics = programs.of(sample.config.stages[-1]).step_fn(state, batch)
        assert np.isfinite(float(metrics.loss.sum)) and float(metrics.loss.count) > 0
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True)
    assert np.mean([not np.array_equal(was, now) for was, now in pairs]) > 0.5


def test_a_recipe_elsewhere_may_build_on_those_of_configs(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "quickstart", raising=False)
    (tmp_path / "mine.py").write_text("from quickstart import config\n")
    assert load_recipe(tmp_path / "mine.py") == load_recipe(CONFIGS / "quickstart.py")


def test_a_recipe_that_breaks_a_rule_by_itself_is_named_since_no_option_can_correct_it(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from flax_encoder.config import Phase, RunConfig\n"
        "config = RunConfig(steps=30, phases=(Phase(steps=10), Phase(steps=10)))\n"
    )
    with pytest.raises(ConfigError, match=r"10 \+ 10 = 20 steps for steps 30.* recipe .*mine\.py itself"):
        load_recipe(tmp_path / "mine.py")


def test_every_recipe_is_one_that_its_task_takes():
    """Each file of configs/, with settings that its objective reads; and jax makes no array for it."""
    before = len(jax.live_arrays())
    for path in sorted(CONFIGS.glob("*.py")):
        check_task(load_recipe(path))
    assert len(jax.live_arrays()) == before
