"""Learn from scratch to say what a text is about in a few words: short descriptions, titles or summaries.

python train.py --config configs/summarize.py --data.source en.jsonl

A row holds a text and its summary; of a text longer than a row the beginning is read. `--init-from runs/spans` starts
from the model and the tokenizer of span_corruption.

Measured with --steps 300 --model.dtype float32 --data.skip-bad-rows on 9,360 Wikipedia leads and their short
descriptions (171 have none), one CPU core that other work kept busy: an epoch, 3 min 31 s of processor time in 20 min,
2.6M parameters. On 502 held-out leads it is worse than their first sentence. It has learned the form of descriptions
(nation, occupation, years) and not yet what a text says: "American writer" with wrong years for a chemist.

                    rouge1  rouge2  rougeL  bleu  chrf
    this model      0.194   0.063   0.190   4.4   16.5
    first sentence  0.310   0.166   0.285   5.5   40.8
    whole text      0.121   0.060   0.110   1.5   19.6
"""

import dataclasses

from translate_en_fr import config as translate

from flax_encoder.config import DataConfig

config = dataclasses.replace(
    translate,
    run_dir="runs/summarize",
    steps=400,
    data=DataConfig(
        source="en.jsonl", text_column="text", text_pair_column="description", row_length=64, target_length=32,
        vocab_size=4096, held_out_rate=0.05,
    ),
)  # fmt: skip
