"""Learn a number for a text or a pair of texts, such as how alike two sentences are, or how well a film is liked.

python train.py --config configs/regression.py --init-from FOLDER --data.source train.csv --data.test test.csv

FOLDER is a published encoder or a run. A row has a text, or a pair of texts, and a number. The run recognizes columns
by usual names; name others by --data.text-column, --data.text-pair-column and --data.label-column.

Measured with --epochs 1, from MiniLM-L6 (22.7M parameters), on 5,749 pairs of STS benchmark: 2 CPU cores that other
work kept busy, 16 min (2 min 34 s of processor time). On 1,379 test pairs Pearson 0.726, Spearman 0.705 and squared
error 1.10; on 1,500 development pairs 0.765, 0.790 and 0.95, where the mean of training has 0, 0 and 2.36.
"""

from flax_encoder.config import DataConfig, EncoderConfig, OptimizerConfig, RunConfig

config = RunConfig(
    objective="regression",
    epochs=3.0,
    batch_texts=32,
    checkpoint_every=200,
    eval_every="epoch",
    model=EncoderConfig(dropout_rate=0.1, dtype="bfloat16", scan_layers=False),
    data=DataConfig(source="train.csv", row_length=128, held_out_rate=0.05),
    optimizer=OptimizerConfig(learning_rate=5e-5, b2=0.999, warmup_rate=0.1),
)
