"""The arguments of an attention backend, and how a backend refuses them."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from flax_encoder.ops.dropout import Words, keep_mask, row_start
from flax_encoder.ops.position import RopeTables, apply_rope
from flax_encoder.ops.relative import pairs_of_offsets

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
    num_heads: int
    """Of the whole problem, of which this may be one device's part,"""
    first_row: int | Int[Array, ""] = 0
    """from this batch row on"""
    first_head: int | Int[Array, ""] = 0
    """and this query head."""
    first_query: int | Int[Array, ""] = 0
    """Of a part of a row's queries, the place of its first,"""
    num_queries: int | None = None
    """and how many the row has; None where this is all of them."""
    rope: RopeTables | None = None
    """By which queries and keys are yet to be turned."""
    offset_bias: Float[Array, "N P"] | None = None
    """A bias that is the same for all pairs of one offset, of which `bias` is yet to be made (ops/relative.py)."""
    lengths: Int[Array, "B"] | None = None
    """Tokens of each row, where a row is one document and then padding, as the segments then say too."""

    def turned(self) -> "Problem":
        if self.rope is None:
            return self
        query, key = (apply_rope(x, self.rope) for x in (self.query, self.key))
        return self._replace(query=query, key=key, rope=None)

    def with_pairs(self) -> "Problem":
        """With the bias of its own queries, where that is given by offset."""
        if self.offset_bias is None:
            return self
        T, S = self.query.shape[1], self.offset_bias.shape[1] - self.row_places[1] + 1
        return self._replace(bias=pairs_of_offsets(self.offset_bias, self.first_query, T, S), offset_bias=None)

    @property
    def row_places(self) -> tuple[int, int]:
        """(heads, queries a row) of the whole problem, by which `kept` tells its places."""
        return self.num_heads, self.num_queries or self.query.shape[1]

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
    query_segments: Int[Array, "..."] | None,
    key_segments: Int[Array, "..."] | None,
    window: Window | None,
    query_index: Int[Array, "..."],
    key_index: Int[Array, "..."],
) -> Bool[Array, "..."] | None:
    """Which keys queries see, None for all; queries' arrays broadcast against keys', indices are places in the row."""
    mask = None
    if window is not None:
        offset = key_index - query_index
        mask = (offset >= -window[0]) & (offset <= window[1])
    if query_segments is not None:
        # Padding matches nothing: said of queries, so that pairs are compared once.
        same = jnp.where(query_segments > 0, query_segments, -1) == key_segments
        mask = same if mask is None else mask & same
    return mask


def kept(
    words: Words,
    rate: float,
    heads_and_queries: tuple[int, int],
    batch: Int[Array, "..."],
    head: Int[Array, "..."],
    query_index: Int[Array, "..."],
    key_index: Int[Array, "..."],
) -> Bool[Array, "..."]:
    """Which probabilities dropout keeps, by their place in the whole problem, of N heads and T queries.

    Every backend takes its mask from here, so that with one key all give the same numbers.
    """
    row = _dropout_row(heads_and_queries, batch, head, query_index)
    return keep_mask(words, rate, row, jnp.asarray(key_index).astype(jnp.uint32))


def dropout_starts(problem: Problem) -> UInt32[Array, "B N T"]:
    """`kept`'s part that is each query's, for a kernel that would make it again for each tile of keys."""
    B, T, N, _ = problem.query.shape
    batch, head = problem.first_row + jnp.arange(B), problem.first_head + jnp.arange(N)
    query = problem.first_query + jnp.arange(T)
    row = _dropout_row(problem.row_places, batch[:, None, None], head[:, None], query)
    return row_start(problem.dropout_words, row)


def _dropout_row(heads_and_queries: tuple[int, int], *place: Int[Array, "..."]) -> UInt32[Array, "..."]:
    N, T = heads_and_queries
    batch, head, query_index = (jnp.asarray(x).astype(jnp.uint32) for x in place)
    return (batch * jnp.uint32(N) + head) * jnp.uint32(T) + query_index
