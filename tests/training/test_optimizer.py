"""Schedules at their corners, AdamW and Muon against transcriptions, and which parameters each rule touches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from toy import SMALL

from flax_encoder.config import OptimizerConfig
from flax_encoder.objectives import Classifier, MaskedLM
from flax_encoder.training.optimizer import make_optimizer, make_schedule, muon_dimensions
from flax_encoder.training.sharding import logical_axes

STEPS, PEAK = 1000, 3.0


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        # warm-up to 100; the middle of what is left is 550; with constant_then_decay the fall begins at 800.
        ("linear", {0: 0.0, 50: 1.5, 100: 3.0, 550: 1.65, 1000: 0.3}),
        ("cosine", {0: 0.0, 50: 1.5, 100: 3.0, 550: 1.65, 325: 0.3 + 2.7 * (1 + 0.5**0.5) / 2, 1000: 0.3}),
        ("constant_then_decay", {0: 0.0, 50: 1.5, 100: 3.0, 550: 3.0, 800: 3.0, 900: 1.65, 1000: 0.3}),
    ],
)
def test_schedules_pass_through_the_points_written_here(schedule, values):
    config = OptimizerConfig(schedule=schedule, warmup_rate=0.1, decay_rate=0.2, final_rate=0.1)
    function = make_schedule(config, STEPS, PEAK)
    for step, value in values.items():
        assert float(function(step)) == pytest.approx(value, rel=1e-5, abs=1e-7), step


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_then_decay"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("warmup_rate", [0.0, 0.06, 0.5, 0.8])
def test_schedules_rise_to_the_peak_and_never_above_it_and_then_fall(schedule, steps, warmup_rate):
    config = OptimizerConfig(schedule=schedule, warmup_rate=warmup_rate, decay_rate=0.2, final_rate=0.1)
    function = make_schedule(config, steps, PEAK)
    values = np.asarray(jax.vmap(function)(jnp.arange(steps + 1)))
    warmup = round(warmup_rate * steps)
    assert values[warmup] == pytest.approx(PEAK)
    assert (np.diff(values[: warmup + 1]) > 0).all()
    assert (np.diff(values[warmup:]) <= 1e-6).all()
    assert values[-1] == pytest.approx(0.1 * PEAK if steps > warmup else PEAK, rel=1e-5)


AXES = {
    "token": ("vocab", "embed"),
    "norm": {"scale": ("features",), "bias": ("features",)},
    "layers": {"up": {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")}},
}
SHAPES = {
    "token": (7, 5),
    "norm": {"scale": (5,), "bias": (5,)},
    "layers": {"up": {"kernel": (2, 5, 11), "bias": (2, 11)}},
}


def draw_tree(seed, size=1.0):
    generator = np.random.default_rng(seed)
    draw = lambda shape: size * generator.standard_normal(shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def run(config, gradients, steps=10):
    tx = make_optimizer(config, steps, AXES)
    params = draw_tree(0)
    state, update = tx.init(params), jax.jit(tx.update)
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def is_decayed(path):
    return path[-1].key not in ("bias", "scale")


@pytest.mark.parametrize("clip_norm", [None, 1.0, 1000.0])
def test_adamw_equals_its_transcription(clip_norm):
    """Loshchilov and Hutter, algorithm 2, after scaling the gradients down to clip_norm."""
    config = OptimizerConfig(
        learning_rate=0.1, weight_decay=0.3, warmup_rate=0.0, final_rate=1.0, b1=0.8, b2=0.9, clip_norm=clip_norm
    )
    gradients = [draw_tree(seed, size=seed) for seed in (1, 2, 3)]
    got = run(config, gradients)
    norms = [np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(tree))) for tree in gradients]
    by_leaf = [jax.tree.leaves(tree) for tree in gradients]
    for i, (path, p) in enumerate(jax.tree_util.tree_leaves_with_path(draw_tree(0))):
        p, m, v = p.astype(np.float64), 0.0, 0.0
        for t, (leaves, norm) in enumerate(zip(by_leaf, norms, strict=True), 1):
            g = leaves[i] * (1 if clip_norm is None else min(1, clip_norm / norm))
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-6)
            p = p - 0.1 * (step + (0.3 * p if is_decayed(path) else 0))
        np.testing.assert_allclose(jax.tree.leaves(got)[i], p, rtol=0, atol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_moves_matrices_and_embeddings_and_never_biases_and_norms(name):
    config = OptimizerConfig(name=name, learning_rate=0.1, muon_learning_rate=0.1, weight_decay=0.5, warmup_rate=0.0)
    after = run(config, [jax.tree.map(np.zeros_like, draw_tree(0))])
    for (path, p), q in zip(jax.tree_util.tree_leaves_with_path(draw_tree(0)), jax.tree.leaves(after), strict=True):
        want = p * (1 - 0.1 * 0.5) if is_decayed(path) else p
        np.testing.assert_allclose(q, want, rtol=1e-6, err_msg=f"{name} {jax.tree_util.keystr(path)}")


FLAT = {"learning_rate": 0.1, "muon_learning_rate": 0.1, "weight_decay": 0.0, "warmup_rate": 0.0, "final_rate": 1.0}


def test_muon_orthogonalises_each_layer_by_itself():
    gradients = draw_tree(1)
    gradients["layers"]["up"]["kernel"][1] *= 100  # one layer's size is not another's
    after, before = (
        t["layers"]["up"]["kernel"] for t in (run(OptimizerConfig("muon", **FLAT), [gradients]), draw_tree(0))
    )
    for change in (np.asarray(after) - before) / 0.1:
        values = np.linalg.svd(change, compute_uv=False) / (11 / 5) ** 0.5  # its size is sqrt(outputs / inputs)
        assert (values > 0.6).all() and (values < 1.3).all()  # five Newton-Schulz steps come this near to 1


def test_muon_leaves_the_rest_to_adamw():
    """The same update that adamw gives embeddings, norms and biases. No clipping, which would see other kernels."""
    gradients = [draw_tree(seed) for seed in (1, 2)]
    muon, adamw = (run(OptimizerConfig(name, clip_norm=None, **FLAT), gradients) for name in ("muon", "adamw"))
    for tree in (muon, adamw):
        del tree["layers"]["up"]["kernel"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), muon, adamw)


def test_each_rate_drives_its_own_parameters():
    before = draw_tree(0)
    for rates, moves in (({"learning_rate": 0.0}, [False, True]), ({"muon_learning_rate": 0.0}, [True, False])):
        after = run(OptimizerConfig(**{**FLAT, "name": "muon", **rates}), [draw_tree(1)])
        pairs = (after["token"], before["token"]), (after["layers"]["up"]["kernel"], before["layers"]["up"]["kernel"])
        assert [not np.array_equal(*pair) for pair in pairs] == moves


# ((axes in), (axes out)); axis 0 is the layer.
MATRICES = {
    "['attention']['query']['kernel']": ((1,), (2, 3)),
    "['attention']['key']['kernel']": ((1,), (2, 3)),
    "['attention']['value']['kernel']": ((1,), (2, 3)),
    "['attention']['out']['kernel']": ((1, 2), (3,)),
    "['feed_forward']['up']['kernel']": ((1,), (2,)),
    "['feed_forward']['down']['kernel']": ((1,), (2,)),
}


@pytest.mark.parametrize("model", [MaskedLM, lambda config, rngs: Classifier(config, 7, rngs=rngs)])
def test_muon_takes_the_layers_matrices_and_nothing_else(model):
    axes = logical_axes(lambda: model(SMALL, rngs=nnx.Rngs(0)))
    taken = {}
    for path, names in jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple)):
        dimensions = muon_dimensions(names)
        if dimensions is not None:
            taken[jax.tree_util.keystr(path)] = (tuple(dimensions.reduction_axis), tuple(dimensions.output_axis))
    assert taken == {f"['encoder']['layers']{name}": axes for name, axes in MATRICES.items()}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_frozen_embedding_stays_and_the_rest_moves_as_if_it_were_not_there(name):
    axes = {"embedding": {"token": AXES["token"]}, "layers": AXES["layers"]}
    config = OptimizerConfig(name, **(FLAT | {"weight_decay": 0.1}), freeze_embedding=True)
    params = {"embedding": {"token": draw_tree(0)["token"]}, "layers": draw_tree(0)["layers"]}
    grads = {"embedding": {"token": 1000 * draw_tree(1)["token"]}, "layers": draw_tree(1)["layers"]}
    tx = make_optimizer(config, 10, axes)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert not updates["embedding"]["token"].any()
    alone = make_optimizer(config, 10, {"layers": AXES["layers"]})
    rest = {"layers": params["layers"]}
    want, _ = jax.jit(alone.update)({"layers": grads["layers"]}, alone.init(rest), rest)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), updates["layers"], want["layers"])
