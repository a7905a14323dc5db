"""Linear maps with named axes."""

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flax_encoder.nn.partition import is_split, normal, param, zeros
from flax_encoder.ops.linear import linear


class Linear(nnx.Module):
    """x @ kernel + bias over the last `len(inputs)` axes of x; axes are given as `name=size`.

    Parameters are float32; operands are rounded to `dtype`, accumulation and result are float32.
    """

    def __init__(
        self, inputs: dict[str, int], outputs: dict[str, int], *, std: float, use_bias: bool, dtype: str, rngs: nnx.Rngs
    ):
        self.num_inputs = len(inputs)
        self.outputs = tuple(outputs.items())
        self.dtype = dtype
        self.kernel = param(rngs, normal(std), **inputs, **outputs)
        bias_axes = {("features" if name == "embed" else name): size for name, size in outputs.items()}
        self.bias = param(rngs, zeros, **bias_axes) if use_bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        kernel = self.kernel[...]
        x = x.reshape(*x.shape[: x.ndim - self.num_inputs], -1)
        kernel = kernel.reshape(-1, *kernel.shape[self.num_inputs :])
        return linear(x, kernel, None if self.bias is None else self.bias[...], dtype=self.dtype)


def packed(x: Float[Array, "*B D"], *layers: Linear) -> list[Float[Array, "..."]]:
    """What each of several layers makes of one x, by one matrix product over their kernels side by side.

    One wide product keeps a matrix unit busier than several narrow ones. Where the outputs are split over devices they
    stay apart: side by side, each device would hold parts that belong elsewhere.
    """
    if any(is_split(name) for layer in layers for name, _ in layer.outputs):
        return [layer(x) for layer in layers]
    shapes = [tuple(size for _, size in layer.outputs) for layer in layers]
    widths = [math.prod(shape) for shape in shapes]
    kernel = jnp.concatenate([layer.kernel[...].reshape(x.shape[-1], -1) for layer in layers], axis=1)
    has_bias = layers[0].bias is not None
    bias = jnp.concatenate([layer.bias[...].reshape(-1) for layer in layers]) if has_bias else None
    y = linear(x, kernel, bias, dtype=layers[0].dtype)
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    return [y[..., e - w : e].reshape(*x.shape[:-1], *s) for e, w, s in zip(ends, widths, shapes, strict=True)]
