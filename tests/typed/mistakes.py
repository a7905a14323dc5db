"""What a type checker must find wrong, a line each."""

from flax_encoder import EncoderConfig, RunConfig, load, load_embedder

width: str = load("run").config.model.embed_dim
names: list[int] | None = load("run").label_names
pooled = load_embedder("folder", dtype="float64")
config = EncoderConfig(num_layers="two")
run = RunConfig(objective="masked_lm", no_such_setting=1)
