"""Text to packed, masked batches. NumPy only: nothing here imports jax.

source -> tokenizer -> store (flat tokens and offsets) -> packing plan -> rows -> masks -> batches
"""
