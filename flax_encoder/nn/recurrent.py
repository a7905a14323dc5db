"""Recurrent layers: Elman's network, LSTM and GRU, one- and two-directional, over packed rows.

Axes beside the usual: R directions (1 or 2), G gates, C cells a direction; R C is D, the width of the residual stream.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flax_encoder.config import EncoderConfig
from flax_encoder.nn.feed_forward import ACTIVATIONS
from flax_encoder.nn.linear import Linear
from flax_encoder.nn.partition import constrain, normal, param, zeros
from flax_encoder.ops.dropout import dropout
from flax_encoder.ops.linear import linear
from flax_encoder.ops.platform import precision

State = tuple[Float[Array, "R B C"], ...]  # what goes from token to token; its first is what the cell puts out
Gates = Float[Array, "R B G C"]


def rnn_cell(state: State, inputs: Gates, hidden: Gates, activation: Callable[[Array], Array]) -> State:
    """h' = act(W x + U h) (Elman 1990)."""
    return (activation(inputs + hidden)[..., 0, :],)


def lstm_cell(state: State, inputs: Gates, hidden: Gates, activation: Callable[[Array], Array]) -> State:
    """Gates are input, forget, candidate, output, as in torch (Hochreiter and Schmidhuber 1997; Gers et al. 2000)."""
    gates = inputs + hidden
    enter, keep, out = (jax.nn.sigmoid(gates[..., i, :]) for i in (0, 1, 3))
    cell = keep * state[1] + enter * jnp.tanh(gates[..., 2, :])
    return out * jnp.tanh(cell), cell


def gru_cell(state: State, inputs: Gates, hidden: Gates, activation: Callable[[Array], Array]) -> State:
    """Gates are reset, update, candidate; reset comes after the product with h, as in torch (Cho et al. 2014)."""
    reset, update = (jax.nn.sigmoid(inputs[..., i, :] + hidden[..., i, :]) for i in (0, 1))
    candidate = jnp.tanh(inputs[..., 2, :] + reset * hidden[..., 2, :])
    return ((1 - update) * candidate + update * state[0],)


class Cell(NamedTuple):
    step: Callable[[State, Gates, Gates, Callable[[Array], Array]], State]
    num_gates: int
    num_states: int


CELLS = {"rnn": Cell(rnn_cell, 1, 1), "lstm": Cell(lstm_cell, 4, 2), "gru": Cell(gru_cell, 3, 1)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recur(
    run: Callable[..., Array], inputs: Float[Array, "T R B G C"], kernel, bias, keep: Bool[Array, "T R B"]
) -> Float[Array, "T R B C"]:
    return run(inputs, jnp.zeros_like(inputs), kernel, bias, keep)


def _recur_forward(run, inputs, kernel, bias, keep):
    # The nudge, zero, is added to each product with the kernel, so that its gradient is theirs.
    out, pull = jax.vjp(lambda inputs, nudge: run(inputs, nudge, kernel, bias, keep), inputs, jnp.zeros_like(inputs))
    return out, (pull, out, kernel, bias, keep)


def _recur_backward(run, residuals, d_out):
    """The kernel's gradient is one product over all tokens; left to the scan it would be added up token by token.

    On 2 CPU cores in bfloat16 an LSTM's step took 0.40 s for 0.51 with 2 x 1024 cells, 0.45 for 0.47 with 2 x 256.
    """
    pull, out, kernel, bias, keep = residuals
    d_inputs, d_products = pull(d_out)
    before = jnp.where(keep[..., None], jnp.roll(out, 1, axis=0), 0.0)
    d_kernel = jnp.einsum("TRBC,TRBGK->RCGK", before, d_products, precision=precision(before))
    return d_inputs, d_kernel.astype(kernel.dtype), None if bias is None else d_products.sum((0, 2)), None


_recur.defvjp(_recur_forward, _recur_backward)


def _run(
    cell: Cell, activation: Callable[[Array], Array], dtype: str, inputs, nudge, kernel, bias, keep
) -> Float[Array, "T R B C"]:
    def step(state, xs):
        inputs, nudge, keep = xs
        state = tuple(jnp.where(keep[..., None], s, 0.0) for s in state)
        products = jnp.stack([linear(h, k, dtype=dtype) for h, k in zip(state[0], kernel, strict=True)]) + nudge
        if bias is not None:
            products = products + bias[:, None]
        state = cell.step(state, inputs, products, activation)
        return state, state[0]

    _, R, B, _, C = inputs.shape
    start = (jnp.zeros((R, B, C)),) * cell.num_states
    return jax.lax.scan(step, start, (inputs, nudge, keep))[1]


class Recurrence(nnx.Module):
    """The parameters that go from token to token."""

    def __init__(self, directions: int, cells: int, gates: int, *, use_bias: bool, rngs: nnx.Rngs):
        axes = {"directions": directions, "cells": cells, "gates": gates, "features": cells}
        self.kernel = param(rngs, normal(cells**-0.5), **axes)
        bias_axes = {"directions": directions, "gates": gates, "cells": cells}
        self.bias = param(rngs, zeros, **bias_axes) if use_bias else None


class RecurrentLayer(nnx.Module):
    """One layer of `config.layer`, with dropout after it; a bidirectional layer concatenates its two directions.

    In each direction the state is zeros before a document's first token; padding comes out as zeros and passes no
    state on. The products with the inputs are one matrix product, before the scan over tokens.
    Gates and biases lie as torch has them: `input` is weight_ih and bias_ih, `recurrence` weight_hh and bias_hh,
    transposed. States, gates and result are float32; operands of matrix products have `config.dtype`. A layer that
    `is_first` reads embeddings, which may have another width.
    """

    def __init__(self, config: EncoderConfig, is_first: bool = False, *, rngs: nnx.Rngs):
        self.config = config
        gates = CELLS[config.layer].num_gates
        axes = {"directions": config.num_directions, "gates": gates, "cells": config.num_cells}
        width = (config.embedding_dim if is_first else None) or config.embed_dim
        options = {"std": config.init_std, "use_bias": config.use_bias, "dtype": config.dtype}
        self.input = Linear({"embed": width}, axes, **options, rngs=rngs)
        self.recurrence = Recurrence(
            config.num_directions, config.num_cells, gates, use_bias=config.use_bias, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "B T E"], segment_ids: Int[Array, "B T"], *_, key: Array | None = None
    ) -> Float[Array, "B T D"]:
        """What attention layers take besides (positions, windows) is not for these."""
        config = self.config
        inputs = rearrange(self.input(x), "B T R G C -> T R B G C")
        segments = jnp.broadcast_to(segment_ids.T[:, None], inputs.shape[:3])
        if config.bidirectional:  # the second direction goes through its row from the end
            inputs, segments = _turn(inputs), _turn(segments)
        before = jnp.concatenate([jnp.zeros_like(segments[:1]), segments[:-1]])
        keep = (segments == before) & (segments > 0)
        bias = self.recurrence.bias
        run = functools.partial(_run, CELLS[config.layer], ACTIVATIONS[config.activation], config.dtype)
        out = _recur(run, inputs, self.recurrence.kernel[...], None if bias is None else bias[...], keep)
        out = jnp.where(segments[..., None] > 0, out, 0.0)
        out = rearrange(_turn(out) if config.bidirectional else out, "T R B C -> B T (R C)")
        return constrain(dropout(out, config.dropout_rate, key), "batch", "length", "features")


def _turn(x: Array) -> Array:
    """Reverse time in the second direction; its own inverse."""
    return jnp.stack([x[:, 0], jnp.flip(x[:, 1], axis=0)], axis=1)


def from_torch(weights: Mapping[str, np.ndarray], layer: int) -> dict[str, dict[str, np.ndarray]]:
    """A RecurrentLayer's parameters from a layer of torch's RNN, LSTM or GRU, by the names of its state dict."""
    turns = [turn for turn in ("", "_reverse") if f"weight_hh_l{layer}{turn}" in weights]

    def part(name: str, shape: str) -> np.ndarray:
        own = [weights[f"{name}_l{layer}{turn}"] for turn in turns]
        cells = weights[f"weight_hh_l{layer}"].shape[1]
        return np.stack([rearrange(w, f"(G C) {'I' * (w.ndim - 1)} -> {shape}", C=cells) for w in own])

    params = {
        "input": {"kernel": np.moveaxis(part("weight_ih", "I G C"), 0, 1)},
        "recurrence": {"kernel": part("weight_hh", "I G C")},
    }
    if f"bias_ih_l{layer}" in weights:
        params["input"]["bias"], params["recurrence"]["bias"] = part("bias_ih", "G C"), part("bias_hh", "G C")
    return params
