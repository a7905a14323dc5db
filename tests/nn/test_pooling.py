"""Pooling: of a document's own tokens, wherever it lies."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_encoder.config.model import PoolingMode
from flax_encoder.nn.pooling import pool_segments
from flax_encoder.ops.platform import platform_for_tracing

MODES = get_args(PoolingMode)
POOL = jax.jit(lambda *rows: pool_segments(*rows[:3], 3, MODES, *rows[3:]))


def by_hand_pooled(hidden, mode, skipped):
    """Of one text's vectors [n, D]."""
    rest = hidden[skipped:]
    weights = np.arange(skipped + 1.0, len(hidden) + 1.0)[:, None]
    return {
        "cls": lambda: rest[0] if len(rest) else hidden[0],
        "lasttoken": lambda: rest[-1] if len(rest) else np.zeros(hidden.shape[1]),
        "max": lambda: rest.max(0, initial=-np.inf),
        "mean": lambda: rest.sum(0) / max(len(rest), 1),
        "mean_sqrt_len_tokens": lambda: rest.sum(0) / max(len(rest), 1) ** 0.5,
        "weightedmean": lambda: (rest * weights).sum(0) / max(weights.sum(), 1),
    }[mode]()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 3), st.integers(0, 2**31))
def test_pooling_reads_a_documents_own_tokens_alone(lengths, skipped, seed):
    hidden = np.random.default_rng(seed).normal(size=(1, 17, 3)).astype(np.float32)
    segments, positions = np.zeros((2, 1, 17), np.int32)
    for i, length in enumerate(lengths):
        own = slice(5 * i, 5 * i + length)
        segments[0, own], positions[0, own] = i + 1, np.arange(length)
    for platform in ("cpu", "gpu"):
        with platform_for_tracing(platform):
            got = POOL(*map(jnp.asarray, (hidden, segments, positions)), skipped)
        for i, length in enumerate(lengths):
            text = hidden[0, 5 * i : 5 * i + length]
            want = np.concatenate([by_hand_pooled(text, mode, skipped) for mode in MODES])
            np.testing.assert_allclose(got[0, i], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("T", [64, 256])
def test_a_documents_vector_has_the_same_bits_wherever_it_lies(T):
    document = np.random.default_rng(0).normal(size=(41, 24)).astype(np.float32)

    def vector(start, segment):
        hidden = np.random.default_rng(start).normal(size=(2, T, 24)).astype(np.float32)
        segments, positions = np.full((2, 2, T), 3, np.int32)
        own = (1, slice(start, start + 41))
        hidden[own], segments[own], positions[own] = document, segment, np.arange(41)
        return POOL(hidden, segments, positions)[1, segment - 1]

    want = vector(0, 1)
    for start in range(1, T - 41, 5):
        np.testing.assert_array_equal(vector(start, 1 + start % 2), want)
