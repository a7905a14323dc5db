"""T5's denoiser for an encoder-decoder, of CPython's texts, on a CPU (Raffel et al., arXiv 1910.10683, section 3.1.4).

python train.py --config configs/span_corruption.py

A small twin of t5_base: spans of three tokens, 15% of each text, are cut out, and the decoder writes them.
`--config configs/translate_en_fr.py --init-from runs/spans` goes on with both, encoder and decoder.
"""

import dataclasses

from ul2 import config as ul2

from flax_encoder.config import SpansConfig

config = dataclasses.replace(ul2, run_dir="runs/spans", spans=SpansConfig())
