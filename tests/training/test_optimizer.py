"""Every optimizer against its formulas in NumPy, on each parameter by itself; which parameters each rule touches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from toy import SMALL

from flax_encoder.config import EncoderConfig, OptimizerConfig
from flax_encoder.tasks import Classifier, MaskedLM
from flax_encoder.training.optimizer import make_optimizer
from flax_encoder.training.sharding import logical_axes
from flax_encoder.training.transformations import global_norm, gradient_point, matrix_axes, orthogonalized

AXES = {
    "token": ("vocab", "embed"),
    "norm": {"scale": ("features",), "bias": ("features",)},
    "layers": {
        "query": {"kernel": ("layers", "embed", "heads", "head_dim"), "bias": ("layers", "heads", "head_dim")},
        "down": {"kernel": ("layers", "mlp", "embed")},
        "gates": {"kernel": ("layers", "embed", "directions", "gates", "cells")},
    },
}
SHAPES = {
    "token": (7, 5),
    "norm": {"scale": (5,), "bias": (5,)},
    "layers": {
        "query": {"kernel": (2, 5, 2, 3), "bias": (2, 2, 3)},
        # SOAP's first Gram matrices then have at most one eigenvalue of zero: of more, any basis would do.
        "down": {"kernel": (2, 4, 5)},
        "gates": {"kernel": (2, 5, 2, 3, 4)},
    },
}
NAMES = ("adamw", "stable_adamw", "lamb", "lion", "muon", "soap", "adafactor", "schedule_free")
FLAT = {"schedule": "wsd", "decay_rate": 0.0, "warmup_rate": 0.0, "clip_norm": None, "muon_dtype": "float32"}
RATE, B1, B2, EPSILON, DECAY = 0.1, 0.8, 0.9, 1e-6, 0.3
KNOWN = FLAT | {
    "learning_rate": RATE, "muon_learning_rate": RATE, "b1": B1, "b2": B2, "weight_decay": DECAY, "muon_momentum": B1,
    "soap_every": 2,
}  # fmt: skip


def is_axes(x):
    return isinstance(x, tuple)


def draw_tree(seed, size=1.0, shapes=SHAPES):
    generator = np.random.default_rng(seed)
    draw = lambda shape: size * generator.standard_normal(shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=is_axes)


def run(config, gradients, steps=10, axes=AXES, params=None):
    tx = make_optimizer(config, steps, axes)
    params = jax.tree.map(jnp.asarray, draw_tree(0) if params is None else params)
    state, update = tx.init(params), jax.jit(tx.update)
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def is_decayed(path):
    return path[-1].key not in ("bias", "scale")


def parameters(names, x):
    """The parameters that lie in an array, as [S, ...]; a layer's kernels are matrices."""
    x = np.asarray(x, np.float64)
    match names:
        case ("layers", "embed", "heads", "head_dim"):
            return x.reshape(2, 5, 6)
        case ("layers", "embed", "directions", "gates", "cells"):
            return x.transpose(0, 2, 3, 1, 4).reshape(12, 5, 4)
        case ("layers", *_):
            return x
    return x[None]


# Each rule takes a parameter, its gradients and its decay, and gives where it ends.


def adam_steps(gs, b1=B1):
    m, v = 0.0, 0.0
    for t, g in enumerate(gs, 1):
        m, v = b1 * m + (1 - b1) * g, B2 * v + (1 - B2) * g**2
        yield g, m / (1 - b1**t), v / (1 - B2**t)


def adamw(p, gs, decay):
    """Loshchilov and Hutter, algorithm 2."""
    for _, m, v in adam_steps(gs):
        p = p - RATE * (m / (np.sqrt(v) + EPSILON) + decay * p)
    return p


def stable_adamw(p, gs, decay):
    """Wortsman et al., algorithm 2."""
    for g, m, v in adam_steps(gs):
        rate = RATE / max(1, np.sqrt(np.mean(g**2 / np.maximum(v, EPSILON**2))))
        p = p - rate * (m / (np.sqrt(v) + EPSILON) + decay * p)
    return p


def lamb(p, gs, decay):
    """You et al., algorithm 2, without a trust ratio for what does not decay."""
    for _, m, v in adam_steps(gs):
        r = m / (np.sqrt(v) + EPSILON) + decay * p
        p = p - RATE * (np.linalg.norm(p) / np.linalg.norm(r) if decay else 1) * r
    return p


def lion(p, gs, decay):
    """Chen et al., algorithm 2."""
    m = np.zeros_like(p)
    for g in gs:
        p = p - RATE * (np.sign(B1 * m + (1 - B1) * g) + decay * p)
        m = B2 * m + (1 - B2) * g
    return p


def muon(p, gs, decay):
    """Jordan et al.: Nesterov momentum, five steps of Newton and Schulz."""
    m = np.zeros_like(p)
    for g in gs:
        m = B1 * m + (1 - B1) * g
        x = B1 * m + (1 - B1) * g
        x = x / (np.linalg.norm(x) + EPSILON)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
        p = p - RATE * (np.sqrt(max(1, p.shape[1] / p.shape[0])) * x + decay * p)
    return p


def soap(p, gs, decay):
    """Vyas et al., algorithm 3. The first step finds the bases and moves nothing, as in the authors' code."""
    left, right = (1 - B2) * gs[0] @ gs[0].T, (1 - B2) * gs[0].T @ gs[0]
    q_left, q_right = np.linalg.eigh(left)[1], np.linalg.eigh(right)[1]
    p, m, v = p - RATE * decay * p, np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(gs[1:], 1):
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * (q_left.T @ g @ q_right) ** 2
        turned = q_left.T @ m @ q_right / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + EPSILON)
        p = p - RATE * (q_left @ turned @ q_right.T + decay * p)
        left, right = B2 * left + (1 - B2) * g @ g.T, B2 * right + (1 - B2) * g.T @ g
        if t % 2 == 0:
            q_left, q_right = np.linalg.qr(left @ q_left)[0], np.linalg.qr(right @ q_right)[0]
    return p


def adafactor(p, gs, decay):
    """Shazeer and Stern, algorithms 4 and 5: sizes relative to the parameter's, clipping at 1, decay 1 - t^-0.8."""
    rows, columns, squares = 0.0, 0.0, 0.0
    for t, g in enumerate(gs, 1):
        b2, g2 = 1 - t**-0.8, g**2 + 1e-30
        if p.ndim == 2 and min(p.shape) >= FACTORED:
            rows, columns = b2 * rows + (1 - b2) * g2.mean(1), b2 * columns + (1 - b2) * g2.mean(0)
            u = g / np.sqrt(np.outer(rows, columns) / rows.mean())
        else:
            squares = b2 * squares + (1 - b2) * g2
            u = g / np.sqrt(squares)
        u = u / max(1, np.sqrt(np.mean(u**2)))
        p = p - RATE * (max(1e-3, np.sqrt(np.mean(p**2))) * u + decay * p)
    return p


FACTORED = 128  # Optax's default


def schedule_free(x, gs, decay):
    """Defazio et al., algorithm 1 with AdamW; the gradients here do not depend on where they are taken."""
    z = x
    for t, (g, _, v) in enumerate(adam_steps(gs), 1):
        y = (1 - B1) * z + B1 * x
        z = z - RATE * (g / (np.sqrt(v) + EPSILON) + decay * y)
        x = (1 - 1 / t) * x + z / t
    return x


ONLY_MATRICES = {"muon", "soap"}


@pytest.mark.parametrize("name", NAMES)
def test_each_optimizer_equals_its_transcription_on_each_parameter_by_itself(name):
    """So a stacked array is updated as its layers would be, were they apart."""
    gradients = [draw_tree(seed, size) for seed, size in enumerate((1, 3, 0.1, 10, 1), 1)]
    for tree in gradients:
        tree["layers"]["down"]["kernel"][1] *= 100  # one layer's size is not another's
    got = run(OptimizerConfig(name, **KNOWN), gradients)
    axes = jax.tree.leaves(AXES, is_leaf=is_axes)
    for i, (path, p) in enumerate(jax.tree_util.tree_leaves_with_path(draw_tree(0))):
        rule = globals()[name if name not in ONLY_MATRICES or matrix_axes(axes[i]) else "adamw"]
        stacks = [parameters(axes[i], jax.tree.leaves(tree)[i]) for tree in (draw_tree(0), *gradients)]
        want = [rule(p, gs, DECAY if is_decayed(path) else 0.0) for p, *gs in zip(*stacks, strict=True)]
        found = parameters(axes[i], jax.tree.leaves(got)[i])
        np.testing.assert_allclose(found, np.stack(want), rtol=0, atol=3e-5, err_msg=jax.tree_util.keystr(path))


def test_adafactor_factors_each_layers_matrix_over_inputs_and_outputs(monkeypatch):
    """Sizes that Optax factors: both sides of the matrix, not of the array, reach its least."""
    axes = {"kernel": ("layers", "embed", "heads", "head_dim")}
    params, *gradients = (draw_tree(seed, seed + 1, {"kernel": (2, 128, 2, 67)}) for seed in range(4))
    got = run(OptimizerConfig("adafactor", **KNOWN), gradients, axes=axes, params=params)
    matrices = [t["kernel"].astype(np.float64).reshape(2, 128, 134) for t in (params, *gradients)]
    want = [adafactor(p, gs, DECAY) for p, *gs in zip(*matrices, strict=True)]
    np.testing.assert_allclose(got["kernel"].reshape(2, 128, 134), want, rtol=0, atol=1e-5)
    state = make_optimizer(OptimizerConfig("adafactor"), 10, axes).init(jax.tree.map(jnp.asarray, params))
    assert sum(x.size for x in jax.tree.leaves(state)) < 2 * (128 + 134 + 3) + 2


@pytest.mark.parametrize("clip_norm", [1.0, 1000.0])
def test_gradients_are_scaled_down_to_the_norm(clip_norm):
    gradients = [draw_tree(seed, size=seed) for seed in (1, 2, 3)]
    norms = [np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(tree))) for tree in gradients]
    scaled = [jax.tree.map(lambda g, n=n: g * min(1, clip_norm / n), t) for t, n in zip(gradients, norms, strict=True)]
    got = run(OptimizerConfig(**(KNOWN | {"clip_norm": clip_norm})), gradients)
    want = run(OptimizerConfig(**KNOWN), scaled)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), got, want)


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_moves_matrices_and_embeddings_and_never_biases_and_norms(name):
    after = run(OptimizerConfig(name, **(KNOWN | {"weight_decay": 0.5})), [jax.tree.map(np.zeros_like, draw_tree(0))])
    kept = 1 - RATE if name == "lamb" else 1 - RATE * 0.5  # lamb's trust ratio makes any decay 1
    for (path, p), q in zip(jax.tree_util.tree_leaves_with_path(draw_tree(0)), jax.tree.leaves(after), strict=True):
        want = p * kept if is_decayed(path) else p
        np.testing.assert_allclose(q, want, rtol=1e-6, atol=1e-7, err_msg=f"{name} {jax.tree_util.keystr(path)}")


def test_the_rate_goes_by_steps_or_by_measured_progress_whichever_is_further():
    """And is an argument: measured progress makes no new program."""
    config = OptimizerConfig("lion", schedule="linear", warmup_rate=0.0, learning_rate=1.0, weight_decay=0.0)
    tx = make_optimizer(config, 4, AXES)
    params, ones = draw_tree(0), jax.tree.map(np.ones_like, draw_tree(0))
    update = jax.jit(tx.update)
    state = tx.init(params)
    for measured, rate in ((0.0, 1.0), (0.0, 0.75), (0.7, 0.3), (0.7, 0.25)):
        updates, state = update(ones, state, params, progress=jnp.float32(measured))
        np.testing.assert_allclose(updates["token"], -rate, rtol=1e-6)
    assert update._cache_size() == 1


@pytest.mark.parametrize("name", ["muon", "soap"])
def test_each_rate_drives_its_own_parameters(name):
    before = draw_tree(0)
    rates = [{"learning_rate": 0.0}] + [{"muon_learning_rate": 0.0}] * (name == "muon")
    moves = [[False, name == "muon"], [True, False]]
    for zero, moved in zip(rates, moves, strict=False):
        after = run(OptimizerConfig(name, **(KNOWN | zero)), [draw_tree(1), draw_tree(2)])
        was, now = ((tree["token"], tree["layers"]["down"]["kernel"]) for tree in (before, after))
        assert [not np.array_equal(a, b) for a, b in zip(was, now, strict=True)] == moved


@pytest.mark.parametrize("shape", [(3, 5, 11), (2, 11, 5), (1, 7, 7), (2, 4, 13), (2, 13, 4)])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_orthogonalized_brings_singular_values_near_one_and_keeps_the_vectors(shape, platform, monkeypatch):
    monkeypatch.setattr("flax_encoder.training.transformations.platform", lambda: platform)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    for matrix, y in zip(x, orthogonalized(x, 1e-8), strict=True):
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
        turned = u.T @ y @ v.T
        values = np.diag(turned)
        np.testing.assert_allclose(turned, np.diag(values), rtol=0, atol=100 * np.finfo(np.float32).eps)
        kept = values[s > s.max() / 50]
        assert (kept > 0.6).all() and (kept < 1.3).all()


@pytest.mark.parametrize("columns", [40, 64, 160])
@pytest.mark.parametrize("smallest", [0.1, 1e-3, 1e-6])
def test_orthogonalized_is_five_steps_of_the_polynomial_on_each_singular_value(columns, smallest):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 32)))[0] for n in (32, columns))
    s = np.geomspace(1.0, smallest, 32)
    want = s / np.linalg.norm(s)
    for _ in range(5):
        want = 3.4445 * want - 4.7750 * want**3 + 2.0315 * want**5
    got = np.asarray(orthogonalized(jnp.asarray(u * s @ v.T, jnp.float32)[None], 0.0)[0], np.float64)
    # What a rounding adds to a singular value near 0 grows as that value does, at most 3.4445 times a step; to its
    # square, which wide matrices are multiplied by, 3.4445^2 times in each of four.
    growth = 3.4445 ** (8 if columns == 160 else 5)
    np.testing.assert_allclose(got, u * want @ v.T, rtol=0, atol=growth * np.finfo(np.float32).eps)


@pytest.mark.parametrize("shape", [(2, 64, 128), (2, 96, 32)])
def test_orthogonalized_in_bfloat16_is_off_by_its_sixteen_roundings(shape):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    got, want = orthogonalized(x, 1e-8, "bfloat16"), orthogonalized(x, 1e-8)
    error = jnp.linalg.norm(got - want, axis=(1, 2)) / jnp.linalg.norm(want, axis=(1, 2))
    assert (error > 0).all() and (error < 16 * 2.0**-8).all(), error


# ((axes in), (axes out)); axis 0 is the layer.
MATRICES = {
    "['attention']['query']['kernel']": ((1,), (2, 3)),
    "['attention']['key']['kernel']": ((1,), (2, 3)),
    "['attention']['value']['kernel']": ((1,), (2, 3)),
    "['attention']['out']['kernel']": ((1, 2), (3,)),
    "['feed_forward']['up']['kernel']": ((1,), (2,)),
    "['feed_forward']['down']['kernel']": ((1,), (2,)),
}
LSTM = EncoderConfig(vocab_size=37, layer="lstm", num_layers=2, embed_dim=10, position="none", embedding_norm=False)
LSTM_MATRICES = {"['input']['kernel']": ((1,), (4,)), "['recurrence']['kernel']": ((2,), (4,))}


@pytest.mark.parametrize(
    ("model", "config", "expected"),
    [
        (MaskedLM, SMALL, MATRICES),
        (lambda config, rngs: Classifier(config, 7, rngs=rngs), SMALL, MATRICES),
        (MaskedLM, LSTM, LSTM_MATRICES),
    ],
)
def test_matrices_are_the_layers_kernels_and_nothing_else(model, config, expected):
    axes = logical_axes(lambda: model(config, rngs=nnx.Rngs(0)))
    found = {
        jax.tree_util.keystr(p): matrix_axes(n) for p, n in jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes)
    }
    want = {f"['encoder']['layers']{name}": pair for name, pair in expected.items()}
    assert {name: pair for name, pair in found.items() if pair is not None} == want


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_embedding_stays_and_the_rest_moves_as_if_it_were_not_there(name):
    axes = {"embedding": {"token": AXES["token"]}, "layers": AXES["layers"]}
    params, *gradients = (
        {"embedding": {"token": size * draw_tree(seed)["token"]}, "layers": draw_tree(seed)["layers"]}
        for seed, size in ((0, 1), (1, 1000), (2, 1000))
    )
    config = OptimizerConfig(name, **(KNOWN | {"clip_norm": 1.0}), freeze_embedding=True)
    got = run(config, gradients, axes=axes, params=params)
    np.testing.assert_array_equal(got["embedding"]["token"], params["embedding"]["token"])
    rest = [{"layers": tree["layers"]} for tree in (params, *gradients)]
    want = run(config, rest[1:], axes={"layers": AXES["layers"]}, params=rest[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got["layers"], want["layers"])


@pytest.mark.parametrize("is_frozen", [False, True])
def test_schedule_free_takes_gradients_between_the_average_and_what_moves(is_frozen):
    """Defazio et al., equations 9 to 11, where the gradient does depend on the point: of |y|^2 / 2 it is y."""
    axes = {"embedding": {"token": AXES["token"]}, "layers": AXES["layers"]}
    params = {"embedding": {"token": draw_tree(0)["token"]}, "layers": draw_tree(0)["layers"]}
    config = OptimizerConfig("schedule_free", **KNOWN, freeze_embedding=is_frozen)
    tx = make_optimizer(config, 10, axes)
    x = jax.tree.map(jnp.asarray, params)
    state = tx.init(x)
    own = z = params["layers"]["down"]["kernel"].astype(np.float64)
    v = 0.0
    for t in range(1, 6):
        grads = gradient_point(state, x)
        updates, state = jax.jit(tx.update)(grads, state, x)
        x = optax.apply_updates(x, updates)
        y = (1 - B1) * z + B1 * own
        v = B2 * v + (1 - B2) * y**2
        z = z - RATE * (y / (np.sqrt(v / (1 - B2**t)) + EPSILON) + DECAY * y)
        own = (1 - 1 / t) * own + z / t
        np.testing.assert_allclose(x["layers"]["down"]["kernel"], own, rtol=0, atol=1e-5)
    assert np.array_equal(x["embedding"]["token"], params["embedding"]["token"]) == is_frozen


@pytest.mark.parametrize("name", [n for n in NAMES if n != "schedule_free"])
def test_elsewhere_gradients_are_taken_at_the_parameters(name):
    params = jax.tree.map(jnp.asarray, draw_tree(0))
    assert gradient_point(make_optimizer(OptimizerConfig(name), 10, AXES).init(params), params) is params


def test_the_global_norm_is_the_norm_of_everything():
    tree = draw_tree(1)
    want = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in jax.tree.leaves(tree)))
    np.testing.assert_allclose(global_norm(jax.tree.map(jnp.asarray, tree)), want, rtol=1e-6)
