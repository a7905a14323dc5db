"""Vectors of texts from pairs that belong together, or pairs with a number that says how alike they are.

python train.py --config configs/contrastive.py --init-from FOLDER --data.source pairs.jsonl --run-dir runs/mine
"""

from flax_encoder.config import ContrastiveConfig, DataConfig, EncoderConfig, OptimizerConfig, RunConfig

config = RunConfig(
    run_dir="runs/contrastive",
    objective="contrastive",
    epochs=2.0,
    batch_size=16,
    checkpoint_every=1000,
    model=EncoderConfig(dropout_rate=0.1, dtype="bfloat16", scan_layers=False),
    contrastive=ContrastiveConfig(temperature=0.05),
    data=DataConfig(source="pairs.jsonl", row_length=128, held_out_rate=0.05),
    optimizer=OptimizerConfig(learning_rate=5e-5, b2=0.999, weight_decay=0.01, warmup_rate=0.1),
)
