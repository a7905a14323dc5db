"""A decoder behind an encoder: causal self-attention, attention to the encoder's output, and a cache to write with.

(Vaswani et al., arXiv 1706.03762, section 3; Raffel et al., arXiv 1910.10683.) Axes beside the usual: M length of the
memory, which is the encoder's output; S length of the cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_encoder.config import ConfigError, DecoderConfig, EncoderConfig, HeadConfig
from flax_encoder.nn.attention import SelfAttention
from flax_encoder.nn.cache import Cache
from flax_encoder.nn.embedding import places
from flax_encoder.nn.encoder import REMAT_POLICIES, Encoder, short_repr, unstack
from flax_encoder.nn.feed_forward import FeedForward
from flax_encoder.nn.heads import MaskedLMHead
from flax_encoder.nn.linear import packed
from flax_encoder.nn.normalization import Norm
from flax_encoder.nn.partition import constrain, normal, param
from flax_encoder.nn.recurrent_decoder import RecurrentDecoder, check_recurrent_decoder
from flax_encoder.ops.attention import Window, attention
from flax_encoder.ops.dropout import dropout
from flax_encoder.ops.mesh import is_spread
from flax_encoder.ops.relative import t5_bias, t5_bias_row, t5_values

KeysValues = tuple[Float[Array, "..."], Float[Array, "..."]]


class Sight(NamedTuple):
    """What the tokens at hand see of their own row, and of the memory."""

    segments: Int[Array, "B T"]
    key_segments: Int[Array, "B S"]
    memory_segments: Int[Array, "B M"]
    window: Window | None
    bias: Float[Array, "1 N T S"] | None
    offset_bias: Float[Array, "N P"] | None
    """The same by offset, on a mesh."""
    start: Int[Array, ""] | int
    """Where the tokens at hand go into the cache."""


def keys_values(layer: SelfAttention, x: Float[Array, "B T D"]) -> KeysValues:
    keys, values = packed(x, layer.key, layer.value)
    return keys.astype(layer.config.dtype), values.astype(layer.config.dtype)


def attend(layer: SelfAttention, x, own: KeysValues, sight: Sight, is_cross: bool, key) -> Float[Array, "B T D"]:
    config = layer.config
    attention_key, output_key = (None, None) if key is None else jax.random.split(key)
    out = attention(
        layer.query(x).astype(config.dtype),
        *own,
        segment_ids=sight.segments,
        key_segment_ids=sight.memory_segments if is_cross else sight.key_segments,
        window=None if is_cross else sight.window,
        bias=None if is_cross else sight.bias,
        offset_bias=None if is_cross else sight.offset_bias,
        scale=config.attention_scale,
        dropout_rate=config.attention_dropout_rate,
        dropout_key=attention_key,
        implementation=config.attention_implementation,
    )
    return dropout(layer.out(out), config.dropout_rate, output_key)


class DecoderLayer(nnx.Module):
    """Self-attention, attention to the memory, feed-forward, each in a residual branch, as in `EncoderLayer`."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.is_pre_norm = config.norm_placement == "pre"
        self.attention_norm = Norm(config, rngs=rngs)
        self.attention = SelfAttention(config, rngs=rngs)
        self.cross_attention_norm = Norm(config, rngs=rngs)
        self.cross_attention = SelfAttention(config, rngs=rngs)
        self.feed_forward_norm = Norm(config, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        memory: Float[Array, "B M D"] | KeysValues,
        sight: Sight,
        cache: KeysValues | None = None,
        *,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], KeysValues | None]:
        """(x, the cache with the tokens at hand in it); `memory` is the encoder's output, or its keys and values."""
        own_key, cross_key, feed_forward_key = (None,) * 3 if key is None else jax.random.split(key, 3)

        def self_attention(y):
            nonlocal cache
            own = keys_values(self.attention, y)
            if cache is not None:
                own = cache = tuple(
                    jax.lax.dynamic_update_slice_in_dim(old, new, sight.start, axis=1)
                    for old, new in zip(cache, own, strict=True)
                )
            return attend(self.attention, y, own, sight, False, own_key)

        def cross_attention(y):
            pair = memory if isinstance(memory, tuple) else keys_values(self.cross_attention, memory)
            return attend(self.cross_attention, y, pair, sight, True, cross_key)

        for norm, branch in (
            (self.attention_norm, self_attention),
            (self.cross_attention_norm, cross_attention),
            (self.feed_forward_norm, lambda y: self.feed_forward(y, key=feed_forward_key)),
        ):
            x = x + branch(norm(x)) if self.is_pre_norm else norm(x + branch(x))
        return constrain(x, "batch", "length", "features"), cache


def check_decoder(config: EncoderConfig) -> None:
    """The rules of a stack that has a decoder behind it, whose layers are of the encoder's kind.

    Raises:
      ConfigError: settings that make no decoder here.
    """
    (_check_attention_decoder if config.layer == "attention" else check_recurrent_decoder)(config)


def _check_attention_decoder(config: EncoderConfig) -> None:
    plain = {
        "layer": ("attention",), "position": ("none", "sinusoidal"), "relative_position": ("none", "t5"),
        "window": (None,), "num_layer_groups": (None,), "first_differs": (False,),
    }  # fmt: skip
    for name, served in plain.items():
        if getattr(config, name) not in served:
            raise ConfigError(
                f"a decoder needs model.{name} to be {' or '.join(map(str, served))}: got {getattr(config, name)}."
            )
    # A causal decoder has all buckets on one side, so that its far ones begin at twice an encoder's.
    if config.relative_position == "t5" and config.relative_max_distance <= config.relative_buckets // 2:
        raise ConfigError(
            f"a decoder's buckets need relative_max_distance above half of relative_buckets: got "
            f"{config.relative_max_distance} and {config.relative_buckets}."
        )


class Decoder(nnx.Module):
    """Embedded tokens and the encoder's output to vectors, [B, T, D], float32, by layers with attention.

    Raises:
      ConfigError: settings that make no decoder here.
    """

    def __init__(self, config: EncoderConfig, decoder: DecoderConfig, *, rngs: nnx.Rngs):
        _check_attention_decoder(config)
        self.config = config
        self.num_layers = decoder.num_layers or config.num_layers
        has_table = config.relative_position == "t5"
        axes = {"distances": config.relative_buckets, "heads": config.num_heads}
        self.relative = param(rngs, normal(config.init_std), **axes) if has_table else None

        @nnx.split_rngs(splits=self.num_layers)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def make_layers(rngs):
            return DecoderLayer(config, rngs=rngs)

        self.layers = make_layers(rngs)
        self.final_norm = Norm(config, rngs=rngs) if config.norm_placement == "pre" else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        memory: Float[Array, "B M D"],
        segment_ids: Int[Array, "B T"],
        memory_segment_ids: Int[Array, "B M"],
        *,
        key: Array | None = None,
        every_layer: bool = False,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "L1 B T D"] | None]:
        """All tokens at once, each seeing its document's tokens before it, and that document in the memory.

        Returns (hidden, states): with `every_layer` the embeddings and what each layer leaves, as in `Encoder`.
        """
        length, bias, offset_bias = x.shape[1], None, None
        if self.relative is not None:
            of = self.relative[...], length, self.config.relative_max_distance
            bias, offset_bias = (None, t5_values(*of, True)) if is_spread() else (t5_bias(*of, True), None)
        sight = Sight(segment_ids, segment_ids, memory_segment_ids, (length, 0), bias, offset_bias, 0)
        x, _, states = self._run(x, memory, sight, None, key=key, every_layer=every_layer)
        return x, states

    def start(self, memory: Float[Array, "B M D"], memory_segment_ids: Int[Array, "B M"], length: int) -> Cache:
        """An empty cache for `length` tokens, with the memory's keys and values made once."""
        config = self.config
        graphdef, params = nnx.split(self.layers)
        of_memory = jax.lax.map(lambda own: keys_values(nnx.merge(graphdef, own).cross_attention, memory), params)
        kv_heads = config.num_kv_heads or config.num_heads
        empty = jnp.zeros((self.num_layers, memory.shape[0], length, kv_heads, config.head_dim), config.dtype)
        return Cache((empty, empty), of_memory, memory_segment_ids, jnp.zeros((), jnp.int32))

    def step(self, x: Float[Array, "B 1 D"], cache: Cache) -> tuple[Float[Array, "B 1 D"], Cache]:
        """The next token, and the cache with it."""
        B, length = x.shape[0], cache.own[0].shape[2]
        visible = jnp.broadcast_to((jnp.arange(length) <= cache.length).astype(jnp.int32), (B, length))
        bias = None
        if self.relative is not None:
            bias = t5_bias_row(self.relative[...], length, self.config.relative_max_distance, cache.length)
        sight = Sight(jnp.ones((B, 1), jnp.int32), visible, cache.memory_segments, None, bias, None, cache.length)
        x, own, _ = self._run(x, cache.memory, sight, cache.own)
        return x, cache._replace(own=own, length=cache.length + 1)

    def _run(self, x, memory, sight: Sight, cache: KeysValues | None, *, key=None, every_layer: bool = False):
        config = self.config
        graphdef, params = nnx.split(self.layers)
        is_cached = cache is not None

        def run_layer(x, xs):
            own, index, own_cache, own_memory = xs
            layer_key = None if key is None else jax.random.fold_in(key, index)
            layer = nnx.merge(graphdef, own)
            y, own_cache = layer(x, own_memory if is_cached else memory, sight, own_cache, key=layer_key)
            return y, (own_cache, y if every_layer else None)

        if policy := REMAT_POLICIES.get(config.remat):
            run_layer = jax.checkpoint(run_layer, policy=policy, prevent_cse=not config.scan_layers)
        start, xs = x, (params, jnp.arange(self.num_layers), cache, memory if is_cached else None)
        if config.scan_layers:
            x, (cache, states) = jax.lax.scan(run_layer, x, xs)
        else:
            each = []
            for i, own in enumerate(unstack(params)):
                x, ys = run_layer(x, (own, i, *jax.tree.map(lambda a, i=i: a[i], xs[2:])))
                each.append(ys)
            cache, states = jax.tree.map(lambda *a: jnp.stack(a), *each)
        x = x if self.final_norm is None else self.final_norm(x)
        if every_layer:
            states = jnp.concatenate([start[None], states]).at[-1].set(x)
        return x, cache, states


class EncoderDecoder(nnx.Module):
    """Rows of source tokens and of target tokens to logits of each target's next token; one token embedding for all."""

    __repr__ = short_repr

    def __init__(self, config: EncoderConfig, decoder: DecoderConfig | None = None, *, rngs: nnx.Rngs):
        decoder = decoder or DecoderConfig()
        self.logit_scale = decoder.logit_scale
        self.encoder = Encoder(config, rngs=rngs)
        make_decoder = Decoder if config.layer == "attention" else RecurrentDecoder
        self.decoder = make_decoder(config, decoder, rngs=rngs)
        self.head = MaskedLMHead(config, HeadConfig(transform=False, out_bias=False, tied=decoder.tied), rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B M"],
        target_tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B M"] | None = None,
        target_segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B M"] | None = None,
        target_positions: Int[Array, "B T"] | None = None,
        *,
        key: Array | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits. Segments and positions as in `Encoder`; a target's segment reads the source's of the same number."""
        rows = (tokens, target_tokens, segment_ids, target_segment_ids, positions, target_positions)
        return self.logits(self.decode(*rows, key=key))

    def decode(
        self, tokens, target_tokens, segment_ids=None, target_segment_ids=None, positions=None, target_positions=None,
        *, key: Array | None = None,
    ) -> Float[Array, "B T D"]:  # fmt: skip
        """The vectors that the logits are made of, before they are scaled; arguments as in `__call__`."""
        encoder_key, embedding_key, decoder_key = (None,) * 3 if key is None else jax.random.split(key, 3)
        segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        target_segment_ids = jnp.ones_like(target_tokens) if target_segment_ids is None else target_segment_ids
        memory = self.encoder(tokens, segment_ids, positions, key=encoder_key)
        x = self.embed(target_tokens, target_positions, key=embedding_key)
        return self.decoder(x, memory, target_segment_ids, segment_ids, key=decoder_key)[0]

    def embed(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None, *, key: Array | None = None
    ) -> Float[Array, "B T D"]:
        if positions is None:
            positions = places(tokens, self.encoder.config)
        return self.encoder.embedding(tokens, positions, key=key)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return self.head(self.scaled(hidden), self.encoder.embedding.token[...])

    def scaled(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return hidden if self.logit_scale == 1.0 else self.logit_scale * hidden

    def start(self, tokens: Int[Array, "B M"], segment_ids: Int[Array, "B M"], length: int) -> Cache:
        """Read the source, each row one document with padding on either side, and make room for `length` tokens."""
        positions = jnp.maximum(jnp.cumsum(segment_ids > 0, axis=1) - 1, 0)
        return self.decoder.start(self.encoder(tokens, segment_ids, positions), segment_ids, length)

    def step(self, tokens: Int[Array, "B"], cache: Cache) -> tuple[Float[Array, "B V"], Cache]:
        """Logits of what follows these tokens, each row's next, and the cache with them."""
        positions = jnp.broadcast_to(cache.length, (tokens.shape[0], 1))
        hidden, cache = self.decoder.step(self.embed(tokens[:, None], positions), cache)
        return self.logits(hidden)[:, 0], cache
