"""The terms that attention adds to its logits for the distance of two tokens: ALiBi, T5's buckets, DeBERTa's products.

A document's tokens lie side by side in a row, so their distance in the row is their distance in the document, packed
or not: one table a row length serves every document of every row. What lies across documents is masked by attention.

Tables are ordered by offset j - i of key j from query i, from -(T - 1) to T - 1; P = 2T - 1 is their length.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flax_encoder.ops.platform import platform, precision


def to_pairs(table: Float[Array, "*B T P"], num_keys: int | None = None) -> Float[Array, "*B T S"]:
    """out[..., i, j] = table[..., i, j - i + T - 1], by a pad, a reshape and slices, which need no gather.

    (The shift of Dai et al., arXiv 1901.02860, appendix B, to both sides.)

    Args:
      num_keys: S; None is T.
    """
    *batch, T, P = table.shape
    S = T if num_keys is None else num_keys
    if P != T + S - 1:
        raise ValueError(f"a table holds the T + S - 1 offsets of T queries and S keys: got {P} for {T} and {S}.")
    # In rows of P + 1, entry (i, j) lies i * (P + 1) + j - i + T - 1 from the start: at (i, j + T - 1) in rows of P.
    flat = jnp.pad(table, [(0, 0)] * (table.ndim - 1) + [(0, 1)]).reshape(*batch, T * (P + 1))
    return flat[..., T - 1 : T - 1 + T * P].reshape(*batch, T, P)[..., :S]


def pairs_of_offsets(
    values: Float[Array, "N P"], first_query: Int[Array, ""] | int, num_queries: int, num_keys: int
) -> Float[Array, "1 N T S"]:
    """out[0, n, i, j] = values[n, j - (first_query + i) + A - 1], of T = num_queries out of A = P - S + 1 in all."""
    N, P = values.shape
    span = num_queries + num_keys - 1
    own = jax.lax.dynamic_slice_in_dim(values, P - num_keys + 1 - num_queries - first_query, span, axis=1)
    return to_pairs(jnp.broadcast_to(own[None, :, None], (1, N, num_queries, span)), num_keys)


def offsets(length: int) -> Int[np.ndarray, "P"]:
    return np.arange(1 - length, length)


def alibi_slopes(num_heads: int) -> list[float]:
    """2^(-8 n / N) for n = 1 ... N; where N is no power of two, every other slope of the next one fills up.

    (Press et al., arXiv 2108.12409, section 3 and its published code.)
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (n + 1) / power) for n in range(power)]
    return slopes + [2.0 ** (-8 * (n + 1) / (2 * power)) for n in range(0, 2 * (num_heads - power), 2)]


def alibi_values(num_heads: int, length: int) -> Float[Array, "N P"]:
    """`alibi_bias` by offset."""
    slopes = jnp.asarray(alibi_slopes(num_heads), jnp.float32)
    return -slopes[:, None] * jnp.asarray(np.abs(offsets(length)), jnp.float32)


def alibi_bias(num_heads: int, length: int) -> Float[Array, "1 N T T"]:
    """-slope |i - j|: nearer tokens count for more, in both directions."""
    distance = np.abs(np.arange(length)[:, None] - np.arange(length)[None, :])
    return -jnp.asarray(alibi_slopes(num_heads), jnp.float32)[None, :, None, None] * jnp.asarray(distance, jnp.float32)


def t5_buckets(
    offset: Int[np.ndarray, "P"], num_buckets: int, max_distance: int, is_causal: bool = False
) -> Int[np.ndarray, "P"]:
    """Half the buckets for keys after the query; of each half, half for single distances and half in log steps.

    A causal decoder has all of them for keys before the query, and those after, which it does not see, in the first.
    (Raffel et al., arXiv 1910.10683, section 2.1.) float32 throughout: at its edges a bucket follows from rounding,
    and published weights were trained with float32's.
    """
    side = num_buckets if is_causal else num_buckets // 2
    exact = side // 2
    distance = np.maximum(-offset, 0) if is_causal else np.abs(offset)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(math.log(max_distance / exact)) * np.float32(side - exact)
    far = np.minimum(exact + steps.astype(np.int64), side - 1)
    return np.where((offset > 0) & (not is_causal), side, 0) + np.where(distance < exact, distance, far)


def t5_values(
    table: Float[Array, "R N"], length: int, max_distance: int, is_causal: bool = False
) -> Float[Array, "N P"]:
    """`t5_bias` by offset."""
    return table[t5_buckets(offsets(length), table.shape[0], max_distance, is_causal)].T


def t5_bias(
    table: Float[Array, "R N"], length: int, max_distance: int, is_causal: bool = False
) -> Float[Array, "1 N T T"]:
    """A learned scalar a head and bucket; R buckets."""
    values = t5_values(table, length, max_distance, is_causal)
    return to_pairs(jnp.broadcast_to(values[None, :, None, :], (1, table.shape[1], length, 2 * length - 1)))


def t5_bias_rows(
    table: Float[Array, "R N"], length: int, max_distance: int, queries: Int[Array, "B"]
) -> Float[Array, "B N T"]:
    """A causal decoder's bias of one query a row, whose place may be traced, to each of `length` keys."""
    values = t5_values(table, length, max_distance, is_causal=True)
    return jax.vmap(lambda at: jax.lax.dynamic_slice_in_dim(values, length - 1 - at, length, axis=1))(queries)


def disentangled_buckets(distance: Int[np.ndarray, "P"], num_buckets: int, max_distance: int) -> Int[np.ndarray, "P"]:
    """Rows in a table of 2 R vectors for distances i - j: single ones near 0, log steps to max_distance, then cut.

    R is num_buckets, or, if that is 0, max_distance with every distance its own. (He et al., arXiv 2006.03654,
    equation 3; the log steps are of DeBERTa v2's published code.) float32, as in `t5_buckets`.
    """
    span = num_buckets or max_distance
    if num_buckets:
        mid = num_buckets // 2
        far = np.maximum(np.abs(distance), mid).astype(np.float32) / np.float32(mid)
        top = np.log(np.float32((max_distance - 1) / mid))
        log_steps = np.ceil(np.log(far) / top * np.float32(mid - 1)).astype(np.int64) + mid
        distance = np.where(np.abs(distance) <= mid, distance, np.sign(distance) * log_steps)
    return np.clip(distance + span, 0, 2 * span - 1)


def disentangled_bias(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    position_key: Float[Array, "R N H"] | None,
    position_query: Float[Array, "R N H"] | None,
    rows: Int[np.ndarray, "P"],
    scale: float,
) -> Float[Array, "B N T T"]:
    """scale (query_i . position_key[r(i, j)] + key_j . position_query[r(i, j)]), float32.

    Content to position and position to content (He et al., arXiv 2006.03654, equation 4); None leaves a term out.

    Args:
      rows: which row r of the tables each offset j - i takes, from -(T - 1).

    Raises:
      ValueError: neither term.
    """
    if position_key is None and position_query is None:
        raise ValueError("disentangled attention has a term: position_key, position_query or both must be given.")

    def products(content, table, rows):
        # One row an offset, so that a matrix product makes every term and none is gathered.
        picked = table[rows].astype(content.dtype)
        options = {"precision": precision(content), "preferred_element_type": jnp.float32}
        return to_pairs(jnp.einsum("BTNH,PNH->BNTP", content, picked, **options))

    if platform() == "cpu":  # where XLA has no fast batched bfloat16 product
        query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    terms = []
    if position_key is not None:
        terms.append(products(query, position_key, rows))
    if position_query is not None:
        # Seen from the key, offsets run the other way, and what comes out is [j, i].
        terms.append(products(key, position_query, rows[::-1]).swapaxes(2, 3))
    return scale * sum(terms[1:], terms[0])
