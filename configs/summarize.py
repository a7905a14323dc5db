"""Learn from scratch to say what a text is about in a few words: titles, short descriptions or summaries.

python train.py --config configs/summarize.py --data.source en.jsonl

A row holds a text and its summary. `--init-from runs/spans` starts from the model and the tokenizer of span_corruption.
Not measured here yet; the last table of a run has ROUGE, with the text's first sentence as a baseline.
"""

import dataclasses

from translate_en_fr import config as translate

from flax_encoder.config import DataConfig

config = dataclasses.replace(
    translate,
    run_dir="runs/summarize",
    data=DataConfig(
        source="en.jsonl", text_column="text", text_pair_column="title", row_length=128, target_length=32,
        vocab_size=4096, held_out_rate=0.05,
    ),
)  # fmt: skip
