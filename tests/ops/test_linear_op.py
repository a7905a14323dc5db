"""linear: products of operands rounded to dtype, accumulated in float32, both ways round."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from flax_encoder.ops.float8 import FORWARD, GRADIENT, dequantised, quantised
from flax_encoder.ops.linear import bias_gradient, linear
from flax_encoder.ops.platform import platform_for_tracing

BATCH, D, F = (2, 3), 7, (5, 11)


def rounded(x, dtype, float8=ml_dtypes.float8_e4m3fn):
    x = np.asarray(x)
    if dtype != "float8":
        return x.astype(dtype).astype(np.float64)
    scale = 2.0 ** np.ceil(np.log2(np.abs(x).max().astype(float) / float(ml_dtypes.finfo(float8).max)))
    return (x.astype(float) / scale).astype(float8).astype(np.float64) * scale


def assert_close(got, want, dtype=np.float32):
    """Rounding of at most 64 additions, in float32, of numbers as large as the largest."""
    tolerance = float(jnp.finfo(dtype).eps) * 8 * max(1.0, np.abs(want).max())
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "has_bfloat16"),
    [("float32", True), ("bfloat16", True), ("bfloat16", False), ("float8", True), ("float8", False)],
    ids=["float32", "bfloat16", "bfloat16 widened", "float8", "float8 widened"],
)
@pytest.mark.parametrize("contract_last", [False, True])
@pytest.mark.parametrize("features", [(11,), F], ids=["vector", "matrix"])
@pytest.mark.parametrize("operands", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [BATCH, (5, 12)], ids=["few rows", "rows"])
def test_linear_and_gradients_equal_numpy(monkeypatch, dtype, contract_last, features, operands, batch, has_bfloat16):
    """With many rows the wider operand of the kernel's gradient is not the one that is transposed."""
    monkeypatch.setattr("flax_encoder.ops.linear.cpu_multiplies_bfloat16", lambda: has_bfloat16)
    generator = np.random.default_rng(0)
    shape = (*features, D) if contract_last else (D, *features)
    x, kernel = (generator.standard_normal(s).astype(jnp.dtype(operands)) for s in ((*batch, D), shape))
    bias, d_y = (generator.standard_normal(s).astype(np.float32) for s in (features, (*batch, *features)))

    @jax.jit
    def out_and_gradients(x, kernel, bias, d_y):
        y, vjp = jax.vjp(lambda *a: linear(*a, contract_last=contract_last, dtype=dtype), x, kernel, bias)
        return y, *vjp(d_y)

    y, d_x, d_kernel, d_bias = out_and_gradients(x, kernel, bias, d_y)
    assert y.dtype == d_bias.dtype == jnp.float32
    assert d_x.dtype == d_kernel.dtype == jnp.dtype(operands)

    low_x, low_kernel = (rounded(a, dtype) for a in (x, kernel))
    low_d_y = rounded(d_y, dtype, ml_dtypes.float8_e5m2)
    names = "fgd" if contract_last else "dfg"
    if len(features) == 1:
        names = names.replace("g", "")
    out = names.replace("d", "")
    assert_close(y, np.einsum(f"abd,{names}->ab{out}", low_x, low_kernel) + bias)
    assert_close(d_x, np.einsum(f"ab{out},{names}->abd", low_d_y, low_kernel), operands)
    assert_close(d_kernel, np.einsum(f"abd,ab{out}->{names}", low_x, low_d_y), operands)
    assert_close(d_bias, (d_y if dtype == "float8" else low_d_y).sum((0, 1)))


@pytest.mark.parametrize("kind", [FORWARD, GRADIENT])
def test_float8_holds_the_largest_number_and_what_is_not_finite(kind):
    rng = np.random.default_rng(0)
    for size in (1e-25, 1.0, 3e38):
        x = (size * rng.uniform(-1, 1, 1000)).astype(np.float32)
        small = jax.jit(lambda x: quantised(x, kind))(x)
        assert np.log2(float(small.scale)) % 1 == 0 and np.isfinite(small.values.astype(np.float32)).all()
        got = np.asarray(dequantised(small, "float32"))
        np.testing.assert_array_equal(got, np.asarray(dequantised(small, "bfloat16"), np.float32))
        largest = np.abs(x).max()
        # Half of the last place of each number, or of the least that the scale leaves.
        last_place = 2.0 ** -(jnp.finfo(kind).nmant + 1)
        np.testing.assert_array_less(np.abs(got - x), last_place * np.maximum(np.abs(x), largest * 2.0**-13) * 1.0001)
    assert not np.asarray(dequantised(quantised(jnp.zeros(3), kind), "float32")).any()
    for bad in (np.inf, np.nan):
        assert not np.isfinite(dequantised(quantised(jnp.array([1.0, bad]), kind), "float32")[1])


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operands", ["float32", "bfloat16"])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_result_is_rounded_to_out_dtype_and_its_bias_gradient_is_not(platform, operands, out_dtype):
    """Sums of 1031 terms, which bfloat16 could not add up; a GPU's products write bfloat16 themselves."""
    generator = np.random.default_rng(0)
    x, kernel = (generator.random(s).astype(jnp.dtype(operands)) for s in ((1031, D), (D, 11)))
    bias, d_y = generator.random(11).astype(np.float32), generator.random((1031, 11)).astype(jnp.dtype(out_dtype))

    @jax.jit
    def out_and_gradients(x, kernel, bias, d_y):
        y, vjp = jax.vjp(lambda *a: linear(*a, dtype="bfloat16", out_dtype=out_dtype), x, kernel, bias)
        return y, *vjp(d_y)

    with platform_for_tracing(platform):
        y, d_x, d_kernel, d_bias = out_and_gradients(x, kernel, bias, d_y)
    assert y.dtype == out_dtype and d_x.dtype == d_kernel.dtype == operands and d_bias.dtype == jnp.float32
    low_x, low_kernel, low_d_y = (rounded(a, jnp.bfloat16) for a in (x, kernel, d_y))
    assert_close(y, low_x @ low_kernel + bias, out_dtype)
    assert_close(d_x, low_d_y @ low_kernel.T, operands)
    assert_close(d_kernel, low_x.T @ low_d_y, operands)
    assert_close(d_bias, low_d_y.sum(0))


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_without_instructions_for_bfloat16_products_are_of_float32(monkeypatch, has_bfloat16):
    monkeypatch.setattr("flax_encoder.ops.linear.cpu_multiplies_bfloat16", lambda: has_bfloat16)
    loss = lambda x, kernel: linear(x, kernel, dtype="bfloat16").sum()  # noqa: E731
    jaxpr = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(jnp.ones((65, D)), jnp.ones((D, 11))))
    assert ("bf16" in jaxpr) == has_bfloat16 != ("reduce_precision" in jaxpr)


def test_accumulation_is_float32():
    """In bfloat16, whose spacing is 2 from 256 on, a sum of ones would stop there."""
    y = linear(jnp.ones((1, 1031)), jnp.ones((1031, 3)), dtype="bfloat16")
    np.testing.assert_array_equal(y, np.full((1, 3), 1031.0, np.float32))
    d_kernel = jax.grad(lambda k: linear(jnp.ones((1031, 3)), k, dtype="bfloat16").sum())(jnp.ones((3, 2)))
    np.testing.assert_array_equal(d_kernel, np.full((3, 2), 1031.0, np.float32))


def test_both_layouts_of_a_kernel_give_the_same():
    generator = np.random.default_rng(0)
    x, kernel = (jnp.asarray(generator.standard_normal(s), jnp.float32) for s in ((*BATCH, D), (D, 11)))
    np.testing.assert_allclose(linear(x, kernel), linear(x, kernel.T, contract_last=True), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("width", "dtype"), [(8, jnp.bfloat16), (3, np.float32)], ids=["narrow", "wide"])
def test_a_bias_gradient_on_a_tpu_is_the_sum_of_rows_rounded_where_a_product_makes_it(width, dtype):
    """Of a result wider than x it is a plain sum."""
    g = np.random.default_rng(0).standard_normal((4, 15, 7)).astype(np.float32)
    assert_close(bias_gradient(jnp.asarray(g.reshape(60, 7))), rounded(g, jnp.bfloat16).sum((0, 1)))
    x, kernel = jnp.ones((4, 15, width)), jnp.ones((width, 7))
    with platform_for_tracing("tpu"):
        _, vjp = jax.vjp(lambda bias: linear(x, kernel, bias, dtype="bfloat16"), jnp.ones(7))
    assert_close(vjp(jnp.asarray(g))[0], rounded(g, dtype).sum((0, 1)))


@pytest.mark.parametrize("batch", [(0,), (0, 5), (5, 0)])
def test_a_batch_may_be_empty(batch):
    x, kernel, bias = jnp.zeros((*batch, 4)), jnp.ones((4, 3)), jnp.ones(3)
    for dtype in ("float32", "bfloat16"):
        y, vjp = jax.vjp(lambda *a, dtype=dtype: linear(*a, dtype=dtype), x, kernel, bias)
        assert y.shape == (*batch, 3)
        for gradient, operand in zip(vjp(y), (x, kernel, bias), strict=True):
            np.testing.assert_array_equal(gradient, np.zeros(operand.shape))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bias_dtype", [jnp.float32, jnp.bfloat16])
def test_a_biass_gradient_is_the_sum_of_what_products_take_in_its_own_dtype(dtype, bias_dtype):
    g = jnp.full((2, 3), 1 + 2**-9)  # a number of float16 and none of bfloat16
    operands = jnp.ones((2, 4)), jnp.ones((4, 3)), jnp.ones(3, bias_dtype)
    d_bias = jax.vjp(lambda *a: linear(*a, dtype=dtype), *operands)[1](g)[2]
    assert d_bias.dtype == bias_dtype
    np.testing.assert_array_equal(d_bias, g.astype(dtype).astype(jnp.float32).sum(0).astype(bias_dtype))
