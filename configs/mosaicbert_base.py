"""MosaicBERT-base, pretrained as published (Portes et al., arXiv 2312.17482).

python train.py --config configs/mosaicbert_base.py --mesh.data 8

Published: 70,000 steps of 4096 rows of 128 tokens of C4 on 8 A100 of 80 GB, 4.6 hours for GLUE 83.2 (79.6 after 1.13
hours). The published weight decay of 1e-5 is a share of the parameters; here it is a share of the learning rate: 1e-5 /
5e-4. Not run here.
"""

import dataclasses

from flax_encoder.config import DataConfig, MaskingConfig, OptimizerConfig, RunConfig
from flax_encoder.families import preset

config = RunConfig(
    steps=70_000,
    batch_size=4096,
    log_every=100,
    checkpoint_every=3_500,
    eval_every=2_000,
    model=dataclasses.replace(preset("mosaicbert_base"), dtype="bfloat16"),
    data=DataConfig(source="hf:allenai/c4:en", vocab_size=30_522, row_length=128, held_out_rate=0.001),
    masking=MaskingConfig(rate=0.3, eval_rate=0.15),
    optimizer=OptimizerConfig(
        name="adamw", learning_rate=5e-4, b1=0.9, b2=0.98, epsilon=1e-6, weight_decay=0.02, clip_norm=None,
        schedule="linear", warmup_rate=0.06, final_rate=0.02,
    ),
)
