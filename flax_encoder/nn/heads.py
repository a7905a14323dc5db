"""Heads, which read the encoder's output at target positions."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_encoder.config import Activation, EncoderConfig, HeadConfig
from flax_encoder.nn.feed_forward import ACTIVATIONS
from flax_encoder.nn.linear import Linear
from flax_encoder.nn.normalization import Norm
from flax_encoder.nn.partition import MESH_AXES, is_split, normal, param, zeros
from flax_encoder.ops.cross_entropy import MeshAxes, linear_cross_entropy
from flax_encoder.ops.dropout import dropout
from flax_encoder.ops.gather import take_tokens
from flax_encoder.ops.linear import linear
from flax_encoder.ops.platform import precision


def gather_rows(hidden: Float[Array, "B T D"], target_positions: Int[Array, "B M"]) -> Float[Array, "B M D"]:
    """The vectors at the target positions: heads skip the rest, which halves a small masked LM's step."""
    return take_tokens(hidden, target_positions)


def segment_mean(
    hidden: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], target_positions: Int[Array, "B M"]
) -> Float[Array, "B M D"]:
    """The mean vector of the document that each target position lies in."""
    target_segments = jnp.take_along_axis(segment_ids, target_positions, axis=1)
    member = (segment_ids[:, None, :] == target_segments[:, :, None]).astype(jnp.float32)
    sums = jnp.einsum("BMT,BTD->BMD", member, hidden, precision=precision(hidden))
    return sums / jnp.maximum(member.sum(-1, keepdims=True), 1.0)


class Head(nnx.Module):
    """The transform that heads begin with: dense, activation, norm, each as `HeadConfig` and the head's kind say."""

    def __init__(
        self,
        config: EncoderConfig,
        head: HeadConfig,
        width: int,
        *,
        transform: bool = True,
        activation: Activation,
        norm: bool,
        dense_bias: bool,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.activation = head.activation or activation
        has_bias = dense_bias if head.dense_bias is None else head.dense_bias
        options = {"std": config.init_std, "use_bias": has_bias, "dtype": dtype, "rngs": rngs}
        has_dense = transform if head.transform is None else head.transform
        inputs, outputs = {"embed": config.embed_dim}, {"features": width}
        self.dense = Linear(inputs, outputs, is_alone=True, **options) if has_dense else None
        has_norm = has_dense and (norm if head.norm is None else head.norm)
        self.norm = Norm(config, width, rngs=rngs) if has_norm else None

    def transform(self, x: Float[Array, "B M D"]) -> Float[Array, "B M E"]:
        if self.dense is None:
            return x
        x = ACTIVATIONS[self.activation](self.dense(x))
        return x if self.norm is None else self.norm(x)


class MaskedLMHead(Head):
    """BERT's head: the transform, then a product with the token embedding or with a table of its own, plus a bias."""

    def __init__(self, config: EncoderConfig, head: HeadConfig | None = None, *, rngs: nnx.Rngs):
        head = head or HeadConfig()
        width = (None if head.transform is False else config.embedding_dim) or config.embed_dim
        if head.tied and width != (config.embedding_dim or config.embed_dim):
            raise ValueError(
                f"tied logits need vectors as wide as the embedding: got {width} for {config.embedding_dim}; "
                "set head.transform, or head.tied to False."
            )
        kind = {"activation": config.activation, "norm": True, "dense_bias": config.use_bias, "dtype": config.dtype}
        super().__init__(config, head, width, **kind, rngs=rngs)
        self.token = None if head.tied else param(rngs, normal(config.init_std), vocab=config.vocab_size, embed=width)
        self.bias = param(rngs, zeros, vocab=config.vocab_size) if head.out_bias else None

    def __call__(self, hidden: Float[Array, "B M D"], token_embedding: Float[Array, "V E"]) -> Float[Array, "B M V"]:
        return linear(*self._operands(hidden, token_embedding), contract_last=True, dtype=self.config.dtype)

    def cross_entropy(
        self,
        hidden: Float[Array, "B M D"],
        token_embedding: Float[Array, "V E"],
        targets: Int[Array, "B M"],
        weights: Float[Array, "B M"],
        smoothing: float = 0.0,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The loss of these logits and the number of correct ones, summed by weight. Large logits are never all in
        memory.

        Args:
          smoothing: share of each target that is spread evenly over all tokens (Szegedy et al., arXiv 1512.00567).
        """
        operands = x, table, bias = self._operands(hidden, token_embedding)
        total, correct = linear_cross_entropy(
            *operands, targets, weights, dtype=self.config.dtype, mesh_axes=_mesh_axes()
        )
        if smoothing:
            # The target's logit counts less, and the mean of all more: the sum over the vocabulary is the same.
            own = jnp.einsum("BMD,BMD->BM", x, table[targets], precision=precision(x))
            mean = jnp.einsum("BMD,D->BM", x, table.mean(0), precision=precision(x))
            difference = own - mean if bias is None else own - mean + bias[targets] - bias.mean()
            total = total + smoothing * (weights * difference).sum()
        return total, correct

    def _operands(self, hidden, token_embedding):
        table = token_embedding if self.token is None else self.token[...]
        return self.transform(hidden), table, None if self.bias is None else self.bias[...]


def _mesh_axes() -> MeshAxes | None:
    if not any(is_split(name) for name in ("batch", "length", "vocab", "embed")):
        return None
    positions = MESH_AXES["length"] if is_split("length") else None
    return MeshAxes(MESH_AXES["batch"], positions, MESH_AXES["vocab"], MESH_AXES["embed"])


class ClassificationHead(Head):
    """The transform (BERT's pooler: dense, tanh), dropout, and a projection to classes, in float32. With 0 classes it
    does not project.

    Args:
      transform: whether there is a transform, if `head` leaves it open.
    """

    def __init__(
        self,
        config: EncoderConfig,
        num_classes: int,
        head: HeadConfig | None = None,
        *,
        transform: bool = True,
        rngs: nnx.Rngs,
    ):
        head = head or HeadConfig()
        kind = {"transform": transform, "activation": "tanh", "norm": False, "dense_bias": True, "dtype": "float32"}
        super().__init__(config, head, config.embed_dim, **kind, rngs=rngs)
        options = {"std": config.init_std, "use_bias": head.out_bias, "dtype": "float32", "rngs": rngs}
        features, classes = {"features": config.embed_dim}, {"classes": num_classes}
        self.out = Linear(features, classes, **options) if num_classes else None

    def __call__(self, pooled: Float[Array, "B M D"], *, key: Array | None = None) -> Float[Array, "B M C"]:
        x = self.transform(pooled)
        return x if self.out is None else self.out(dropout(x, self.config.dropout_rate, key))
