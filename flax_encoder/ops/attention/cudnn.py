"""cuDNN's fused attention, through JAX: documents by lengths where each row is one, else by a mask.

Its gradient of the queries is summed in no fixed order, so the last bits differ from run to run.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_encoder.ops.attention.problem import Problem, Refusal, visible
from flax_encoder.ops.platform import platform

IMPLEMENTATION = "cudnn"  # of jax.nn.dot_product_attention; "xla" is the same contract where there is no GPU


def refusal(problem: Problem) -> Refusal | None:
    query, bias = problem.query, problem.bias
    if platform() != "gpu":
        return Refusal("it is a kernel for NVIDIA GPUs", platform(), "leave implementation None")
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return Refusal("its operands are bfloat16 or float16", query.dtype, "'chunked' takes float32")
    if query.shape[3] % 8 or query.shape[3] > 128:
        return Refusal("head_dim must be a multiple of 8 and at most 128", query.shape[3], "'chunked' takes any")
    T, S = query.shape[1], problem.key.shape[1]
    is_added = bias is not None or (problem.query_segments is not None and problem.lengths is None)
    if (is_added or problem.window is not None) and (T % 2 or S % 2):
        rule = "with a bias, packed rows or a window it takes even lengths"
        return Refusal(rule, f"{T} and {S}", "'chunked' takes any")
    if bias is not None and bias.dtype != query.dtype:
        return Refusal("a bias must have the query's dtype", f"{bias.dtype} for {query.dtype}", "'chunked' takes any")
    if problem.dropout_words is not None:
        return Refusal("its dropout has a mask of its own", problem.dropout_rate, "'chunked' drops by the key alone")
    return None


def attend(problem: Problem) -> Float[Array, "B T N H"]:
    arrays, window, lengths = (problem.query, problem.key, problem.value), problem.window, problem.lengths
    T, S = arrays[0].shape[1], arrays[1].shape[1]
    is_causal = problem.static_window is not None and window[1] == 0 and T == S
    query_segments, key_segments = problem.query_segments, problem.key_segments
    by_mask = None, None
    if query_segments is not None:
        is_token = [(s > 0)[..., None, None] for s in (query_segments, key_segments, key_segments)]
        # What cuDNN leaves in padding's places, of gradients too, is nobody's business.
        arrays = [jnp.where(is_one, x, 0) for is_one, x in zip(is_token, arrays, strict=True)]
        if lengths is None:
            by_mask = query_segments[:, None, :, None], key_segments[:, None, None, :]
    # Added to the logits it leaves other documents' probabilities at 0 exactly; it is as large as one head's.
    mask = visible(*by_mask, None if is_causal else window, jnp.arange(T)[:, None], jnp.arange(S))
    out = jax.nn.dot_product_attention(
        *arrays,
        problem.bias,
        mask,
        scale=problem.scale,
        is_causal=is_causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=window if is_causal and window[0] < S - 1 else None,
        implementation=IMPLEMENTATION,
    )
    return out if query_segments is None else jnp.where(is_token[0], out, 0)
