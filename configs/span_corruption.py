"""T5's denoising for an encoder-decoder, on CPython's texts and a CPU (Raffel et al., arXiv 1910.10683, section 3.1.4).

python train.py --config configs/span_corruption.py

A small version of t5_base: spans of three tokens, 15% of each text, are cut out, and the decoder writes them.
`--config configs/translate_en_fr.py --init-from runs/spans` then starts from its encoder and decoder.

Measured with --steps 200 --model.dtype float32 on one CPU core that other work kept busy: an epoch and a half, 3 min
50 s of processor time in 18 min, 2.6M parameters. On 663 held-out documents 0.356 of the targets' tokens are right, at
a loss of 4.44. A guess from the target's token before has 0.216, the most frequent token 0.077 and a loss of 5.73.
"""

import dataclasses

from ul2 import config as ul2

from flax_encoder.config import SpansConfig

config = dataclasses.replace(ul2, run_dir="runs/spans", spans=SpansConfig())
