"""Pooling: one vector for each document of packed rows, from the vectors of its tokens."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_encoder.config.model import PoolingMode
from flax_encoder.ops.platform import platform, precision


def pool_segments(
    hidden: Float[Array, "B T D"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    num_segments: int,
    modes: Sequence[PoolingMode],
    skipped: Int[Array, ""] | int = 0,
) -> Float[Array, "B M E"]:
    """The vectors of a row's documents 1 to M, M = num_segments, float32; several modes are concatenated.

    `cls` is a document's first token, `lasttoken` its last, `mean_sqrt_len_tokens` the sum over the root of their
    number, and `weightedmean` weighs a token by its place, from 1. A document's vector does not depend on where in the
    row it lies, on CPUs to the bit.

    Args:
      positions: each token's place in its document, from 0.
      skipped: tokens at each document's beginning that are not pooled. Of a document without others `cls` is the first
        token, `max` minus infinity, and the rest is zeros.

    A document that the row does not have is zeros, and minus infinity by `max`.
    """
    B, T = hidden.shape[:2]
    slots = jnp.where(segment_ids > 0, jnp.arange(B)[:, None] * num_segments + segment_ids - 1, B * num_segments)
    is_pooled = (segment_ids > 0) & (positions >= skipped)

    def by_segment(reduce, values):
        flat = reduce(values.reshape(B * T, *values.shape[2:]), slots.reshape(-1), B * num_segments + 1)
        return flat[:-1].reshape(B, num_segments, *values.shape[2:])

    def of_tokens(values):
        """Each token's document's value [B, T]; of padding's anything."""
        return jnp.take_along_axis(values, jnp.maximum(segment_ids - 1, 0), axis=1)

    def weighted_sum(weights):
        if platform() == "cpu":  # in the order of tokens, whose sums by a product depend on where in the row they lie
            return by_segment(jax.ops.segment_sum, weights[..., None] * hidden)
        member = segment_ids[:, None] == jnp.arange(1, num_segments + 1)[:, None]  # scattered, atoms have any order
        return jnp.einsum("BMT,BTD->BMD", member * weights[:, None], hidden, precision=precision(hidden))

    ones = is_pooled.astype(jnp.float32)
    count = by_segment(jax.ops.segment_sum, ones)
    places = positions + 1.0

    def at_least_one(values):
        return jnp.maximum(values, 1.0)[..., None]

    def pooled(mode: PoolingMode):
        match mode:
            case "max":
                return by_segment(jax.ops.segment_max, jnp.where(is_pooled[..., None], hidden, -jnp.inf))
            case "cls":
                first = jnp.where(of_tokens(count) > 0, skipped, 0)
                return weighted_sum(((segment_ids > 0) & (positions == first)).astype(jnp.float32))
            case "lasttoken":
                last = of_tokens(by_segment(jax.ops.segment_max, positions))
                return weighted_sum(ones * (positions == last))
            case "weightedmean":
                return weighted_sum(ones * places) / at_least_one(by_segment(jax.ops.segment_sum, ones * places))
            case "mean_sqrt_len_tokens":
                return weighted_sum(ones) / jnp.sqrt(at_least_one(count))
            case "mean":
                return weighted_sum(ones) / at_least_one(count)

    return jnp.concatenate([pooled(mode) for mode in modes], -1)
