"""One of several labels a text, or a pair of texts, learned from a file, starting from a published encoder.

python train.py --config configs/classify.py --init-from FOLDER --data.source train.csv --run-dir runs/mine
"""

from flax_encoder.config import DataConfig, EncoderConfig, OptimizerConfig, RunConfig

config = RunConfig(
    objective="classification",
    steps=300,
    batch_size=16,
    checkpoint_every=100,
    eval_every=100,
    model=EncoderConfig(dropout_rate=0.1, dtype="bfloat16", scan_layers=False),
    data=DataConfig(source="train.csv", row_length=128, held_out_rate=0.1),
    optimizer=OptimizerConfig(name="adamw", learning_rate=5e-5, b2=0.999, weight_decay=0.01, warmup_rate=0.1),
)
