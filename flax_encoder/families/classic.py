"""Models from before BERT, which nobody publishes folders of."""

from flax_encoder.config import EncoderConfig

# The encoder of table 3's first row; `EncoderDecoder` makes the whole (Vaswani et al., arXiv 1706.03762).
transformer_base = EncoderConfig(
    vocab_size=37_000, num_layers=6, embed_dim=512, num_heads=8, mlp_dim=2048, activation="relu",
    position="sinusoidal", embedding_scale=512**0.5, embedding_norm=False, norm_epsilon=1e-6, attention_bias=False,
    dropout_rate=0.1,
)  # fmt: skip
# InferSent's BiLSTM over 300-dimensional word vectors, without its pooling (Conneau et al., arXiv 1705.02364).
bilstm = EncoderConfig(
    layer="lstm", num_layers=1, embed_dim=4096, embedding_dim=300, position="none", embedding_norm=False
)
