"""Shapes with names, for benchmarks and tests alike.

Axes as in the ops: B rows, T tokens a row, N query heads, K key/value heads, H head dim; M targets a row, E embed,
V vocabulary.
"""

from typing import NamedTuple

import numpy as np


class AttentionCase(NamedTuple):
    B: int
    T: int
    N: int
    K: int
    H: int
    window: tuple[int, int] | None = None
    documents: int = 1
    """In a row, of random lengths, with some padding where there are several."""
    bias: tuple[int, int] | None = None
    """The leading axes of one, [#B, #N]."""
    dropout_rate: float = 0.0
    is_small: bool = False
    """Quick enough for tests."""

    def segment_ids(self) -> np.ndarray:
        """[B, T], as a packed batch has them."""
        if self.documents == 1:
            return np.ones((self.B, self.T), np.int32)
        rng = np.random.default_rng(0)
        ends = np.sort(rng.integers(1, self.T, (self.B, self.documents)), axis=1)
        number = (np.arange(self.T) >= ends[:, :, None]).sum(1) + 1
        return np.where(number > self.documents, 0, number).astype(np.int32)


ATTENTION_CASES = {
    "bert_128": AttentionCase(16, 128, 12, 12, 64),
    "bert_128_dropout": AttentionCase(16, 128, 12, 12, 64, dropout_rate=0.1),
    "bert_512": AttentionCase(4, 512, 12, 12, 64),
    "bert_512_dropout": AttentionCase(4, 512, 12, 12, 64, dropout_rate=0.1),
    "packed_512": AttentionCase(4, 512, 12, 12, 64, documents=6),
    "modernbert_1024_local": AttentionCase(2, 1024, 12, 12, 64, (64, 64), documents=4),
    "packed_1024": AttentionCase(2, 1024, 12, 12, 64, documents=4),
    "packed_8192": AttentionCase(1, 8192, 12, 12, 64, documents=8),
    "modernbert_8192": AttentionCase(1, 8192, 12, 12, 64),
    "modernbert_8192_local": AttentionCase(1, 8192, 12, 12, 64, (64, 64), documents=12),
    "grouped_1024": AttentionCase(2, 1024, 12, 4, 64),
    "t5_bias_512": AttentionCase(4, 512, 12, 12, 64, bias=(1, 12)),
    "deberta_bias_512": AttentionCase(4, 512, 12, 12, 64, bias=(4, 12)),
    "small_packed": AttentionCase(2, 256, 2, 2, 64, documents=3, is_small=True),
    "small_local": AttentionCase(1, 384, 2, 2, 64, (17, 5), documents=2, is_small=True),
    "small_grouped": AttentionCase(2, 128, 4, 2, 64, documents=2, is_small=True),
    "small_dropout": AttentionCase(2, 128, 4, 4, 32, documents=2, dropout_rate=0.2, is_small=True),
    "small_bias": AttentionCase(2, 128, 4, 2, 32, bias=(1, 4), is_small=True),
}

HEAD_CASES: dict[str, dict[str, int]] = {
    "bert_base_16x128": {"B": 16, "M": 20, "E": 768, "V": 30592},
    "modernbert_base_16x512": {"B": 16, "M": 154, "E": 768, "V": 50432},
    "modernbert_base_64x512": {"B": 64, "M": 154, "E": 768, "V": 50432},  # a TPU chip's share
    "small_primes": {"B": 2, "M": 11, "E": 13, "V": 37},
}
