"""What an attention backend is given, and how it refuses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from flax_encoder.ops.dropout import keep_mask

Window = tuple[int | Int[Array, ""], int | Int[Array, ""]]

MASKED = -1e30  # finite, so that no inf - inf arises where a query sees no key


class Problem(NamedTuple):
    """One call of `attention`, checked and filled in."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    query_segments: Int[Array, "B T"] | None
    """With key_segments None where every query may see every key; 0 is padding."""
    key_segments: Int[Array, "B S"] | None
    window: Window | None
    """How far a query sees to the (left, right): ints where they are known as the program is traced."""
    bias: Float[Array, "#B #N T S"] | None
    scale: float
    dropout_rate: float
    dropout_words: UInt32[Array, "2"] | None
    """None without dropout."""

    @property
    def static_window(self) -> tuple[int, int] | None:
        return None if self.window is None or self.has_traced_window else self.window

    @property
    def has_traced_window(self) -> bool:
        return self.window is not None and not all(isinstance(w, int) for w in self.window)


class Refusal(NamedTuple):
    """Why a backend cannot serve: '{rule}: got {got}; {way_out}.'"""

    rule: str
    got: object
    way_out: str

    def __str__(self) -> str:
        return f"{self.rule}: got {self.got}; {self.way_out}."


def visible(
    query_segments: Int[Array, "B T"] | None,
    key_segments: Int[Array, "B S"] | None,
    window: Window | None,
    query_index: Int[Array, "T"],
    key_index: Int[Array, "S"],
) -> Bool[Array, "#B T S"]:
    """Which keys queries see; the indices are places in the row."""
    mask = jnp.ones((1, query_index.size, key_index.size), bool)
    if window is not None:
        offset = key_index[None, :] - query_index[:, None]
        mask &= (-jnp.asarray(window[0], jnp.int32) <= offset) & (offset <= jnp.asarray(window[1], jnp.int32))
    if query_segments is not None:
        queries = query_segments[:, :, None]
        mask &= (queries == key_segments[:, None, :]) & (queries > 0)
    return mask


def kept(
    words: UInt32[Array, "2"],
    rate: float,
    shape: tuple[int, int, int],
    batch: Int[Array, "..."],
    head: Int[Array, "..."],
    query_index: Int[Array, "..."],
    key_index: Int[Array, "..."],
) -> Bool[Array, "..."]:
    """Which probabilities dropout keeps, by their place in the whole problem; `shape` is its (B, N, T).

    Every backend takes its mask from here, so that with one key all give the same numbers.
    """
    _, N, T = shape
    places = (jnp.asarray(x).astype(jnp.uint32) for x in (batch, head, query_index, key_index))
    batch, head, query_index, key_index = places
    row = (batch * jnp.uint32(N) + head) * jnp.uint32(T) + query_index
    return keep_mask(words, rate, row, key_index)


def grouped_indices(B: int, K: int, G: int, T: int) -> tuple[Array, Array, Array]:
    """(batch, head, query) that broadcast to [B, K, G, T, 1], for `kept`."""
    shape = B, K, G, T, 1

    def index(axis):
        return jax.lax.broadcasted_iota(jnp.int32, tuple(n if a == axis else 1 for a, n in enumerate(shape)), axis)

    return index(0), index(1) * G + index(2), index(3)
