"""Learn one of several labels for each text, or pair of texts, of a file, starting from a published encoder.

python train.py --config configs/classify.py --init-from FOLDER --data.source train.csv --run-dir runs/mine

Measured with --epochs 3 --batch-texts 32 --model.dtype float32 --optimizer.learning-rate 3e-4 from a BERT of two layers
of width 128, on 1,584 movie snippets rated good or bad: accuracy on 800 others is 0.744 with each of two seeds;
transformers on torch (benchmarks/peer_finetune.py) has 0.740 as the median of five seeds, from 0.739 to 0.746.
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
