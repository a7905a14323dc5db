"""The base Transformer, English to German, as published (Vaswani et al., arXiv 1706.03762, sections 5 and 6).

python train.py --config configs/transformer_base.py --mesh.data 8

Published: 100,000 steps of about 25,000 source and as many target tokens, on 8 P100 in 12 hours; BLEU 27.3 on
newstest2014 with a beam of 4 and a length penalty of 0.6, by the average of the last five checkpoints. Here a batch has
98 packed rows of 256 tokens for sources and as many for targets; `--optimizer.average 0.999` averages the parameters in
training. Not run here; translate_en_fr is a small recipe of this kind that was run.
"""

import dataclasses

from flax_encoder.config import DataConfig, GenerationConfig, LabelsConfig, OptimizerConfig, RunConfig
from flax_encoder.families import preset

config = RunConfig(
    objective="text_to_text",
    steps=100_000,
    batch_size=98,
    log_every=100,
    checkpoint_every=1_500,
    eval_every=10_000,
    model=dataclasses.replace(preset("transformer_base"), dtype="bfloat16"),
    generation=GenerationConfig(num_beams=4, length_penalty=0.6),
    data=DataConfig(
        source="tfds:wmt14_translate/de-en", text_column="en", text_pair_column="de", vocab_size=37_000,
        row_length=256, target_length=256,
    ),
    labels=LabelsConfig(smoothing=0.1),
    optimizer=OptimizerConfig(
        name="adamw", learning_rate=512**-0.5 * 4_000**-0.5, b1=0.9, b2=0.98, epsilon=1e-9, weight_decay=0.0,
        clip_norm=None, schedule="inverse_sqrt", warmup_rate=4_000 / 100_000,
    ),
)  # fmt: skip
