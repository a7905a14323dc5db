"""T5's denoising for an encoder-decoder, on CPython's texts and a CPU (Raffel et al., arXiv 1910.10683, section 3.1.4).

python train.py --config configs/span_corruption.py

A small version of t5_base: spans of three tokens, 15% of each text, are cut out, and the decoder writes them.
`--config configs/translate_en_fr.py --init-from runs/spans` then starts from its encoder and decoder.
"""

import dataclasses

from ul2 import config as ul2

from flax_encoder.config import SpansConfig

config = dataclasses.replace(ul2, run_dir="runs/spans", spans=SpansConfig())
