"""What a text is about, in a few words: titles, short descriptions or summaries of texts, from scratch.

python train.py --config configs/summarize.py --data.source en.jsonl

A row holds a text and what is to be written for it. `--init-from runs/spans` starts from what span_corruption learned
of texts, with its tokenizer. Not measured here yet; a run's last table has ROUGE beside the text's first sentence.
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
