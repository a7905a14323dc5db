"""On every mesh a run is the run of one device, and devices send one another what the layout asks for and no more.

A few meshes stand for all; `pytest -m every_mesh` runs every one of eight devices that a model can have.
"""

import dataclasses
import functools
import itertools
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

from flax_encoder.config import DecoderConfig, EncoderConfig, MeshConfig, OptimizerConfig
from flax_encoder.plan.collectives import collectives
from flax_encoder.plan.estimate import estimate
from flax_encoder.plan.targets import CHIPS
from flax_encoder.tasks import MaskedLM
from flax_encoder.tasks.text_to_text import TextToText
from flax_encoder.training.optimizer import make_optimizer
from flax_encoder.training.sharding import logical_axes, make_mesh, put_batch
from flax_encoder.training.step import init_train_state, make_train_step

# Sizes that eight devices divide, and of which no leading two are alike, whole or divided: what is sent can be told by
# its size.
V, T, S, M, D, F, ROWS, STEPS = 352, 64, 40, 13, 48, 72, 8, 20
PLAIN = EncoderConfig(
    vocab_size=V, num_layers=5, embed_dim=D, num_heads=8, mlp_dim=F, max_length=T + 1, dropout_rate=0.1
)
SHAPES = {
    "bert": PLAIN,
    "modernbert": dataclasses.replace(
        PLAIN, num_layers=5, position="rope", norm_placement="pre", gated=True, use_bias=False, window=3,
        global_every=2, first_attention_norm=False, embedding_norm=True,
    ),
    "t5": dataclasses.replace(
        PLAIN, num_layers=3, num_heads=24, position="none", relative_position="t5", relative_buckets=12,
        relative_max_distance=16, norm="rms_norm", norm_placement="pre", use_bias=False, activation="relu",
        remat="dots",
    ),
    "lstm": EncoderConfig(vocab_size=V, layer="lstm", num_layers=3, embed_dim=D, position="none"),
}  # fmt: skip
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_rate=0.0, epsilon=1e-4)


def sizes_that_make(devices: int):
    """All (data, fsdp, tensor, context) of so many devices."""
    powers = [2**i for i in range(devices.bit_length())]
    return [sizes for sizes in itertools.product(powers, repeat=4) if np.prod(sizes) == devices]


CASES = [("bert", (1, 2, 2, 2)), ("modernbert", (2, 1, 1, 4)), ("t5", (2, 1, 2, 2)), ("lstm", (2, 2, 2, 1))]
ALL = [(shape, sizes) for shape in SHAPES for sizes in sizes_that_make(8) if shape != "lstm" or sizes[3] == 1]


def make_model(shape):
    config = SHAPES[shape]
    if shape == "t5":
        return lambda: TextToText(config, DecoderConfig(logit_scale=D**-0.5), rngs=nnx.Rngs(0))
    return lambda: MaskedLM(config, rngs=nnx.Rngs(0))


def documents(length, generator):
    """Segments and positions of rows of two documents and some padding, which fall anywhere."""
    segments, positions = np.zeros((ROWS, length), np.int32), np.zeros((ROWS, length), np.int32)
    for row in range(ROWS):
        first, both = sorted(generator.integers(1, length + 1, 2))
        segments[row, :first], segments[row, first:both] = 1, 2
        positions[row, :first], positions[row, first:both] = np.arange(first), np.arange(both - first)
    return segments, positions


def make_batch(shape, seed):
    generator = np.random.default_rng(seed)
    segments, positions = documents(T, generator)
    batch = {"tokens": generator.integers(0, V, (ROWS, T)), "segment_ids": segments, "positions": positions}
    if shape == "t5":
        segments, positions = documents(S, generator)
        batch |= {"decoder_tokens": generator.integers(0, V, (ROWS, S)), "decoder_segment_ids": segments}
        batch |= {"decoder_positions": positions, "targets": generator.integers(0, V, (ROWS, S))}
        weights = segments > 0
    else:
        batch["target_positions"] = generator.integers(0, T, (ROWS, M))
        batch["targets"] = generator.integers(0, V, (ROWS, M))
        weights = np.arange(M) < generator.integers(0, M + 1, (ROWS, 1))
    return {name: x.astype(np.int32) for name, x in batch.items()} | {"target_weights": weights.astype(np.float32)}


class Trained(NamedTuple):
    losses: np.ndarray
    params: Any
    text: str
    """Of the compiled step."""


@functools.cache
def trained(shape, sizes) -> Trained:
    """Twenty steps on a mesh; on one device if sizes is None."""
    mesh = make_mesh(MeshConfig(1), jax.devices()[:1]) if sizes is None else make_mesh(MeshConfig(*sizes))
    with jax.set_mesh(mesh):
        tx = make_optimizer(OPTIMIZER, 100, logical_axes(make_model(shape)))
        graphdef, state, shardings = init_train_state(make_model(shape), tx, mesh)
        step = make_train_step(graphdef, tx, shardings=shardings)
        compiled, losses = step.lower(state, put_batch(make_batch(shape, 0), mesh)).compile(), []
        for seed in range(STEPS):
            state, metrics = compiled(state, put_batch(make_batch(shape, seed % 4), mesh))
            losses.append((float(metrics.loss.sum) / float(metrics.loss.count), float(metrics.grad_norm)))
    return Trained(np.array(losses), jax.tree.map(np.asarray, state.params), compiled.as_text())


def assert_equals_one_device(shape, sizes):
    want, got = trained(shape, None), trained(shape, sizes)
    assert want.losses[-1, 0] < want.losses[0, 0] - 0.02, "the trajectory should move"
    np.testing.assert_allclose(got.losses[:, 0], want.losses[:, 0], rtol=1e-5)
    np.testing.assert_allclose(got.losses[:, 1], want.losses[:, 1], rtol=1e-4)
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(got.params), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.every_mesh
@pytest.mark.parametrize(("shape", "sizes"), ALL)
def test_every_mesh_of_eight_devices_has_the_losses_and_parameters_of_one(shape, sizes):
    assert_equals_one_device(shape, sizes)
    assert_sends_what_the_layout_asks_for(shape, sizes)


@pytest.mark.parametrize(("shape", "sizes"), CASES)
def test_after_twenty_steps_a_mesh_has_the_losses_and_parameters_of_one_device(shape, sizes):
    assert_equals_one_device(shape, sizes)


# What devices may send one another along the axes of a mesh, but for scalars and integers, and for what all-reduces add
# up, gradients of parameters, over any axes.
SENT = {
    # A layer's parameters; keys and values, and targets' vectors; tokens that a layer's products read.
    "all-gather": [{"fsdp"}, {"context"}, {"tensor"}],
    "reduce-scatter": [{"fsdp"}, {"context"}, {"tensor"}],  # their gradients, and what such products add up
    "collective-permute": [{"context"}],  # the keys beside a window
}
# Of bert: before a layer's first products, twice forward and twice again backward; before its last ones' gradients; the
# embedding's gradient; and for the head.
GATHERS_OF_TOKENS = 8


def sent(shape, sizes):
    """(kind, axes, sizes of one array) of each float array that a step's collectives give."""
    chip, mesh = CHIPS["v5e"], make_mesh(MeshConfig(*sizes))
    for line in estimate(trained(shape, sizes).text, chip).collectives:
        for one in collectives([line], mesh, chip):
            for numbers in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", line.instruction.shape):
                yield one.kind, {*one.axes}, tuple(int(n) for n in numbers.split(","))


@pytest.mark.parametrize(("shape", "sizes"), CASES)
def test_devices_send_what_the_layout_asks_for(shape, sizes):
    assert_sends_what_the_layout_asks_for(shape, sizes)


def assert_sends_what_the_layout_asks_for(shape, sizes):
    data, fsdp, tensor, context = sizes
    rows, stack = ROWS // (data * fsdp), 0 if shape == "modernbert" else SHAPES[shape].num_layers
    # The vocabulary's table; a layer's keys; a recurrent layer's kernel.
    largest = max(V * D // tensor, rows * max(T, S) * D, 4 * D * D * (shape == "lstm"))
    together = [(rows, length // context, D) for length in (T, S)]
    apart = [(rows, length // (context * tensor), D) for length in (T, S)]
    gathers = scatters = 0
    for kind, axes, array in sent(shape, sizes):
        named = f"{kind} over {axes}: {array}"
        # Nothing in a recurrent layer is split by `tensor`: the compiler splits what its products add up. And of axes
        # with as many devices it takes one for another: a kernel of D x D came by `fsdp` and, once, by `data`.
        is_of_recurrence = shape == "lstm" and np.prod(array) <= 4 * D * D
        assert kind == "all-reduce" or axes in SENT[kind] or is_of_recurrence, named
        if axes == {"tensor"} and kind != "all-reduce" and not is_of_recurrence:
            assert array in (together if kind == "all-gather" else apart), f"not a layer's tokens: {named}"
            gathers, scatters = gathers + (kind == "all-gather"), scatters + (kind == "reduce-scatter")
            continue
        # Targets are tokens of t5's decoder, whose gradient the vocabulary's parts add up.
        is_of_targets = shape == "t5" and array == together[1]
        if "tensor" in axes and shape != "lstm" and not is_of_targets:
            assert array not in (*together, (rows, T, D), (rows, S, D)), f"tokens that every device has: {named}"
        assert np.prod(array) <= largest, named
        assert array[0] != stack, f"a whole stack of layers: {named}"
        assert array[0] != ROWS or rows == ROWS or len(array) < 2, f"rows of all devices: {named}"
        is_table = len(array) < 2 or (len(array) == 2 and array[0] in (D, D // fsdp))  # or its gradient
        assert array[-1] not in (V, V // tensor) or is_table, f"logits: {named}"
        if kind != "all-reduce" and len(array) > 2 and context > 1 and axes != {"context"}:
            assert array[1] in (T // context, S // context), f"tokens of all devices: {named}"
    if tensor > 1 and shape != "lstm":
        assert gathers and scatters, "every device along `tensor` had all tokens between a layer's products"
        assert gathers <= GATHERS_OF_TOKENS or shape != "bert", f"tokens were gathered {gathers} times"
