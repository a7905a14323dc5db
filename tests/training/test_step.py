"""The step: microbatches, meshes and donation change where numbers are computed, never which."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from toy import assert_trees_close, split_model

from flax_encoder.config import ConfigError, EncoderConfig, MeshConfig, OptimizerConfig
from flax_encoder.nn.partition import partition_spec
from flax_encoder.ops.platform import platform_for_tracing
from flax_encoder.tasks import MaskedLM
from flax_encoder.training.optimizer import make_optimizer
from flax_encoder.training.sharding import check_batch, logical_axes, make_mesh, put_batch
from flax_encoder.training.step import TrainState, init_train_state, make_eval_step, make_train_step
from flax_encoder.training.transformations import gradient_point

# Sizes that eight fsdp or four tensor devices divide, and no two alike.
CONFIG = EncoderConfig(vocab_size=40, num_layers=3, embed_dim=16, num_heads=4, mlp_dim=24, max_length=13)
ROWS, T, M, STEPS = 8, 11, 5, 5
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_rate=0.0)
OPTIONS = {"muon": {"muon_dtype": "float32"}, "schedule_free": {"schedule": "wsd", "decay_rate": 0.0}}
MESHES = {
    "data 8": MeshConfig(),
    "fsdp 8": MeshConfig(fsdp=8),
    "2 x 2 x 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "tensor 4, data 2": MeshConfig(data=2, tensor=4),
}


def model_maker(config=CONFIG):
    return lambda: MaskedLM(config, rngs=nnx.Rngs(0))


def make_batch(seed):
    """Rows of two documents and some padding, with uneven numbers of targets."""
    generator = np.random.default_rng(seed)
    segments = np.array([[1] * (3 + r % 5) + [2] * 3 + [0] * (5 - r % 5) for r in range(ROWS)], np.int32)
    return {
        "tokens": generator.integers(0, CONFIG.vocab_size, (ROWS, T)).astype(np.int32),
        "segment_ids": segments,
        "positions": np.array([[*range(3 + r % 5), 0, 1, 2, *[0] * (5 - r % 5)] for r in range(ROWS)], np.int32),
        "target_positions": generator.integers(0, 6, (ROWS, M)).astype(np.int32),
        "targets": generator.integers(0, CONFIG.vocab_size, (ROWS, M)).astype(np.int32),
        "target_weights": (np.arange(M) < generator.integers(0, M + 1, (ROWS, 1))).astype(np.float32),
    }


def loss_of(metrics):
    return float(metrics.loss.sum / metrics.loss.count)


@functools.cache
def trajectory(optimizer, mesh_name=None):
    """Of five steps: losses and gradient norms, how each array of the state was born, the last state, its axes."""
    config, make_model = dataclasses.replace(OPTIMIZER, name=optimizer, **OPTIONS.get(optimizer, {})), model_maker()
    axes = logical_axes(make_model)
    tx = make_optimizer(config, 100, axes)
    if mesh_name is None:
        graphdef, state, shardings = init_train_state(make_model, tx)
        step, put = make_train_step(graphdef, tx), lambda batch: jax.tree.map(jnp.asarray, batch)
        return *_run(step, state, put), axes
    mesh = make_mesh(MESHES[mesh_name])
    with jax.set_mesh(mesh):
        graphdef, state, shardings = init_train_state(make_model, tx, mesh)
        step = make_train_step(graphdef, tx, shardings=shardings)
        return *_run(step, state, lambda batch: put_batch(batch, mesh)), axes


def _run(step, state, put):
    born = jax.tree.map(lambda x: (x.sharding, x.shape, x.addressable_shards[0].data.shape), state)
    lines = []
    for seed in range(STEPS):
        old = state
        state, metrics = step(state, put(make_batch(seed % 2)))
        assert all(x.is_deleted() for x in jax.tree.leaves(old.params)), "the old state is donated"
        lines.append((loss_of(metrics), float(metrics.grad_norm)))
    assert int(state.step) == STEPS
    return np.array(lines), born, state


@pytest.mark.parametrize(
    ("mesh_name", "optimizer"), [*((m, o) for m in MESHES for o in ("adamw", "muon")), ("2 x 2 x 2", "schedule_free")]
)
def test_sharded_equals_single_device(mesh_name, optimizer):
    want, *_ = trajectory(optimizer)
    got, *_ = trajectory(optimizer, mesh_name)
    assert want[-1, 0] < want[0, 0] - 0.1, "the trajectory should move"
    np.testing.assert_allclose(got[:, 0], want[:, 0], rtol=1e-5)
    np.testing.assert_allclose(got[:, 1], want[:, 1], rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("mesh_name", MESHES)
def test_parameters_and_moments_lie_where_the_table_says(mesh_name, optimizer):
    """From birth to the last step, moments with their parameters."""
    _, born, state, axes = trajectory(optimizer, mesh_name)
    mesh = make_mesh(MESHES[mesh_name])
    names = {
        jax.tree_util.keystr(p): n
        for p, n in jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    }
    is_born = lambda x: isinstance(x, tuple) and len(x) == 3 and hasattr(x[0], "spec")  # noqa: E731
    num_moments = num_split = 0
    births = jax.tree_util.tree_leaves_with_path(born, is_leaf=is_born)
    for (path, (sharding, shape, part)), leaf in zip(births, jax.tree.leaves(state), strict=True):
        path_name = jax.tree_util.keystr(path)
        own = next((n for tail, n in names.items() if path_name.endswith(tail)), (None,) * len(shape))
        entries = [None if n is None else partition_spec(n)[0] for n in own]
        want = tuple(size // (mesh.shape[e] if e else 1) for size, e in zip(shape, entries, strict=True))
        assert part == want, path_name
        assert leaf.sharding.is_equivalent_to(sharding, len(shape)), path_name
        num_moments += path[0].name == "opt_state" and own[:1] not in ((), (None,))
        num_split += part != shape
    assert num_moments >= len(names)
    assert (num_split > 0) == (mesh_name != "data 8")


def start(tx, config=CONFIG):
    """(graphdef, a state that may be donated)."""
    graphdef, params = split_model(model_maker(config))
    return graphdef, TrainState(jnp.int32(0), params, tx.init(params))


SGD = optax.sgd(1.0)  # the parameters' change is the gradient


@functools.cache
def gradient_of_one_batch(num_microbatches):
    graphdef, state = start(SGD)
    before = jax.tree.map(np.array, state.params)
    batch = jax.tree.map(jnp.asarray, make_batch(0))
    state, metrics = make_train_step(graphdef, SGD, num_microbatches=num_microbatches)(state, batch)
    return jax.tree.map(np.subtract, before, state.params), metrics._asdict()


@pytest.mark.parametrize("num_microbatches", [2, 8])
def test_microbatches_equal_one_batch(num_microbatches):
    """Though their numbers of targets differ."""
    one, many = gradient_of_one_batch(1), gradient_of_one_batch(num_microbatches)
    assert_trees_close(many, one)
    assert float(many[1]["loss"].count) == make_batch(0)["target_weights"].sum()


def test_gradients_of_schedule_free_are_taken_at_its_gradient_point():
    """The step's loss is that of the point, and evaluation's that of the parameters."""
    config = dataclasses.replace(OPTIMIZER, name="schedule_free", **OPTIONS["schedule_free"])
    make_model = model_maker()
    tx = make_optimizer(config, 100, logical_axes(make_model))
    graphdef, state = start(tx)
    step, evaluate = make_train_step(graphdef, tx), make_eval_step(graphdef)
    batch = jax.tree.map(jnp.asarray, make_batch(0))
    for _ in range(3):
        state, _ = step(state, batch)
    point, params = gradient_point(state.opt_state, state.params), jax.tree.map(jnp.copy, state.params)
    at_point, at_params = (evaluate(p, batch) for p in (point, params))
    _, metrics = step(state, batch)
    np.testing.assert_allclose(loss_of(metrics), at_point.sum / at_point.count, rtol=1e-6)
    assert abs(float(at_point.sum - at_params.sum)) > 1e-3


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_the_batch_tells_the_optimizer_how_far_the_run_is(num_microbatches):
    """By the largest of what its rows say, since processes' clocks differ."""
    tx = make_optimizer(dataclasses.replace(OPTIMIZER, name="lion", weight_decay=0.0), 100, logical_axes(model_maker()))
    graphdef, state = start(tx)
    before = jax.tree.map(np.array, state.params)
    progress = np.linspace(0.0, 0.75, ROWS, dtype=np.float32)[:, None]
    step = make_train_step(graphdef, tx, num_microbatches=num_microbatches)
    state, metrics = step(state, jax.tree.map(jnp.asarray, make_batch(0) | {"progress": progress}))
    assert float(metrics.progress) == 0.75
    was, now = (tree["encoder"]["embedding"]["norm"]["scale"] for tree in (before, state.params))
    moves = np.abs(now - was)
    np.testing.assert_allclose(moves, 0.25 * OPTIMIZER.learning_rate, rtol=1e-4)


def test_a_batch_without_targets_changes_nothing():
    graphdef, state = start(SGD)
    before = jax.tree.map(np.array, state.params)
    batch = make_batch(0) | {"target_weights": np.zeros((ROWS, M), np.float32)}
    state, metrics = make_train_step(graphdef, SGD)(state, jax.tree.map(jnp.asarray, batch))
    jax.tree.map(np.testing.assert_array_equal, before, state.params)
    assert float(metrics.grad_norm) == 0.0


def test_dropout_is_a_function_of_seed_and_step_and_evaluation_has_none():
    plain = dataclasses.replace(CONFIG, num_layers=1)
    dropped, still = dataclasses.replace(plain, dropout_rate=0.5), optax.sgd(0.0)
    batch = jax.tree.map(jnp.asarray, make_batch(0))
    graphdef, _ = start(still, dropped)
    losses = {}
    for seed in (0, 1):
        step = make_train_step(graphdef, still, seed=seed)
        for run in (0, 1):
            state = start(still, dropped)[1]
            for number in (0, 1):
                state, metrics = step(state, batch)
                losses[seed, run, number] = loss_of(metrics)
    assert losses[0, 0, 0] == losses[0, 1, 0] and losses[0, 0, 1] == losses[0, 1, 1]
    assert len({losses[0, 0, 0], losses[0, 0, 1], losses[1, 0, 0], losses[1, 0, 1]}) == 4

    evaluate, plain_evaluate = make_eval_step(graphdef), make_eval_step(start(still, plain)[0])
    jax.tree.map(np.testing.assert_array_equal, evaluate(state.params, batch), plain_evaluate(state.params, batch))


def test_evaluation_on_a_mesh_equals_one_device():
    mesh = make_mesh(MESHES["2 x 2 x 2"])
    with jax.set_mesh(mesh):
        graphdef, state, shardings = init_train_state(model_maker(), SGD, mesh)
        got = make_eval_step(graphdef, shardings)(state.params, put_batch(make_batch(0), mesh))
    params = jax.tree.map(lambda x: jnp.asarray(np.array(x)), state.params)
    want = make_eval_step(graphdef)(params, jax.tree.map(jnp.asarray, make_batch(0)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


class Nameless(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((3, 5)))


def test_a_parameter_without_names_is_refused():
    with pytest.raises(ValueError, match=r"needs a logical name: kernel has shape \(3, 5\)"):
        logical_axes(Nameless)


@pytest.mark.parametrize(
    ("config", "product"),
    [(MeshConfig(data=3), 3), (MeshConfig(fsdp=3), 6), (MeshConfig(data=4, tensor=4), 16), (MeshConfig(tensor=16), 16)],
)
def test_a_mesh_must_use_every_device(config, product):
    with pytest.raises(ConfigError, match=rf"is {product}, and there are 8\..*device_count={product} "):
        make_mesh(config)


def test_minus_one_takes_the_devices_that_are_left():
    assert dict(make_mesh(MeshConfig(fsdp=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}


@pytest.mark.parametrize(
    ("changes", "mesh", "message"),
    [
        ({"embed_dim": 12}, MeshConfig(fsdp=8), r"mesh\.fsdp must divide the embed axis of .*: got 8 for 12"),
        ({"mlp_dim": 26}, MeshConfig(tensor=4), r"mesh\.tensor must divide the mlp axis of .*'kernel'.*: got 4 for 26"),
        ({"num_kv_heads": 2}, MeshConfig(tensor=4), r"the kv_heads axis of .*'key'.*: got 4 for 2"),
    ],
)
def test_a_mesh_axis_that_does_not_divide_names_the_parameter(changes, mesh, message):
    mesh = make_mesh(mesh)
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match=message):
        init_train_state(model_maker(dataclasses.replace(CONFIG, **changes)), SGD, mesh)


@pytest.mark.parametrize(
    ("batch_size", "parts", "message"),
    [
        (100, 1, "got 100 for 8 x 1; 96 and 104 do"),
        (24, 2, "got 24 for 8 x 2; 16 and 32 do"),
        (4, 1, "got 4 for 8 x 1; 8 does"),
    ],
)
def test_a_batch_that_does_not_divide_says_what_does(batch_size, parts, message):
    with pytest.raises(ConfigError, match=message):
        check_batch(batch_size, parts, make_mesh(MeshConfig()))


def test_a_batch_divides_over_rows_axes_only():
    check_batch(2, 1, make_mesh(MESHES["tensor 4, data 2"]))
    mesh = make_mesh(MESHES["2 x 2 x 2"])
    rows = put_batch(make_batch(0), mesh)["tokens"]
    assert rows.sharding.spec == PartitionSpec(("data", "fsdp"))
    assert rows.addressable_shards[0].data.shape == (ROWS // 4, T)


def products(jaxpr):
    """All matrix products of a program, those of its inner programs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr)):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("changes", [{}, {"gated": True, "position": "rope"}], ids=["bert", "rope"])
def test_no_float32_product_is_left_to_be_rounded(platform, changes):
    """JAX's default on accelerators would: 'float32' would be a name only."""
    make_model = model_maker(dataclasses.replace(CONFIG, **changes))
    tx = make_optimizer(OPTIMIZER, 100, logical_axes(make_model))
    graphdef, state, _ = init_train_state(make_model, tx)
    with platform_for_tracing(platform):
        traced = jax.make_jaxpr(make_train_step(graphdef, tx))(state, make_batch(0))
    found = list(products(traced.jaxpr))
    assert len(found) > 3 * 6  # layers are scanned
    for equation in found:
        if any(v.aval.dtype == jnp.float32 for v in equation.invars):
            assert set(equation.params["precision"]) == {jax.lax.Precision.HIGHEST}, equation
