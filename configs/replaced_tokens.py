"""ELECTRA's objective on the quickstart's small encoder: a twin of electra_small that two CPU cores train in minutes.

python train.py --config configs/replaced_tokens.py

A generator of half the width fills in masked words, and the encoder says of each token whether it was replaced (Clark
et al., arXiv 2003.10555). `--config configs/classify.py --init-from runs/replaced_tokens` teaches the encoder a task.
"""

import dataclasses

from quickstart import config as quickstart

from flax_encoder.config import GeneratorConfig, MaskingConfig

config = dataclasses.replace(
    quickstart,
    run_dir="runs/replaced_tokens",
    objective="replaced_token_detection",
    steps=700,
    eval_every=350,
    generator=GeneratorConfig(width=0.5),
    masking=MaskingConfig(rate=0.15, mask_rate=0.85, random_rate=0.0),
)
