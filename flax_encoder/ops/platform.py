"""For which platform code is being traced: the default backend's, unless it is compiled for hardware elsewhere."""

import jax

# Part of jit's cache key, so that what was traced for one platform is never taken for another.
_for_tracing = jax.make_user_context(default_value=None)


def platform() -> str:
    """`cpu`, `gpu` or `tpu`, read at trace time."""
    return _for_tracing.value or jax.default_backend()


def platform_for_tracing(name: str):
    """Within this context code is traced for platform `name`, as when a host without a TPU compiles for one."""
    if name not in ("cpu", "gpu", "tpu"):
        raise ValueError(f"the platform must be 'cpu', 'gpu' or 'tpu': got {name!r}.")
    return _for_tracing(name)
