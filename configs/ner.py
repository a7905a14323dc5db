"""Tag the words of a text: names, addresses, parts of speech, from a file of tokens and tags.

python train.py --config configs/ner.py --data.source train.jsonl --data.test test.jsonl --init-from FOLDER

A line of the files is {"tokens": ["3600", "West", "5th", "Ave"], "tags": ["B-Number", "O", "B-Street", "I-Street"]};
FOLDER is a published encoder or a run.
"""

from flax_encoder.config import DataConfig, EncoderConfig, OptimizerConfig, RunConfig

config = RunConfig(
    objective="token_classification",
    steps=240,
    batch_size=8,
    checkpoint_every=120,
    model=EncoderConfig(dropout_rate=0.1),
    data=DataConfig(source="train.jsonl", row_length=128, held_out_rate=0.05),
    optimizer=OptimizerConfig(learning_rate=3e-4),
)
