"""Products of a layer whose features the mesh splits over `tensor`, between vectors whose tokens it splits there too.

What lies between such products (the residual stream, norms, dropout) is the same work on the same tokens for every
device along `tensor`, unless each has tokens of its own. So tokens are gathered before the products that a layer
begins with, and what its last products add up is scattered again (Korthikanti et al., arXiv 2205.05198, section 4.2.2;
an all-reduce sends as much). Kept for the backward pass are a device's own tokens and its own part of the kernels,
which are gathered again. Left to the compiler, tokens are gathered several times over, and kernels with them (LOG.md).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from flax_encoder.ops.linear import linear, linear_gradients, made_once
from flax_encoder.ops.mesh import BATCH_AXES, HEAD_AXES, LENGTH_AXES, TOKEN_AXES, is_spread, splitting

PRODUCT = "product of tokens"
"""The name of each result here, by which a checkpoint policy can keep it. Policies that keep products do not see those
within a `shard_map`."""
_KERNEL_AXES = ("fsdp",)
"""Those of the mesh that split a kernel's other side, that of the residual stream."""


class _Layout(NamedTuple):
    """Mesh axes by what they split; all that a product and its gradients have to know of the mesh."""

    rows: tuple[str, ...] | None
    context: tuple[str, ...] | None
    embed: tuple[str, ...] | None

    @property
    def tokens(self) -> PartitionSpec:
        """Of [B, T, D]: a device's own tokens."""
        return PartitionSpec(self.rows, (*(self.context or ()), *HEAD_AXES))

    @property
    def features(self) -> PartitionSpec:
        """Of [B, T, F]: all tokens that devices along `tensor` have together, and a device's own features."""
        return PartitionSpec(self.rows, self.context, HEAD_AXES)


def splits_tokens(shape: Sequence[int], embed_dim: int, num_features: int) -> bool:
    """Whether the mesh at hand splits vectors [B, T, ...] by tokens over `tensor`, between products from or to
    `num_features` features: it has such an axis, and its axes divide rows, tokens, and both sides of kernels."""
    if len(shape) < 3 or not is_spread():
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape.get(HEAD_AXES[0], 1) == 1:
        return False
    sizes = ((BATCH_AXES, shape[0]), (TOKEN_AXES, shape[1]), (_KERNEL_AXES, embed_dim), (HEAD_AXES, num_features))
    return all(splitting(mesh, axes, size) == splitting(mesh, axes, 0) for axes, size in sizes)


def products_of_tokens(
    x: Float[Array, "B T D"], kernels: Sequence[Float[Array, "D _"]], *, dtype: str, out_dtype: str
) -> list[Float[Array, "B T _"]]:
    """x @ kernel for several kernels, where `splits_tokens`: tokens are split in x, features in the results.

    Args:
      dtype, out_dtype: as `linear` takes them.
    """
    return checkpoint_name(_gathered(x, tuple(kernels), dtype, out_dtype), PRODUCT)


def product_to_tokens(
    x: Float[Array, "B T F"], kernel: Float[Array, "F D"], *, dtype: str, out_dtype: str
) -> Float[Array, "B T D"]:
    """x @ kernel where `splits_tokens`: features are split in x, tokens in the result, which is added up in float32.

    Args:
      dtype, out_dtype: as `linear` takes them.
    """
    return checkpoint_name(_scattered(x, kernel, dtype, out_dtype), PRODUCT)


def _layout() -> _Layout:
    mesh = jax.sharding.get_abstract_mesh()
    return _Layout(*(splitting(mesh, axes, 0) for axes in (BATCH_AXES, LENGTH_AXES, _KERNEL_AXES)))


def _over_mesh(run, in_specs, out_specs):
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _gather(x, axes: tuple[str, ...] | None, axis: int):
    return jax.lax.all_gather(x, axes, axis=axis, tiled=True) if axes else x


def _scatter(x, axes: tuple[str, ...] | None, axis: int):
    return jax.lax.psum_scatter(x, axes, scatter_dimension=axis, tiled=True) if axes else x


def _once_there(x, kernels, g):
    """The same, when the gradient is there: without the barrier XLA would find what the forward pass gathered, or
    gather early, and all layers' would live at once."""
    return jax.lax.optimization_barrier((x, kernels, g))


def _matrix(x):
    return x.reshape(-1, x.shape[-1])


def _own_kernel_gradient(d_kernel, layout: _Layout, embed_axis: int):
    """A device's part of the sum over all rows and tokens; where `fsdp` splits kernels, it splits rows."""
    others = (*(axis for axis in layout.rows or () if axis not in (layout.embed or ())), *(layout.context or ()))
    d_kernel = _scatter(d_kernel, layout.embed, embed_axis)
    return jax.lax.psum(d_kernel, others) if others else d_kernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gathered(x, kernels, dtype, out_dtype):
    return _gathered_forward(x, kernels, dtype, out_dtype)[0]


def _gathered_forward(x, kernels, dtype, out_dtype):
    layout = _layout()
    likes = jnp.zeros((), x.dtype), [jnp.zeros((), kernel.dtype) for kernel in kernels]
    # Rounded before they are sent.
    x, kernels = x.astype(dtype), tuple(kernel.astype(dtype) for kernel in kernels)

    def own(x, kernels):
        x = _gather(x, HEAD_AXES, 1)
        return [linear(x, _gather(k, layout.embed, 0), dtype=dtype, out_dtype=out_dtype) for k in kernels]

    run = _over_mesh(own, (layout.tokens, PartitionSpec(layout.embed, HEAD_AXES)), layout.features)
    return run(x, kernels), (x, kernels, likes)


def _gathered_backward(dtype, out_dtype, residuals, gradients):
    x, kernels, (x_like, kernels_like) = residuals
    x, kernels, gradients = _once_there(x, kernels, gradients)
    layout = _layout()

    def own(x, kernels, gradients):
        x = _gather(x, HEAD_AXES, 1)
        d_x, d_kernels = jnp.zeros((), x_like.dtype), []
        for kernel, g in zip(kernels, gradients, strict=True):
            kernel, g = _gather(kernel, layout.embed, 0), _matrix(made_once(g, dtype))
            more, d_kernel = linear_gradients(_matrix(x), kernel, g, dtype=dtype, x_dtype=x_like.dtype.name)
            d_x = d_x + more
            d_kernels.append(_own_kernel_gradient(d_kernel, layout, 0))
        return _scatter(d_x.reshape(x.shape), HEAD_AXES, 1), tuple(d_kernels)

    of_kernels = PartitionSpec(layout.embed, HEAD_AXES)
    run = _over_mesh(own, (layout.tokens, of_kernels, layout.features), (layout.tokens, of_kernels))
    d_x, d_kernels = run(x, kernels, gradients)
    return d_x, tuple(d.astype(like.dtype) for d, like in zip(d_kernels, kernels_like, strict=True))


_gathered.defvjp(_gathered_forward, _gathered_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _scattered(x, kernel, dtype, out_dtype):
    return _scattered_forward(x, kernel, dtype, out_dtype)[0]


def _scattered_forward(x, kernel, dtype, out_dtype):
    layout = _layout()
    likes = jnp.zeros((), x.dtype), jnp.zeros((), kernel.dtype)
    x, kernel = x.astype(dtype), kernel.astype(dtype)

    def own(x, kernel):
        return _scatter(linear(x, _gather(kernel, layout.embed, 1), dtype=dtype), HEAD_AXES, 1)

    run = _over_mesh(own, (layout.features, PartitionSpec(HEAD_AXES, layout.embed)), layout.tokens)
    return run(x, kernel).astype(out_dtype), (x, kernel, likes)


def _scattered_backward(dtype, out_dtype, residuals, g):
    x, kernel, (x_like, kernel_like) = residuals
    x, kernel, g = _once_there(x, kernel, g)
    layout = _layout()

    def own(x, kernel, g):
        g = _matrix(_gather(g.astype(dtype), HEAD_AXES, 1))
        kernel = _gather(kernel, layout.embed, 1)
        d_x, d_kernel = linear_gradients(_matrix(x), kernel, g, dtype=dtype, x_dtype=x_like.dtype.name)
        return d_x.reshape(x.shape), _own_kernel_gradient(d_kernel, layout, 1)

    of_kernel = PartitionSpec(HEAD_AXES, layout.embed)
    run = _over_mesh(own, (layout.features, of_kernel, layout.tokens), (layout.features, of_kernel))
    d_x, d_kernel = run(x, kernel, g)
    return d_x, d_kernel.astype(kernel_like.dtype)


_scattered.defvjp(_scattered_forward, _scattered_backward)
