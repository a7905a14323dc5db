from flax_encoder.config import DataConfig, EncoderConfig, MaskingConfig, OptimizerConfig, RunConfig

config = RunConfig(
    run_dir="runs/quickstart",
    steps=1000,
    batch_size=32,
    log_every=10,
    checkpoint_every=100,
    model=EncoderConfig(
        num_layers=4, embed_dim=256, num_heads=4, mlp_dim=512, activation="gelu_tanh", gated=True, use_bias=False,
        norm="rms_norm", norm_placement="pre", norm_epsilon=1e-6, position="rope", dtype="bfloat16", scan_layers=False,
    ),
    data=DataConfig(source="tfds:python_docs", vocab_size=4096, row_length=128),
    masking=MaskingConfig(rate=0.3, eval_rate=0.15),
    optimizer=OptimizerConfig(name="muon", learning_rate=3e-3, muon_learning_rate=0.02),
)  # fmt: skip
