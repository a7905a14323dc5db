"""Vectors from texts alone: an encoder makes one vector of a text without some words; a decoder writes it (TSDAE).

python train.py --config configs/autoencoder.py --init-from FOLDER --data.source texts.txt --data.text-unit line

(Wang et al., arXiv 2104.06979.) FOLDER is a published encoder or a run; `embed` and `export` then give its vectors.

Measured with --optimizer.learning-rate 3e-4, from a published BERT of 2 layers of width 128 that knew only masked
words, on 13,197 sentences of the STS benchmark (194 steps): 2 CPU cores that other work kept busy, 2 min 44 s.
The decoder writes 0.202 of the held-out tokens right; a guess from the token before reaches 0.249. Spearman on the
1,379 test pairs with mean pooling is 0.401; before the run the encoder had 0.620. So this short run at this rate made
the vectors worse.

With the recipe's 3e-5 and --autoencoder.pooling cls, TSDAE's, as many steps in float32 (1 min 58 s of processor time)
hardly begin: 0.056 of the held-out tokens are right, the most frequent token has 0.072, and the loss is 8.37, above
that token's 6.98. Spearman falls from 0.577 to 0.515 by cls vectors and from 0.620 to 0.571 by mean ones. More steps
were not tried.
"""

from flax_encoder.config import DataConfig, EncoderConfig, OptimizerConfig, RunConfig

config = RunConfig(
    run_dir="runs/autoencoder",
    objective="autoencoder",
    epochs=1.0,
    batch_size=16,
    checkpoint_every=1000,
    model=EncoderConfig(dtype="bfloat16", scan_layers=False),
    data=DataConfig(source="texts.txt", row_length=64, held_out_rate=0.02),
    optimizer=OptimizerConfig(learning_rate=3e-5, b2=0.999, weight_decay=0.01, warmup_rate=0.1),
)
