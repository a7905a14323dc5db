"""JAX's splash attention, a Pallas kernel for TPUs that skips blocks outside a window and is linear in memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_encoder.ops.attention.mesh import over_mesh
from flax_encoder.ops.attention.problem import Problem, Refusal
from flax_encoder.ops.platform import kernels_are_interpreted, platform

LANES = 128
LARGEST_BLOCK = 512


def refusal(problem: Problem) -> Refusal | None:
    T, S = problem.query.shape[1], problem.key.shape[1]
    if platform() != "tpu":
        return Refusal("it is a kernel for TPUs", platform(), "leave implementation None")
    if problem.bias is not None:
        return Refusal("it adds no bias", f"one of shape {problem.bias.shape}", "'chunked' does")
    if problem.dropout_words is not None:
        return Refusal("it has no dropout", problem.dropout_rate, "'chunked' and 'rows' have")
    if problem.has_traced_window:
        return Refusal("its window must be two Python ints", "traced values", "'chunked' takes them")
    if T != S or T % LANES:
        return Refusal(
            f"queries and keys must be as many, a multiple of {LANES}", f"{T} and {S}", "'chunked' takes any"
        )
    if problem.query_segments is not problem.key_segments:
        # Its softmax of a query that sees no key is not defined; in self-attention each sees itself.
        return Refusal("keys must be the queries' own tokens", "key_segment_ids of their own", "'chunked' takes them")
    return None


@over_mesh
def attend(problem: Problem) -> Float[Array, "B T N H"]:
    # Pallas takes a third of a second to import, which only TPUs need.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, N = problem.query.shape[1:3]
    mask = splash.FullMask((T, T)) if problem.window is None else splash.LocalMask((T, T), problem.window, 0)
    block = max(b for b in range(LANES, LARGEST_BLOCK + 1, LANES) if T % b == 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(*[block] * 8),
        head_shards=1,
        q_seq_shards=1,
        interpret=kernels_are_interpreted(),
    )
    scaled = (problem.query.astype(jnp.float32) * problem.scale).astype(problem.query.dtype)
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (scaled, problem.key, problem.value))
    if problem.query_segments is None:
        out = jax.vmap(kernel)(query, key, value)
        return jnp.swapaxes(out, 1, 2)
    segments = splash.SegmentIds(problem.query_segments, problem.key_segments)
    out = jnp.swapaxes(jax.vmap(kernel)(query, key, value, segments), 1, 2)
    # Padding is a segment of its own to the kernel. Cut here, it moves nothing and nothing moves it.
    return jnp.where((problem.query_segments > 0)[:, :, None, None], out, jnp.zeros_like(out))
