"""Products between vectors whose tokens the mesh splits over `tensor` are those of one device, and so are gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_encoder.config import MeshConfig
from flax_encoder.nn.encoder import REMAT_POLICIES
from flax_encoder.ops.linear import linear
from flax_encoder.ops.tensor_parallel import product_to_tokens, products_of_tokens, splits_tokens
from flax_encoder.training.sharding import make_mesh

B, T, D, F, G = 4, 8, 12, 20, 28
X, WIDE, NARROW, OTHER = (B, T, D), (D, F), (F, D), (D, G)


@pytest.mark.parametrize("sizes", [(1, 2, 2, 2), (2, 1, 4, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_split_tokens_and_their_gradients_are_those_of_one_device(sizes, dtype):
    generator = np.random.default_rng(0)
    operands = [generator.standard_normal(shape).astype(np.float32) for shape in (X, WIDE, OTHER, NARROW)]
    weights = [generator.standard_normal((B, T, size)).astype(np.float32) for size in (F, G, D)]
    dtypes = {"dtype": dtype, "out_dtype": "float32"}

    def by_hand(x, wide, other, narrow):
        inner, beside = products_of_tokens(x, [wide, other], **dtypes)
        return inner, beside, product_to_tokens(inner, narrow, **dtypes)

    def plain(x, wide, other, narrow):
        inner = linear(x, wide, **dtypes)
        return inner, linear(x, other, **dtypes), linear(inner, narrow, **dtypes)

    def values_and_gradients(run):
        def total(*operands):
            values = run(*operands)
            return sum((w * value).sum() for w, value in zip(weights, values, strict=True)), values

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True))(*operands)

    (_, want), want_gradients = values_and_gradients(plain)
    with jax.set_mesh(make_mesh(MeshConfig(*sizes))):
        assert splits_tokens(X, D, F)
        (_, got), got_gradients = values_and_gradients(by_hand)
    # A product that adds up in another order may be rounded to the next bfloat16 where the following one reads it.
    epsilon = float(jnp.finfo(dtype).eps)
    for g, w in zip((*got, *got_gradients), (*want, *want_gradients), strict=True):
        assert g.dtype == w.dtype
        np.testing.assert_allclose(g, w, rtol=0, atol=epsilon * float(jnp.abs(w).max()) * 4)


def test_what_keeps_products_keeps_these_which_are_not_made_again():
    """Of two products, each sends tokens once forward; backward the one sends them twice, the other once. Where they
    are made again, each sends them once more."""

    def blocks(x, up, down):
        (inner,) = products_of_tokens(x, [up], dtype="float32", out_dtype="float32")
        return product_to_tokens(jnp.sin(inner), down, dtype="float32", out_dtype="float32").sum()

    operands = [jnp.ones(shape) for shape in (X, WIDE, NARROW)]
    with jax.set_mesh(make_mesh(MeshConfig(2, 1, 4, 1))):
        counts = {}
        for name, policy in REMAT_POLICIES.items():
            gradients = jax.grad(jax.checkpoint(lambda *xs: jnp.cos(blocks(*xs)), policy=policy), argnums=(0, 1, 2))
            text = str(jax.make_jaxpr(gradients)(*operands))
            counts[name] = text.count("all_gather[") + text.count("reduce_scatter[")
    assert counts == {"dots": 5, "full": 7}


@pytest.mark.parametrize(
    ("shape", "embed_dim", "features", "is_split"),
    [
        ((4, 8, 12), 12, 20, True),
        ((4, 8, 4, 3), 12, 20, True),  # heads are still apart
        ((4, 6, 12), 12, 20, False),  # context x tensor is 4
        ((4, 1, 12), 12, 20, False),  # the next token of a decoder
        ((3, 8, 12), 12, 20, False),  # rows that fsdp does not divide
        ((4, 8, 13), 13, 20, False),
        ((4, 8, 12), 12, 21, False),
        ((8, 12), 12, 20, False),  # vectors of distances, not of rows
    ],
)
def test_tokens_are_split_where_the_mesh_divides_everything(shape, embed_dim, features, is_split):
    with jax.set_mesh(make_mesh(MeshConfig(1, 2, 2, 2))):
        assert splits_tokens(shape, embed_dim, features) == is_split
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 1, 2))):
        assert not splits_tokens(shape, embed_dim, features)
    assert not splits_tokens(shape, embed_dim, features)
