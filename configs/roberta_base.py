"""RoBERTa-base, pretrained as published (Liu et al., arXiv 1907.11692, table 9).

python train.py --config configs/roberta_base.py --mesh.data 8 --num-microbatches 16 --data.tokenizer FOLDER

FOLDER has RoBERTa's tokenizer; without it the run trains a WordPiece. Published: 500,000 steps of 8192 rows of 512
tokens on 1024 V100; GLUE 86.4 for the base model (average of the development sets, as later papers report it). The
published text was 160 GB of five corpora. Here rows are packed, and no document sees another. Not run here.
"""

import dataclasses

from flax_encoder.config import DataConfig, MaskingConfig, OptimizerConfig, RunConfig
from flax_encoder.families import preset

config = RunConfig(
    steps=500_000,
    batch_size=8192,
    log_every=100,
    checkpoint_every=5_000,
    eval_every=5_000,
    model=dataclasses.replace(preset("roberta_base"), dtype="bfloat16"),
    data=DataConfig(
        source="hf:wikimedia/wikipedia:20231101.en", vocab_size=50_265, row_length=512, held_out_rate=0.001
    ),
    masking=MaskingConfig(rate=0.15, mask_rate=0.8, random_rate=0.1),
    optimizer=OptimizerConfig(
        name="adamw", learning_rate=6e-4, b1=0.9, b2=0.98, epsilon=1e-6, weight_decay=0.01, clip_norm=None,
        schedule="linear", warmup_rate=24_000 / 500_000,
    ),
)
