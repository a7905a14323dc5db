"""Which parameters are trained, and at which rates: by names and layers, whatever array they lie in."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_optimizer import AXES, KNOWN, NAMES, draw_tree, run
from toy import SMALL, B, D, T, V, random_tokens, split_model

from flax_encoder.config import ConfigError, EncoderConfig, LoraConfig, MeshConfig, OptimizerConfig
from flax_encoder.nn.lora import with_adapters
from flax_encoder.nn.partition import abstract_model, flatten
from flax_encoder.tasks import Classifier, MaskedLM
from flax_encoder.training.optimizer import make_optimizer
from flax_encoder.training.parameters import count_trained, layer_numbers, names_of, rates, trained
from flax_encoder.training.sharding import logical_axes, make_mesh, put_batch
from flax_encoder.training.step import TrainState, init_train_state, make_train_step
from flax_encoder.training.transformations import global_norm

# A first layer without a norm, in a stack of its own, and three more.
FIRST_DIFFERS = EncoderConfig(
    vocab_size=V, num_layers=4, embed_dim=D, num_heads=5, mlp_dim=41, position="rope", norm_placement="pre",
    embedding_norm=True, first_attention_norm=False,
)  # fmt: skip


def shapes_of(config):
    make_model = lambda: Classifier(config, 3, rngs=nnx.Rngs(0))  # noqa: E731
    return nnx.to_pure_dict(abstract_model(make_model)[1])


def all_names(params):
    numbers = layer_numbers(params)
    return [
        name
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
        for name in names_of(path, numbers[path][0] if path in numbers else None)
    ]


def test_every_layer_of_a_stack_has_names_of_its_own():
    names = all_names(shapes_of(FIRST_DIFFERS))
    assert len(set(names)) == len(names)
    queries = [name for name in names if name.endswith("query.kernel")]
    assert queries == [f"encoder.layers.{i}.attention.query.kernel" for i in range(4)]
    assert "encoder.layers.0.attention_norm.scale" not in names and "encoder.layers.1.attention_norm.scale" in names


@pytest.mark.parametrize("config", [SMALL, FIRST_DIFFERS])
def test_a_layers_rate_falls_by_the_decay_for_each_layer_above_it(config):
    params = shapes_of(config)
    options = OptimizerConfig(layer_decay=0.5)
    found = flatten(rates(options, params, trained(options, params)))
    L = config.num_layers
    for name, rate in found.items():
        if name.startswith("encoder.layers."):
            first = L - flatten(params)[name].shape[0]
            np.testing.assert_array_equal(np.ravel(rate), [0.5 ** (L - 1 - i) for i in range(first, L)])
        elif name.startswith("encoder.first."):
            assert rate == 0.5 ** (L - 1)
        elif name.startswith(("head.", "encoder.final_norm")):
            assert rate == 1.0
        else:
            assert name.startswith("encoder.embedding") and rate == 0.5**L, name


@pytest.mark.parametrize("name", NAMES)
def test_layers_with_a_decay_move_as_with_rates_of_their_own(name):
    """Two layers in one array: the lower moves as the upper would at half the rate."""
    gradients = [draw_tree(seed) for seed in (1, 2, 3)]
    options = KNOWN | {"weight_decay": 0.1}
    got = run(OptimizerConfig(name, **options, layer_decay=0.5), gradients)
    upper = run(OptimizerConfig(name, **options), gradients)
    slow = options | {"learning_rate": KNOWN["learning_rate"] / 2, "muon_learning_rate": KNOWN["learning_rate"] / 2}
    lower = run(OptimizerConfig(name, **slow), gradients)
    for path, x in jax.tree_util.tree_leaves_with_path(got["layers"]):
        at = lambda tree, path=path: flatten(tree["layers"])[".".join(k.key for k in path)]  # noqa: E731
        np.testing.assert_allclose(x[1], at(upper)[1], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(x[0], at(lower)[0], rtol=1e-6, atol=1e-7)


def test_the_head_has_its_own_rate():
    axes, shapes = {"encoder": AXES, "head": {"kernel": ("features", "classes")}}, {"kernel": (5, 3)}
    params, grads = ({"encoder": draw_tree(i), "head": draw_tree(i, shapes=shapes)} for i in (0, 1))
    options = OptimizerConfig("lion", **(KNOWN | {"weight_decay": 0.0}), head_learning_rate=0.7)
    after = run(options, [grads], axes=axes, params=params)
    np.testing.assert_allclose(np.abs(after["head"]["kernel"] - params["head"]["kernel"]), 0.7, rtol=1e-5)
    np.testing.assert_allclose(np.abs(after["encoder"]["token"] - params["encoder"]["token"]), 0.1, rtol=1e-5)


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        (("encoder.embedding",), lambda name: name.startswith("encoder.embedding.")),
        (("encoder.layers.0",), lambda name: name.startswith("encoder.layers.0.")),
        (("encoder.layers.[01]", "*.bias"), lambda n: n.startswith(("encoder.layers.0.", "encoder.layers.1."))
         or n.endswith(".bias")),
        (("encoder",), lambda name: name.startswith("encoder.")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("config", [SMALL, FIRST_DIFFERS])
def test_names_and_patterns_freeze_what_they_say(config, patterns, frozen):
    params = shapes_of(config)
    mask = trained(OptimizerConfig(freeze=patterns), params)
    numbers = layer_numbers(params)
    for path, m in jax.tree_util.tree_leaves_with_path(mask):
        names = names_of(path, numbers[path][0] if path in numbers else None)
        got = np.broadcast_to(np.ravel(m), len(names))
        np.testing.assert_array_equal(got, [not frozen(name) for name in names], err_msg=str(names))
    sizes = {name: size for name, size in _sizes(params)}
    total = sum(sizes.values())
    assert count_trained(mask, params) == (total, total - sum(n for name, n in sizes.items() if frozen(name)))


def _sizes(params):
    numbers = layer_numbers(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = names_of(path, numbers[path][0] if path in numbers else None)
        yield from ((name, leaf.size // len(names)) for name in names)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("encoder.embeding",), "'encoder.embeding' fits none. Did you mean encoder.embedding?"),
        (("head", "encoder.layers.3"), "'encoder.layers.3' fits none."),
        (("bias",), "There are encoder.embedding.norm.bias"),
        (("*",), "something must be trained"),
    ],
)
def test_a_name_of_no_parameter_lists_those_that_there_are(patterns, message):
    with pytest.raises(ConfigError) as caught:
        trained(OptimizerConfig(freeze=patterns), shapes_of(SMALL))
    assert message in str(caught.value)


MODEL = lambda: MaskedLM(SMALL, rngs=nnx.Rngs(0))  # noqa: E731


def masked_batch(seed):
    generator = np.random.default_rng(seed)
    tokens = random_tokens((B, T), seed)
    positions = jnp.asarray(np.stack([generator.permutation(T)[:4] for _ in range(B)]), jnp.int32)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens)}
    batch |= {"positions": jnp.broadcast_to(jnp.arange(T), (B, T)), "target_positions": positions}
    targets = jnp.take_along_axis(random_tokens((B, T), seed + 9), positions, 1)
    return batch | {"targets": targets, "target_weights": jnp.ones((B, 4), jnp.float32)}


def steps(config, mask_of=trained, count=3):
    graphdef, params = split_model(MODEL)
    mask = trained(config, params)
    tx = make_optimizer(config, 10, logical_axes(MODEL))
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    step = make_train_step(graphdef, tx, trained=mask_of(config, params))
    norms = []
    for number in range(count):
        state, metrics = step(jax.tree.map(jnp.copy, state), masked_batch(number))
        norms.append(float(metrics.grad_norm))
    return params, state, norms, mask


@pytest.mark.parametrize("name", ["adamw", "schedule_free"])
def test_what_is_frozen_stays_to_the_bit_and_weighs_nothing_in_the_norm(name):
    """Whole arrays, and some layers of a stack."""
    more = {"schedule": "wsd", "decay_rate": 0.0, "warmup_rate": 0.0, "clip_norm": 0.1}
    frozen = OptimizerConfig(name, freeze=("encoder.embedding", "encoder.layers.0", "*.bias"), **more)
    before, state, norms, mask = steps(frozen)
    for path, was in flatten(before).items():
        now, m = np.asarray(flatten(state.params)[path]), flatten(mask)[path]
        whole = np.broadcast_to(m, was.shape)
        np.testing.assert_array_equal(now[~whole], np.asarray(was)[~whole], err_msg=path)
        if np.any(m) and "key" not in path:
            assert (now[whole] != np.asarray(was)[whole]).any(), path

    def gradient(params):
        return nnx.merge(graphdef, params).loss(masked_batch(0)).sum

    graphdef, params = split_model(MODEL)
    grads = jax.tree.map(lambda g, m: g * np.asarray(m, np.float32), jax.grad(gradient)(params), mask)
    np.testing.assert_allclose(norms[0], float(global_norm(grads)) / (4 * B), rtol=1e-5)


def test_frozen_parameters_have_no_optimizer_state_and_no_gradient():
    config = OptimizerConfig(freeze=("encoder",))
    graphdef, params = split_model(MODEL)
    tx = make_optimizer(config, 10, logical_axes(MODEL))
    head = sum(x.size for x in jax.tree.leaves(params["head"]))
    assert sum(x.size for x in jax.tree.leaves(tx.init(params))) <= 2 * head + 4

    def num_products(mask):
        state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
        step = make_train_step(graphdef, tx, trained=mask)
        return str(jax.make_jaxpr(step)(state, masked_batch(0))).count("dot_general")

    assert num_products(trained(config, params)) < 0.7 * num_products(None)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_parameters_are_the_average_of_what_the_optimizer_moves(name):
    """d x + (1 - d) z with d = min(decay, (1 + t) / (10 + t)); z goes where it would without an average."""
    gradients = [draw_tree(seed) for seed in range(1, 16)]
    options, decay = KNOWN | {"weight_decay": 0.0}, 0.5
    got = run(OptimizerConfig(name, **options, average=decay), gradients)
    want = jax.tree.map(np.float64, draw_tree(0))
    for t in range(len(gradients)):
        z = run(OptimizerConfig(name, **options), gradients[: t + 1])
        d = min(decay, (1 + t) / (10 + t))
        want = jax.tree.map(lambda x, z, d=d: d * x + (1 - d) * np.float64(z), want, z)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_gradients_of_a_run_with_an_average_are_taken_at_the_parameters_themselves():
    """So what is moved goes the same way, to the bit, as without an average."""
    plain, averaged = (steps(OptimizerConfig(average=average), lambda *_: None) for average in (None, 0.9))
    assert plain[2] == averaged[2]
    [z] = [s.z for s in jax.tree.leaves(averaged[1].opt_state, is_leaf=lambda s: hasattr(s, "z")) if hasattr(s, "z")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), z, plain[1].params)
    assert not np.array_equal(averaged[1].params["head"]["bias"], plain[1].params["head"]["bias"])


def test_without_such_settings_an_update_is_optax_adamw():
    gradients = [draw_tree(seed) for seed in (1, 2, 3)]
    got = run(OptimizerConfig(**KNOWN), gradients)
    decayed = lambda tree: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: path[-1].key not in ("bias", "scale"), tree)  # fmt: skip
    tx = optax.adamw(KNOWN["learning_rate"], KNOWN["b1"], KNOWN["b2"], 1e-6, weight_decay=KNOWN["weight_decay"],
                     mask=decayed)  # fmt: skip
    params = jax.tree.map(jnp.asarray, draw_tree(0))
    state = tx.init(params)
    for grads in gradients:
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, params)


def test_frozen_parameters_averages_and_adapters_on_a_mesh_equal_one_device():
    config = OptimizerConfig(freeze=("encoder.layers.0", "encoder.embedding"), average=0.9)
    small = EncoderConfig(vocab_size=64, num_layers=2, embed_dim=16, num_heads=4, mlp_dim=32, max_length=29)
    lora = LoraConfig(rank=2, targets=("query", "down"))
    make_model = with_adapters(lambda: MaskedLM(small, rngs=nnx.Rngs(0)), lora, 0)
    batch = jax.tree.map(lambda x: np.concatenate([np.asarray(x)] * 4), masked_batch(0))
    results = []
    for mesh in (None, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        tx = make_optimizer(config, 10, logical_axes(make_model))
        with jax.set_mesh(mesh) if mesh else jax.default_device(jax.devices()[0]):
            graphdef, state, shardings = init_train_state(make_model, tx, mesh)
            step = make_train_step(graphdef, tx, shardings=shardings, trained=trained(config, state.params))
            for _ in range(2):
                state, _ = step(state, put_batch(batch, mesh) if mesh else batch)
            results.append(jax.device_get(state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), *results)
