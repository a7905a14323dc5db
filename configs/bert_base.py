"""BERT-base, pretrained as published but without next sentences (Devlin et al., arXiv 1810.04805, appendix A.2).

python train.py --config configs/bert_base.py --mesh.data 8

Published: a million steps of 256 rows of 512 tokens, rows of 128 for the first nine tenths, on 4 cloud TPUs (16 chips)
in 4 days; GLUE 79.6 (average of the paper's test scores without WNLI). Here every batch has 131,072 tokens, first in
1024 rows of 128, then in 256 of 512. Rows are packed, and no document sees another. The published text was Wikipedia
and BookCorpus. Not run here: this project has had no such machine.
"""

import dataclasses

from flax_encoder.config import DataConfig, MaskingConfig, OptimizerConfig, Phase, RunConfig
from flax_encoder.families import preset

config = RunConfig(
    steps=1_000_000,
    batch_size=1024,
    log_every=100,
    checkpoint_every=10_000,
    eval_every=10_000,
    model=dataclasses.replace(preset("bert_base"), dtype="bfloat16"),
    phases=(Phase(share=0.9, row_length=128), Phase(share=0.1, row_length=512)),
    data=DataConfig(
        source="hf:wikimedia/wikipedia:20231101.en", vocab_size=30_522, row_length=128, held_out_rate=0.001
    ),
    masking=MaskingConfig(rate=0.15, mask_rate=0.8, random_rate=0.1),
    optimizer=OptimizerConfig(
        name="adamw", learning_rate=1e-4, b1=0.9, b2=0.999, epsilon=1e-6, weight_decay=0.01, clip_norm=1.0,
        schedule="linear", warmup_rate=0.01,
    ),
)
