"""This machine's own CPU as a chip to plan for: its speed and its memory's, measured in a second."""

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flax_encoder.ops.linear import linear
from flax_encoder.plan.targets import Chip

_REPEATS = 5


def measured_cpu(dtype: str, num_devices: int) -> Chip:
    """One of `num_devices` virtual devices that share the machine's cores.

    The peak is of a plain product [2048, 768] x [768, 3072] with operands of `dtype`, the bandwidth that of adding two
    large arrays.
    """
    rows, inner, columns = 2048, 768, 3072
    x, kernel = (jax.random.normal(jax.random.key(0), shape, dtype) for shape in ((rows, inner), (inner, columns)))
    product = jax.jit(lambda x, kernel: linear(x, kernel, dtype=dtype))
    a = jnp.ones(2**25, jnp.float32)
    add = jax.jit(lambda a, b: a + b)
    flops = 2 * rows * inner * columns / _least_seconds(lambda: product(x, kernel))
    bandwidth = 3 * a.nbytes / _least_seconds(lambda: add(a, a))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shares = (each / num_devices for each in (flops, bandwidth, memory, bandwidth))
    return Chip("cpu", 1e9, *shares, kernel_fraction=1.0)


def _least_seconds(call: Callable[[], Any]) -> float:
    jax.block_until_ready(call())
    found = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - began)
    return min(found)
