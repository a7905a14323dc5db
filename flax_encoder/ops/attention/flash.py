"""FlashAttention for GPUs, Pallas-Triton kernels with our segments, windows, dropout and biases; see `flash_kernel`."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_encoder.ops.attention.mesh import over_mesh
from flax_encoder.ops.attention.problem import Problem, Refusal, dropout_starts
from flax_encoder.ops.platform import kernels_are_interpreted, platform

SMALLEST_TILE = 16  # the sides that a GPU's matrix unit takes
WIDEST = 128


def refusal(problem: Problem) -> Refusal | None:
    (_, T, _, H), S = problem.query.shape, problem.key.shape[1]
    if platform() != "gpu":
        return Refusal("it is a kernel for GPUs", platform(), "leave implementation None")
    if T % SMALLEST_TILE or S % SMALLEST_TILE:
        rule = f"queries and keys must be a multiple of {SMALLEST_TILE}"
        return Refusal(rule, f"{T} and {S}", "'chunked' takes any")
    if H & (H - 1) or not SMALLEST_TILE <= H <= WIDEST:
        rule = f"head_dim must be a power of two from {SMALLEST_TILE} to {WIDEST}"
        return Refusal(rule, H, "'chunked' takes any")
    return None


@over_mesh
def attend(problem: Problem) -> Float[Array, "B T N H"]:
    # Pallas takes a third of a second to import, which only GPUs need.
    from flax_encoder.ops.attention.flash_kernel import Known, Plan, attend_flash

    known = Known(
        problem.query_segments,
        problem.key_segments,
        None if problem.window is None else jnp.stack([jnp.asarray(w, jnp.int32) for w in problem.window]),
        None if problem.dropout_words is None else dropout_starts(problem),
    )
    plan = Plan(problem.scale, problem.dropout_rate, problem.static_window, kernels_are_interpreted())
    return attend_flash(problem.query, problem.key, problem.value, problem.bias, known, plan)
