"""Masked words, and whether the two halves of a text are in order: ALBERT's two tasks, small, with its shared layers.

python train.py --config configs/sentence_order.py

(Lan et al., arXiv 1909.11942, section 3.1.) The head goes out with the model as an AlbertForPreTraining.

Hardware and time: 2 CPU cores that other work kept busy, 4 min 18 s for the whole command (1 min 33 s of processor
time). Result on 663 texts held out: pairs told right 0.494, where the more frequent answer has 0.506, so nothing of the
order was learned in 600 steps; masked accuracy 0.156 and loss 5.61, where the most frequent token has 0.046.
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
