"""What the README shows as code runs as written."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_encoder import EncoderConfig

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_python_examples_run(monkeypatch):
    import flax_encoder

    jax.config.update("jax_disable_most_optimizations", True)  # conftest.py undoes it
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) == 4
    tokens = jnp.arange(28).reshape(4, 7)
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 2, 0]] * 4)
    q = k = v = jax.random.normal(jax.random.key(0), (4, 7, 3, 5))
    config = EncoderConfig(vocab_size=101, num_layers=2, embed_dim=12, num_heads=3, mlp_dim=11)
    targets = {"target_positions": tokens[:, :2] % 7, "targets": tokens[:, :2], "target_weights": jnp.ones((4, 2))}
    batch = {"tokens": tokens, "segment_ids": segment_ids, "positions": tokens % 7} | targets
    untrained = flax_encoder.MaskedLM(config, rngs=nnx.Rngs(0))
    monkeypatch.setattr(flax_encoder, "load_run", lambda path: type("Run", (), {"model": untrained}))
    folder, load = README.parent / "tests/golden/text_to_text/t5", flax_encoder.load_pretrained
    monkeypatch.setattr(flax_encoder, "load_pretrained", lambda path: load(folder))
    classifier = flax_encoder.load(README.parent / "tests/golden/runs/classification")
    monkeypatch.setattr(flax_encoder, "load", lambda path: classifier)
    ids = np.array([[3, 4, 5], [6, 7, 0]])
    names = {"tokens": tokens, "segment_ids": segment_ids, "q": q, "k": k, "v": v, "config": config, "batch": batch}
    names |= {"ids": ids, "mask": ids > 0, "target": ids[:, :2]}
    for block in blocks:
        exec(block, names)
    assert names["vectors"].shape == (4, 7, 12) and names["mixed"].shape == q.shape
    assert int(names["state"].step) == 1
    assert [set(answer) for answer in names["answers"]] == [{"label", "probability", "probabilities"}] * 2
    assert names["logits"].shape[:2] == (2, 2) and names["text"].shape[0] == 2
