"""Self-attention: projections, positions, and the attention op."""

from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_encoder.config import EncoderConfig
from flax_encoder.nn.linear import Linear, packed
from flax_encoder.nn.normalization import Norm
from flax_encoder.nn.partition import normal, param
from flax_encoder.ops.attention import Window, attention, attention_weights
from flax_encoder.ops.dropout import dropout
from flax_encoder.ops.mesh import is_spread
from flax_encoder.ops.position import RopeTables
from flax_encoder.ops.relative import (
    alibi_bias,
    alibi_values,
    disentangled_bias,
    disentangled_buckets,
    offsets,
    t5_bias,
    t5_values,
)


class PositionInputs(NamedTuple):
    """What attention is told of positions; the same for all layers but for rope, which may differ."""

    rope: RopeTables | None = None
    bias: Float[Array, "1 N T T"] | None = None
    """Added to the logits (ALiBi, T5)."""
    offset_bias: Float[Array, "N P"] | None = None
    """The same by offset: on a mesh each device makes what it needs of it."""
    distances: Float[Array, "R D"] | None = None
    """Vectors of distances, of which each layer makes keys and queries (DeBERTa)."""


class RelativePosition(nnx.Module):
    """What all layers share of `config.relative_position`: T5's scalars, or DeBERTa's vectors of distances."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        axes = {
            "t5": {"distances": config.relative_buckets, "heads": config.num_heads},
            "disentangled": {
                "distances": 2 * (config.relative_buckets or config.relative_max_distance),
                "embed": config.embed_dim,
            },
        }.get(config.relative_position)
        self.table = param(rngs, normal(config.init_std), **axes) if axes else None
        has_norm = config.relative_position == "disentangled" and config.relative_norm
        self.norm = Norm(config, rngs=rngs) if has_norm else None

    def __call__(self, length: int) -> PositionInputs:
        config = self.config
        if config.relative_position == "alibi":
            if is_spread():
                return PositionInputs(offset_bias=alibi_values(config.num_heads, length))
            return PositionInputs(bias=alibi_bias(config.num_heads, length))
        if config.relative_position == "t5":
            table, furthest = self.table[...], config.relative_max_distance
            if is_spread():
                return PositionInputs(offset_bias=t5_values(table, length, furthest))
            return PositionInputs(bias=t5_bias(table, length, furthest))
        if config.relative_position == "disentangled":
            return PositionInputs(distances=self.table[...] if self.norm is None else self.norm(self.table[...]))
        return PositionInputs()


class SelfAttention(nnx.Module):
    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        embed = {"embed": config.embed_dim}
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_kv_heads or config.num_heads, "head_dim": config.head_dim}
        options = {"std": config.init_std, "use_bias": config.biases.attention, "dtype": config.operands, "rngs": rngs}
        self.query = Linear(embed, heads, out_dtype=config.dtype, **options)
        self.key = Linear(embed, kv_heads, out_dtype=config.dtype, **options)
        self.value = Linear(embed, kv_heads, out_dtype=config.dtype, **options)
        self.out = Linear(heads, embed, **options)
        terms = config.disentangled_terms if config.relative_position == "disentangled" else ""
        is_own = not config.share_relative_projections
        self.position_key = Linear(embed, heads, **options) if is_own and "c2p" in terms else None
        self.position_query = Linear(embed, heads, **options) if is_own and "p2c" in terms else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        position: PositionInputs,
        window: Window | None,
        *,
        key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """`window` is an argument, not a setting of the layer, so that stacked layers can differ in it."""
        config = self.config
        attention_key, output_key = (None, None) if key is None else jax.random.split(key)
        query, keys, value, bias, scale = self._inputs(x, position, output_key)
        out = attention(
            query,
            keys,
            value,
            segment_ids=segment_ids,
            window=window,
            rope=position.rope,
            bias=bias,
            offset_bias=position.offset_bias,
            scale=scale,
            dropout_rate=config.attention_dropout_rate,
            dropout_key=attention_key,
            implementation=config.attention_implementation,
        )
        return dropout(self.out(out), config.dropout_rate, output_key)

    def weights(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        position: PositionInputs,
        window: Window | None,
    ) -> Float[Array, "B N T T"]:
        """By which each query [T] weighs the values of each key [T], without dropout (`attention_weights`)."""
        query, keys, _, bias, scale = self._inputs(x, position, None)
        options = {"segment_ids": segment_ids, "window": window, "rope": position.rope}
        return attention_weights(query, keys, bias=bias, offset_bias=position.offset_bias, scale=scale, **options)

    def projections(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """(queries, keys, values), before positions turn them."""
        query, keys, value = packed(x, self.query, self.key, self.value)
        return query, keys, value

    def _inputs(self, x, position: PositionInputs, key: Array | None):
        """(query, keys, values, bias, scale) of the attention op; `key` drops vectors of distances."""
        query, keys, value = self.projections(x)
        bias, scale = position.bias, self.config.attention_scale
        if position.distances is not None:
            bias, scale = self._disentangled(query, keys, position.distances, key)
        return query, keys, value, bias, scale

    def _disentangled(self, query, keys, distances, key) -> tuple[Float[Array, "B N T T"], float]:
        """The bias of both terms, and the scale that it and the contents' own product share."""
        config = self.config
        terms = config.disentangled_terms.split("+")
        scale = (config.head_dim * (1 + len(terms))) ** -0.5
        key = None if key is None else jax.random.fold_in(key, 1)
        distances = dropout(distances, config.dropout_rate, key)
        # Content meets position: c2p needs keys of positions, p2c queries of positions.
        position_key = (self.position_key or self.key)(distances) if "c2p" in terms else None
        position_query = (self.position_query or self.query)(distances) if "p2c" in terms else None
        rows = disentangled_buckets(-offsets(query.shape[1]), config.relative_buckets, config.relative_max_distance)
        return disentangled_bias(query, keys, position_key, position_query, rows, scale), scale
