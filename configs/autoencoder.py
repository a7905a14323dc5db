"""Vectors from texts alone: a text with words missing goes through one vector, and is written whole from it (TSDAE).

python train.py --config configs/autoencoder.py --init-from FOLDER --data.source texts.txt --data.text-unit line

(Wang et al., arXiv 2104.06979.) FOLDER is a published encoder or a run; `embed` and `export` then give its vectors.
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
