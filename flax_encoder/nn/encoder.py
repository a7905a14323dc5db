"""The encoder stack."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_encoder.config import EncoderConfig
from flax_encoder.nn.attention import SelfAttention
from flax_encoder.nn.embedding import Embedding
from flax_encoder.nn.feed_forward import FeedForward
from flax_encoder.nn.normalization import Norm
from flax_encoder.nn.partition import constrain
from flax_encoder.ops.attention import Window
from flax_encoder.ops.position import RopeTables, rope_tables

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class EncoderLayer(nnx.Module):
    """Attention, then feed-forward, each in residual branches normalised before (pre) or after (post) the sum."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.is_pre_norm = config.norm_placement == "pre"
        self.attention_norm = Norm(config, rngs=rngs)
        self.attention = SelfAttention(config, rngs=rngs)
        self.feed_forward_norm = Norm(config, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        rope: RopeTables | None,
        window: Window | None,
        *,
        key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        attention_key, feed_forward_key = (None, None) if key is None else jax.random.split(key)
        if self.is_pre_norm:
            x = x + self.attention(self.attention_norm(x), segment_ids, rope, window, key=attention_key)
            x = x + self.feed_forward(self.feed_forward_norm(x), key=feed_forward_key)
        else:
            x = self.attention_norm(x + self.attention(x, segment_ids, rope, window, key=attention_key))
            x = self.feed_forward_norm(x + self.feed_forward(x, key=feed_forward_key))
        return constrain(x, "batch", "length", "features")


class Encoder(nnx.Module):
    """Packed rows of tokens to vectors, [B, T] -> [B, T, D], float32.

    Its only leaves are `nnx.Param`. The layers' parameters are stored stacked, with a leading axis named `layers`,
    whichever way they run.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        if config.vocab_size <= 0:
            raise ValueError("an Encoder needs its vocab_size: 0 (take the tokenizer's) is settled before this.")
        self.config = config
        self.embedding = Embedding(config, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def make_layers(rngs):
            return EncoderLayer(config, rngs=rngs)

        self.layers = make_layers(rngs)
        self.final_norm = Norm(config, rngs=rngs) if config.norm_placement == "pre" else None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        *,
        key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Encode rows.

        Args:
          segment_ids: each token's document in its row, from 1; 0 is padding. None is one document a row.
          positions: each token's place in its document, from 0; None counts along the row.
          key: for dropout; None is deterministic.
        """
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        config = self.config
        embedding_key, layers_key = (None, None) if key is None else jax.random.split(key)
        x = constrain(self.embedding(tokens, positions, key=embedding_key), "batch", "length", "features")

        rope = rope_tables(positions, config.head_dim, config.rope_theta) if config.position == "rope" else None
        graphdef, stacked = nnx.split(self.layers)

        def run_layer(x, xs):
            params, index, window = xs
            layer_key = None if layers_key is None else jax.random.fold_in(layers_key, index)
            return nnx.merge(graphdef, params)(x, segment_ids, rope, window, key=layer_key), None

        if config.remat != "none":
            run_layer = jax.checkpoint(
                run_layer, policy=REMAT_POLICIES[config.remat], prevent_cse=not config.scan_layers
            )
        windows = None
        if config.window is not None:
            reach = jnp.array([tokens.shape[1] if w is None else w for w in config.windows], jnp.int32)
            windows = (reach, reach)
        xs = (stacked, jnp.arange(config.num_layers), windows)
        if config.scan_layers:
            x, _ = jax.lax.scan(run_layer, x, xs)
        else:
            for i in range(config.num_layers):
                x, _ = run_layer(x, jax.tree.map(lambda a, i=i: a[i], xs))
        return x if self.final_norm is None else self.final_norm(x)
