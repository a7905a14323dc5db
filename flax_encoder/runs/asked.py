"""The compiled programs of a model that is queried, one for many tokens at once and one for few."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_encoder.ops.platform import platform

FEW_TOKENS = 256  # the largest batch for which the program for few tokens is worth its longer compilation (LOG.md)


@dataclasses.dataclass(frozen=True)
class AskedModel:
    """A model's functions, each compiled once for each shape of its arguments, and once more for few tokens.

    The program for few tokens runs the layers one after another, each on weights that lie apart. A loop over stacked
    weights copies each layer's out of the stack first, on a CPU, which takes longer than few tokens' products. The
    arithmetic is the same and results differ by rounding. The layers' weights are in memory twice once it has run.
    """

    model: nnx.Module
    make_unrolled: Callable[[], Any]
    """The graphdef of the model with `scan_layers` off; its parameters are `model`'s."""

    @functools.cached_property
    def split(self) -> tuple[Any, nnx.State]:
        """(graphdef, parameters) of the model."""
        return nnx.split(self.model)

    def function(self, of_model: Callable[..., Any]) -> Callable[..., Any]:
        """`of_model(model, *args)`, compiled, as a function of `is_few` and `args`."""
        graphdef, params = self.split
        for_many = jax.jit(lambda params, *args: of_model(nnx.merge(graphdef, params), *args))
        for_few = jax.jit(lambda weights, *args: of_model(self._put_together(weights), *args))

        def call(is_few: bool, *args: Any) -> Any:
            return for_few(self._apart, *args) if is_few and platform() == "cpu" else for_many(params, *args)

        return call

    @functools.cached_property
    def _apart(self) -> list[jax.Array | list[jax.Array]]:
        """Each parameter's value; of one that is stacked, the slices [1, ...] along its layers."""
        variables = jax.tree.leaves(self.split[1], is_leaf=lambda x: isinstance(x, nnx.Variable))
        values = [(v[...], (v.get_metadata().get("out_sharding") or ("",))[0] == "layers") for v in variables]
        # By NumPy, which needs no program for each shape.
        slices = [np.split(np.asarray(value), len(value)) if is_stacked else value for value, is_stacked in values]
        return jax.device_put(slices)

    @functools.cached_property
    def _unrolled(self) -> Any:
        return self.make_unrolled()

    def _put_together(self, weights: list[jax.Array | list[jax.Array]]) -> nnx.Module:
        """The unrolled model: it takes slices of what is stacked here, and the compiler makes neither."""
        values = [jnp.concatenate(value) if isinstance(value, list) else value for value in weights]
        is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        variables, structure = jax.tree.flatten(self.split[1], is_leaf=is_variable)
        params = [variable.replace(value) for variable, value in zip(variables, values, strict=True)]
        return nnx.merge(self._unrolled, jax.tree.unflatten(structure, params))
