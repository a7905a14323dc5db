"""Attention of rows that the mesh cuts into parts is attention of whole rows, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from flax_encoder.ops.attention import attention
from flax_encoder.ops.position import rope_tables

B, T, S, N, K, H = 2, 96, 64, 4, 2, 16
SEGMENTS = np.array([[1] * 7 + [2] * 50 + [3] * 30 + [0] * 9, [1] * 90 + [2] * 6], np.int32)
POSITIONS = np.array([[*range(7), *range(50), *range(30), *[0] * 9], [*range(90), *range(6)]], np.int32)
MEMORY = np.array([[1] * 20 + [2] * 10 + [3] * 30 + [0] * 4, [1] * 64], np.int32)
CASES = {
    "no segments": {},
    "segments": {"segment_ids": SEGMENTS},
    "rope": {"segment_ids": SEGMENTS, "rope": True},
    "narrow window": {"segment_ids": SEGMENTS, "window": (3, 5)},
    "narrow window, no segments": {"window": (8, 8)},
    "window of several parts": {"segment_ids": SEGMENTS, "window": (30, 1)},
    "looking back": {"segment_ids": SEGMENTS, "window": (T, 0)},
    "traced window": {"segment_ids": SEGMENTS, "window": "traced"},
    "bias": {"segment_ids": SEGMENTS, "bias": (1, N)},
    "bias and window": {"segment_ids": SEGMENTS, "bias": (B, N), "window": (4, 4)},
    "bias by offset": {"segment_ids": SEGMENTS, "offset_bias": True},
    "bias by offset and window": {"segment_ids": SEGMENTS, "offset_bias": True, "window": (4, 4)},
    "a memory": {"segment_ids": SEGMENTS, "key_segment_ids": MEMORY},
    "dropout": {"segment_ids": SEGMENTS, "dropout_rate": 0.3},
    "dropout and window": {"segment_ids": SEGMENTS, "dropout_rate": 0.3, "window": (4, 4)},
}


def draw(*shapes, dtype=np.float32):
    generator = np.random.default_rng(0)
    return [jnp.asarray(generator.standard_normal(shape), dtype) for shape in shapes]


def set_mesh(shape):
    names = ("data", "fsdp", "tensor", "context")
    return jax.set_mesh(jax.make_mesh(shape, names, (AxisType.Auto,) * 4))


def out_and_gradients(case, implementation, dtype=np.float32):
    length = S if "key_segment_ids" in case else T
    query, key, value, d_out = draw((B, T, N, H), (B, length, K, H), (B, length, K, H), (B, T, N, H), dtype=dtype)
    options = {name: jnp.asarray(x) if name.endswith("_ids") else x for name, x in case.items()}
    bias = draw((*options.pop("bias"), T, length))[0] if "bias" in case else None
    by_offset = options.pop("offset_bias", False)
    bias = draw((N, 2 * T - 1))[0] if by_offset else bias
    if options.pop("rope", False):
        options["rope"] = rope_tables(jnp.asarray(POSITIONS), H)
    if "dropout_rate" in case:
        options["dropout_key"] = jax.random.key(1)
    is_traced = case.get("window") == "traced"

    @jax.jit
    def run(query, key, value, bias, d_out, window):
        own = options | ({"window": tuple(window)} if is_traced else {})
        name = "offset_bias" if by_offset else "bias"
        call = lambda *xs: attention(*xs[:3], **{name: xs[3]}, implementation=implementation, **own)  # noqa: E731
        out, vjp = jax.vjp(call, query, key, value, bias)
        return out, *vjp(d_out)

    return run(query, key, value, bias, d_out, jnp.asarray([9, 2]))


@functools.cache
def whole(case):
    return out_and_gradients(CASES[case], "reference")


def assert_close(got, want, eps=4e-6):
    for name, g, w in zip(("out", "d_query", "d_key", "d_value", "d_bias"), got, want, strict=True):
        if w is not None:
            size = max(1.0, float(np.abs(w).max()))
            np.testing.assert_allclose(np.asarray(g, np.float32), w, rtol=0, atol=eps * size, err_msg=name)


@pytest.mark.parametrize(
    ("case", "mesh", "implementation"),
    [*((case, (2, 1, 2, 2), "chunked") for case in CASES),
     *((case, (1, 1, 1, 8), "reference") for case in ("narrow window", "looking back", "bias by offset", "dropout"))],
)  # fmt: skip
def test_rows_in_parts_attend_as_whole_rows(case, mesh, implementation):
    with set_mesh(mesh):
        got = out_and_gradients(CASES[case], implementation)
    assert_close(got, whole(case))
