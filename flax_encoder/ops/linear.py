"""Matrix products with bfloat16 operands and float32 accumulation, in the layouts that a CPU's matrix unit takes."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from flax_encoder.ops.float8 import FORWARD, GRADIENT, Float8, dequantised, quantised
from flax_encoder.ops.mesh import TOKEN_AXES, is_spread, parts
from flax_encoder.ops.platform import cpu_multiplies_bfloat16, platform, precision
from flax_encoder.ops.sums import sum_over

_FEW_ROWS = 64


def linear(
    x: Float[Array, "*B D"],
    kernel: Float[Array, "D *F"] | Float[Array, "*F D"],
    bias: Float[Array, "*F"] | None = None,
    *,
    contract_last: bool = False,
    dtype: str = "float32",
    out_dtype: str = "float32",
) -> Float[Array, "..."]:
    """x @ kernel + bias: operands rounded to `dtype`, accumulated in float32.

    Args:
      x: batch axes, then D.
      kernel: [D, ...], or with `contract_last` [..., D], as a tied vocabulary head has it.
      dtype: dtype of the operands, also in the backward pass, where the bias's gradient is the sum of the rounded
        operands. The gradients come back in the dtypes of x, kernel and bias. "float8" rounds x and kernel to 3 bits of
        mantissa and the result's gradient to 2, with a scale for each of the three (ops/float8.py).
      out_dtype: dtype of the result, which is rounded once; on a GPU the product, the bias and their sum each are.

    Example:
      >>> linear(jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.ones(4))[0].tolist()
      [4.0, 4.0, 4.0, 4.0]
    """
    D, features = (kernel.shape[-1], kernel.shape[:-1]) if contract_last else (kernel.shape[0], kernel.shape[1:])
    matrix = kernel.reshape((-1, D) if contract_last else (D, math.prod(features)))
    # A GPU's product rounds as it writes: apart that would read float32 again, and in some versions of XLA it takes
    # the bias with it, if that is of the same dtype.
    is_narrow = dtype != "float32" and out_dtype == "bfloat16" and platform() == "gpu"
    product_dtype = out_dtype if is_narrow else "float32"
    # Batch axes come back before the bias, features after: a reshape between the product and what reads it keeps a TPU
    # from fusing them, and heads of 64 fill half of its lanes (LOG.md).
    y = _product(x.reshape(*_batch_axes(x), D), matrix, contract_last, dtype, product_dtype)
    y = y.reshape(*x.shape[:-1], math.prod(features))
    if bias is not None:
        y = add_bias(y, bias.reshape(-1), dtype=dtype, is_wider=y.shape[-1] > D)
    return y.astype(out_dtype).reshape(*x.shape[:-1], *features)


def _batch_axes(x: Array) -> tuple[int, ...]:
    """All but the last axis as one, or as they are where the mesh splits tokens: an axis of rows and tokens in one is
    none that it splits, and tokens would be brought together."""
    return x.shape[:-1] if parts(TOKEN_AXES) > 1 else (math.prod(x.shape[:-1]),)


def add_bias(
    y: Float[Array, "*B F"], bias: Float[Array, "F"], *, dtype: str = "float32", is_wider: bool = False
) -> Float[Array, "*B F"]:
    """What `linear` does with a product's result and a bias, for who adds it later.

    Args:
      dtype: of the product's operands.
      is_wider: whether y has more features than what it was made of: it is an activation's, and the sum that is its
        bias's gradient a TPU's compiler fuses into the product that makes it.
    """
    is_plain = dtype != "bfloat16" or (platform() == "tpu" and is_wider)
    return y + bias.astype(y.dtype) if is_plain else _biased(y, bias)


@jax.custom_vjp
def _biased(y, bias):
    """y + bias rounded to y's dtype, whose gradient is `bias_gradient`."""
    return y + bias.astype(y.dtype)


def _biased_backward(like, g):
    g = made_once(g, "bfloat16")
    return g, bias_gradient(g.reshape(*_batch_axes(g), g.shape[-1])).astype(like.dtype)


_biased.defvjp(lambda y, bias: (_biased(y, bias), jnp.zeros((), bias.dtype)), _biased_backward)


def made_once(g, dtype: str):
    """On a GPU g rounded to dtype, one array for all that read it: XLA would make a concatenation for each product."""
    dtype = "bfloat16" if dtype == "float8" else dtype
    return jax.lax.optimization_barrier(g.astype(dtype)).astype(g.dtype) if platform() == "gpu" else g


def bias_gradient(g: Float[Array, "*B F"]) -> Float[Array, "F"]:
    """g rounded to bfloat16, as products have it, and summed over rows in float32."""
    g = g.astype(jnp.bfloat16)
    if platform() == "tpu" and g.ndim == 2:
        # By its matrix unit: eight rows of ones, since a product with one is made a sum of the vector unit's again.
        return _dot(jnp.ones((8, g.shape[0]), jnp.bfloat16), g, (1, 0))[0]
    # The barrier keeps the rounding, and so what the product reads, which is then there anyway.
    return sum_over(jax.lax.optimization_barrier(g).astype(jnp.float32), tuple(range(g.ndim - 1))).reshape(-1)


def linear_gradients(
    x: Float[Array, "*B D"],
    kernel: Float[Array, "D F"] | Float[Array, "F D"],
    g: Float[Array, "*B F"],
    *,
    contract_last: bool = False,
    dtype: str = "float32",
    x_dtype: str = "float32",
) -> tuple[Float[Array, "*B D"], Float[Array, "..."]]:
    """The gradients of x, as `x_dtype`, and kernel for that of `linear`'s result: operands rounded to `dtype`, the rest
    float32."""
    return _gradients(x, kernel, g, contract_last, dtype, x_dtype)


def _gradients(x, kernel, g, contract_last: bool, dtype: str, x_dtype: str):
    """`linear_gradients`, also of what `_kept` has rounded already."""
    x, kernel, g = _operand(x, dtype), _operand(kernel, dtype), _operand(g, dtype, GRADIENT)
    d_x = _rows_dot(g, kernel, 0 if contract_last else 1, x_dtype)
    return d_x, _rows_dot_over_rows(*((g, x) if contract_last else (x, g)))


def _dot(a, b, contract: tuple[int, int] | tuple[tuple[int, ...], tuple[int, ...]], dtype: str = "float32"):
    if isinstance(a, Float8):
        y = _dot(a.values, b.values, contract, dtype)
        return y * (a.scale * b.scale).astype(y.dtype)
    dims = tuple((axes,) if isinstance(axes, int) else axes for axes in contract), ((), ())
    return jax.lax.dot_general(a, b, dims, precision=precision(a, b), preferred_element_type=jnp.dtype(dtype))


def _row_major(x):
    # XLA:CPU reaches AMX only from row-major operands and result: 900 GFLOP/s against 150 (LOG.md). Without the
    # constraint its layout assignment may choose otherwise, and for some bf16 products then fails at run time.
    # A constraint is opaque to the compiler: where it splits arrays, it would bring them together first.
    return with_layout_constraint(x, Layout((0, 1))) if platform() == "cpu" and not is_spread() else x


def _rows_dot(a, b, contract_b: int, out_dtype: str = "float32"):
    """The product over a's last axis."""
    contract = a.ndim - 1, contract_b
    if platform() == "gpu":  # accumulates in float32 and rounds as it writes
        return _dot(a, b, contract, out_dtype)
    return _row_major(_dot(_row_major(a), _row_major(b), contract)).astype(out_dtype)


def _widens() -> bool:
    """Whether products of bfloat16 are made of float32 operands that hold the same numbers."""
    # Without instructions for bfloat16 XLA:CPU widens inside its product's loops, at half of float32's speed (LOG.md);
    # and over several devices, where layouts are not constrained, it has no product of bfloat16 in any layout.
    return platform() == "cpu" and (is_spread() or not cpu_multiplies_bfloat16())


def _kept(x, dtype: str, float8=FORWARD):
    """x rounded to `dtype`, as it is kept for the backward pass: of the dtype that products take, or `Float8`."""
    if dtype == "float8":
        return quantised(x, float8)
    if dtype == "bfloat16" and _widens():
        return jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def _operand(x, dtype: str, float8=FORWARD):
    """What a product takes of x, which is rounded already or not: `Float8` on a GPU alone."""
    x = x if isinstance(x, Float8) else _kept(x, dtype, float8)
    if isinstance(x, Float8) and platform() != "gpu":
        return dequantised(x, "float32" if _widens() else "bfloat16")
    return x


def _rows_dot_over_rows(a, b):
    """a^T b. The transpose is made explicit, since a product over the leading axis misses a CPU's fast path.

    It is the narrower operand that is transposed, and then if need be the result: a wide one is often an activation,
    and XLA:CPU makes that element by element in the order of the transpose, which is no order for memory (LOG.md).
    """
    if a.ndim > 2:  # the mesh cuts rows: each device has a product of its own tokens
        axes = tuple(range(a.ndim - 1))
        a, b = (x.astype(jnp.float32) if platform() == "cpu" else x for x in (a, b))
        return _dot(a, b, (axes, axes))
    (rows, A), B = a.shape, b.shape[1]
    if platform() == "cpu" and rows * (A - B) >= 2 * A * B:
        # Without the barrier the transposes would be folded into the product.
        return _row_major(jax.lax.optimization_barrier(_rows_dot(b.T, a, 0)).T)
    return _rows_dot(a.T, b, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x, kernel, transposed, dtype, out_dtype):
    return _forward(x, kernel, transposed, dtype, out_dtype)[0]


def _forward(x, kernel, transposed, dtype, out_dtype):
    # What is kept for the backward pass is already rounded: half the memory, and the cast is not made twice.
    x_low, kernel_low = _kept(x, dtype), _kept(kernel, dtype)
    dtypes = jnp.zeros((), x.dtype), jnp.zeros((), kernel.dtype)
    y = _few_rows_dot(_operand(x_low, dtype), _operand(kernel_low, dtype), transposed, out_dtype)
    return y, (x_low, kernel_low, dtypes)


def _few_rows_dot(x, kernel, transposed: bool, out_dtype: str):
    """x @ kernel. Of few rows and a kernel [F, D] a CPU's product is twice as fast the other way round (LOG.md)."""
    # The platform first: a program for all of them has lengths that are symbols.
    if platform() == "cpu" and transposed and x.ndim == 2 and x.shape[0] <= _FEW_ROWS and not is_spread():
        return _row_major(_dot(_row_major(kernel), _row_major(x), (1, 1))).T.astype(out_dtype)
    return _rows_dot(x, kernel, 1 if transposed else 0, out_dtype)


def _backward(transposed, dtype, out_dtype, residuals, g):
    x, kernel, (x_like, kernel_like) = residuals
    d_x, d_kernel = _gradients(x, kernel, made_once(g, dtype), transposed, dtype, x_like.dtype.name)
    if platform() == "tpu":
        # Otherwise a reshape that takes heads apart becomes part of the product, which then wants x transposed.
        d_kernel = jax.lax.optimization_barrier(d_kernel)
    return d_x, d_kernel.astype(kernel_like.dtype)


_product.defvjp(_forward, _backward)
