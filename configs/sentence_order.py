"""Masked words, and whether the two halves of a text are in order: ALBERT's two tasks, small, with its shared layers.

python train.py --config configs/sentence_order.py

(Lan et al., arXiv 1909.11942, section 3.1.) The head goes out with the model as an AlbertForPreTraining.
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
