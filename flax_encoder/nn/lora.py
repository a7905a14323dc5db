"""Low-rank adapters (Hu et al., arXiv 2106.09685) beside a model's products, added into its kernels before it is run.

The modules know nothing of them: a model with adapters has them at `lora`, in a tree like its own, and `assembled`
gives the model with W + alpha / rank * A B where W was.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flax_encoder.config import ConfigError, LoraConfig
from flax_encoder.nn.partition import param, zeros


class Adapter(nnx.Module):
    """A and B of a stack of kernels [L, inputs, outputs]: `a` is [L, inputs, r], `b` is [L, r, outputs]; `b` starts
    at 0, and `a` as torch starts a linear map."""

    def __init__(
        self, inputs: Mapping[str, int], outputs: Mapping[str, int], layers: int, rank: int, *, rngs: nnx.Rngs
    ):
        bound = math.prod(inputs.values()) ** -0.5
        uniform = lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)  # noqa: E731
        self.a = param(rngs, uniform, layers=layers, **inputs, rank=rank)
        self.b = param(rngs, zeros, layers=layers, rank=rank, **outputs)

    def product(self) -> Float[Array, "L *io"]:
        """A B of each layer, [L, inputs, outputs]."""
        a, b = self.a[...], self.b[...]
        L, r = b.shape[:2]
        both = jnp.matmul(a.reshape(L, -1, r), b.reshape(L, r, -1), precision=jax.lax.Precision.HIGHEST)
        return both.reshape(*a.shape[:-1], *b.shape[2:])


class Adapters(nnx.Module):
    """The adapters of a model, at the paths of the linear maps that they are beside."""

    def __init__(self, model: nnx.Module, config: LoraConfig, *, rngs: nnx.Rngs):
        self.scale = config.alpha / config.rank
        self.paths: tuple[str, ...] = ()
        used, known = set(), {}
        for path, kernel in _kernels(model):
            name = path.rpartition(".")[2]
            known[name] = None
            if not (hits := [t for t in config.targets if fnmatchcase(name, t)]):
                continue
            used.update(hits)
            self.paths += (path,)
            names = kernel.get_metadata()["out_sharding"][1:]
            sizes = dict(zip(names, kernel.shape[1:], strict=True))
            count = _num_inputs(names)
            inputs, outputs = ({n: sizes[n] for n in part} for part in (names[:count], names[count:]))
            parent, _, last = path.rpartition(".")
            node: Any = self
            for part in parent.split("."):
                if not hasattr(node, part):
                    setattr(node, part, nnx.Module())
                node = getattr(node, part)
            setattr(node, last, Adapter(inputs, outputs, kernel.shape[0], config.rank, rngs=rngs))
        if unknown := [t for t in config.targets if t not in used]:
            raise ConfigError(
                f"lora.targets must name matrices of the encoder's layers: {unknown[0]!r} is not one; they are "
                f"{', '.join(known) or 'none'}."
            )


def _kernels(model: Any) -> Iterator[tuple[str, Any]]:
    """(path, kernel) of each stacked linear map of the encoder whose axes are its inputs and then its outputs."""
    for path, leaf in nnx.to_flat_state(nnx.state(model.encoder, nnx.Param)):
        names = leaf.get_metadata().get("out_sharding") or ()
        if path[-1] == "kernel" and names[:1] == ("layers",) and _num_inputs(names[1:]):
            yield ".".join(map(str, ("encoder", *path[:-1]))), leaf


def _num_inputs(names: tuple[str, ...]) -> int:
    """How many axes, at the beginning, are inputs of a kernel from `embed` or to it; 0 of another array."""
    if len(names) < 2 or len(set(names)) < len(names):
        return 0
    return 1 if names[0] == "embed" else len(names) - 1 if names[-1] == "embed" else 0


def with_adapters(make_model: Callable[[], nnx.Module], config: LoraConfig, seed: int) -> Callable[[], nnx.Module]:
    """A factory of the model with its adapters at `lora`.

    Raises (as it is called):
      ConfigError: a target that no layer of the encoder has.
    """

    def make():
        model: Any = make_model()
        model.lora = Adapters(model, config, rngs=nnx.Rngs(jax.random.fold_in(jax.random.key(seed), 1)))
        return model

    return make if config.rank else make_model


def assembled(graphdef: Any, params: Any) -> Any:
    """The model of these parameters, its adapters added into its kernels; it has no `lora` then."""
    model = nnx.merge(graphdef, params)
    adapters = getattr(model, "lora", None)
    if adapters is None:
        return model
    for path in adapters.paths:
        layer, adapter = model, adapters
        for part in path.split("."):
            layer, adapter = getattr(layer, part), getattr(adapter, part)
        layer.kernel[...] = layer.kernel[...] + adapters.scale * adapter.product()
    del model.lora
    return model
