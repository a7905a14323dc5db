"""cuDNN's fused attention, through JAX, for the problems that it solves exactly."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_encoder.ops.attention.problem import Problem, Refusal
from flax_encoder.ops.platform import platform


def refusal(problem: Problem) -> Refusal | None:
    query, window, bias = problem.query, problem.window, problem.bias
    if platform() != "gpu":
        return Refusal("it is a kernel for NVIDIA GPUs", platform(), "leave implementation None")
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return Refusal("its operands are bfloat16 or float16", query.dtype, "'chunked' takes float32")
    if query.shape[3] % 8 or query.shape[3] > 128:
        return Refusal("head_dim must be a multiple of 8 and at most 128", query.shape[3], "'chunked' takes any")
    if problem.query_segments is not None:
        return Refusal("a row must be one document", "segment_ids", "'chunked' takes packed rows and padding")
    is_self_attention = query.shape[1] == problem.key.shape[1]
    if window is not None and (problem.has_traced_window or window[1] != 0 or not is_self_attention):
        rule = "its window must be two Python ints of which the right is 0, over as many keys as queries"
        return Refusal(rule, window, "'chunked' takes any")
    if bias is not None and bias.dtype != query.dtype:
        return Refusal("a bias must have the query's dtype", f"{bias.dtype} for {query.dtype}", "'chunked' takes any")
    if problem.dropout_words is not None:
        return Refusal("its dropout has a mask of its own", problem.dropout_rate, "'chunked' drops by the key alone")
    return None


def attend(problem: Problem) -> Float[Array, "B T N H"]:
    is_causal = problem.window is not None
    return jax.nn.dot_product_attention(
        problem.query,
        problem.key,
        problem.value,
        problem.bias,
        scale=problem.scale,
        is_causal=is_causal,
        local_window_size=problem.window if is_causal and problem.window[0] < problem.key.shape[1] - 1 else None,
        implementation="cudnn",
    )
