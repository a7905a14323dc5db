"""linear_cross_entropy: every implementation against the definition, on one device and split over a mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import flax_encoder.ops.cross_entropy as op
from benchmarks.cases import HEAD_CASES
from flax_encoder.config import MeshConfig
from flax_encoder.nn.partition import MESH_AXES
from flax_encoder.ops.platform import platform_for_tracing
from flax_encoder.training.sharding import make_mesh

B, M, E, V = HEAD_CASES["small_primes"].values()
AXES = op.MeshAxes(MESH_AXES["batch"], None, MESH_AXES["vocab"], MESH_AXES["embed"])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Three chunks of 4 positions a row, of which the last has one slot too many."""
    monkeypatch.setattr(op, "_CHUNK_BYTES", dict.fromkeys(op._CHUNK_BYTES, 4 * B * 4 * V))
    monkeypatch.setattr(op, "_SMALL_BYTES", 4 * B * 4 * V)


def draw(B=B, M=M, E=E, V=V, dtype=np.float32):
    generator = np.random.default_rng(0)
    hidden = generator.standard_normal((B, M, E)).astype(dtype)
    table, bias = generator.standard_normal((V, E)).astype(dtype), generator.standard_normal(V).astype(np.float32)
    targets = generator.integers(0, V, (B, M)).astype(np.int32)
    # Some are the likeliest class, so that there is something to count.
    best = (np.einsum("bme,ve->bmv", hidden.astype(np.float64), table.astype(np.float64)) + bias).argmax(-1)
    targets = np.where(generator.random((B, M)) < 0.4, best, targets).astype(np.int32)
    weights = generator.choice([0.0, 1.0, 0.5], (B, M)).astype(np.float32)
    return hidden, table, bias, targets, weights


def rounded(x, dtype):
    return np.asarray(x).astype(jnp.dtype(dtype)).astype(np.float64)


def definition(hidden, table, bias, targets, weights, dtype):
    """(sum, correct), gradients of 3 sum; what goes into a product is rounded to dtype."""
    x, w = rounded(hidden, dtype), rounded(table, dtype)
    logits = np.einsum("bme,ve->bmv", x, w) + (0.0 if bias is None else bias)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    is_target = np.eye(table.shape[0])[targets]
    losses, correct = -np.log((probabilities * is_target).sum(-1)), logits.argmax(-1) == targets
    d_logits = 3 * weights[..., None] * (probabilities - is_target)
    d_hidden, d_table = np.einsum("bmv,ve->bme", d_logits, w), np.einsum("bmv,bme->ve", d_logits, x)
    d_bias = None if bias is None else d_logits.sum((0, 1))
    return ((losses * weights).sum(), (correct * weights).sum()), (d_hidden, d_table, d_bias, 3 * losses)


def sums_and_gradients(implementation, dtype, mesh_axes=None):
    @jax.jit
    def run(hidden, table, bias, targets, weights):
        def f(hidden, table, bias, weights):
            return op.linear_cross_entropy(
                hidden, table, bias, targets, weights, dtype=dtype, implementation=implementation, mesh_axes=mesh_axes
            )

        sums, vjp = jax.vjp(f, hidden, table, bias, weights)
        return sums, vjp((jnp.float32(3), jnp.float32(0)))

    return run


def assert_close(got, want, dtype):
    """Within a few roundings to dtype of the largest number, each product being a sum of terms so rounded."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        atol = 8 * float(jnp.finfo(dtype).eps) * max(1.0, np.abs(w).max())
        np.testing.assert_allclose(np.asarray(g, np.float64), w, rtol=0, atol=atol)


@pytest.mark.parametrize("operands", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("implementation", op.IMPLEMENTATIONS)
def test_sums_and_gradients_equal_the_definition(implementation, has_bias, dtype, operands):
    hidden, table, bias, targets, weights = draw(dtype=jnp.dtype(operands))
    inputs = hidden, table, bias if has_bias else None, targets, weights
    sums, gradients = sums_and_gradients(implementation, dtype)(*inputs)
    want_sums, want_gradients = definition(*inputs, dtype)
    assert_close(sums, want_sums, "float32")
    assert 0 < float(sums[1]) < weights.sum()
    assert_close(gradients, want_gradients, "float32" if dtype == operands == "float32" else "bfloat16")
    assert [g.dtype for g in gradients[:2]] == [jnp.dtype(operands)] * 2


def test_a_tpu_reads_rounded_exponentials_and_sums_by_products():
    inputs = draw()
    with platform_for_tracing("tpu"):
        sums, gradients = sums_and_gradients("chunked", "bfloat16")(*inputs)
    want_sums, want_gradients = definition(*inputs, "bfloat16")
    assert_close(sums, want_sums, "float32")
    assert_close(gradients, want_gradients, "bfloat16")


@pytest.mark.parametrize("implementation", op.IMPLEMENTATIONS)
def test_targets_of_weight_zero_are_ignored(implementation):
    hidden, table, bias, targets, weights = draw()
    run = sums_and_gradients(implementation, "float32")
    garbage = np.where(weights == 0, (targets + 1) % V, targets)
    sums, (d_hidden, *_) = run(hidden, table, bias, targets, weights)
    np.testing.assert_array_equal(sums, run(hidden, table, bias, garbage, weights)[0])
    assert (np.asarray(d_hidden)[weights == 0] == 0).all()


def test_values_alone_are_those_that_come_with_gradients():
    inputs = draw()
    values = jax.jit(lambda *inputs: op.linear_cross_entropy(*inputs, implementation="chunked"))(*inputs)
    np.testing.assert_allclose(values, sums_and_gradients("chunked", "float32")(*inputs)[0], rtol=1e-6)


MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(fsdp=8),
    "2 x 2 x 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "tensor 8": MeshConfig(data=1, tensor=8),
}
SPLIT = {"B": 8, "M": 11, "E": 24, "V": 136}


def on_mesh(mesh, inputs):
    rows, vocab = PartitionSpec(AXES.rows), PartitionSpec(AXES.vocab)
    specs = rows, PartitionSpec(AXES.vocab, AXES.embed), vocab, rows, rows
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(inputs, specs, strict=True)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh_name", MESHES)
@pytest.mark.parametrize("implementation", op.IMPLEMENTATIONS)
def test_sharded_equals_the_definition(implementation, mesh_name, dtype):
    inputs = draw(**SPLIT)
    mesh = make_mesh(MESHES[mesh_name])
    with jax.set_mesh(mesh):
        sums, gradients = sums_and_gradients(implementation, dtype, AXES)(*on_mesh(mesh, inputs))
    want_sums, want_gradients = definition(*inputs, dtype)
    assert_close(sums, want_sums, "float32")
    assert_close(gradients, want_gradients, dtype)


def test_devices_gather_nothing_but_the_table():
    """Neither logits nor the vectors of other devices' rows."""
    mesh = make_mesh(MESHES["2 x 2 x 2"])
    with jax.set_mesh(mesh):
        inputs = on_mesh(mesh, draw(**SPLIT))
        text = sums_and_gradients("chunked", "float32", AXES).lower(*inputs).compile().as_text()
    results = [line.split(" all-gather(")[0] for line in text.split("\n") if " all-gather(" in line]
    gathered = {shape for result in results for shape in re.findall(r"\[([\d,]+)\]", result)}
    own_vocab, E = SPLIT["V"] // 2, SPLIT["E"]
    assert gathered
    assert gathered <= {f"{own_vocab},{E}", f"{E},{own_vocab}"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunked_never_has_all_logits(dtype):
    shapes = re.compile(rf"\[(?:{B},{M},{V}|{B * M},{V}|{V},{B * M}|\d+,{B * 4},{V}|3,{B},4,{V})\]")
    texts = [sums_and_gradients(name, dtype).lower(*draw()).compile().as_text() for name in ("reference", "chunked")]
    assert [bool(shapes.search(text)) for text in texts] == [True, False]
    assert f"[{B * 4},{V}]" in texts[1]


def test_implementation_is_chosen_by_the_logits_of_one_device(caplog):
    op._log_choice.cache_clear()
    with caplog.at_level("INFO", logger=op.__name__):
        assert op._choose((B, 4), V, None) == "reference"
        assert op._choose((B, 5), V, None) == "chunked"
        with jax.set_mesh(make_mesh(MESHES["2 x 2 x 2"])):
            assert op._choose((8 * B, 4), V, AXES) == "reference"
        op._choose((B, 5), V, None)
    assert len(caplog.messages) == 2, "each choice is logged once"


def test_unknown_implementation_lists_the_known_ones():
    with pytest.raises(ValueError, match="known are reference, chunked"):
        op.linear_cross_entropy(*map(jnp.asarray, draw()), implementation="fast")
