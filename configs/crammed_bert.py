"""A crammed BERT, the second version of its recipe (Geiping and Goldstein, arXiv 2212.14034;
github.com/JonasGeiping/cramming).

python train.py --config configs/crammed_bert.py

Published: 24 hours on one A6000, GLUE 80.4. The run ends by the clock, and its learning rate, a triangle, follows the
clock. Batches grow over the first 60% of the steps; the original's grow linearly with time to 8192 rows. Not run here.
"""

import dataclasses

from flax_encoder.config import DataConfig, MaskingConfig, OptimizerConfig, Phase, RunConfig
from flax_encoder.families import preset

config = RunConfig(
    steps=60_000,  # more than a day holds
    budget_minutes=24 * 60.0,
    batch_size=8192,
    phases=(Phase(share=0.6, batch_size=(128, 8192)), Phase(share=0.4)),
    log_every=100,
    checkpoint_every=1_000,
    model=dataclasses.replace(preset("crammed_bert"), dtype="bfloat16"),
    data=DataConfig(source="hf:allenai/c4:en", vocab_size=32_768, row_length=128, held_out_rate=0.001),
    masking=MaskingConfig(rate=0.25, eval_rate=0.25),
    optimizer=OptimizerConfig(
        name="adamw", learning_rate=1e-3, b1=0.9, b2=0.98, epsilon=1e-12, weight_decay=0.01, clip_norm=0.5,
        schedule="linear", warmup_rate=0.5,
    ),
)
