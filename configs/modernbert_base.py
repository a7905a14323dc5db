"""ModernBERT-base, its three phases as published (Warner et al., arXiv 2412.13663; AnswerDotAI/ModernBERT's yamls).

python train.py --config configs/modernbert_base.py --mesh.data 8 --data.tokenizer FOLDER

FOLDER has ModernBERT's tokenizer; without it the run trains a WordPiece. Published: 2 trillion tokens on 8 H100 in 246
hours (194, 40 and 12 for the three phases); GLUE 88.4. First 1.719 trillion tokens in rows of 1024, where batches grow
from 768 to 4608 rows over the first 50 billion and the learning rate over the first 3 billion; then 250 billion in rows
of 8192 with another rope_theta; then 50 billion in which the rate falls. Here batches grow by doubling; the original's
grow by microbatches. The published weight decay of 1e-5 is a share of the parameters; here it is a share of the
learning rate: 1e-5 / 8e-4. The original has dropout of 0.1 after attention, where a model here has one rate for all,
and another initialization (Megatron's). The published text is not public; this recipe reads FineWeb-Edu. Not run here;
modernbert_small is a small version that was run.
"""

import dataclasses

from flax_encoder.config import DataConfig, MaskingConfig, OptimizerConfig, Phase, RunConfig
from flax_encoder.families import preset

config = RunConfig(
    steps=444_086,
    batch_size=4608,
    num_microbatches=6,
    log_every=100,
    checkpoint_every=4_000,
    eval_every=4_000,
    model=dataclasses.replace(preset("modernbert_base"), rope_theta=10_000.0, dtype="bfloat16"),
    phases=(
        Phase(tokens=3e9, batch_size=768, learning_rate=(0.0, 8e-4)),
        Phase(tokens=47e9, batch_size=(768, 4608), learning_rate=8e-4),
        Phase(tokens=1669e9),
        Phase(tokens=250e9, row_length=8192, rope_theta=160_000.0, learning_rate=3e-4),
        Phase(tokens=50e9, learning_rate=(3e-4, 3e-7), learning_rate_shape="one_minus_sqrt"),
    ),
    data=DataConfig(source="hf:HuggingFaceFW/fineweb-edu", vocab_size=50_368, row_length=1024, held_out_rate=0.0001),
    masking=MaskingConfig(rate=0.3, eval_rate=0.15),
    optimizer=OptimizerConfig(
        name="stable_adamw", learning_rate=8e-4, b1=0.9, b2=0.98, epsilon=1e-6, weight_decay=1e-5 / 8e-4,
        clip_norm=None,
    ),
)  # fmt: skip
