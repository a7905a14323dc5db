"""The platform that code is traced for: that of the default backend, unless `plan` compiles for other hardware."""

import functools
import pathlib

import jax
import jax.numpy as jnp
from jaxtyping import Array

# Part of jit's cache key, so that what was traced for one platform is never taken for another.
_for_tracing = jax.make_user_context(default_value=None)


def platform() -> str:
    """`cpu`, `gpu` or `tpu`, read at trace time."""
    return jax.default_backend() if _for_tracing.value is None else _for_tracing.value[0]


def precision(*operands: Array) -> jax.lax.Precision | None:
    """What `jax.lax.dot_general` is to be told for a product of float32 operands to be one.

    JAX's default on accelerators rounds them first, to TF32 on a GPU (a relative error of 3e-4 for 3e-7 on an H100) and
    to bfloat16 on a TPU; bfloat16 operands are what says that this is wanted. `jax_default_matmul_precision`, where it
    is set, decides instead.
    """
    is_exact = platform() == "cpu" or all(x.dtype != jnp.float32 for x in operands)
    return None if is_exact or jax.config.jax_default_matmul_precision is not None else jax.lax.Precision.HIGHEST


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this host's CPU has instructions for products of bfloat16: AVX512-BF16 or AMX, or Arm's BF16.

    It is read where Linux lists them. Elsewhere the answer is yes, which leaves the products to XLA.
    """
    listed = pathlib.Path("/proc/cpuinfo")
    words = set(listed.read_text(errors="replace").split()) if listed.exists() else {"bf16"}
    return not words.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def kernels_are_interpreted() -> bool:
    """Whether Pallas kernels are to run as plain XLA, which any platform can; read at trace time."""
    return _for_tracing.value is not None and _for_tracing.value[1]


def platform_for_tracing(name: str, interpret_kernels: bool = False):
    """Within this context code is traced for platform `name`, as when a host without a TPU compiles for one.

    With interpret_kernels what is traced can be run here, slowly: that is how kernels are tested.
    """
    if name not in ("cpu", "gpu", "tpu"):
        raise ValueError(f"the platform must be 'cpu', 'gpu' or 'tpu': got {name!r}.")
    return _for_tracing((name, interpret_kernels))
