"""On a mesh of 2 x 2 x 2 every optimizer makes the update that one device makes, and its state is split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from flax_encoder.config import EncoderConfig, MeshConfig, OptimizerConfig
from flax_encoder.nn.partition import abstract_model
from flax_encoder.tasks import MaskedLM
from flax_encoder.training.optimizer import make_optimizer
from flax_encoder.training.sharding import logical_axes, make_mesh, spread
from flax_encoder.training.step import TrainState, state_shardings

# Square matrices: of a Gram matrix with many eigenvalues of zero any basis would do, and SOAP's would differ.
CONFIG = EncoderConfig(vocab_size=40, num_layers=3, embed_dim=16, num_heads=4, mlp_dim=16, max_length=13)
NAMES = ("adamw", "stable_adamw", "lamb", "lion", "muon", "soap", "adafactor", "schedule_free")


def make_model():
    return MaskedLM(CONFIG, rngs=nnx.Rngs(0))


def draw(seed, size=1.0):
    generator = np.random.default_rng(seed)
    _, abstract = abstract_model(make_model)
    return jax.tree.map(
        lambda x: jnp.asarray(size * generator.standard_normal(x.shape), jnp.float32), nnx.to_pure_dict(abstract)
    )


@functools.cache
def sharded(name):
    """(the optimizer, the shardings of its parameters and state, shapes of these)."""
    config = OptimizerConfig(
        name, schedule="wsd", decay_rate=0.0, warmup_rate=0.0, soap_every=2, muon_dtype="float32", learning_rate=0.01
    )
    tx = make_optimizer(config, 10, logical_axes(make_model))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = draw(0)
    abstract = jax.eval_shape(lambda: TrainState(jnp.zeros((), jnp.int32), params, tx.init(params)))
    return tx, state_shardings(make_model, tx, mesh, abstract), abstract


@pytest.mark.parametrize("name", NAMES)
def test_the_sharded_update_equals_one_devices(name):
    tx, shardings, _ = sharded(name)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    places = shardings.params, shardings.opt_state
    one, many = jax.jit(step), jax.jit(step, in_shardings=(*places, shardings.params), out_shardings=places)
    p = q = draw(0)
    s = t = tx.init(p)
    for seed in (1, 2, 3, 4):
        p, s = one(p, s, draw(seed, seed))
        q, t = many(jax.device_put(q, places[0]), jax.device_put(t, places[1]), draw(seed, seed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), q, p)


@pytest.mark.parametrize("name", NAMES)
def test_state_lies_with_its_parameter_or_is_spread(name):
    _, shardings, abstract = sharded(name)
    where = {jax.tree_util.keystr(p): s for p, s in jax.tree_util.tree_leaves_with_path(shardings.params)}
    shapes = {jax.tree_util.keystr(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(abstract.params)}
    states = jax.tree_util.tree_leaves_with_path(abstract.opt_state)
    total = held = 0
    for (path, leaf), sharding in zip(states, jax.tree.leaves(shardings.opt_state), strict=True):
        own = next((name for name in where if name in jax.tree_util.keystr(path)), None)
        if own is not None and leaf.shape == shapes[own]:
            assert sharding.spec == where[own].spec
        elif leaf.ndim > 1 and leaf.size >= 16 * 16:
            assert sharding.shard_shape(leaf.shape) != leaf.shape, jax.tree_util.keystr(path)
        total, held = total + leaf.size, held + np.prod(sharding.shard_shape(leaf.shape))
    assert held < 0.4 * total  # the parameters' share is 0.32: vectors, and what only one axis splits


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((), ()),
        ((8,), (None,)),
        ((3, 16, 16), (None, "fsdp", "tensor")),
        ((4, 16, 16), ("fsdp", "tensor", None)),
        ((3, 5, 8), (None, None, "fsdp")),
        ((3, 5, 7), (None, None, None)),
    ],
)
def test_what_has_no_names_is_split_where_it_can_be(shape, spec):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert tuple(spread(mesh, shape).spec) == spec
