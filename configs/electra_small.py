"""ELECTRA-small, pretrained as published (Clark et al., arXiv 2003.10555, appendix A; the released configuration).

python train.py --config configs/electra_small.py

Published: a million steps of 128 rows of 128 tokens, 4 days on one V100; GLUE 79.9 on the development sets. Masked
tokens become [MASK] in 85% of cases and stay otherwise, as in the released code.
`configs/replaced_tokens.py` trains a small encoder so in minutes. The whole recipe was not run here.
"""

import dataclasses

from flax_encoder.config import DataConfig, GeneratorConfig, MaskingConfig, OptimizerConfig, RunConfig
from flax_encoder.families import preset

config = RunConfig(
    objective="replaced_token_detection",
    steps=1_000_000,
    batch_size=128,
    log_every=100,
    checkpoint_every=10_000,
    eval_every=10_000,
    model=dataclasses.replace(preset("electra_small"), dtype="bfloat16"),
    generator=GeneratorConfig(width=0.25, sharing="embedding", detection_weight=50.0),
    data=DataConfig(
        source="hf:wikimedia/wikipedia:20231101.en", vocab_size=30_522, row_length=128, held_out_rate=0.001
    ),
    masking=MaskingConfig(rate=0.15, mask_rate=0.85, random_rate=0.0),
    optimizer=OptimizerConfig(
        name="adamw", learning_rate=5e-4, b1=0.9, b2=0.999, epsilon=1e-6, weight_decay=0.01, clip_norm=1.0,
        schedule="linear", warmup_rate=0.01,
    ),
)
