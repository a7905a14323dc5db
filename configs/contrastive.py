"""Vectors of texts from pairs that belong together, or pairs with a number that says how alike they are.

python train.py --config configs/contrastive.py --init-from FOLDER --data.source pairs.jsonl --run-dir runs/mine

FOLDER is a published encoder or a run. A line of the file is {"query": ..., "positive": ...}, which may have a
"negative" too, or {"sentence1": ..., "sentence2": ..., "score": 3.8}, or {"text": ...}.

Measured on 2 CPU cores with a load of 13 to 24 from other work.

Pairs: Wikipedia leads with their short descriptions, 7,606 to train on, from a BERT of 2 layers (4.4M parameters) that
had learned only masked words, with --epochs 4 --batch-size 64 --optimizer.learning-rate 5e-4, 8 min a seed. On 1,862
other pairs, where each description looks for its lead among all leads:

                        accuracy_at_1        mrr                  ndcg_at_10
    three seeds         0.660, 0.671, 0.673  0.760, 0.766, 0.767  0.797, 0.803, 0.805
    TF-IDF              0.572                0.685                0.732
    before training     0.260                0.373                0.415

Pairs with a number: the STS benchmark, 5,697 pairs, from MiniLM-L6 (22.7M parameters), which already made vectors.
Spearman on the 1,379 test pairs: one epoch (--epochs 1) 0.829, 0.837 and 0.845 with three seeds, two epochs 0.864 with
one seed; before training 0.820, TF-IDF 0.691. Two epochs took 10 min, 3 and a half of them processor time.
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
