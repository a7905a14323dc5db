"""Losses that compare the texts of a whole batch with one another; every sum is over all devices' rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_encoder.ops.platform import precision
from flax_encoder.tasks.loss import LossSum

Keys = Int[Array, "N 2"]
"""A hash of each text: equal texts have equal ones."""


def cosines(x: Float[Array, "*N E"]) -> Float[Array, "*N E"]:
    """Vectors of length 1; one of zeros stays so. The gradient there is 0."""
    square = jnp.square(x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def info_nce(
    vectors: Float[Array, "A n E"],
    keys: Int[Array, "A n 2"],
    weights: Float[Array, "A"],
    scale: Float[Array, ""] | float,
    *,
    symmetric: bool = False,
) -> LossSum:
    """Cross-entropy of finding each anchor's positive among all texts of the batch that are no anchors (van den Oord et
    al., arXiv 1807.03748; Henderson et al., arXiv 1705.00652), summed over anchors.

    A document is an anchor, its positive, and n - 2 texts that do not belong to it. A text is no candidate of an anchor
    if it equals the anchor or its positive, or is the positive of a document whose anchor is equal.

    Args:
      vectors: of length 1.
      weights: 1 of a document, 0 of an empty slot.
      scale: one over the temperature.
      symmetric: average this with the loss of finding each positive's anchor among all anchors.
    """
    A, n, E = vectors.shape
    is_document = weights > 0
    anchors, positives, others = vectors[:, 0], vectors[:, 1], vectors[:, 2:].reshape(A * (n - 2), E)
    anchor_keys, positive_keys, other_keys = keys[:, 0], keys[:, 1], keys[:, 2:].reshape(A * (n - 2), 2)
    same_anchor, same_positive = _equal(anchor_keys, anchor_keys), _equal(positive_keys, positive_keys)
    crossed = _equal(anchor_keys, positive_keys)  # an anchor here, a positive there
    is_out = same_anchor | same_positive | crossed
    is_other_out = _equal(anchor_keys, other_keys) | _equal(positive_keys, other_keys)
    own = jnp.eye(A, dtype=bool)
    candidates = jnp.concatenate([positives, others])
    is_in = jnp.concatenate([own | ~is_out & is_document, ~is_other_out & jnp.repeat(is_document, n - 2)], 1)
    logits = _products(anchors, candidates) * scale
    losses, right = _softmax_loss(logits, is_in)
    correct = (right * weights).sum()
    if symmetric:
        is_in = own | ~(same_anchor | same_positive | crossed.T) & is_document
        losses = (losses + _softmax_loss(_products(positives, anchors) * scale, is_in)[0]) / 2
    count = weights.sum()
    return LossSum((losses * weights).sum(), count, {"correct": correct, "compared": count})


def cosent(
    vectors: Float[Array, "A 2 E"],
    numbers: Float[Array, "A"],
    weights: Float[Array, "A"],
    scale: Float[Array, ""] | float,
) -> LossSum:
    """log(1 + sum of exp(scale * (cosine of j - cosine of i)) over all pairs of texts i and j of which i has the larger
    number) (Su 2022, kexue.fm/archives/8847): one loss a batch, so the count is 1."""
    cosine = (vectors[:, 0] * vectors[:, 1]).sum(-1)
    is_document = weights > 0
    is_above = (numbers[:, None] > numbers) & is_document[:, None] & is_document
    differences = jnp.where(is_above, scale * (cosine - cosine[:, None]), -jnp.inf)
    loss = jax.nn.logsumexp(jnp.append(differences.reshape(-1), 0.0))
    correct = (is_above & (cosine[:, None] > cosine)).sum(dtype=jnp.float32)
    metrics = {"correct": correct, "compared": is_above.sum(dtype=jnp.float32)}
    return LossSum(loss, is_document.any().astype(jnp.float32), metrics)


def _equal(keys: Keys, others: Int[Array, "C 2"]) -> Bool[Array, "N C"]:
    return (keys[:, None, 0] == others[:, 0]) & (keys[:, None, 1] == others[:, 1])


def _products(x, y):
    return jnp.einsum("AE,CE->AC", x, y, precision=precision(x))


def _softmax_loss(
    logits: Float[Array, "A C"], is_in: Bool[Array, "A C"]
) -> tuple[Float[Array, "A"], Float[Array, "A"]]:
    """(loss [A], whether no other has a larger logit [A]), of candidate i being row i's."""
    logits = jnp.where(is_in, logits, -jnp.inf)
    right = jnp.diagonal(logits[:, : len(logits)])
    return jax.nn.logsumexp(logits, -1) - right, (right >= logits.max(-1)).astype(jnp.float32)
