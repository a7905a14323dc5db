"""Tokens and positions to vectors."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_encoder.config import EncoderConfig
from flax_encoder.nn.normalization import Norm
from flax_encoder.nn.partition import normal, param
from flax_encoder.ops.dropout import dropout
from flax_encoder.ops.position import sinusoidal


class Embedding(nnx.Module):
    """Token vectors plus absolute positions, if the config has them; then norm (post-norm stacks) and dropout."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = normal(config.init_std)
        self.token = param(rngs, init, vocab=config.vocab_size, embed=config.embed_dim)
        is_learned = config.position == "learned"
        self.position = param(rngs, init, length=config.max_length, embed=config.embed_dim) if is_learned else None
        self.norm = Norm(config, rngs=rngs) if config.norm_placement == "post" else None

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], *, key: Array | None = None
    ) -> Float[Array, "B T D"]:
        x = jnp.take(self.token[...], tokens, axis=0)
        if self.position is not None:
            x = x + jnp.take(self.position[...], positions, axis=0)
        elif self.config.position == "sinusoidal":
            x = x + sinusoidal(positions, self.config.embed_dim)
        if self.norm is not None:
            x = self.norm(x)
        return dropout(x, self.config.dropout_rate, key)
