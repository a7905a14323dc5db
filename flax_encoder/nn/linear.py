"""A linear map with named axes."""

from flax import nnx
from jaxtyping import Array, Float

from flax_encoder.nn.partition import normal, param, zeros
from flax_encoder.ops.linear import linear


class Linear(nnx.Module):
    """x @ kernel + bias over the last `len(inputs)` axes of x; axes are given as `name=size`.

    Parameters are float32; operands are rounded to `dtype`, accumulation and result are float32.
    """

    def __init__(
        self, inputs: dict[str, int], outputs: dict[str, int], *, std: float, use_bias: bool, dtype: str, rngs: nnx.Rngs
    ):
        self.num_inputs = len(inputs)
        self.dtype = dtype
        self.kernel = param(rngs, normal(std), **inputs, **outputs)
        bias_axes = {("features" if name == "embed" else name): size for name, size in outputs.items()}
        self.bias = param(rngs, zeros, **bias_axes) if use_bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        kernel = self.kernel[...]
        x = x.reshape(*x.shape[: x.ndim - self.num_inputs], -1)
        kernel = kernel.reshape(-1, *kernel.shape[self.num_inputs :])
        return linear(x, kernel, None if self.bias is None else self.bias[...], dtype=self.dtype)
