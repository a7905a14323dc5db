"""Layer norm and RMS norm as modules."""

from flax import nnx
from jaxtyping import Array, Float

from flax_encoder.config import EncoderConfig
from flax_encoder.nn.partition import ones, param, zeros
from flax_encoder.ops.norm import layer_norm, rms_norm


class Norm(nnx.Module):
    """`config.norm` over the last axis, `width` wide (None: embed_dim)."""

    def __init__(self, config: EncoderConfig, width: int | None = None, *, rngs: nnx.Rngs):
        width = width or config.embed_dim
        self.epsilon, self.dtype = config.norm_epsilon, config.dtype
        self.is_rms = config.norm == "rms_norm"
        self.scale = param(rngs, ones, features=width)
        has_bias = config.biases.norm and not self.is_rms
        self.bias = param(rngs, zeros, features=width) if has_bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        if self.is_rms:
            return rms_norm(x, self.scale[...], self.epsilon, self.dtype)
        return layer_norm(x, self.scale[...], None if self.bias is None else self.bias[...], self.epsilon, self.dtype)
