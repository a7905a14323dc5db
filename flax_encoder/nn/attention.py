"""Self-attention: projections, positions, and the attention op."""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_encoder.config import EncoderConfig
from flax_encoder.nn.linear import Linear, packed
from flax_encoder.ops.attention import Window, attention
from flax_encoder.ops.dropout import dropout
from flax_encoder.ops.position import RopeTables, apply_rope


class SelfAttention(nnx.Module):
    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        embed = {"embed": config.embed_dim}
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_kv_heads or config.num_heads, "head_dim": config.head_dim}
        options = {"std": config.init_std, "use_bias": config.use_bias, "dtype": config.dtype, "rngs": rngs}
        self.query = Linear(embed, heads, **options)
        self.key = Linear(embed, kv_heads, **options)
        self.value = Linear(embed, kv_heads, **options)
        self.out = Linear(heads, embed, **options)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        rope: RopeTables | None,
        window: Window | None,
        *,
        key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """`window` is an argument, not a setting of the layer, so that stacked layers can differ in it."""
        config = self.config
        query, keys, value = packed(x, self.query, self.key, self.value)
        if rope is not None:
            query, keys = apply_rope(query, rope), apply_rope(keys, rope)
        attention_key, output_key = (None, None) if key is None else jax.random.split(key)
        out = attention(
            *(a.astype(config.dtype) for a in (query, keys, value)),
            segment_ids=segment_ids,
            window=window,
            dropout_rate=config.attention_dropout_rate,
            dropout_key=attention_key,
            implementation=config.attention_implementation,
        )
        return dropout(self.out(out), config.dropout_rate, output_key)
