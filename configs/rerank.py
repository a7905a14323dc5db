"""A cross-encoder, which reads a query and a passage together, to put the results of a search in a better order.

python train.py --config configs/rerank.py --init-from FOLDER --data.source pairs.jsonl --run-dir runs/rerank
python -m flax_encoder predict runs/rerank --input found.jsonl --output scores.jsonl --probabilities

A row of pairs.jsonl is {"query": ..., "passage": ..., "label": "yes"}, or the same with "no"; the best passages for
"no" are wrong results of a search by words or vectors. A row of found.jsonl has a query and one of its results; sort by
the probability of "yes". For grades in place of labels use --objective regression. A vector model can learn the margins
of such a model by contrastive's margin_mse (docs/tasks.md).

Measured by benchmarks/rerank_search.py on 9,049 short descriptions and the first words of their Wikipedia leads, from a
BERT of 2 layers (4.4M parameters) that had learned only masked words, with --epochs 1 --optimizer.learning-rate 3e-4
--model.dtype float32 on one CPU core that other work kept busy: 20,631 pairs, 2 min 15 s of processor time in 10 min.
Held-out pairs are told apart with an accuracy of 0.826, where the more frequent answer has 0.667. In the order of the
ten first results of TF-IDF for each of 1,810 other descriptions (91.5% have the right one among them), medians of three
seeds:

                    accuracy_at_1  mrr    ndcg_at_10
    this model      0.719          0.793  0.823
    TF-IDF          0.655          0.743  0.784

The seeds have 0.717, 0.750 and 0.719 at 1, and 0.821, 0.838 and 0.823 of nDCG; held-out pairs 0.826, 0.833 and 0.820.
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
