"""Learn to tag the words of a text (names, parts of addresses, parts of speech) from a file of tokens and tags.

python train.py --config configs/ner.py --data.source train.jsonl --data.test test.jsonl --init-from FOLDER

A line of the files is {"tokens": ["3600", "West", "5th", "Ave"], "tags": ["B-Number", "O", "B-Street", "I-Street"]};
FOLDER is a published encoder or a run. CoNLL files and texts with character offsets of entities are read as well.

Hardware and time: 2 CPU cores shared with other work, about 5 minutes of processor time.
Result, from MiniLM-L6 on US addresses (2,566 to train on, 46 types of entity): F1 of entities is 0.891 on 675 test
addresses, precision 0.878, recall 0.905, accuracy of words 0.899. On the 131 held out F1 is 0.908; there the most
frequent tag of each word has 0.509, and tagging all words O has 0.
These are of rows packed best-fit. Rows of all lengths (packing mixed) and transformers on torch, on the same texts with
AdamW at 5e-4, four epochs, 37 texts an update and dropout (benchmarks/peer_finetune.py), five seeds: F1 on the test
addresses is 0.885, 0.896, 0.888, 0.883 and 0.883 here, 0.893, 0.891, 0.886, 0.890 and 0.895 there; packed best-fit it
is 0.884 and 0.884.
"""

from flax_encoder.config import DataConfig, EncoderConfig, OptimizerConfig, RunConfig

config = RunConfig(
    objective="token_classification",
    steps=240,
    batch_size=8,
    checkpoint_every=120,
    model=EncoderConfig(dropout_rate=0.1),
    data=DataConfig(source="train.jsonl", row_length=128, held_out_rate=0.05, packing="mixed"),
    optimizer=OptimizerConfig(learning_rate=3e-4),
)
