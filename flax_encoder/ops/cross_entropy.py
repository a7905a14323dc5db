"""Cross-entropy over a vocabulary, from logits or straight from the vectors that a table turns into logits.

Axes: B rows, M target positions a row, E embed, V vocabulary.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from flax_encoder.ops.linear import bias_gradient, linear, linear_gradients
from flax_encoder.ops.mesh import parts
from flax_encoder.ops.platform import platform

# Float32 logits that live at once. Larger chunks re-read the table and its gradient less often, smaller ones stay
# nearer to the caches: 2500 x 50432 ran fastest on a CPU in three to five chunks, and would on a TPU in one (LOG.md).
_CHUNK_BYTES = {"cpu": 2**27, "gpu": 2**29, "tpu": 2**29}
_SMALL_BYTES = 2**27  # below which it is not worth it to make gradients with the loss
logger = logging.getLogger(__name__)

Sums = tuple[Float[Array, ""], Float[Array, ""]]


class MeshAxes(NamedTuple):
    """The axes of the mesh at hand that split rows, the target positions of a row (None: none does), the vocabulary,
    and the table's vectors (one of the rows')."""

    rows: tuple[str, ...]
    positions: str | None
    vocab: str
    embed: str

    @property
    def targets(self) -> tuple[str, ...]:
        """Those that split targets, of whatever row."""
        return (*self.rows, self.positions) if self.positions else self.rows


def cross_entropy(logits: Float[Array, "B M V"], targets: Int[Array, "B M"], weights: Float[Array, "B M"]) -> Sums:
    """Minus each target's log-probability, and whether no other class beats it: both summed by weight, in float32."""
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    # Softmax needs the maximum anyway; an argmax would be one more pass over the logits.
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    correct = (target_logits >= logits.max(-1)).astype(jnp.float32)
    return (losses * weights).sum(), (correct * weights).sum()


def linear_cross_entropy(
    hidden: Float[Array, "B M E"],
    table: Float[Array, "V E"],
    bias: Float[Array, "V"] | None,
    targets: Int[Array, "B M"],
    weights: Float[Array, "B M"],
    *,
    dtype: str = "float32",
    implementation: str | None = None,
    mesh_axes: MeshAxes | None = None,
) -> Sums:
    """`cross_entropy` of the logits hidden table^T + bias, which need not all live at once.

    Args:
      dtype: of the operands of all three products; accumulation, softmax and the sums are float32.
      implementation: a name in `IMPLEMENTATIONS`, or None to choose by the size of one device's logits.
      mesh_axes: how the mesh set by `jax.set_mesh` splits the operands; None is not at all.

    Raises:
      ValueError: an unknown implementation.
    """
    if mesh_axes is not None and mesh_axes.positions:
        num_parts = parts(mesh_axes.positions)
        hidden, targets, weights = (_dealt(x, num_parts, mesh_axes) for x in (hidden, targets, weights))
    if implementation is None:
        implementation = _choose(hidden.shape[:2], table.shape[0], mesh_axes)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown cross-entropy implementation {implementation!r}; known are {', '.join(IMPLEMENTATIONS)}."
        )
    return IMPLEMENTATIONS[implementation](hidden, table, bias, targets, weights, dtype, mesh_axes)


def _dealt(x, num_parts: int, axes: MeshAxes):
    """Target positions [B M ...] shared out among the devices that share a row, with some of no weight if M does not
    divide: each then has logits of its own, where all would make the same."""
    if more := -x.shape[1] % num_parts:
        x = jax.lax.with_sharding_constraint(x, PartitionSpec(axes.rows))  # made on all, as is what made it
        x = jnp.pad(x, ((0, 0), (0, more), *((0, 0),) * (x.ndim - 2)))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes.rows, axes.positions))


def _choose(rows: tuple[int, int], vocab_size: int, axes: MeshAxes | None) -> str:
    num_parts = parts((*axes.targets, axes.vocab)) if axes else 1
    num_logits = math.prod(rows) * vocab_size // num_parts
    choice = "reference" if 4 * num_logits <= _SMALL_BYTES else "chunked"
    _log_choice(choice, num_logits)
    return choice


@functools.cache
def _log_choice(choice: str, num_logits: int) -> None:
    logger.info("cross-entropy of %d logits a device uses the %r implementation", num_logits, choice)


def reference_cross_entropy(hidden, table, bias, targets, weights, dtype: str, axes: MeshAxes | None) -> Sums:
    """The definition: every logit at once, and kept for the backward pass. The compiler sees to the mesh."""
    return cross_entropy(linear(hidden, table, bias, contract_last=True, dtype=dtype), targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def chunked_cross_entropy(hidden, table, bias, targets, weights, dtype: str, axes: MeshAxes | None) -> Sums:
    """A few positions of every row at a time, with both gradients made while their logits are there.

    What comes from above is one number, so that the gradients can be made for 1 in the forward pass and scaled in the
    backward pass: three products, where making the logits again takes four (Hsu et al., arXiv 2410.10989, section 3.2;
    Wijmans et al., arXiv 2411.09009, make them again). Chunks run over positions, since rows are what a mesh splits.
    """
    losses, correct, _ = _all_chunks(hidden, table, bias, targets, weights, dtype, axes, with_gradients=False)
    return (losses * weights).sum(), (correct * weights).sum()


def _forward(hidden, table, bias, targets, weights, dtype, axes):
    losses, correct, gradients = _all_chunks(hidden, table, bias, targets, weights, dtype, axes, with_gradients=True)
    sums = (losses * weights).sum(), (correct * weights).sum()
    operands = hidden, table, bias
    gradients = jax.tree.map(lambda gradient, operand: gradient.astype(operand.dtype), gradients, operands)
    return sums, (gradients, losses, correct)


def _backward(dtype, axes, residuals, cotangents):
    gradients, losses, correct = residuals
    d_sum, d_correct = cotangents
    d_operands = jax.tree.map(lambda gradient: d_sum.astype(gradient.dtype) * gradient, gradients)
    return *d_operands, None, d_sum * losses + d_correct * correct


chunked_cross_entropy.defvjp(_forward, _backward)


def _all_chunks(hidden, table, bias, targets, weights, dtype, axes, *, with_gradients: bool):
    """(losses, correct, gradients of the weighted sum or None), on each device for its own rows and tokens."""
    # Rounded here, since it is what devices that split the vectors send each other.
    operands = hidden.astype(dtype), table.astype(dtype), bias, targets, weights
    run = functools.partial(_own_chunks, dtype=dtype, axes=axes, with_gradients=with_gradients)
    if axes is None:
        return run(*operands)
    rows, tokens = PartitionSpec(axes.rows, axes.positions), PartitionSpec(axes.vocab)
    # Left to the compiler, the table's gradient would be summed over devices once a chunk instead of once.
    return jax.shard_map(
        run,
        in_specs=(rows, tokens, tokens, rows, rows),
        out_specs=(rows, rows, (rows, PartitionSpec(axes.vocab, axes.embed), tokens) if with_gradients else None),
        check_vma=False,
    )(*operands)


def _own_chunks(hidden, table, bias, targets, weights, *, dtype, axes: MeshAxes | None, with_gradients: bool):
    (B, M, E), V = hidden.shape, table.shape[0]
    num_chunks = max(1, min(M, -(-4 * B * M * V // _CHUNK_BYTES[platform()])))
    size = -(-M // num_chunks)
    over_vocab = (lambda collective, x: x) if axes is None else (lambda collective, x: collective(x, axes.vocab))
    if axes is not None:  # another device's token is -1 here
        targets = targets - V * jax.lax.axis_index(axes.vocab)
        targets = jnp.where((targets >= 0) & (targets < V), targets, -1)

    def chunks(x):
        x = jnp.pad(x, ((0, 0), (0, num_chunks * size - M), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(B, num_chunks, size, *x.shape[2:]), 1, 0).reshape(-1, B * size, *x.shape[2:])

    def whole(x):
        x = jnp.moveaxis(x.reshape(num_chunks, B, size, *x.shape[2:]), 0, 1)
        return x.reshape(B, num_chunks * size, *x.shape[3:])[:, :M]

    def chunk(total, xs):
        x, target, weight = xs
        logits = linear(x, table, bias, contract_last=True, dtype=dtype)
        top = over_vocab(jax.lax.pmax, logits.max(-1))
        # Exponentials are made once: XLA:CPU stores them anyway, for its sums.
        exponentials = jnp.exp(logits - top[:, None])
        normalizer = over_vocab(jax.lax.psum, exponentials.sum(-1))
        at_target = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
        at_target = over_vocab(jax.lax.psum, jnp.where(target < 0, 0.0, at_target))
        losses, correct = top + jnp.log(normalizer) - at_target, (at_target >= top).astype(jnp.float32)
        if not with_gradients:
            return None, (losses, correct)
        if dtype == "bfloat16" and platform() == "tpu":
            # Made and rounded in the pass that sums them; three products read them, in half the bytes.
            exponentials = jax.lax.optimization_barrier(exponentials.astype(dtype)).astype(jnp.float32)
        scale = weight / normalizer
        is_target = jnp.arange(V, dtype=target.dtype) == target[:, None]
        d_logits = exponentials * scale[:, None] - jnp.where(is_target, weight[:, None], 0.0)
        d_x, d_table = linear_gradients(x, table, d_logits, contract_last=True, dtype=dtype)
        d_bias = None
        if bias is not None and dtype == "bfloat16" and platform() == "tpu":
            d_bias = bias_gradient(d_logits)
        elif bias is not None:  # the sum of d_logits, by a product, so that they need not be stored in float32 for it
            at = jnp.where(target < 0, V, target)
            d_bias = jnp.dot(scale, exponentials, precision="highest").at[at].add(-weight, mode="drop")
        total = jax.tree.map(jnp.add, total, (d_table, d_bias))
        return total, (losses, correct, over_vocab(jax.lax.psum, d_x))

    start = jnp.zeros((V, E)), None if bias is None else jnp.zeros(V)
    start = start if with_gradients else None
    total, (losses, correct, *d_hidden) = jax.lax.scan(chunk, start, (chunks(hidden), chunks(targets), chunks(weights)))
    losses, correct = whole(losses), whole(correct)
    if not with_gradients:
        return losses, correct, None
    d_table, d_bias = total
    if axes is not None:
        others = tuple(name for name in axes.targets if name != axes.embed)
        d_table = jax.lax.psum_scatter(jax.lax.psum(d_table, others), axes.embed, scatter_dimension=1, tiled=True)
        d_bias = None if bias is None else jax.lax.psum(d_bias, axes.targets)
    return losses, correct, (whole(d_hidden[0]), d_table, d_bias)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "reference": reference_cross_entropy,
    "chunked": chunked_cross_entropy,
}
