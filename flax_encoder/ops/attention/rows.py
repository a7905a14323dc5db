"""A Pallas kernel for TPUs that has a row's keys in fast memory; see `rows_kernel`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_encoder.ops.attention.mesh import heads_here, over_mesh
from flax_encoder.ops.attention.problem import Problem, Refusal
from flax_encoder.ops.platform import kernels_are_interpreted, platform

LANES = 128
LARGEST = 2**20  # numbers of a row that lie side by side there: 8192 places of heads up to 128 wide


def refusal(problem: Problem) -> Refusal | None:
    (_, T, N, H), (S, K) = problem.query.shape, problem.key.shape[1:3]
    if platform() != "tpu":
        return Refusal("it is a kernel for TPUs", platform(), "leave implementation None")
    if problem.bias is not None:
        return Refusal("it adds no bias", f"one of shape {problem.bias.shape}", "'chunked' does")
    if problem.has_traced_window:
        return Refusal("its window must be two Python ints", "traced values", "'chunked' takes them")
    if N != K:
        return Refusal("each query head needs a key/value head", f"{K} for {N}", "'splash' groups heads")
    longest = LARGEST // max(LANES, H)
    if T != S or T % LANES or longest < T:
        rule = f"queries and keys must be as many, a multiple of {LANES} and at most {longest}"
        return Refusal(rule, f"{T} and {S}", "'splash' takes longer rows, 'chunked' any")
    if (LANES % H and H % LANES) or heads_here(N) * H % LANES:
        found = f"{heads_here(N)} of {H} on a device"
        return Refusal(f"heads must fill {LANES} lanes", found, "'chunked' takes any")
    return None


@over_mesh
def attend(problem: Problem) -> Float[Array, "B T N H"]:
    # Pallas takes a third of a second to import, which only TPUs need.
    from flax_encoder.ops.attention.rows_kernel import Plan, attend_rows

    B, T, N, H = problem.query.shape
    is_packed = problem.query_segments is not None
    plan = Plan(
        problem.scale, problem.dropout_rate, problem.window, problem.num_heads, H, is_packed, kernels_are_interpreted()
    )
    query, key, value = (x.reshape(B, T, N * H) for x in (problem.query, problem.key, problem.value))
    query_segments, key_segments = problem.query_segments, problem.key_segments
    if query_segments is None:
        query_segments = key_segments = jnp.ones((B, T), jnp.int32)
    words = jnp.zeros(2, jnp.uint32) if problem.dropout_words is None else problem.dropout_words
    first = jnp.asarray([problem.first_row, problem.first_head], jnp.int32)
    scalars = jnp.concatenate([jax.lax.bitcast_convert_type(words, jnp.int32), first])
    segments = tuple(x[:, None].astype(jnp.int32) for x in (query_segments, key_segments))
    tables = ()
    if problem.rope is not None:  # as wide as the lanes that a program turns at once
        tables = tuple(jnp.tile(a[:, :, 0], max(1, LANES // H)) for a in problem.rope)
    return attend_rows(query, key, value, segments, tables, scalars, plan).reshape(B, T, N, H)
