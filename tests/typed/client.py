"""What a user's program does, as a type checker in strict mode sees it."""

import jax
import numpy as np
from flax import nnx

import flax_encoder
from flax_encoder import (
    DataConfig,
    EncoderConfig,
    MaskedLM,
    OptimizerConfig,
    RunConfig,
    init_train_state,
    load,
    load_embedder,
    load_pretrained,
    logical_axes,
    make_optimizer,
    make_train_step,
    preset,
)

config = EncoderConfig(vocab_size=128, num_layers=2, embed_dim=32, num_heads=2, mlp_dim=64)
model = MaskedLM(config, rngs=nnx.Rngs(0))
tokens = jax.random.randint(jax.random.key(0), (1, 8), 0, 128)
hidden = model.encoder(tokens)

run = load("runs/movie")
for answer in run.predict(["a fine film", "a dull one"]):
    label = answer["label"]
width: int = run.config.model.embed_dim
labels: list[str] | None = run.label_names

embedder = load_embedder("folder", pooling="mean", normalize=True)
vectors, num_cut = embedder.embed(["a text", "another"], progress=lambda done: None)
cosines = vectors @ vectors.T
cut: int = num_cut

pretrained = load_pretrained("folder")
output = pretrained(np.array([[1, 2, 3]]))

settings = RunConfig(objective="classification", data=DataConfig(source="movie.csv"), model=preset("bert_base"))


def make_model() -> MaskedLM:
    return MaskedLM(config, rngs=nnx.Rngs(0))


tx = make_optimizer(OptimizerConfig(learning_rate=1e-3), steps=100, axes=logical_axes(make_model))
graphdef, state, shardings = init_train_state(make_model, tx)
step = make_train_step(graphdef, tx)
names: list[str] = sorted(flax_encoder.TASKS)
