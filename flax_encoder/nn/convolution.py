"""A convolution beside the first layer (DeBERTa v2)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_encoder.config import EncoderConfig
from flax_encoder.nn.feed_forward import ACTIVATIONS
from flax_encoder.nn.linear import Linear
from flax_encoder.nn.normalization import Norm
from flax_encoder.ops.dropout import dropout


def neighbours(x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], width: int) -> Float[Array, "B T W D"]:
    """Each token's `width` neighbours, itself in the middle; zeros for those beyond its document."""
    reach, length = width // 2, x.shape[1]

    def shifted(a, offset):
        a = jnp.pad(a, [(0, 0), (reach, reach)] + [(0, 0)] * (a.ndim - 2))
        return a[:, reach + offset : reach + offset + length]

    rows = []
    for offset in range(-reach, reach + 1):
        is_own = (shifted(segment_ids, offset) == segment_ids) & (segment_ids > 0)
        rows.append(jnp.where(is_own[..., None], shifted(x, offset), 0.0))
    return jnp.stack(rows, axis=2)


class Convolution(nnx.Module):
    """norm(y + act(x * kernel)) for a layer's input x and output y; it ends where the document does."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.conv = Linear(
            {"width": config.conv_width, "embed": config.embed_dim},
            {"features": config.embed_dim},
            std=config.init_std,
            use_bias=True,
            dtype=config.dtype,
            rngs=rngs,
        )
        self.norm = Norm(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        y: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        *,
        key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        config = self.config
        out = self.conv(neighbours(x, segment_ids, config.conv_width))
        return self.norm(y + ACTIVATIONS[config.conv_activation](dropout(out, config.dropout_rate, key)))
