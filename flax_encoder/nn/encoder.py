"""The encoder stack."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_encoder.config import EncoderConfig
from flax_encoder.nn.attention import PositionInputs, RelativePosition, SelfAttention
from flax_encoder.nn.convolution import Convolution
from flax_encoder.nn.embedding import Embedding
from flax_encoder.nn.feed_forward import FeedForward
from flax_encoder.nn.normalization import Norm
from flax_encoder.nn.partition import constrain
from flax_encoder.nn.recurrent import RecurrentLayer
from flax_encoder.ops.attention import Window
from flax_encoder.ops.position import rope_tables

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class EncoderLayer(nnx.Module):
    """Attention, then feed-forward, each in residual branches normalised before (pre) or after (post) the sum.

    `is_first` is layer 0 where that has parts of its own (`EncoderConfig.first_differs`).
    """

    def __init__(self, config: EncoderConfig, is_first: bool = False, *, rngs: nnx.Rngs):
        self.is_pre_norm = config.norm_placement == "pre"
        has_norm = config.first_attention_norm or not is_first
        self.attention_norm = Norm(config, rngs=rngs) if has_norm else None
        self.attention = SelfAttention(config, rngs=rngs)
        self.feed_forward_norm = Norm(config, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)
        self.convolution = Convolution(config, rngs=rngs) if is_first and config.conv_width else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        position: PositionInputs,
        window: Window | None,
        *,
        key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        attention_key, feed_forward_key = (None, None) if key is None else jax.random.split(key)
        before = x
        if self.is_pre_norm:
            normed = x if self.attention_norm is None else self.attention_norm(x)
            x = x + self.attention(normed, segment_ids, position, window, key=attention_key)
            x = x + self.feed_forward(self.feed_forward_norm(x), key=feed_forward_key)
        else:
            x = self.attention_norm(x + self.attention(x, segment_ids, position, window, key=attention_key))
            x = self.feed_forward_norm(x + self.feed_forward(x, key=feed_forward_key))
        if self.convolution is not None:
            x = self.convolution(before, x, segment_ids, key=None if key is None else jax.random.fold_in(key, 2))
        return constrain(x, "batch", "length", "features")


class Encoder(nnx.Module):
    """Packed rows of tokens to vectors, [B, T] -> [B, T, D], float32.

    Its only leaves are `nnx.Param`. The layers' parameters are stored stacked, with a leading axis named `layers`,
    whichever way they run; a first layer that differs from the rest is a stack of one, `first`.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        if config.vocab_size <= 0:
            raise ValueError("an Encoder needs its vocab_size: 0 (take the tokenizer's) is settled before this.")
        self.config = config
        self.embedding = Embedding(config, rngs=rngs)
        self.relative = RelativePosition(config, rngs=rngs) if config.relative_position != "none" else None

        make_layer = EncoderLayer if config.layer == "attention" else RecurrentLayer

        def make_layers(count, is_first):
            @nnx.split_rngs(splits=count)
            @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
            def make(rngs):
                return make_layer(config, is_first, rngs=rngs)

            return make(rngs)

        self.first = make_layers(1, True) if config.first_differs else None
        rest = (config.num_layer_groups or config.num_layers) - config.first_differs
        self.layers = make_layers(rest, False) if rest else None
        self.final_norm = Norm(config, rngs=rngs) if config.norm_placement == "pre" else None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
        *,
        key: Array | None = None,
        every_layer: bool = False,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], Float[Array, "L1 B T D"]]:
        """Encode rows.

        Args:
          segment_ids: each token's document in its row, from 1; 0 is padding. None is one document a row.
          positions: each token's place in its document, from 0; None counts along the row.
          token_types: each token's type; None is 0.
          key: for dropout; None is deterministic.
          every_layer: return (hidden, states) with the embeddings, unless recurrent layers are wider than those, and
            what each layer leaves; the last is `hidden`, after the final norm of a pre-norm stack.
        """
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        config = self.config
        embedding_key, layers_key = (None, None) if key is None else jax.random.split(key)
        x = self.embedding(tokens, positions, token_types, key=embedding_key)
        x = constrain(x, "batch", "length", "features")

        position = PositionInputs() if self.relative is None else self.relative(tokens.shape[1])
        is_local = None  # a scanned layer learns here which of two rotations is its own
        if config.position == "rope":
            rope = rope_tables(positions, config.head_dim, config.rope_theta)
            if config.local_rope_theta is not None:
                local_rope = rope_tables(positions, config.head_dim, config.local_rope_theta)
                is_local = jnp.array([w is not None for w in config.windows])
            position = position._replace(rope=rope)
        windows = None
        if config.window is not None:
            reach = jnp.array([tokens.shape[1] if w is None else w for w in config.windows], jnp.int32)
            windows = (reach, reach)

        def run_stack(x, stack, start, stop):
            graphdef, params = nnx.split(stack)
            runs = (stop - start) // jax.tree.leaves(params)[0].shape[0]  # of each set of parameters

            def run_layer(x, xs):
                own, (index, window, is_local) = xs
                if runs > 1:
                    own = jax.tree.map(lambda a: a[0] if a.shape[0] == 1 else a[(index - start) // runs], params)
                layer_key = None if layers_key is None else jax.random.fold_in(layers_key, index)
                own_position = position
                if is_local is not None:
                    own_position = position._replace(
                        rope=jax.tree.map(functools.partial(jnp.where, is_local), local_rope, rope)
                    )
                y = nnx.merge(graphdef, own)(x, segment_ids, own_position, window, key=layer_key)
                return y, y if every_layer else None

            if config.remat != "none":
                run_layer = jax.checkpoint(
                    run_layer, policy=REMAT_POLICIES[config.remat], prevent_cse=not config.scan_layers
                )
            each = jax.tree.map(lambda a: a[start:stop], (jnp.arange(config.num_layers), windows, is_local))
            xs = (params if runs == 1 else None, each)
            if config.scan_layers and x.shape[-1] == config.embed_dim:
                return jax.lax.scan(run_layer, x, xs)
            states = []
            for i in range(stop - start):
                x, y = run_layer(x, jax.tree.map(lambda a, i=i: a[i], xs))
                states.append(y)
            return x, jnp.stack(states) if every_layer else None

        states = [x[None]] if x.shape[-1] == config.embed_dim else []
        for stack, start, stop in ((self.first, 0, 1), (self.layers, int(config.first_differs), config.num_layers)):
            if stack is not None:
                x, own_states = run_stack(x, stack, start, stop)
                states.append(own_states)
        hidden = x if self.final_norm is None else self.final_norm(x)
        if not every_layer:
            return hidden
        states = jnp.concatenate(states)
        return hidden, states.at[-1].set(hidden)
