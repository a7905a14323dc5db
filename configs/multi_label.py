"""Any of several labels for a text, each by itself: from a list of labels a row, or a column of 0 and 1 for each label.

python train.py --config configs/multi_label.py --init-from FOLDER --data.source train.jsonl --data.test test.jsonl

A line of the files is {"text": "3600 West 5th Ave", "labels": ["AddressNumber", "StreetName"]}; FOLDER is a published
encoder or a run.
"""

from flax_encoder.config import DataConfig, EncoderConfig, OptimizerConfig, RunConfig

config = RunConfig(
    objective="multi_label",
    epochs=3.0,
    batch_texts=32,
    checkpoint_every=200,
    model=EncoderConfig(dropout_rate=0.1, dtype="bfloat16", scan_layers=False),
    data=DataConfig(source="train.jsonl", row_length=64, held_out_rate=0.05),
    optimizer=OptimizerConfig(learning_rate=3e-4, b2=0.999, warmup_rate=0.1),
)
