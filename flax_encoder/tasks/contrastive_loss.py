"""Losses that compare the texts of a whole batch with one another; every sum is over all devices' rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from flax_encoder.ops.platform import precision
from flax_encoder.tasks.loss import LossSum

Keys = Int[Array, "N 2"]
"""A hash of each text: equal texts have equal ones."""
_NEVER = -1e30  # a logit of what is no candidate; infinities would make the gradient of a row without any no number
_AT_ONCE = 2**24  # logits: batches of thousands of texts have more


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
    texts = jnp.concatenate([vectors[:, 1], vectors[:, 2:].reshape(A * (n - 2), E)])
    text_keys = jnp.concatenate([keys[:, 1], keys[:, 2:].reshape(A * (n - 2), 2)])
    is_real = jnp.concatenate([is_document, jnp.repeat(is_document, n - 2)])
    losses, right = _finding(vectors[:, 0], keys[:, 0], keys[:, 1], texts, text_keys, is_real, scale)
    if symmetric:
        back, _ = _finding(vectors[:, 1], keys[:, 1], keys[:, 0], vectors[:, 0], keys[:, 0], is_document, scale)
        losses = (losses + back) / 2
    count = weights.sum()
    return LossSum((losses * weights).sum(), count, {"correct": (right * weights).sum(), "compared": count})


def _finding(
    x: Float[Array, "A E"],
    keys: Int[Array, "A 2"],
    partner_keys: Int[Array, "A 2"],
    texts: Float[Array, "C E"],
    text_keys: Int[Array, "C 2"],
    is_real: Bool[Array, "C"],
    scale: Float[Array, ""] | float,
) -> tuple[Float[Array, "A"], Float[Array, "A"]]:
    """(loss, whether no other is as near or nearer) of finding text i for row i among those that are not known to
    belong to it."""
    A, C = len(x), len(texts)
    numbers = jnp.arange(C)

    def of(number, x, key, partner):
        is_own = number[:, None] == numbers
        is_known = _equal(key, text_keys) | _equal(partner, text_keys)
        is_known |= jnp.pad(_equal(key, keys), ((0, 0), (0, C - A)))  # what goes with an equal text
        logits = scale * jnp.einsum("AE,CE->AC", x, texts, precision=precision(x))
        logits = jnp.where(is_own | (~is_known & is_real), logits, _NEVER)
        own = jnp.where(is_own, logits, 0.0).sum(-1)
        best_other = jnp.where(is_own, _NEVER, logits).max(-1)
        return jax.nn.logsumexp(logits, -1) - own, (own > best_other).astype(jnp.float32)

    return _in_blocks(of, C, numbers[:A], x, keys, partner_keys)


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

    def of(own, number, is_own):
        is_above = (number[:, None] > numbers) & is_own[:, None] & is_document
        differences = jnp.where(is_above, scale * (cosine - own[:, None]), _NEVER)
        correct = (is_above & (own[:, None] > cosine)).sum(-1, dtype=jnp.float32)
        return jax.nn.logsumexp(differences, -1), correct, is_above.sum(-1, dtype=jnp.float32)

    rows, correct, compared = _in_blocks(of, len(cosine), cosine, numbers, is_document)
    loss = jax.nn.logsumexp(jnp.append(rows, 0.0))
    metrics = {"correct": correct.sum(), "compared": compared.sum()}
    return LossSum(loss, is_document.any().astype(jnp.float32), metrics)


def margin_mse(
    vectors: Float[Array, "A 3 E"],
    numbers: Float[Array, "A"],
    weights: Float[Array, "A"],
    scale: Float[Array, ""] | float,
) -> LossSum:
    """The squared difference of scale * (cosine to the positive - cosine to the negative) and the margin that a
    teacher, such as a cross-encoder, puts between the two (Hofstätter et al., arXiv 2010.02666), summed over anchors.
    The paper's scores are products of vectors; here they are cosines over the temperature, so that vectors are
    compared as they are by every other loss. `correct` counts margins of the teacher's sign."""
    cosine = jnp.einsum("AE,ACE->AC", vectors[:, 0], vectors[:, 1:], precision=precision(vectors))
    margins = scale * (cosine[:, 0] - cosine[:, 1])
    right = (margins * numbers > 0).astype(jnp.float32)
    count = weights.sum()
    # A slot without a document has a number of 0 and vectors of 0.
    loss = (jnp.square(margins - numbers) * weights).sum()
    return LossSum(loss, count, {"correct": (right * weights).sum(), "compared": count})


def _equal(keys: Keys, others: Int[Array, "C 2"]) -> Bool[Array, "N C"]:
    return (keys[:, None, 0] == others[:, 0]) & (keys[:, None, 1] == others[:, 1])


def _in_blocks(of: Callable[..., tuple[Array, ...]], columns: int, *rows: Array) -> tuple[Array, ...]:
    """`of(*rows)`, a few rows at a time where rows times columns are many: what is made between is not kept, but made
    again for the gradient. Blocks take rows from all over, so that each lies on all devices."""
    num_rows = len(rows[0])
    wanted = -(-num_rows * columns // _AT_ONCE)
    parts = next(k for k in range(wanted, num_rows + 1) if num_rows % k == 0) if wanted < num_rows else num_rows
    if parts <= 1:
        return of(*rows)
    blocks = jax.tree.map(lambda x: rearrange(x, "(A parts) ... -> parts A ...", parts=parts), rows)
    made = jax.lax.map(lambda block: jax.checkpoint(of)(*block), blocks)
    return jax.tree.map(lambda x: rearrange(x, "parts A ... -> (A parts) ..."), made)
