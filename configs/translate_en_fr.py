"""Learn to translate English to French, from scratch, from a file of pairs such as LibreOffice's help texts.

python train.py --config configs/translate_en_fr.py --data.source pairs.jsonl

Measured with --budget-minutes 26 on 33,448 pairs of LibreOffice's help, 2 CPU cores that some twenty other programs
kept busy (5 min of processor time in all), 508 of the 800 steps, an epoch and a half, 2.6M parameters: on the 682
held-out pairs BLEU 17.8, chrF 42.6, ROUGE-L 0.409; the source itself has 5.7, 26.8 and 0.114. Rows are 96.4% full.

Beside transformers' Marian class on torch with as many parameters, at the same time, one core and 6 minutes each
(--budget-minutes 6; benchmarks/peer_translate.py with AdamW at 1e-3, bfloat16, the same pairs, tokenizer and tokens an
update, batches grouped by length): this recipe makes 650 updates, BLEU 19.8, chrF 44.8; Marian 497 updates, BLEU 1.9,
chrF 15.9. At 3e-3 Marian's class has 0.0 and 1.6, and T5's class, with this recipe's architecture, 0.3 and 8.7. Lower
rates were not tried.
"""

from flax_encoder.config import DataConfig, EncoderConfig, LabelsConfig, OptimizerConfig, RunConfig

config = RunConfig(
    objective="text_to_text",
    steps=800,
    batch_size=32,
    checkpoint_every=200,
    model=EncoderConfig(
        num_layers=2,
        embed_dim=192,
        num_heads=3,
        mlp_dim=384,
        activation="gelu_tanh",
        gated=True,
        norm="rms_norm",
        norm_placement="pre",
        norm_epsilon=1e-6,
        position="none",
        relative_position="t5",
        use_bias=False,
        init_std=0.05,
        dtype="bfloat16",
        scan_layers=False,
    ),
    data=DataConfig(source="pairs.jsonl", text_column="en", text_pair_column="fr", row_length=64, vocab_size=4096),
    labels=LabelsConfig(smoothing=0.1),
    optimizer=OptimizerConfig(name="muon", learning_rate=3e-3, muon_learning_rate=0.02, warmup_rate=0.05),
)
