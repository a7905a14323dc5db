"""A small model and small batches that several tests share. Sizes differ, so that a swapped axis cannot pass."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_encoder.config import EncoderConfig
from flax_encoder.nn.partition import abstract_model, round_up_vocab
from flax_encoder.runs.loaded import model_factory
from flax_encoder.runs.record import RunRecord
from flax_encoder.training.checkpoint import Checkpoints
from flax_encoder.training.step import TrainState

B, T, V, L, N, H, F = 2, 23, 37, 3, 5, 6, 41
D = N * H
SMALL = EncoderConfig(vocab_size=V, num_layers=L, embed_dim=D, num_heads=N, mlp_dim=F, max_length=29)


def split_model(make_model, seed: int = 0):
    """(graphdef, parameters), the latter drawn here: models start with zeros and ones, which hide mistakes."""
    graphdef, abstract = abstract_model(make_model)
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        std = 0.1 if path[-1].key in ("bias", "scale") else 0.2
        return jnp.asarray((path[-1].key == "scale") + std * generator.standard_normal(leaf.shape), leaf.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(abstract))


def save_run(config, tokenizer, labels=None) -> None:
    """Write a run folder of a model that nobody trained, its parameters drawn as `split_model` does."""
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=round_up_vocab(tokenizer.vocab_size))
    )
    _, params = split_model(model_factory(config, labels))
    with Checkpoints(pathlib.Path(config.run_dir), keep=1) as checkpoints:
        state = TrainState(jnp.zeros((), jnp.int32), params, {})
        checkpoints.save(state, 1, RunRecord(config, tokenizer, labels, step=1).to_json())


def random_tokens(shape, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, shape), jnp.int32)


def assert_trees_close(got, want, scale_eps: float = 100.0):
    """Each leaf within `scale_eps` float32 roundings of its own largest value, or of a hundredth of the tree's.

    The latter is for gradients that are zero but for rounding. A key bias's is, since it moves all logits of a query
    alike; what cancels in it is as large as its kernel's gradient, whose largest value therefore counts.
    """
    top = max(float(np.abs(w).max()) for w in jax.tree.leaves(want))
    got, want = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, want))
    assert [path for path, _ in got] == [path for path, _ in want]
    sizes = {jax.tree_util.keystr(path): float(np.abs(w).max()) for path, w in want}
    for (path, g), (_, w) in zip(got, want, strict=True):
        name = jax.tree_util.keystr(path)
        kernel = name.replace("['key']['bias']", "['key']['kernel']")
        atol = scale_eps * np.finfo(np.float32).eps * max(sizes[name], sizes.get(kernel, 0.0), top / 100)
        np.testing.assert_allclose(g, w, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))
