r"""Learn one of several labels for each text, or pair of texts, of a file, starting from a published encoder.

python train.py --config configs/classify.py --init-from FOLDER --data.source train.csv --run-dir runs/mine

Measured with --epochs 3 --batch-texts 32 --model.dtype float32 --optimizer.learning-rate 3e-4 from a BERT of two layers
of width 128, on 1,584 movie snippets rated good or bad: accuracy on 800 others is 0.744 with each of two seeds;
transformers on torch (benchmarks/peer_finetune.py) has 0.740 as the median of five seeds, from 0.739 to 0.746.

A larger model's answers help it. MiniLM (22.7M parameters) learned 1,584 of 1,600 snippets (--epochs 3, 1e-4), an
accuracy of 0.811 on 800 others, and answered these 1,600 and 8,166 without labels; then the BERT learned its shares:

python -m flax_encoder predict LARGE --input texts.jsonl --output answers.jsonl --texts --probabilities
python train.py --config configs/classify.py --init-from FOLDER --data.source answers.jsonl \
  --data.label-column probabilities

With --steps 300 --batch-texts 32, 3e-4, float32 and three seeds its accuracy on the 800 is 0.766, 0.769 and 0.761, its
loss 0.496, 0.496 and 0.495. With the 1,600 labels in as many steps it has 0.729, 0.715 and 0.719, in three epochs
0.719, 0.725 and 0.734, losses of 0.57 at least. One CPU core that other work kept busy: 2 min 47 s of processor time
for MiniLM, 1 min 39 s for its answers, 49 s a seed. What the shares gain without the further texts was not measured.
"""

from flax_encoder.config import DataConfig, EncoderConfig, OptimizerConfig, RunConfig

config = RunConfig(
    objective="classification",
    steps=300,
    batch_size=16,
    checkpoint_every=100,
    eval_every=100,
    model=EncoderConfig(dropout_rate=0.1, dtype="bfloat16", scan_layers=False),
    data=DataConfig(source="train.csv", row_length=128, held_out_rate=0.1),
    optimizer=OptimizerConfig(name="adamw", learning_rate=5e-5, b2=0.999, weight_decay=0.01, warmup_rate=0.1),
)
