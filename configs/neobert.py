"""NeoBERT, the first of its two phases as published (Le Breton et al., arXiv 2502.19587, table 3).

python train.py --config configs/neobert.py --mesh.data 8 --num-microbatches 16

Published: a million steps of 2M tokens in rows of 1024 on 8 H100 (2.1T tokens with the second phase of 50,000 steps
in rows of 4096), GLUE 89.0. For the second phase start another run: --init-from runs/neobert --data.row-length 4096
--batch-size 512 --steps 50000. The published text was RefinedWeb. Not run here.
"""

import dataclasses

from flax_encoder.config import DataConfig, MaskingConfig, OptimizerConfig, RunConfig
from flax_encoder.families import preset

config = RunConfig(
    steps=1_000_000,
    batch_size=2048,
    log_every=100,
    checkpoint_every=5_000,
    eval_every=10_000,
    model=dataclasses.replace(preset("neobert"), dtype="bfloat16"),
    data=DataConfig(source="hf:tiiuae/falcon-refinedweb", text_column="content", vocab_size=30_522, row_length=1024,
                    held_out_rate=0.0001),
    masking=MaskingConfig(rate=0.2, eval_rate=0.2, mask_rate=1.0, random_rate=0.0),
    optimizer=OptimizerConfig(
        name="adamw", learning_rate=6e-4, b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.1, clip_norm=1.0,
        schedule="cosine", warmup_rate=0.002, final_rate=0.1,
    ),
)  # fmt: skip
