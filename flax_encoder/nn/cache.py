"""What a decoder keeps while it writes."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class Cache(NamedTuple):
    """What writing the next token needs of all before."""

    own: tuple[Float[Array, "..."], ...]
    """Of the tokens written, each [L, B, ...]: keys and values [L, B, S, K, H], or the states of recurrent layers."""
    memory: tuple[Float[Array, "..."], ...]
    """Of the encoder's output: keys and values [L, B, M, K, H], or keys and the output itself [B, M, D]."""
    memory_segments: Int[Array, "B M"]
    length: Int[Array, ""]
    """Tokens written."""
