"""The feed-forward block, plain or gated."""

import functools
from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float

from flax_encoder.config import Activation, EncoderConfig
from flax_encoder.nn.linear import Linear, packed
from flax_encoder.ops.dropout import dropout

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
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
}


class FeedForward(nnx.Module):
    """act(x W_up) W_down, or gated: (act(x W_gate) * x W_up) W_down (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        embed, mlp = {"embed": config.embed_dim}, {"mlp": config.mlp_dim}
        options = {"std": config.init_std, "dtype": config.dtype, "rngs": rngs}
        self.gate = Linear(embed, mlp, use_bias=config.biases.mlp, **options) if config.gated else None
        self.up = Linear(embed, mlp, use_bias=config.biases.mlp, **options)
        self.down = Linear(mlp, embed, use_bias=config.biases.mlp_out, **options)

    def __call__(self, x: Float[Array, "B T D"], *, key: Array | None = None) -> Float[Array, "B T D"]:
        activation = ACTIVATIONS[self.config.activation]
        if self.gate is None:
            hidden = activation(self.up(x))
        else:
            gate, up = packed(x, self.gate, self.up)
            hidden = activation(gate) * up
        return dropout(self.down(hidden), self.config.dropout_rate, key)
