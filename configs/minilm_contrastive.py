"""all-MiniLM-L6-v2: vectors of texts from a billion pairs, as published (the model's card and training script).

python train.py --config configs/minilm_contrastive.py --init-from FOLDER --data.source pairs.jsonl --mesh.data 8

FOLDER is MiniLM-L6-H384-uncased (every second layer of the MiniLM of arXiv 2002.10957); a line of the file is {"query":
..., "positive": ...}. Published: 100,000 steps of 1024 pairs, from 1.17 billion, whose texts are cut at 128 tokens, on
one TPU v3-8; 68.06 on average over 14 sentence tasks (sbert.net), 22.7M parameters. The two texts of a pair find each
other among all texts of the batch, by cosines times 20. Not run here; contrastive is a small recipe that was run.
"""

from flax_encoder.config import ContrastiveConfig, DataConfig, EncoderConfig, OptimizerConfig, RunConfig

config = RunConfig(
    objective="contrastive",
    steps=100_000,
    batch_texts=1024,
    log_every=100,
    checkpoint_every=5_000,
    model=EncoderConfig(
        vocab_size=30_522, num_layers=6, embed_dim=384, num_heads=12, mlp_dim=1536, num_token_types=2,
        dropout_rate=0.1, attention_dropout_rate=0.1, dtype="bfloat16",
    ),
    contrastive=ContrastiveConfig(pooling="mean", loss="infonce", temperature=0.05, symmetric=True),
    data=DataConfig(source="pairs.jsonl", vocab_size=30_522, row_length=128, held_out_rate=0.0001),
    optimizer=OptimizerConfig(
        name="adamw", learning_rate=2e-5, b1=0.9, b2=0.999, epsilon=1e-6, weight_decay=0.0, clip_norm=1.0,
        schedule="linear", warmup_rate=500 / 100_000,
    ),
)  # fmt: skip
