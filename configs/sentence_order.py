"""ALBERT's two tasks, small, with its shared layers: masked words, and whether two halves of a text are in order.

python train.py --config configs/sentence_order.py

(Lan et al., arXiv 1909.11942, section 3.1.) `export` writes an AlbertForPreTraining with both heads.

Hardware and time: 2 CPU cores that other work kept busy, 4 min 18 s for the whole command (1 min 33 s of processor
time). Result on 663 held-out texts: 0.494 of the pairs are right (the more frequent answer: 0.506), so 600 steps did
not teach the order; masked accuracy is 0.156 and loss 5.61 (the most frequent token: 0.046).
"""

import dataclasses

from next_sentence import config as next_sentence

from flax_encoder.config import MaskingConfig

config = dataclasses.replace(
    next_sentence,
    run_dir="runs/sentence_order",
    objective="sentence_order",
    model=dataclasses.replace(next_sentence.model, num_layer_groups=1, embedding_dim=64, activation="gelu_tanh"),
    masking=MaskingConfig(kind="span", mean_span_words=2.0, max_span_words=3),
)
