"""The mesh of `jax.set_mesh` as ops see it: the axes that split rows, tokens and heads."""

import math

import jax

BATCH_AXES, LENGTH_AXES, HEAD_AXES = ("data", "fsdp"), ("context",), ("tensor",)
TOKEN_AXES = (*LENGTH_AXES, *HEAD_AXES)
"""Those that split tokens between a layer's products, where features are not (ops/tensor_parallel.py)."""


def parts(axes: tuple[str, ...] | str) -> int:
    """Over how many devices the mesh splits arrays along these axes: 1 without a mesh, and within a `shard_map`, where
    arrays are a device's part already."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return 1
    return math.prod(mesh.shape.get(axis, 1) for axis in ((axes,) if isinstance(axes, str) else axes))


def is_spread() -> bool:
    """Whether arrays lie on several devices and it is the compiler that splits what is done to them."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and not mesh.manual_axes and mesh.size > 1


def splitting(mesh: jax.sharding.AbstractMesh, axes: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    """Those of the mesh's axes that split a dimension: as many of them, from the first, as divide it. None if each
    device has it whole."""
    axes = tuple(a for a in axes if mesh.shape.get(a, 1) > 1)
    while axes and size % math.prod(mesh.shape[a] for a in axes):
        axes = axes[:-1]
    return axes or None


def part_index(mesh: jax.sharding.AbstractMesh, axes: tuple[str, ...] | None):
    """Within a `shard_map`, which of the parts along `axes` is this device's."""
    index = 0
    for axis in axes or ():
        index = index * mesh.shape[axis] + jax.lax.axis_index(axis)
    return index
