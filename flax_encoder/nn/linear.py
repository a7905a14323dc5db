"""Linear maps with named axes."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flax_encoder.nn.partition import MESH_AXES, constrain, is_split, normal, param, zeros
from flax_encoder.ops.linear import add_bias, linear
from flax_encoder.ops.mesh import HEAD_AXES
from flax_encoder.ops.platform import platform
from flax_encoder.ops.tensor_parallel import product_to_tokens, products_of_tokens, splits_tokens


class Linear(nnx.Module):
    """x @ kernel + bias over the last `len(inputs)` axes of x; axes are given as `name=size`.

    Parameters are float32; operands are rounded to `dtype`, accumulation is float32, and so is the result, unless
    `out_dtype` has it rounded too: what lies between two products, not on the residual stream, can be. A map that
    `is_alone`, of no stack of layers, is brought together from the devices of a mesh before it is used: left to the
    compiler, its product is split by whatever axis has as many. (Of a stack each layer would be kept so.)

    Where the mesh splits its outputs over `tensor`, as it does heads, vectors [B, T, D] come with their tokens split
    there, and where it splits its inputs they leave so (ops/tensor_parallel.py).
    """

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        std: float,
        use_bias: bool,
        dtype: str,
        out_dtype: str = "float32",
        is_alone: bool = False,
        rngs: nnx.Rngs,
    ):
        self.num_inputs = len(inputs)
        self.splits_inputs, self.splits_outputs = (
            any(MESH_AXES[name] in HEAD_AXES for name in names) for names in (inputs, outputs)
        )
        self.outputs = tuple(outputs.items())
        self.dtype, self.out_dtype, self.is_alone = dtype, out_dtype, is_alone
        self.kernel = param(rngs, normal(std), **inputs, **outputs)
        bias_axes = {("features" if name == "embed" else name): size for name, size in outputs.items()}
        self.bias = param(rngs, zeros, **bias_axes) if use_bias else None

    def __call__(self, x: Float[Array, "..."], *, with_bias: bool = True) -> Float[Array, "..."]:
        kernel = constrain(self.kernel[...], *["features"] * self.kernel.ndim) if self.is_alone else self.kernel[...]
        features = kernel.shape[self.num_inputs :]
        num_batch_axes = x.ndim - self.num_inputs
        x = x.reshape(*x.shape[:num_batch_axes], math.prod(x.shape[num_batch_axes:]))
        bias = self.bias[...].reshape(-1) if with_bias and self.bias is not None else None
        if self.splits_outputs and splits_tokens(x.shape, x.shape[-1], math.prod(features)):
            return _of_tokens(x, [self], with_bias)[0]
        matrix = kernel.reshape(x.shape[-1], -1)
        if self.splits_inputs and splits_tokens(x.shape, matrix.shape[1], x.shape[-1]):
            y = product_to_tokens(x, matrix, dtype=self.dtype, out_dtype=self.out_dtype)
            y = self.add_bias(y) if with_bias else y
        else:
            # Rounded before the features are taken apart: heads of 64 do not fill a TPU's 128 lanes.
            y = linear(x, matrix, bias, dtype=self.dtype, out_dtype=self.out_dtype)
        return y.reshape(*x.shape[:-1], *features)

    def add_bias(self, y: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
        """What a call without it left out, of y whose features are one axis."""
        if self.bias is None:
            return y
        num_features = math.prod(self.kernel.shape[: self.num_inputs])
        return add_bias(y, self.bias[...].reshape(-1), dtype=self.dtype, is_wider=y.shape[-1] > num_features)


def _of_tokens(x: Float[Array, "B T D"], layers: Sequence[Linear], with_bias: bool) -> list[Float[Array, "B T ..."]]:
    """What each of several layers makes of one x whose tokens are split over `tensor`: they are gathered once."""
    first = layers[0]
    kernels = [layer.kernel[...].reshape(x.shape[-1], -1) for layer in layers]
    ys = products_of_tokens(x, kernels, dtype=first.dtype, out_dtype=first.out_dtype)
    if with_bias:
        ys = [layer.add_bias(y) for layer, y in zip(layers, ys, strict=True)]
    return [
        y.reshape(*x.shape[:-1], *(size for _, size in layer.outputs)) for layer, y in zip(layers, ys, strict=True)
    ]


def packed(x: Float[Array, "*B D"], *layers: Linear, with_bias: bool = True) -> list[Float[Array, "..."]]:
    """What each of several layers makes of one x, by one matrix product over their kernels side by side.

    One wide product keeps a matrix unit busier than several narrow ones. A TPU's is as busy with narrow ones, and
    there it is taking the outputs apart that costs (LOG.md). Where the outputs are split over devices they stay apart
    too: side by side, each device would hold parts that belong elsewhere.
    """
    if all(
        layer.splits_outputs and splits_tokens(x.shape, x.shape[-1], math.prod(size for _, size in layer.outputs))
        for layer in layers
    ):
        return _of_tokens(x, layers, with_bias)
    if platform() == "tpu" or any(is_split(name) for layer in layers for name, _ in layer.outputs):
        return [layer(x, with_bias=with_bias) for layer in layers]
    shapes = [tuple(size for _, size in layer.outputs) for layer in layers]
    widths = [math.prod(shape) for shape in shapes]
    first = layers[0]
    # Rounded before they are copied side by side, which then moves half as much.
    rounded = "bfloat16" if first.dtype == "float8" else first.dtype
    kernels = [layer.kernel[...].reshape(x.shape[-1], -1).astype(rounded) for layer in layers]
    has_bias = with_bias and first.bias is not None
    bias = jnp.concatenate([layer.bias[...].reshape(-1) for layer in layers]) if has_bias else None
    y = linear(x, jnp.concatenate(kernels, axis=1), bias, dtype=first.dtype, out_dtype=first.out_dtype)
    parts = jax.lax.split(y, widths, axis=y.ndim - 1)
    return [part.reshape(*x.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]
