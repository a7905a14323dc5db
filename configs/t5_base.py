"""T5-base's baseline: spans are cut out of texts, and the decoder writes them (Raffel et al., arXiv 1910.10683, 3.1).

python train.py --config configs/t5_base.py --mesh.data 8 --data.tokenizer FOLDER

FOLDER has T5's tokenizer; without it the run trains a byte-level BPE with sentinels. Published: 2**19 steps of 128 rows
of 512 tokens of C4, 34 billion in all, on Cloud TPU pods; GLUE 83.3 on the validation sets (table 1). The learning rate
is 0.01 for 10,000 steps and then one over the root of the step. Not run here.
"""

import dataclasses

from flax_encoder.config import DataConfig, DecoderConfig, OptimizerConfig, Phase, RunConfig, SpansConfig
from flax_encoder.families import preset

config = RunConfig(
    objective="span_corruption",
    steps=2**19,
    batch_size=128,
    log_every=100,
    checkpoint_every=5_000,
    eval_every=5_000,
    model=dataclasses.replace(preset("t5_base"), dtype="bfloat16"),
    decoder=DecoderConfig(tied=True, logit_scale=768**-0.5),
    phases=(
        Phase(steps=10_000, learning_rate=0.01),
        Phase(steps=2**19 - 10_000, learning_rate=(0.01, 2**-9.5), learning_rate_shape="inverse_sqrt"),
    ),
    data=DataConfig(source="hf:allenai/c4:en", vocab_size=32_000, row_length=512, held_out_rate=0.0001),
    spans=SpansConfig(rate=0.15, mean_tokens=3.0),
    optimizer=OptimizerConfig(name="adafactor", learning_rate=0.01, weight_decay=0.0, clip_norm=None),
)
