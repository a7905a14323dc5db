"""How well a passage answers a query, the two read together (a cross-encoder): puts the first finds in a better order.

python train.py --config configs/rerank.py --init-from FOLDER --data.source pairs.jsonl --run-dir runs/rerank
python -m flax_encoder predict runs/rerank --input found.jsonl --output scores.jsonl

A row of pairs.jsonl is {"query": ..., "passage": ..., "label": "yes"} or "no"; those of "no" are best what a search by
words or vectors finds wrongly. A row of found.jsonl has a query and one of its finds, and the probability of "yes" is
what to sort by. Grades rather than labels are learned by --objective regression. A vector model learns the margins of
such a model by contrastive's margin_mse (docs/tasks.md). Not measured here yet.
"""

import dataclasses

from classify import config as classify

from flax_encoder.config import DataConfig

config = dataclasses.replace(
    classify,
    run_dir="runs/rerank",
    epochs=2.0,
    batch_texts=32,
    eval_every="epoch",
    data=DataConfig(
        source="pairs.jsonl", text_column="query", text_pair_column="passage", label_column="label", row_length=128,
        held_out_rate=0.05,
    ),
)  # fmt: skip
