"""What stands on the encoder: heads that read it at target positions."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_encoder.config import EncoderConfig
from flax_encoder.nn.feed_forward import ACTIVATIONS
from flax_encoder.nn.linear import Linear
from flax_encoder.nn.normalization import Norm
from flax_encoder.nn.partition import param, zeros
from flax_encoder.ops.dropout import dropout
from flax_encoder.ops.linear import linear


def gather_rows(hidden: Float[Array, "B T D"], target_positions: Int[Array, "B M"]) -> Float[Array, "B M D"]:
    """The vectors at the target positions: heads skip the rest, which halves a small masked LM's step."""
    return jnp.take_along_axis(hidden, target_positions[..., None], axis=1)


class MaskedLMHead(nnx.Module):
    """BERT's head: dense, activation, norm, then the token embedding transposed, plus a bias a token."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.dense = Linear(
            {"embed": config.embed_dim},
            {"features": config.embed_dim},
            std=config.init_std,
            use_bias=config.use_bias,
            dtype=config.dtype,
            rngs=rngs,
        )
        self.norm = Norm(config, rngs=rngs)
        self.bias = param(rngs, zeros, vocab=config.vocab_size)

    def __call__(self, hidden: Float[Array, "B M D"], token_embedding: Float[Array, "V D"]) -> Float[Array, "B M V"]:
        x = self.norm(ACTIVATIONS[self.config.activation](self.dense(hidden)))
        return linear(x, token_embedding, self.bias[...], contract_last=True, dtype=self.config.dtype)


class ClassificationHead(nnx.Module):
    """Dense, tanh, dropout, projection to classes (BERT's pooler and classifier), in float32."""

    def __init__(self, config: EncoderConfig, num_classes: int, *, rngs: nnx.Rngs):
        self.config = config
        self.dense = Linear(
            {"embed": config.embed_dim},
            {"features": config.embed_dim},
            std=config.init_std,
            use_bias=True,
            dtype="float32",
            rngs=rngs,
        )
        self.out = Linear(
            {"features": config.embed_dim},
            {"classes": num_classes},
            std=config.init_std,
            use_bias=True,
            dtype="float32",
            rngs=rngs,
        )

    def __call__(self, pooled: Float[Array, "B M D"], *, key: Array | None = None) -> Float[Array, "B M C"]:
        return self.out(dropout(jnp.tanh(self.dense(pooled)), self.config.dropout_rate, key))
