"""The keys and values that a decoder keeps while it writes.

Axes: R sources that were read, B of them at hand, W texts that are written of each, S places for tokens, M length of
the memory, which is the encoder's output.
"""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Int


class Memory(NamedTuple):
    """Sources as a decoder reads them, made once for all tokens."""

    of_layers: tuple[Any, ...]
    """Keys and values [R, K, M, H] of each layer; of recurrent layers keys, the output itself and the first states."""
    segments: Int[Array, "R M"]
    """0 where a source is padding."""

    def take(self, rows: Int[Array, "B"]) -> "Memory":
        """The sources of those numbers."""
        return jax.tree.map(lambda a: a[rows], self)


class Cache(NamedTuple):
    """What writing the next token needs of all before."""

    own: tuple[Any, ...]
    """Of the tokens written: keys and values [B, K, W, S, H] of each layer, or the states of recurrent ones."""
    memory: Memory
    """Of the B sources at hand."""
    length: Int[Array, "B"]
    """Tokens written of each source's texts."""
    origin: Int[Array, "B W S"] | None = None
    """The text that wrote each of a text's tokens, where several of a source go on from one another: their keys stay
    where they were written. None where a source has one text, or layers are recurrent."""

