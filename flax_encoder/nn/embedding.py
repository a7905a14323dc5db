"""Embeds tokens, their types and their positions."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_encoder.config import EncoderConfig
from flax_encoder.nn.linear import Linear
from flax_encoder.nn.normalization import Norm
from flax_encoder.nn.partition import MESH_AXES, constrain, normal, param, partition_spec
from flax_encoder.ops.dropout import dropout
from flax_encoder.ops.gather import take_vectors
from flax_encoder.ops.position import sinusoidal


def places(tokens: Int[Array, "B T"], config: EncoderConfig) -> Int[Array, "B T"]:
    """Each token's place in its row.

    Raises:
      ValueError: the row is longer than the model's positions reach.
    """
    length = tokens.shape[1]
    if config.position == "learned" and length > config.max_length:
        raise ValueError(
            f"learned positions reach max_length: got rows of {length} tokens for {config.max_length}. Rows of several "
            f"documents take segment_ids and positions, which count in each document."
        )
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)


def _axes(rows: str) -> tuple[Any, Any]:
    """The mesh axes of a table of vectors whose rows have this name."""
    return MESH_AXES[rows], MESH_AXES["embed"]


class Embedding(nnx.Module):
    """Token vectors plus those of types and absolute positions, as the config has them; norm, dropout, projection."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        init, width = normal(config.init_std), config.embedding_dim or config.embed_dim
        self.token = param(rngs, init, vocab=config.vocab_size, embed=width)
        # Of a model that begins from another's table, which it does not train (DeBERTa v3's sharing, arXiv 2111.09543).
        self.base: nnx.Param | None = nnx.data(None)
        rows = config.max_length + config.position_offset
        self.position = param(rngs, init, places=rows, embed=width) if config.position == "learned" else None
        # Where Hua et al. (arXiv 2202.10447) start it; `scale` is a name that no weight decay touches.
        self.scale = (
            param(rngs, lambda _, shape: jnp.full(shape, width**-0.5), features=1) if config.position_scale else None
        )
        types = config.num_token_types
        self.token_type = param(rngs, init, token_types=types, embed=width) if types else None
        has_norm = config.norm_placement == "post" if config.embedding_norm is None else config.embedding_norm
        self.norm = Norm(config, width, rngs=rngs) if has_norm else None
        options = {"std": config.init_std, "use_bias": config.use_bias, "dtype": config.dtype, "rngs": rngs}
        inputs, outputs = {"embed": width}, {"features": config.embed_dim}
        has_projection = config.embedding_dim is not None and config.layer == "attention"
        self.projection = None if not has_projection else Linear(inputs, outputs, **options)

    @property
    def table(self) -> Float[Array, "V E"]:
        """The token vectors: `token`, beside a table that other parameters train if there is one, `base`."""
        return self.token[...] if self.base is None else jax.lax.stop_gradient(self.base[...]) + self.token[...]

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        token_types: Int[Array, "B T"] | None = None,
        *,
        key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """`token_types` None is type 0 everywhere. A number beyond its table makes that token's vector NaN.

        Raises:
          ValueError: token_types for a model that has none.
        """
        tokens, positions = (constrain(a, "batch", "length") for a in (tokens, positions))
        # Recurrent layers need a row's tokens together.
        length = "tokens" if self.config.layer == "attention" else "length"
        split = partition_spec(length)[0]
        x = take_vectors(self.table, tokens, _axes("vocab"), split)
        x = x if self.config.embedding_scale == 1.0 else self.config.embedding_scale * x
        if self.token_type is not None:
            types = self.token_type[...]
            x = x + (types[0] if token_types is None else take_vectors(types, token_types, _axes("token_types"), split))
        elif token_types is not None:
            raise ValueError("token_types need num_token_types: this model has 0; leave them out.")
        if self.position is not None:
            numbers = positions + self.config.position_offset
            x = x + take_vectors(self.position[...], numbers, _axes("places"), split)
        elif self.config.position == "sinusoidal":
            table = sinusoidal(positions, x.shape[-1])
            x = x + (table if self.scale is None else self.scale[...] * table)
        if self.norm is not None:
            x = self.norm(x)
        x = dropout(x, self.config.dropout_rate, key)
        x = x if self.projection is None else self.projection(x)
        return constrain(x, "batch", length, "features")
