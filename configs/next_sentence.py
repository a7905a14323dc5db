"""BERT's two tasks, small: masked words, and whether the second half of a text belongs to the first.

python train.py --config configs/next_sentence.py

(Devlin et al., arXiv 1810.04805, section 3.1.) `export` writes a BertForPreTraining with both heads. The published
recipe, configs/bert_base.py, learns masked words only; with --objective next_sentence it learns both.

Hardware and time: 2 CPU cores that other work kept busy, 2 min 46 s for the whole command (1 min 43 s of processor
time). Result on 663 held-out texts: 0.699 of the pairs are right (the more frequent answer: 0.506); masked accuracy is
0.178 and loss 5.54 (two neighbours' counts: accuracy 0.274; the most frequent token: 0.051).
"""

from flax_encoder.config import DataConfig, EncoderConfig, OptimizerConfig, RunConfig

config = RunConfig(
    run_dir="runs/next_sentence",
    objective="next_sentence",
    steps=600,
    batch_size=16,
    checkpoint_every=200,
    model=EncoderConfig(
        num_layers=2, embed_dim=128, num_heads=2, mlp_dim=512, num_token_types=2, max_length=128, dtype="bfloat16",
        scan_layers=False,
    ),
    data=DataConfig(source="tfds:python_docs", vocab_size=8192, row_length=128),
    optimizer=OptimizerConfig(name="muon", learning_rate=3e-3, muon_learning_rate=0.02, warmup_rate=0.05),
)  # fmt: skip
