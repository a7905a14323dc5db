"""The feed-forward block, plain or gated."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from flax_encoder.config import Activation, EncoderConfig
from flax_encoder.nn.linear import Linear, packed
from flax_encoder.ops.dropout import dropout
from flax_encoder.ops.platform import platform

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    # By erf, as torch has it: jax.nn.gelu's erfc is more exact far below 0, and half again as slow on CPUs.
    "gelu": lambda x: x * (0.5 + 0.5 * jax.lax.erf(x * np.float32(0.5**0.5))),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jax.nn.relu(x) ** 2,
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "mish": jax.nn.mish,
    "tanh": jax.numpy.tanh,
    "sigmoid": jax.nn.sigmoid,
    "identity": lambda x: x,
    "elu": jax.nn.elu,
    "celu": jax.nn.celu,
    "selu": jax.nn.selu,
    "softplus": jax.nn.softplus,
    "softsign": jax.nn.soft_sign,
    "log_sigmoid": jax.nn.log_sigmoid,
    "hard_tanh": jax.nn.hard_tanh,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_swish": jax.nn.hard_swish,
    "tanh_shrink": lambda x: x - jax.numpy.tanh(x),
}


class FeedForward(nnx.Module):
    """act(x W_up) W_down, or gated: (act(x W_gate) * x W_up) W_down (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        embed, mlp = {"embed": config.embed_dim}, {"mlp": config.mlp_dim}
        options = {"std": config.init_std, "dtype": config.operands, "rngs": rngs}
        inner = options | {"use_bias": config.biases.mlp, "out_dtype": config.dtype}
        self.gate = Linear(embed, mlp, **inner) if config.gated else None
        self.up = Linear(embed, mlp, **inner)
        self.down = Linear(mlp, embed, use_bias=config.biases.mlp_out, **options)

    def __call__(self, x: Float[Array, "B T D"], *, key: Array | None = None) -> Float[Array, "B T D"]:
        # Of what lies between the products, the backward pass keeps what the first ones made, their biases not yet
        # added, and makes the rest again: elementwise chains cost less to compute than to read, and XLA would keep
        # several arrays as large.
        if self.config.remat == "feed_forward":
            y = jax.checkpoint(lambda x: self._down(*self._up(x)))(x.astype(self.config.dtype))
        else:
            y = jax.checkpoint(self._down)(*self._up(x))
        return dropout(y, self.config.dropout_rate, key)

    def _up(self, x: Float[Array, "B T D"]) -> list[Float[Array, "B T F"]]:
        return packed(x, *self._first(), with_bias=False)

    def _first(self) -> list[Linear]:
        return [self.up] if self.gate is None else [self.gate, self.up]

    def _down(self, *inner: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
        x, *factors = (layer.add_bias(x.astype(jnp.float32)) for layer, x in zip(self._first(), inner, strict=True))
        hidden = math.prod(factors, start=ACTIVATIONS[self.config.activation](x))
        # Rounded here, as the product would, so that its gradient is made in that dtype: half of what is written. A TPU
        # makes more of the chain in the product that it ends in if it is not (LOG.md).
        return self.down(hidden.astype(self.config.dtype) if platform() == "gpu" else hidden)
