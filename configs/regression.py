"""A number for a text or a pair of texts, learned from a file: how alike two sentences are, how well a film is liked.

python train.py --config configs/regression.py --init-from FOLDER --data.source train.csv --data.test test.csv

FOLDER is a published encoder or a run. A row is a text, or a pair, and a number; the columns are guessed, and named by
--data.text-column, --data.text-pair-column and --data.label-column.
"""

from flax_encoder.config import DataConfig, EncoderConfig, OptimizerConfig, RunConfig

config = RunConfig(
    objective="regression",
    epochs=3.0,
    batch_texts=32,
    checkpoint_every=200,
    eval_every="epoch",
    model=EncoderConfig(dropout_rate=0.1, dtype="bfloat16", scan_layers=False),
    data=DataConfig(source="train.csv", row_length=128, held_out_rate=0.05),
    optimizer=OptimizerConfig(learning_rate=5e-5, b2=0.999, warmup_rate=0.1),
)
