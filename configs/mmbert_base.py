"""mmBERT-base, its three phases as published (Marone et al., arXiv 2509.06888; JHU-CLSP/mmBERT's configs).

python train.py --config configs/mmbert_base.py --mesh.data 8 --data.tokenizer FOLDER

FOLDER has Gemma 2's tokenizer; the three folders of data.source hold the published text of each phase, in 60, 110 and
1,833 languages, as Parquet with a column `text`. Published: 3 trillion tokens, 40 days on 8 H100; 307M parameters.
First 2.3 trillion tokens in rows of 1024 with 30% of tokens masked, where batches grow over the first 60 billion and
the learning rate over the first 3; then 600 billion in rows of 8192 with another rope_theta and 15% masked; then 100
billion with 5% masked, in which the rate falls. Here batches grow by doubling. The published weight decay of 8e-5 is a
share of the parameters; here it is a share of the learning rate. The original has dropout of 0.1 after attention. Not
run here.
"""

import dataclasses

from flax_encoder.config import DataConfig, MaskingConfig, OptimizerConfig, Phase, RunConfig
from flax_encoder.families import preset

config = RunConfig(
    steps=530_977,
    batch_size=4608,
    num_microbatches=12,
    log_every=100,
    checkpoint_every=2_000,
    eval_every=10_000,
    model=dataclasses.replace(
        preset("modernbert_base"), vocab_size=256_000, rope_theta=10_000.0, local_rope_theta=None, dtype="bfloat16"
    ),
    phases=(
        Phase(tokens=3e9, batch_size=384, num_microbatches=1, weights=(1.0, 0.0, 0.0), learning_rate=(0.0, 8e-4)),
        Phase(tokens=57e9, batch_size=(384, 4608), num_microbatches=8, learning_rate=8e-4),
        Phase(tokens=2240e9, num_microbatches=12),
        Phase(tokens=600e9, batch_size=4608, row_length=8192, num_microbatches=96, rope_theta=160_000.0,
              weights=(0.0, 1.0, 0.0), masking_rate=0.15),
        Phase(tokens=100e9, weights=(0.0, 0.0, 1.0), masking_rate=0.05, learning_rate=(8e-4, 1.6e-5),
              learning_rate_shape="one_minus_sqrt"),
    ),
    data=DataConfig(
        source=("mmbert/pretraining", "mmbert/midtraining", "mmbert/decay"), weights=(1.0, 1.0, 1.0),
        text_column="text", vocab_size=256_000, row_length=1024, held_out_rate=0.0001,
    ),
    masking=MaskingConfig(rate=0.3, eval_rate=0.15),
    optimizer=OptimizerConfig(
        name="stable_adamw", learning_rate=8e-4, b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=8e-5 / 8e-4,
        clip_norm=None,
    ),
)  # fmt: skip
