"""A cross-encoder, which reads a query and a passage together, to put the results of a search in a better order.

python train.py --config configs/rerank.py --init-from FOLDER --data.source pairs.jsonl --run-dir runs/rerank
python -m flax_encoder predict runs/rerank --input found.jsonl --output scores.jsonl

A row of pairs.jsonl is {"query": ..., "passage": ..., "label": "yes"}, or the same with "no"; the best passages for
"no" are wrong results of a search by words or vectors. A row of found.jsonl has a query and one of its results; sort by
the probability of "yes". For grades in place of labels use --objective regression. A vector model can learn the margins
of such a model by contrastive's margin_mse (docs/tasks.md). Not measured here yet.
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
