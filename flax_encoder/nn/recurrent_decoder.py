"""A recurrent decoder, which attends to the encoder's states by an additive score at every token.

(Bahdanau, Cho and Bengio, arXiv 1409.0473.) Axes beside the usual: M length of the memory, which is the encoder's
output; A width of the score; L layers of C = D cells; G gates.
"""


import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flax_encoder.config import ConfigError, DecoderConfig, EncoderConfig
from flax_encoder.nn.cache import Cache, Memory
from flax_encoder.nn.encoder import REMAT_POLICIES, unstack
from flax_encoder.nn.feed_forward import ACTIVATIONS
from flax_encoder.nn.linear import Linear
from flax_encoder.nn.normalization import Norm
from flax_encoder.nn.partition import constrain, normal, param
from flax_encoder.nn.recurrent import CELLS, Recurrence
from flax_encoder.ops.dropout import dropout
from flax_encoder.ops.linear import linear

States = tuple[Float[Array, "L B C"], ...]
"""What goes from token to token, as the cell has it; the first is what it puts out."""


class AdditiveAttention(nnx.Module):
    """Weights of the memory by v . tanh(W s + U m), and the memory's mean by them."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        D, options = config.embed_dim, {"std": config.init_std, "dtype": config.dtype}
        self.query = Linear({"embed": D}, {"features": D}, use_bias=False, **options, rngs=rngs)
        self.key = Linear({"embed": D}, {"features": D}, use_bias=config.use_bias, **options, rngs=rngs)
        self.score = param(rngs, normal(config.init_std), features=D)

    def __call__(
        self, state: Float[Array, "B C"], keys: Float[Array, "B M A"], memory: Float[Array, "B M D"],
        is_visible: Bool[Array, "B M"],
    ) -> Float[Array, "B D"]:  # fmt: skip
        """`keys` is U m, made once; a state that sees nothing gets zeros."""
        # The tanh of all pairs is made again in the backward pass: it is A times as large as the weights.
        score = jax.checkpoint(lambda query, keys, v: (jnp.tanh(query[:, None] + keys) * v).sum(-1))
        scores = jnp.where(is_visible, score(self.query(state), keys, self.score[...]), -jnp.inf)
        top = jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - jax.lax.stop_gradient(top))
        weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        return jnp.einsum("BM,BMD->BD", weights, memory)


class RecurrentDecoderLayer(nnx.Module):
    """The parameters of one layer: products with its input, with its state before, and of the first with what is
    attended to."""

    def __init__(self, config: EncoderConfig, is_first: bool, *, rngs: nnx.Rngs):
        D, gates = config.embed_dim, CELLS[config.layer].num_gates
        options = {"std": config.init_std, "dtype": config.dtype}
        axes = {"gates": gates, "cells": D}
        self.input = Linear({"embed": D}, axes, use_bias=config.use_bias, **options, rngs=rngs)
        self.recurrence = Recurrence(1, D, gates, use_bias=config.use_bias, rngs=rngs)
        self.context = Linear({"embed": D}, axes, use_bias=False, **options, rngs=rngs) if is_first else None


def check_recurrent_decoder(config: EncoderConfig) -> None:
    """The rules of a stack of recurrent layers that has a decoder behind it.

    Raises:
      ConfigError: settings that make no decoder here.
    """
    served = {
        "position": ("none", "sinusoidal"), "num_layer_groups": (None,), "embedding_dim": (None, config.embed_dim),
    }  # fmt: skip
    for name, values in served.items():
        if getattr(config, name) not in values:
            raise ConfigError(
                f"a decoder of {config.layer} layers needs model.{name} to be {' or '.join(map(str, values))}: got "
                f"{getattr(config, name)}."
            )


class RecurrentDecoder(nnx.Module):
    """Embedded tokens and the encoder's output to vectors, [B, T, D], float32; layers of `config.layer`, in one
    direction.

    The first layer reads a token's embedding and what its state before attends to; those above read the layer below.
    A target starts from a projection of its source's mean state (Sennrich et al., arXiv 1703.04357); of an LSTM the
    cell starts from zeros. What logits are made of is the larger of two linear maps of the top state, the attended
    memory and the embedding, feature by feature (the paper's maxout, of the state at hand, as in its equation 4).

    Raises:
      ConfigError: settings that make no decoder here.
    """

    def __init__(self, config: EncoderConfig, decoder: DecoderConfig, *, rngs: nnx.Rngs):
        check_recurrent_decoder(config)
        self.config = config
        self.num_layers = decoder.num_layers or config.num_layers
        D, options = config.embed_dim, {"std": config.init_std, "dtype": config.dtype, "use_bias": config.use_bias}
        self.attention = AdditiveAttention(config, rngs=rngs)
        self.start_state = Linear({"embed": D}, {"layers": self.num_layers, "cells": D}, **options, rngs=rngs)
        self.first = RecurrentDecoderLayer(config, True, rngs=rngs)

        @nnx.split_rngs(splits=max(1, self.num_layers - 1))
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def make_layers(rngs):
            return RecurrentDecoderLayer(config, False, rngs=rngs)

        self.layers = make_layers(rngs) if self.num_layers > 1 else None
        self.out = Linear({"embed": 3 * D}, {"features": D, "width": 2}, **options, rngs=rngs)
        self.final_norm = Norm(config, rngs=rngs) if config.norm_placement == "pre" else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        memory: Float[Array, "B M D"],
        segment_ids: Int[Array, "B T"],
        memory_segment_ids: Int[Array, "B M"],
        *,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], None]:
        """All tokens, one after the other, each seeing its document's tokens before it, and that document in the
        memory; as `Decoder`, without the states of each layer."""
        before = jnp.pad(segment_ids, [(0, 0), (1, 0)])[:, :-1]
        keep = (segment_ids == before) & (segment_ids > 0)
        is_visible = (segment_ids[..., None] == memory_segment_ids[:, None]) & (segment_ids[..., None] > 0)
        starts = rearrange(self._start(memory, is_visible), "B T L C -> T L B C")
        keys, layers = self.attention.key(memory), self._layers()
        inputs = rearrange(self.first.input(x), "B T G C -> T B G C")

        def step(states, xs):
            own_inputs, start, own_keep, sight = xs
            begin = (start, *(jnp.zeros_like(start) for _ in states[1:]))
            states = tuple(jnp.where(own_keep[:, None], s, b) for s, b in zip(states, begin, strict=True))
            states, context = self._advance(layers, states, own_inputs, keys, memory, sight)
            return states, (states[0][-1], context)

        if policy := REMAT_POLICIES.get(self.config.remat):
            step = jax.checkpoint(step, policy=policy)
        zeros = tuple(jnp.zeros(starts.shape[1:]) for _ in range(CELLS[self.config.layer].num_states))
        _, (top, contexts) = jax.lax.scan(step, zeros, (inputs, starts, keep.T, is_visible.swapaxes(0, 1)))
        out = self._read(top.swapaxes(0, 1), contexts.swapaxes(0, 1), x)
        out = dropout(out, self.config.dropout_rate, key)
        return constrain(out, "batch", "length", "features"), None

    def read(self, memory: Float[Array, "R M D"], segments: Int[Array, "R M"]) -> Memory:
        """What every token to come needs of the encoder's output: its keys, itself, and the states to start from."""
        starts = self._start(memory, (segments > 0)[:, None])[:, 0]
        return Memory((self.attention.key(memory), memory, starts), segments)

    def start(self, memory: Memory, length: int, num_texts: int = 1) -> Cache:
        """The states before the first token of so many texts of each source; any number of tokens may follow."""
        B = memory.segments.shape[0]
        return Cache(self._first(memory, num_texts), memory, jnp.zeros(B, jnp.int32))

    def _first(self, memory: Memory, num_texts: int) -> tuple[Float[Array, "B W L C"], ...]:
        starts = jnp.repeat(memory.of_layers[2][:, None], num_texts, axis=1)
        return (starts, *(jnp.zeros_like(starts) for _ in range(CELLS[self.config.layer].num_states - 1)))

    def begin(self, cache: Cache, memory: Memory, which: Bool[Array, "B"]) -> Cache:
        """The cache with other sources; the texts of those marked begin anew."""
        first, chosen = self._first(memory, cache.own[0].shape[1]), which[:, None, None, None]
        own = tuple(jnp.where(chosen, new, old) for new, old in zip(first, cache.own, strict=True))
        return Cache(own, memory, jnp.where(which, 0, cache.length))

    def follow(self, cache: Cache, texts: Int[Array, "B W"]) -> Cache:
        """The cache of texts that go on from those of these numbers, each of its own source."""
        own = tuple(jnp.take_along_axis(a, texts[..., None, None], axis=1) for a in cache.own)
        return cache._replace(own=own)

    def step(self, x: Float[Array, "B W D"], cache: Cache) -> tuple[Float[Array, "B W D"], Cache]:
        """The next token of each text, and the cache with it."""
        B, W = x.shape[:2]
        keys, memory, sight = (
            jnp.repeat(a, W, axis=0) for a in (*cache.memory.of_layers[:2], cache.memory.segments > 0)
        )
        rows = x.reshape(B * W, 1, -1)
        states = tuple(rearrange(a, "B W L C -> L (B W) C") for a in cache.own)
        states, context = self._advance(self._layers(), states, self.first.input(rows)[:, 0], keys, memory, sight)
        out = self._read(states[0][-1][:, None], context[:, None], rows)
        own = tuple(rearrange(a, "L (B W) C -> B W L C", W=W) for a in states)
        return out.reshape(x.shape), cache._replace(own=own, length=cache.length + 1)

    def _layers(self) -> list[RecurrentDecoderLayer]:
        """All layers, the first first."""
        if self.layers is None:
            return [self.first]
        graphdef, params = nnx.split(self.layers)
        return [self.first, *(nnx.merge(graphdef, own) for own in unstack(params))]

    def _start(
        self, memory: Float[Array, "B M D"], is_visible: Bool[Array, "B T M"]
    ) -> Float[Array, "B T L C"]:
        seen = is_visible.astype(jnp.float32)
        mean = jnp.einsum("BTM,BMD->BTD", seen, memory) / jnp.maximum(seen.sum(-1, keepdims=True), 1.0)
        return jnp.tanh(self.start_state(mean))

    def _advance(
        self, layers: list[RecurrentDecoderLayer], states: States, inputs: Float[Array, "B G C"], keys, memory,
        is_visible: Bool[Array, "B M"],
    ) -> tuple[States, Float[Array, "B D"]]:  # fmt: skip
        """One token: (the states after it, what was attended to). `inputs` is the first layer's product with it."""
        config, cell = self.config, CELLS[self.config.layer]
        context = self.attention(states[0][0], keys, memory, is_visible)
        inputs, after = inputs + self.first.context(context), []
        for number, layer in enumerate(layers):
            own = tuple(s[number][None] for s in states)
            kernel, bias = layer.recurrence.kernel[...][0], layer.recurrence.bias
            products = linear(own[0][0], kernel, None if bias is None else bias[...][0], dtype=config.dtype)
            own = cell.step(own, inputs[None], products[None], ACTIVATIONS[config.activation])
            after.append(own)
            if number + 1 < len(layers):
                inputs = layers[number + 1].input(own[0][0])
        return tuple(jnp.concatenate(each) for each in zip(*after, strict=True)), context

    def _read(self, state: Float[Array, "B T C"], context, x) -> Float[Array, "B T D"]:
        out = self.out(jnp.concatenate([state, context, x], axis=-1)).max(-1)
        return out if self.final_norm is None else self.final_norm(out)
