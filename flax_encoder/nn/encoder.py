"""The encoder stack."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_encoder.config import EncoderConfig
from flax_encoder.config.rules import counted
from flax_encoder.nn.attention import PositionInputs, RelativePosition, SelfAttention
from flax_encoder.nn.convolution import Convolution
from flax_encoder.nn.embedding import Embedding, places
from flax_encoder.nn.feed_forward import FeedForward
from flax_encoder.nn.normalization import Norm
from flax_encoder.nn.partition import constrain
from flax_encoder.nn.recurrent import RecurrentLayer
from flax_encoder.ops.attention import Window
from flax_encoder.ops.position import rope_tables
from flax_encoder.ops.tensor_parallel import PRODUCT

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(PRODUCT)
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class EncoderLayer(nnx.Module):
    """Attention, then a feed-forward block, each in a residual branch that is normalized before (pre) or after (post)
    the sum.

    `is_first`: this is a layer 0 that differs from the other layers (`EncoderConfig.first_differs`).
    """

    def __init__(self, config: EncoderConfig, is_first: bool = False, *, rngs: nnx.Rngs):
        self.is_pre_norm, self.dtype = config.norm_placement == "pre", config.dtype
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
            branch = self.attention(normed, segment_ids, position, window, key=attention_key)
            x = add_branch(x, branch, self.dtype)
            x = add_branch(x, self.feed_forward(self.feed_forward_norm(x), key=feed_forward_key), self.dtype)
        else:
            x = self.attention_norm(x + self.attention(x, segment_ids, position, window, key=attention_key))
            x = self.feed_forward_norm(x + self.feed_forward(x, key=feed_forward_key))
        if self.convolution is not None:  # reads neighbours
            before, x = (constrain(a, "batch", "length", "features") for a in (before, x))
            x = self.convolution(before, x, segment_ids, key=None if key is None else jax.random.fold_in(key, 2))
        return constrain(x, "batch", "tokens", "features")

    def attention_weights(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        position: PositionInputs,
        window: Window | None,
    ) -> Float[Array, "B N T T"]:
        """The layer's attention weights for the input x of the layer."""
        return self.attention.weights(self._read(x), segment_ids, position, window)

    def projections(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """(queries, keys, values) of the layer's attention for the input x of the layer, before rotary positions."""
        return self.attention.projections(self._read(x))

    def _read(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What attention reads of x."""
        return self.attention_norm(x) if self.is_pre_norm and self.attention_norm is not None else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def add_branch(x: Float[Array, "B T D"], branch: Float[Array, "B T D"], dtype: str) -> Float[Array, "B T D"]:
    """x + branch. The gradient is made once, and rounded to `dtype` in the same pass for the branch's products.

    Left alone, a TPU's compiler makes it again, from all that is added up in it, wherever it is read (LOG.md).
    """
    return x + branch


def _branch_gradients(dtype, _, g):
    g, rounded = jax.lax.optimization_barrier((g, g.astype(dtype)))
    return g, rounded.astype(g.dtype)


add_branch.defvjp(lambda x, branch, dtype: (x + branch, None), _branch_gradients)


@jax.custom_vjp
def unstack(tree: Any) -> list[Any]:
    """The slices of every leaf along its leading axis; their gradients are stacked again.

    Left to itself, differentiation pads each slice's gradient to the whole stack and adds them up, which is quadratic
    in the number of layers (LOG.md).
    """
    return [jax.tree.map(lambda a, i=i: a[i], tree) for i in range(jax.tree.leaves(tree)[0].shape[0])]


unstack.defvjp(lambda tree: (unstack(tree), None), lambda _, slices: (jax.tree.map(lambda *g: jnp.stack(g), *slices),))


@jax.custom_vjp
def in_turn(tree: Any) -> Any:
    """The tree, whose gradients are all made before any is read.

    A TPU's scheduler puts the gradients of unrolled layers' weights off until they are stacked, and keeps all layers'
    activations for them (LOG.md).
    """
    return tree


in_turn.defvjp(lambda tree: (tree, None), lambda _, grads: (jax.lax.optimization_barrier(grads),))


def _period(kinds: Sequence[Any]) -> int:
    """After how many the sequence repeats itself."""
    return next(p for p in range(1, len(kinds) + 1) if all(a == b for a, b in zip(kinds, kinds[p:], strict=False)))


def looks_ahead(config: EncoderConfig) -> str | None:
    """What of a model sees later tokens whatever the window, with a way out; None if nothing does."""
    if config.layer != "attention" and config.bidirectional:
        return f"half of each {config.layer} layer reads from the end; give --model.no-bidirectional."
    if config.conv_width:
        return f"a convolution of {config.conv_width} tokens reads the next ones; give --model.conv-width 0."
    return None


def num_parameters(model: nnx.Module) -> int:
    """Numbers in all parameters of a model."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def short_repr(model: Any) -> str:
    """A model that has an encoder in one line; treescope shows it whole."""
    return f"{type(model).__name__}({model.encoder!r}, {num_parameters(model):,} parameters in all)"


def layers_said(config: EncoderConfig) -> str:
    return f"{counted(config.num_layers, 'layer')} of width {config.embed_dim}"


class Encoder(nnx.Module):
    """Turns packed rows of tokens into vectors, [B, T] -> [B, T, D], float32.

    Its only leaves are `nnx.Param`. The parameters of the layers are stored stacked, with a leading axis named
    `layers`, whether the layers run scanned or unrolled. A first layer that differs from the rest is a stack of one,
    `first`.
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
        is_causal: bool = False,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], Float[Array, "L1 B T D"]]:
        """Encode rows.

        Args:
          segment_ids: each token's document in its row, from 1; 0 is padding. None is one document a row.
          positions: each token's place in its document, from 0; None counts along the row.
          token_types: each token's type; None is 0.
          key: for dropout; None is deterministic.
          every_layer: return (hidden, states) with the embeddings, unless recurrent layers are wider than those, and
            what each layer leaves; the last is `hidden`, after the final norm of a pre-norm stack.
          is_causal: no token sees those after it: the right side of every layer's window is closed. The parameters are
            the same.

        Tokens, positions and types are as many as the config says; a number beyond makes its whole document NaN.

        Raises:
          ValueError: rows without positions that are longer than max_length, types for a model that has none, or
            is_causal for one whose layers look ahead without attention.
        """
        if is_causal and (reason := looks_ahead(self.config)):
            raise ValueError(f"a causal encoder looks back alone: {reason}")
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = places(tokens, self.config)
        config = self.config
        positions = constrain(positions, "batch", "length")
        embedding_key, layers_key = (None, None) if key is None else jax.random.split(key)
        x = self.embedding(tokens, positions, token_types, key=embedding_key)

        position = self._position_inputs(positions)
        kinds = config.windows

        def run_layer(graphdef, reach, x, params, index):
            key = None if layers_key is None else jax.random.fold_in(layers_key, index)
            window = None if reach is None else (reach, reach)
            if is_causal:
                window = (segment_ids.shape[1] if reach is None else reach, 0)
            return nnx.merge(graphdef, params)(x, segment_ids, position[reach], window, key=key)

        def run_stack(x, stack, start, stop):
            graphdef, params = nnx.split(stack)
            runs = (stop - start) // jax.tree.leaves(params)[0].shape[0]  # of each set of parameters
            run = {}
            for reach in {*kinds[start:stop]}:
                run[reach] = functools.partial(run_layer, graphdef, reach)
                if policy := REMAT_POLICIES.get(config.remat):
                    run[reach] = jax.checkpoint(run[reach], policy=policy, prevent_cse=not config.scan_layers)
            states = []
            done = 0  # layers that a scan has run
            if config.scan_layers and x.shape[-1] == config.embed_dim:
                # Windows are part of the program, so the loop's body is a whole period of them.
                period = _period(kinds[start:stop])
                done = (stop - start) // period * period

                def run_period(x, xs):
                    first, own = xs
                    states = []
                    for j, mine in enumerate([None] * period if own is None else unstack(own)):
                        at = first + j
                        if mine is None:
                            mine = jax.tree.map(lambda a: a[(at - start) // runs], params)  # noqa: B023
                        x = run[kinds[start + j]](x, mine, at)
                        states.append(x)
                    return x, jnp.stack(states) if every_layer else None

                by_period = None
                if runs == 1:
                    by_period = jax.tree.map(lambda a: a[:done].reshape(-1, period, *a.shape[1:]), params)
                x, ys = jax.lax.scan(run_period, x, (jnp.arange(start, start + done, period), by_period))
                states = [] if ys is None else [ys.reshape(-1, *x.shape)]
            rest = unstack(jax.tree.map(lambda a: a[done // runs :], params)) if start + done < stop else []
            for i in range(start + done, stop):
                x = run[kinds[i]](*in_turn((x, rest[(i - start) // runs - done // runs])), i)
                states.append(x[None])
            return x, jnp.concatenate(states) if every_layer else None

        states = [x[None]] if x.shape[-1] == config.embed_dim else []
        for stack, start, stop in self._stacks():
            x, own_states = run_stack(x, stack, start, stop)
            states.append(own_states)
        # What reads it may want a row's tokens together.
        hidden = constrain(x if self.final_norm is None else self.final_norm(x), "batch", "length", "features")
        if not every_layer:
            return hidden
        states = jnp.concatenate(states)
        return hidden, states.at[-1].set(hidden)

    def attention_weights(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "L B N T T"]:
        """The attention weights of every layer and head, without dropout: how much each token [T] attends to each token
        [T]. Arguments as in `__call__`.

        float32. A token's weights add up to 1 over its own segment and window, and are 0 elsewhere; padding has none.
        The layers' inputs are the model's own; the plain `reference` computes the weights.

        Raises:
          ValueError: the layers are recurrent and have no attention; otherwise as `__call__`.
        """
        config = self.config
        if config.layer != "attention":
            raise ValueError(f"attention weights need layers with attention: these are {config.layer}.")
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = places(tokens, config)
        _, states = self(tokens, segment_ids, positions, token_types, every_layer=True)
        rows = (segment_ids, self._position_inputs(positions))
        return jnp.stack([self._weights(i, states[i], *rows) for i in range(config.num_layers)])

    def layer_weights(
        self, index: int, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B N T T"]:
        """`attention_weights` of layer `index`, counted from 0, for the input x of that layer."""
        return self._weights(index, x, segment_ids, self._position_inputs(positions))

    def _weights(self, index, x, segment_ids, position: dict[int | None, PositionInputs]) -> Float[Array, "B N T T"]:
        reach = self.config.windows[index]
        window = None if reach is None else (reach, reach)
        return self.layer(index).attention_weights(x, segment_ids, position[reach], window)

    def layer(self, index: int) -> nnx.Module:
        """Layer `index`, counted from 0 in the order in which layers run, as a module of its own."""
        stack, start, stop = next(found for found in self._stacks() if index < found[2])
        graphdef, params = nnx.split(stack)
        runs = (stop - start) // jax.tree.leaves(params)[0].shape[0]
        return nnx.merge(graphdef, jax.tree.map(lambda a: a[(index - start) // runs], params))

    def __repr__(self) -> str:
        config = self.config
        size = f"{config.vocab_size:,} tokens, {num_parameters(self):,} parameters"
        return f"{type(self).__name__}({layers_said(config)}, {size})"

    def _stacks(self) -> list[tuple[nnx.Module, int, int]]:
        """(stacked layers, the first of them, the one after the last), in the order that they run."""
        first = int(self.config.first_differs)
        stacks = ((self.first, 0, 1), (self.layers, first, self.config.num_layers))
        return [(stack, start, stop) for stack, start, stop in stacks if stack is not None]

    def _position_inputs(self, positions: Int[Array, "B T"]) -> dict[int | None, PositionInputs]:
        """What attention is told of positions, by the layer's window: a layer with one may turn by another rate."""
        config = self.config
        position = PositionInputs() if self.relative is None else self.relative(positions.shape[1])
        if config.position != "rope":
            return {None: position, config.window: position}
        thetas = {None: config.rope_theta, config.window: config.local_rope_theta or config.rope_theta}
        ropes = {theta: rope_tables(positions, config.head_dim, theta) for theta in {*thetas.values()}}
        return {reach: position._replace(rope=ropes[theta]) for reach, theta in thetas.items()}
