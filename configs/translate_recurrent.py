"""Translate English to French by a recurrent encoder-decoder with attention (Bahdanau et al., arXiv 1409.0473).

python train.py --config configs/translate_recurrent.py --data.source pairs.jsonl

A bidirectional GRU reads the source, and a GRU that attends to its states writes the target; data, tokenizer and steps
are those of translate_en_fr.

Measured with --budget-minutes 7 on 33,448 pairs of LibreOffice's help, 2 CPU cores that other work kept busy, 496 of
the 800 steps, an epoch and a half, 8 min 35 s in all, 1.6M parameters: on the 682 held-out pairs BLEU 19.8, chrF 43.3,
ROUGE-L 0.411; the source itself has 5.7, 26.8 and 0.114.
"""

from flax_encoder.config import DataConfig, DecoderConfig, EncoderConfig, LabelsConfig, OptimizerConfig, RunConfig

config = RunConfig(
    objective="text_to_text",
    steps=800,
    batch_size=32,
    checkpoint_every=200,
    model=EncoderConfig(
        layer="gru",
        bidirectional=True,
        num_layers=1,
        embed_dim=192,
        position="none",
        init_std=0.05,
        dropout_rate=0.1,
        dtype="bfloat16",
        scan_layers=False,
    ),
    decoder=DecoderConfig(num_layers=1),
    data=DataConfig(source="pairs.jsonl", text_column="en", text_pair_column="fr", row_length=64, vocab_size=4096),
    labels=LabelsConfig(smoothing=0.1),
    optimizer=OptimizerConfig(name="adamw", learning_rate=3e-3, warmup_rate=0.05),
)
