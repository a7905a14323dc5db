"""Shapes with names, for benchmarks and tests alike.

Axes as in the ops: B rows, M targets a row, E embed, V vocabulary.
"""

HEAD_CASES: dict[str, dict[str, int]] = {
    "bert_base_16x128": {"B": 16, "M": 20, "E": 768, "V": 30592},
    "modernbert_base_16x512": {"B": 16, "M": 154, "E": 768, "V": 50432},
    "modernbert_base_64x512": {"B": 64, "M": 154, "E": 768, "V": 50432},  # a TPU chip's share
    "small_primes": {"B": 2, "M": 11, "E": 13, "V": 37},
}
