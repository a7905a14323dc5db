"""ALBERT-base, version 1, pretrained as published (Lan et al., arXiv 1909.11942).

python train.py --config configs/albert_base.py --mesh.data 8 --num-microbatches 16

Published: 125,000 steps of 4096 rows of 512 tokens on 64 TPU v3 or more, with LAMB; 80.1 on average over SQuAD 1.1 and
2.0, MNLI, SST-2 and RACE. As in the original, spans of one to three words are masked. There their lengths have odds of
6, 3 and 2 to 11; here they are geometric with the same mean, cut at three. The model also learns whether the two halves
of a text are in order. The published text was Wikipedia and BookCorpus. Not run here; sentence_order is a small recipe
of this kind that was run.
"""

import dataclasses

from flax_encoder.config import DataConfig, MaskingConfig, OptimizerConfig, RunConfig
from flax_encoder.families import preset

config = RunConfig(
    objective="sentence_order",
    steps=125_000,
    batch_size=4096,
    log_every=100,
    checkpoint_every=5_000,
    eval_every=5_000,
    model=dataclasses.replace(
        preset("albert_base_v2"), dropout_rate=0.1, attention_dropout_rate=0.1, dtype="bfloat16"
    ),
    data=DataConfig(
        source="hf:wikimedia/wikipedia:20231101.en", vocab_size=30_000, row_length=512, held_out_rate=0.001
    ),
    masking=MaskingConfig(kind="span", rate=0.15, mask_rate=0.8, random_rate=0.1, mean_span_words=1.79,
                          max_span_words=3),
    optimizer=OptimizerConfig(
        name="lamb", learning_rate=0.00176, b1=0.9, b2=0.999, epsilon=1e-6, weight_decay=0.01, clip_norm=1.0,
        schedule="linear", warmup_rate=3_125 / 125_000,
    ),
)  # fmt: skip
