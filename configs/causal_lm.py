"""A first part of pretraining: each next token is predicted, looking back alone; the run goes on as masked_lm.

python train.py --config configs/causal_lm.py
python train.py --init-from runs/causal_lm --steps 700 --run-dir runs/causal_then_masked

(Gisserot-Boukhlef et al., arXiv 2507.00994: both parts, one after the other, gave better encoders than either alone.)
"""

import dataclasses

from quickstart import config as quickstart

from flax_encoder.config import MaskingConfig

config = dataclasses.replace(
    quickstart,
    objective="causal_lm",
    run_dir="runs/causal_lm",
    steps=750,
    masking=MaskingConfig(),
    model=dataclasses.replace(quickstart.model, window=None, global_every=1),
)
