"""Which tokens are predicted, and what the model sees in their place: a function of (seed, row number)."""

import numpy as np

from flax_encoder.data.randomness import random_bits


def budget(rate: float, row_length: int) -> int:
    """M, the target slots of a row: enough for `rate` of a row without padding, so that none is ever left over."""
    return max(1, int(np.ceil(rate * row_length)))


def mask_tokens(
    tokens: np.ndarray,
    numbers: np.ndarray,
    *,
    rate: float,
    mask_rate: float,
    random_rate: float,
    mask_id: int,
    vocab_size: int,
    special_ids: np.ndarray,
    seed: int,
) -> dict[str, np.ndarray]:
    """Choose `rate` of each row's ordinary tokens; replace most by [MASK], some by a random token, leave the rest.

    (Devlin et al., arXiv 1810.04805, section 3.1.) Of a row with n ordinary tokens round(rate * n) are chosen, at
    least one, all equally likely. Special tokens, padding among them, are neither chosen nor drawn.

    Args:
      tokens: [B, T].
      numbers: [B], the rows' numbers over all epochs, which with the seed decide the draw.

    Returns:
      tokens [B, T], and target_positions, targets int32 [B, M], target_weights float32 [B, M], M = budget(rate, T);
      unused slots have weight 0, and positions are in order.
    """
    B, T = tokens.shape
    M = budget(rate, T)
    ordinary = np.ones(vocab_size, bool)
    ordinary[special_ids] = False
    maskable = ordinary[tokens]
    number = np.asarray(numbers)[:, None]
    draw = random_bits(seed, 3, number, np.arange(T)[None, :]) >> np.uint64(1)
    draw[~maskable] = np.iinfo(np.uint64).max
    count = maskable.sum(1)
    chosen_count = np.where(count > 0, np.maximum(1, np.rint(rate * count)), 0).astype(np.int64)

    # The M smallest draws of each row, in order of draw; of these the first `chosen_count` count.
    candidates = np.argpartition(draw, M - 1, axis=1)[:, :M]
    by_draw = np.argsort(np.take_along_axis(draw, candidates, 1), axis=1)
    positions = np.take_along_axis(candidates, by_draw, 1)
    is_chosen = np.arange(M)[None, :] < chosen_count[:, None]
    positions = np.sort(np.where(is_chosen, positions, T), axis=1)
    is_chosen = positions < T
    positions = np.where(is_chosen, positions, 0)

    targets = np.take_along_axis(tokens, positions, 1)
    fate = random_bits(seed, 4, number, positions) >> np.uint64(11)
    fate = fate.astype(np.float64) / 2**53
    choices = np.flatnonzero(ordinary)
    random_token = choices[random_bits(seed, 5, number, positions) % np.uint64(len(choices))]
    shown = np.where(fate < mask_rate, mask_id, np.where(fate < mask_rate + random_rate, random_token, targets))
    masked = tokens.copy()
    rows = np.broadcast_to(np.arange(B)[:, None], positions.shape)
    masked[rows[is_chosen], positions[is_chosen]] = shown[is_chosen]
    return {
        "tokens": masked,
        "target_positions": positions.astype(np.int32),
        "targets": np.where(is_chosen, targets, 0).astype(np.int32),
        "target_weights": is_chosen.astype(np.float32),
    }
