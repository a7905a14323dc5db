"""Answer in a conversation, from scratch: each answer is learned from the turns before it.

python train.py --config configs/dialogue.py --data.source dialogue.jsonl

A row holds a list of turns (`turns`, `dialog`, `messages` with roles, ...), or a history beside a source and a target.
"""

from flax_encoder.config import DataConfig, EncoderConfig, LabelsConfig, OptimizerConfig, RunConfig

config = RunConfig(
    objective="text_to_text",
    steps=100,
    batch_size=16,
    checkpoint_every=100,
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
        dropout_rate=0.1,
        dtype="bfloat16",
        scan_layers=False,
    ),
    data=DataConfig(source="dialogue.jsonl", row_length=128, vocab_size=2048, held_out_rate=0.1),
    labels=LabelsConfig(smoothing=0.1),
    optimizer=OptimizerConfig(name="muon", learning_rate=3e-3, muon_learning_rate=0.02, warmup_rate=0.05),
)
