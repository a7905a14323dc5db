"""ModernBERT's recipe, small: its layers and its phases on your own text, in minutes.

python train.py --config configs/modernbert_small.py --data.source texts.jsonl

The learning rate and the batches grow, then rows of 128 become rows of 512 with another rope_theta, then the rate falls
by one minus a root, with half as many masks. A line of the file is {"text": ...}.

Measured on 10,033 Wikipedia leads, 4.4M parameters, 2 CPU cores that other work kept busy, 933 s of steps: accuracy on
held-out masked tokens after steps 250, 500, 750 and 1000 is 0.213, 0.253, 0.273 and 0.303, the last loss 4.353; a guess
from two neighbours has 0.276, the most frequent token 0.049. The run was stopped by a signal after step 610 and killed
after step 780. It resumed from step 700, and steps 701 to 780, over the beginning of the third phase, had bit for bit
the losses and gradient norms of the first time.
"""

from flax_encoder.config import DataConfig, EncoderConfig, MaskingConfig, OptimizerConfig, Phase, RunConfig

config = RunConfig(
    steps=1000,
    batch_size=16,
    log_every=10,
    checkpoint_every=100,
    eval_every=250,
    model=EncoderConfig(
        num_layers=4,
        embed_dim=256,
        num_heads=4,
        mlp_dim=384,
        activation="gelu_tanh",
        gated=True,
        norm_placement="pre",
        norm_epsilon=1e-5,
        embedding_norm=True,
        first_attention_norm=False,
        position="rope",
        local_rope_theta=10_000.0,
        window=16,
        global_every=3,
        use_bias=False,
        init_std=0.05,
        dtype="bfloat16",
        scan_layers=False,
    ),
    phases=(
        Phase(share=0.05, batch_size=(4, 16), learning_rate=(0.0, 3e-3)),
        Phase(share=0.70, learning_rate=3e-3),
        Phase(share=0.10, row_length=512, rope_theta=160_000.0, learning_rate=2e-3),
        Phase(share=0.15, masking_rate=0.15, learning_rate=(2e-3, 0.0), learning_rate_shape="one_minus_sqrt"),
    ),
    data=DataConfig(source="texts.jsonl", text_column="text", vocab_size=8192, row_length=128),
    masking=MaskingConfig(rate=0.3, eval_rate=0.15),
    optimizer=OptimizerConfig(name="muon", learning_rate=3e-3, muon_learning_rate=0.02),
)
