"""The published pretraining recipes: as large, as long and with such rates as their papers say; none is run."""

import math
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from flax_encoder.commands.recipe import load_recipe
from flax_encoder.nn.partition import abstract_model, flatten
from flax_encoder.runs.loaded import model_factory
from flax_encoder.tasks import check_task
from flax_encoder.training.schedule import share_of_update

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def linear(peak, warmup, steps, last=0.0):
    return lambda step: peak * (step / warmup if step < warmup else 1 - (1 - last) * (step - warmup) / (steps - warmup))


def cosine(peak, warmup, steps, last):
    fallen = lambda step: (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2  # noqa: E731
    return lambda step: peak * (step / warmup if step < warmup else last + (1 - last) * fallen(step))


# The parameters that are published of each (in millions, of what is counted there), the tokens of the run (in
# thousands of millions), and the learning rate of a step. transformers counts BertForMaskedLM 109,514,298,
# RobertaForMaskedLM 124,697,433 and ElectraForPreTraining 13,549,057.
PUBLISHED = {
    "bert_base": (109.514298, "", 1_000_000 * 131_072 / 1e9, linear(1e-4, 10_000, 1_000_000)),
    "roberta_base": (124.697433, "", 500_000 * 8192 * 512 / 1e9, linear(6e-4, 24_000, 500_000)),
    "electra_small": (13.549057, "encoder. head.", 1_000_000 * 128 * 128 / 1e9, linear(5e-4, 10_000, 1_000_000)),
    "mosaicbert_base": (137, "", 70_000 * 4096 * 128 / 1e9, linear(5e-4, 4_200, 70_000, 0.02)),
    "crammed_bert": (None, "", None, linear(1e-3, 30_000, 60_000)),
    "neobert": (None, "", 1_000_000 * 2048 * 1024 / 1e9, cosine(6e-4, 2_000, 1_000_000, 0.1)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_is_as_large_and_as_long_as_its_paper_says(name):
    millions, parts, billions, rate = PUBLISHED[name]
    config = load_recipe(CONFIGS / f"{name}.py")
    check_task(config)
    _, params = abstract_model(model_factory(config, None))
    sizes = {path: math.prod(leaf.shape) for path, leaf in flatten(nnx.to_pure_dict(params)).items()}
    count = sum(size for path, size in sizes.items() if path.startswith(tuple(parts.split()) or ""))
    if millions is not None:
        exact = millions != round(millions)
        np.testing.assert_allclose(count / 1e6, millions, rtol=1e-9 if exact else 0.02)
    start, tokens = 0, 0
    for stage in config.stages:
        tokens += (stage.end_step - start) * stage.batch_size * stage.row_length
        start = stage.end_step
    if billions is not None:
        np.testing.assert_allclose(tokens / 1e9, billions, rtol=1e-3)
    for step in np.linspace(0, config.steps, 10, endpoint=False).astype(int):
        got = config.optimizer.learning_rate * float(share_of_update(config.optimizer, int(step), config.steps))
        np.testing.assert_allclose(got, rate(step), rtol=1e-4, atol=1e-9)


def test_every_recipe_is_one_that_its_task_takes():
    """Each file of configs/, with settings that its objective reads; and jax makes no array for it."""
    before = len(jax.live_arrays())
    for path in sorted(CONFIGS.glob("*.py")):
        check_task(load_recipe(path))
    assert len(jax.live_arrays()) == before
