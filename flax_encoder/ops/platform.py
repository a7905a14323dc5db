"""For which platform code is being traced: the default backend's, unless it is compiled for hardware elsewhere."""

import jax

# Part of jit's cache key, so that what was traced for one platform is never taken for another.
_for_tracing = jax.make_user_context(default_value=None)


def platform() -> str:
    """`cpu`, `gpu` or `tpu`, read at trace time."""
    return jax.default_backend() if _for_tracing.value is None else _for_tracing.value[0]


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
