"""DeBERTaV3-small, pretrained as published (He et al., arXiv 2111.09543, sections 3 and 5.1).

python train.py --config configs/deberta_v3_small.py --mesh.data 8 --num-microbatches 16 --data.tokenizer FOLDER

FOLDER has DeBERTaV3's tokenizer; without it the run trains a WordPiece. Published: 500,000 steps of 8192 rows of 512
tokens; MNLI 88.3 and 87.7, SQuAD 2.0 F1 82.8 (the model's card). The encoder finds the words that a generator, as wide
and half as deep, has replaced; the two share embeddings by gradient-disentangled sharing. The published text was 160 GB
of five corpora. Not run here.
"""

import dataclasses

from flax_encoder.config import DataConfig, GeneratorConfig, MaskingConfig, OptimizerConfig, RunConfig
from flax_encoder.families import preset

config = RunConfig(
    objective="replaced_token_detection",
    steps=500_000,
    batch_size=8192,
    log_every=100,
    checkpoint_every=5_000,
    eval_every=5_000,
    model=dataclasses.replace(preset("deberta_v3_base"), num_layers=6, dtype="bfloat16"),
    generator=GeneratorConfig(width=1.0, num_layers=3, sharing="disentangled", detection_weight=50.0),
    data=DataConfig(
        source="hf:wikimedia/wikipedia:20231101.en", vocab_size=128_100, row_length=512, held_out_rate=0.001
    ),
    masking=MaskingConfig(rate=0.15, mask_rate=1.0, random_rate=0.0),
    optimizer=OptimizerConfig(
        name="adamw", learning_rate=5e-4, b1=0.9, b2=0.98, epsilon=1e-6, weight_decay=0.01, clip_norm=1.0,
        schedule="linear", warmup_rate=10_000 / 500_000,
    ),
)  # fmt: skip
