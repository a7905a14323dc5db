"""A decoder behind an encoder: causal self-attention, attention to the encoder's output, and a cache to write with.

(Vaswani et al., arXiv 1706.03762, section 3; Raffel et al., arXiv 1910.10683.) Axes beside the usual: M length of the
memory, which is the encoder's output; S places of the cache, W texts that are written of a source.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flax_encoder.config import ConfigError, DecoderConfig, EncoderConfig, HeadConfig
from flax_encoder.nn.attention import SelfAttention
from flax_encoder.nn.cache import Cache, Memory
from flax_encoder.nn.embedding import places
from flax_encoder.nn.encoder import REMAT_POLICIES, Encoder, short_repr, unstack
from flax_encoder.nn.feed_forward import FeedForward
from flax_encoder.nn.heads import MaskedLMHead
from flax_encoder.nn.linear import packed
from flax_encoder.nn.normalization import Norm
from flax_encoder.nn.partition import constrain, normal, param
from flax_encoder.nn.recurrent_decoder import RecurrentDecoder, check_recurrent_decoder
from flax_encoder.ops.attention import Window, attention
from flax_encoder.ops.attention.cached import attend_to_cache, kept
from flax_encoder.ops.dropout import dropout
from flax_encoder.ops.mesh import is_spread
from flax_encoder.ops.relative import t5_bias, t5_bias_rows, t5_values

KeysValues = tuple[Float[Array, "..."], Float[Array, "..."]]


class Sight(NamedTuple):
    """What the tokens of a row see of it, and of the memory."""

    segments: Int[Array, "B T"]
    memory_segments: Int[Array, "B M"]
    window: Window
    bias: Float[Array, "1 N T T"] | None
    offset_bias: Float[Array, "N P"] | None
    """The same by offset, on a mesh."""


class Place(NamedTuple):
    """Where the next token of each text goes, and what it sees; S places, W texts of a source."""

    length: Int[Array, "B"]
    is_visible: Bool[Array, "B W Z"]
    """Of the Z = W S tokens that a source's texts wrote."""
    memory_is_visible: Bool[Array, "B 1 M"]
    bias: Float[Array, "B N Z"] | None


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
        key_segment_ids=sight.memory_segments if is_cross else None,
        window=None if is_cross else sight.window,
        bias=None if is_cross else sight.bias,
        offset_bias=None if is_cross else sight.offset_bias,
        scale=config.attention_scale,
        dropout_rate=config.attention_dropout_rate,
        dropout_key=attention_key,
        implementation=config.attention_implementation,
    )
    return dropout(layer.out(out), config.dropout_rate, output_key)


def kept_by_head(x: Float[Array, "B S K H"], config: EncoderConfig) -> Float[Array, "B K S H"]:
    return kept(x, config.dtype).swapaxes(1, 2)


def put(cache: Float[Array, "B K W S H"], new: Float[Array, "B K W 1 H"], at: Int[Array, "B"]):
    """The cache with a token more of each text, at each source's own place."""
    return jax.vmap(lambda old, one, i: jax.lax.dynamic_update_slice_in_dim(old, one, i, axis=2))(cache, new, at)


def attend_kept(layer: SelfAttention, x: Float[Array, "B W D"], key, value, is_visible, bias=None):
    config = layer.config
    query = layer.query(x).astype(config.dtype)
    out = attend_to_cache(query, key, value, is_visible, bias, scale=config.attention_scale or config.head_dim**-0.5)
    return layer.out(out.astype(config.dtype))


class DecoderLayer(nnx.Module):
    """Self-attention, attention to the memory, feed-forward, each in a residual branch, as in `EncoderLayer`."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.is_pre_norm = config.norm_placement == "pre"
        self.attention_norm = Norm(config, rngs=rngs)
        self.attention = SelfAttention(config, rngs=rngs)
        self.cross_attention_norm = Norm(config, rngs=rngs)
        self.cross_attention = SelfAttention(config, rngs=rngs)
        self.feed_forward_norm = Norm(config, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], memory: Float[Array, "B M D"], sight: Sight, *, key: Array | None = None
    ) -> Float[Array, "B T D"]:
        """All tokens of rows at once."""
        own_key, cross_key, feed_forward_key = (None,) * 3 if key is None else jax.random.split(key, 3)

        def self_attention(y):
            return attend(self.attention, y, keys_values(self.attention, y), sight, False, own_key)

        def cross_attention(y):
            pair = keys_values(self.cross_attention, memory)
            return attend(self.cross_attention, y, pair, sight, True, cross_key)

        x = self._branches(x, self_attention, cross_attention, feed_forward_key)
        return constrain(x, "batch", "tokens", "features")

    def write(
        self, x: Float[Array, "B W D"], memory: KeysValues, place: Place, cache: KeysValues
    ) -> tuple[Float[Array, "B W D"], KeysValues]:
        """The next token of each text, by the memory's keys and values [B, K, M, H] and those of the tokens before,
        [B, K, W, S, H]: (x, the cache with the tokens at hand in it)."""

        def self_attention(y):
            nonlocal cache
            new = (kept_by_head(pair, self.config)[:, :, :, None] for pair in keys_values(self.attention, y))
            cache = tuple(put(old, one, place.length) for old, one in zip(cache, new, strict=True))
            flat = (a.reshape(*a.shape[:2], -1, a.shape[-1]) for a in cache)
            return attend_kept(self.attention, y, *flat, place.is_visible, place.bias)

        def cross_attention(y):
            return attend_kept(self.cross_attention, y, *memory, place.memory_is_visible)

        return self._branches(x, self_attention, cross_attention, None), cache

    def _branches(self, x, self_attention, cross_attention, key):
        for norm, branch in (
            (self.attention_norm, self_attention),
            (self.cross_attention_norm, cross_attention),
            (self.feed_forward_norm, lambda y: self.feed_forward(y, key=key)),
        ):
            x = x + branch(norm(x)) if self.is_pre_norm else norm(x + branch(x))
        return x


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
        sight = Sight(segment_ids, memory_segment_ids, (length, 0), bias, offset_bias)
        return self._run(x, memory, sight, key, every_layer)

    def read(self, memory: Float[Array, "R M D"], segments: Int[Array, "R M"]) -> Memory:
        """What every token to come needs of the encoder's output: each layer's keys and values of it."""
        config = self.config

        def keys_values_of(layer: DecoderLayer) -> KeysValues:
            return tuple(kept_by_head(x, config) for x in keys_values(layer.cross_attention, memory))

        return Memory(tuple(map(keys_values_of, self._each_layer())), segments)

    def start(self, memory: Memory, length: int, num_texts: int = 1) -> Cache:
        """An empty cache for so many texts of each source, and so many tokens of each."""
        config, B = self.config, memory.segments.shape[0]
        shape = (B, config.num_kv_heads or config.num_heads, num_texts, length, config.head_dim)
        own = tuple((kept(jnp.zeros(shape), config.dtype),) * 2 for _ in range(self.num_layers))
        origin = jnp.zeros((B, num_texts, length), jnp.int32) if num_texts > 1 else None
        return Cache(own, memory, jnp.zeros(B, jnp.int32), origin)

    def begin(self, cache: Cache, memory: Memory, which: Bool[Array, "B"]) -> Cache:
        """The cache with other sources; the texts of those marked begin anew."""
        return cache._replace(memory=memory, length=jnp.where(which, 0, cache.length))

    def follow(self, cache: Cache, texts: Int[Array, "B W"]) -> Cache:
        """The cache of texts that go on from those of these numbers, each of its own source."""
        assert cache.origin is not None
        return cache._replace(origin=jnp.take_along_axis(cache.origin, texts[..., None], axis=1))

    def step(self, x: Float[Array, "B W D"], cache: Cache) -> tuple[Float[Array, "B W D"], Cache]:
        """The next token of each text, and the cache with it."""
        (B, W, _), S = x.shape, cache.own[0][0].shape[3]
        place, written, bias, origin = cache.length[:, None, None], jnp.arange(S), None, cache.origin
        is_visible = jnp.broadcast_to(written <= place, (B, W, S))
        if origin is not None:
            origin = jnp.where(written == place, jnp.arange(W)[:, None], origin)
            # [B, own W, W, S]: a text sees what it wrote itself, and what those wrote that it goes on from.
            is_visible = is_visible[:, :, None] & (origin[:, :, None] == jnp.arange(W)[:, None])
        if self.relative is not None:
            of = self.relative[...], S, self.config.relative_max_distance
            bias = jnp.tile(t5_bias_rows(*of, cache.length), (1, 1, W))
        memory_is_visible = (cache.memory.segments > 0)[:, None]
        at = Place(cache.length, is_visible.reshape(B, W, W * S), memory_is_visible, bias)
        own = []
        for layer, of_memory, of_own in zip(self._each_layer(), cache.memory.of_layers, cache.own, strict=True):
            x, of_own = layer.write(x, of_memory, at, of_own)
            own.append(of_own)
        x = x if self.final_norm is None else self.final_norm(x)
        return x, cache._replace(own=tuple(own), length=cache.length + 1, origin=origin)

    def _each_layer(self) -> list[DecoderLayer]:
        graphdef, params = nnx.split(self.layers)
        return [nnx.merge(graphdef, own) for own in unstack(params)]

    def _run(self, x, memory, sight: Sight, key: Array | None, every_layer: bool):
        config = self.config
        graphdef, params = nnx.split(self.layers)

        def run_layer(x, xs):
            own, index = xs
            layer_key = None if key is None else jax.random.fold_in(key, index)
            y = nnx.merge(graphdef, own)(x, memory, sight, key=layer_key)
            return y, y if every_layer else None

        if policy := REMAT_POLICIES.get(config.remat):
            run_layer = jax.checkpoint(run_layer, policy=policy, prevent_cse=not config.scan_layers)
        start = x
        if config.scan_layers:
            x, states = jax.lax.scan(run_layer, x, (params, jnp.arange(self.num_layers)))
        else:
            each = []
            for i, own in enumerate(unstack(params)):
                x, y = run_layer(x, (own, i))
                each.append(y)
            states = jnp.stack(each) if every_layer else None
        x = constrain(x if self.final_norm is None else self.final_norm(x), "batch", "length", "features")
        if every_layer:
            states = jnp.concatenate([start[None], states]).at[-1].set(x)
        return x, states


class EncoderDecoder(nnx.Module):
    """Turns rows of source tokens and of target tokens into logits of each target's next token; source, target and, if
    tied, logits have one token embedding."""

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

    def read(self, tokens: Int[Array, "R M"], segment_ids: Int[Array, "R M"]) -> Memory:
        """The memory that the decoder attends to, of sources with one document per row and padding on either side."""
        positions = jnp.maximum(jnp.cumsum(segment_ids > 0, axis=1) - 1, 0)
        return self.decoder.read(self.encoder(tokens, segment_ids, positions), segment_ids)

    def step(self, tokens: Int[Array, "B W"], cache: Cache) -> tuple[Float[Array, "B W V"], Cache]:
        """(logits of the token after these, the cache with these added). The tokens are the newest ones of the W texts
        that are written for each of B sources."""
        positions = jnp.broadcast_to(cache.length[:, None], tokens.shape)
        hidden, cache = self.decoder.step(self.embed(tokens, positions), cache)
        return self.logits(hidden), cache
