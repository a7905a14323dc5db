"""The feed-forward block, plain or gated."""

import functools

import jax
from flax import nnx
from jaxtyping import Array, Float

from flax_encoder.config import EncoderConfig
from flax_encoder.nn.linear import Linear, packed
from flax_encoder.ops.dropout import dropout

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


class FeedForward(nnx.Module):
    """act(x W_up) W_down, or gated: (act(x W_gate) * x W_up) W_down (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        embed, mlp = {"embed": config.embed_dim}, {"mlp": config.mlp_dim}
        options = {"std": config.init_std, "use_bias": config.use_bias, "dtype": config.dtype, "rngs": rngs}
        self.gate = Linear(embed, mlp, **options) if config.gated else None
        self.up = Linear(embed, mlp, **options)
        self.down = Linear(mlp, embed, **options)

    def __call__(self, x: Float[Array, "B T D"], *, key: Array | None = None) -> Float[Array, "B T D"]:
        activation = ACTIVATIONS[self.config.activation]
        if self.gate is None:
            hidden = activation(self.up(x))
        else:
            gate, up = packed(x, self.gate, self.up)
            hidden = activation(gate) * up
        return dropout(self.down(hidden), self.config.dropout_rate, key)
