"""Where arrays live: every parameter axis has a logical name, and one table maps names to mesh axes."""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array

from flax_encoder.ops.mesh import parts, splitting

_ONLY_SHAPES: ContextVar[bool] = ContextVar("only_shapes", default=False)
MESH_AXES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": "context",
    "tokens": ("context", "tensor"),  # of the residual stream, between products that `tensor` splits
    "places": None,
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "classes": None,
    "distances": None,
    "width": None,
    "token_types": None,
    "directions": None,
    "gates": None,
    "cells": None,
    "rank": None,  # of adapters
    "features": None,  # vectors as long as the residual stream: too small to be worth splitting
}


def partition_spec(*names: str) -> PartitionSpec:
    """The mesh axes of an array whose axes have these logical names; an unknown name lists those that are known."""
    if unknown := [n for n in names if n not in MESH_AXES]:
        raise ValueError(f"unknown logical axis {unknown[0]!r}; known are {', '.join(MESH_AXES)}.")
    return PartitionSpec(*(MESH_AXES[n] for n in names))


def round_up_vocab(size: int) -> int:
    """The rows an embedding table is stored with: a multiple of 128, which suits matrix units and any usual mesh."""
    return -(-size // 128) * 128


def constrain(x: Array, *names: str) -> Array:
    """Pin an activation's sharding, under `jax.set_mesh`; without a mesh there is nothing to pin.

    An axis that its mesh axes do not divide, such as the one token that a decoder writes next, is not split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = partition_spec(*names)
    axes = (splitting(mesh, _as_tuple(axes), size) for axes, size in zip(spec, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def _as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def is_split(name: str) -> bool:
    """Whether the mesh at hand splits this axis over several devices."""
    return parts(_as_tuple(MESH_AXES[name])) > 1


def normal(std: float) -> Callable[..., Array]:
    """Normal draws cut at two standard deviations, as BERT's are."""
    return lambda key, shape: std * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)


def zeros(key: Array, shape: tuple[int, ...]) -> Array:
    return jnp.zeros(shape, jnp.float32)


def ones(key: Array, shape: tuple[int, ...]) -> Array:
    return jnp.ones(shape, jnp.float32)


def param(rngs: nnx.Rngs, init: Callable[..., Array], **axes: int) -> nnx.Param:
    """A float32 parameter with one keyword an axis: its logical name and its size."""
    shape = tuple(axes.values())
    # To trace how numbers are drawn takes most of the time that a model of shapes takes.
    value = jnp.zeros(shape, jnp.float32) if _ONLY_SHAPES.get() else init(rngs.params(), shape)
    # Eager sharding would need a mesh at birth; parameters are born sharded by `jit` instead (training/sharding.py).
    return nnx.Param(value, out_sharding=tuple(axes), eager_sharding=False)


def abstract_model(make_model: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, nnx.State]:
    """(graphdef, parameters as shapes), with nothing computed."""
    token = _ONLY_SHAPES.set(True)
    try:
        # Under a mesh Flax would take logical names for the mesh's own.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return nnx.split(nnx.eval_shape(make_model), nnx.Param)
    finally:
        _ONLY_SHAPES.reset(token)


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of parameters as {"encoder.norm.scale": array, ...}."""
    return {".".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(by_path: Mapping[str, Any]) -> dict[str, Any]:
    """The tree again."""
    tree: dict[str, Any] = {}
    for path, leaf in by_path.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
