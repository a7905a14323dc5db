"""The settings of a model."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

from flax_encoder.config.rules import (
    ShortRepr,
    nearest_divisors,
    require,
    require_finite,
    require_positive,
    require_rates,
)

Activation = Literal[
    "gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu2", "relu6", "leaky_relu", "mish", "tanh", "sigmoid",
    "identity", "elu", "celu", "selu", "softplus", "softsign", "log_sigmoid", "hard_tanh", "hard_sigmoid",
    "hard_swish", "tanh_shrink",
]  # fmt: skip

PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
"""How the vectors of a document's tokens become one: `nn.pooling` does it."""

# Settings that recurrent layers, and what stands around them, read.
_OF_RECURRENT = (
    "vocab_size", "layer", "bidirectional", "num_layers", "num_layer_groups", "embed_dim", "embedding_dim",
    "embedding_scale", "num_token_types", "activation", "norm", "norm_placement", "norm_epsilon", "embedding_norm",
    "position", "max_length", "position_offset", "position_scale", "use_bias", "norm_bias", "init_std", "dropout_rate",
    "dtype", "scan_layers", "remat",
)  # fmt: skip
# Settings of an EncoderConfig that its parameters do not depend on.
FREE_OF_PARAMETERS = (
    "dropout_rate", "attention_dropout_rate", "dtype", "product_dtype", "attention_implementation", "scan_layers",
    "remat",
)  # fmt: skip


class Biases(NamedTuple):
    attention: bool
    mlp: bool
    mlp_out: bool
    norm: bool


@dataclass(frozen=True, repr=False)
class EncoderConfig(ShortRepr):
    """The architecture. Axes are B batch, T length, N heads, K key/value heads, H head_dim, D embed, F MLP."""

    vocab_size: int = 0
    """Rows of the embedding table; 0 takes the tokenizer's size."""
    layer: Literal["attention", "rnn", "lstm", "gru"] = "attention"
    """Kind of layer: attention with a feed-forward block, Elman's network (with activation tanh or relu), LSTM or GRU.
    """
    bidirectional: bool = True
    """Recurrent layers: half of embed_dim reads each row forward and half backward; if off, all of it reads forward."""
    num_layers: int = 12
    """L, the number of layers."""
    num_layer_groups: int | None = None
    """Sets of layer parameters; num_layers / num_layer_groups layers in succession share a set (ALBERT has 1 set). None
    gives each layer its own."""
    embed_dim: int = 768
    """D, the width of the residual stream."""
    embedding_dim: int | None = None
    """Width of the embeddings. A linear map (ALBERT, ELECTRA) or the first recurrent layer then brings them to
    embed_dim. None is embed_dim."""
    embedding_scale: float = 1.0
    """Factor of the token vectors before anything is added (Vaswani et al.: embed_dim ** 0.5)."""
    num_token_types: int = 0
    """Number of token types, each with a vector, such as BERT's sentences A and B; 0 has none."""
    num_heads: int = 12
    """N, the number of attention heads."""
    attention_head_dim: int | None = None
    """H, the width of a head; None is embed_dim / num_heads. Modules read the property `head_dim`."""
    num_kv_heads: int | None = None
    """K, the number of key/value heads, each shared by num_heads / K query heads; None is num_heads."""
    attention_scale: float | None = None
    """Factor of the attention logits; None is H ** -0.5 (T5 has 1)."""
    mlp_dim: int = 3072
    """F, the inner width of the feed-forward block (of each half, if gated)."""
    activation: Activation = "gelu"
    """Activation of the feed-forward block, or of rnn layers."""
    gated: bool = False
    """Feed-forward blocks compute act(x W_gate) * (x W_up): with gelu it is GeGLU, with silu SwiGLU (Shazeer, arXiv
    2002.05202)."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_placement: Literal["pre", "post"] = "post"
    """post normalizes after each residual sum (BERT); pre normalizes each block's input and the final output."""
    norm_epsilon: float = 1e-12
    """Added to the variance under the root."""
    embedding_norm: bool | None = None
    """Normalize the embeddings; None does so if norm_placement is post."""
    first_attention_norm: bool = True
    """False leaves out the norm before the first attention of a pre-norm model whose embeddings have a norm
    (ModernBERT)."""
    position: Literal["learned", "sinusoidal", "rope", "none"] = "learned"
    """How a token knows its own position; relative_position is about the distance of two tokens."""
    max_length: int = 512
    """The longest row for learned positions; other positions have no limit."""
    position_offset: int = 0
    """Rows of the table of learned positions before that of the first token (RoBERTa has 2)."""
    position_scale: bool = False
    """Multiply sinusoidal positions by a learned factor (Hua et al., arXiv 2202.10447)."""
    rope_theta: float = 10_000.0
    """Base of the wavelengths of rotary positions (Su et al., arXiv 2104.09864)."""
    local_rope_theta: float | None = None
    """rope_theta of the layers with a window; None is rope_theta."""
    relative_position: Literal["none", "alibi", "t5", "disentangled"] = "none"
    """What attention adds for the distance of two tokens: alibi a slope per head; t5 a learned scalar per head and
    bucket, the same in all layers; disentangled products of contents with learned vectors of distances (DeBERTa)."""
    relative_buckets: int = 32
    """Buckets of distances. t5: of both signs together; disentangled: of each sign, and with 0 one per distance."""
    relative_max_distance: int = 128
    """Distances from this one on share one bucket."""
    disentangled_terms: Literal["c2p", "p2c", "c2p+p2c"] = "c2p+p2c"
    """Products that are added: content to position, position to content (He et al., arXiv 2006.03654, equation 4)."""
    share_relative_projections: bool = True
    """disentangled: the query and key projections of contents also project distances (DeBERTa v2, v3)."""
    relative_norm: bool = True
    """disentangled: normalize the vectors of distances (DeBERTa v2, v3)."""
    conv_width: int = 0
    """Width, in tokens, of a convolution beside the first layer (DeBERTa v2 has 3); 0 has no convolution."""
    conv_activation: Activation = "gelu"
    window: int | None = None
    """A token sees this many tokens to either side; None: it sees its whole document."""
    global_every: int = 1
    """With a window: the layers 0, global_every, 2 global_every, ... see the whole document; 0: no layer does."""
    use_bias: bool = True
    """Biases in linear layers and in layer norm; attention_bias, mlp_bias, mlp_out_bias and norm_bias override it."""
    attention_bias: bool | None = None
    """Biases of attention's projections; None is use_bias."""
    mlp_bias: bool | None = None
    """Biases of the feed-forward block; None is use_bias."""
    mlp_out_bias: bool | None = None
    """Bias of the feed-forward block's last linear map; None is mlp_bias."""
    norm_bias: bool | None = None
    """Biases of layer norms; None is use_bias."""
    init_std: float = 0.02
    """Standard deviation of the truncated normal that kernels and embeddings start from."""
    dropout_rate: float = 0.0
    """Dropout of the embeddings and of each block's output."""
    attention_dropout_rate: float = 0.0
    """Dropout of the attention weights."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Dtype of the operands of matrix products. Parameters, accumulation, norms, softmax and loss are always float32.
    """
    product_dtype: Literal["float8"] | None = None
    """Dtype of the operands of the layers' linear maps, where it is not `dtype`, which must be bfloat16 then: float8
    rounds inputs and kernels to 3 bits of mantissa and gradients to 2, with a scale for each tensor. GPUs from Hopper
    on have products of it; other devices compute the same numbers, but no sooner."""
    attention_implementation: Literal["reference", "chunked", "rows", "splash", "flash", "cudnn"] | None = None
    """Backend of attention; None picks the fastest that can serve."""
    scan_layers: bool = True
    """Run the layers by `lax.scan` (faster to compile) or unrolled (faster to run); the parameters are the same."""
    remat: Literal["none", "feed_forward", "dots", "full"] = "none"
    """What the backward pass recomputes. none: at most chains of elementwise operations; feed_forward: also the first
    product of feed-forward blocks, their largest result; dots: all but matrix products; full: everything in a layer."""

    def __post_init__(self):
        require(self.dtype in ("bfloat16", "float32"), f"dtype must be bfloat16 or float32: got {self.dtype!r}.")
        require(
            self.product_dtype is None
            or (self.product_dtype, self.dtype, self.layer) == ("float8", "bfloat16", "attention"),
            f"product_dtype must be None, or float8 beside dtype bfloat16 in layers of attention: got "
            f"{self.product_dtype!r}, dtype {self.dtype} and layer {self.layer}.",
        )
        require_positive(
            self,
            "num_layers",
            "embed_dim",
            "num_heads",
            "mlp_dim",
            "norm_epsilon",
            "max_length",
            "rope_theta",
            "relative_max_distance",
            "embedding_scale",
            "init_std",
        )
        for name in ("num_layer_groups", "embedding_dim", "attention_head_dim", "attention_scale", "local_rope_theta"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be above 0 or None: got {value}.")
        require_rates(self, "dropout_rate", "attention_dropout_rate")
        for name in ("num_token_types", "position_offset", "relative_buckets", "conv_width"):
            value = getattr(self, name)
            require(value >= 0, f"{name} must be at least 0: got {value}.")
        require(self.vocab_size >= 0, f"vocab_size must be at least 0 (0 is the tokenizer's): got {self.vocab_size}.")
        self._check_layer()
        require(self.num_layers <= 10_000, f"num_layers is at most 10,000: got {self.num_layers}.")
        require(
            self.layer != "attention" or self.attention_head_dim is not None or self.embed_dim % self.num_heads == 0,
            f"num_heads must divide embed_dim: got {self.num_heads} for {self.embed_dim}; "
            f"{nearest_divisors(self.embed_dim, self.num_heads)} do, and with attention_head_dim set any does.",
        )
        require(
            self.num_kv_heads is None or (self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0),
            f"num_kv_heads must divide num_heads: got {self.num_kv_heads} for {self.num_heads}.",
        )
        groups = self.num_layer_groups or self.num_layers
        require(
            self.num_layers % groups == 0,
            f"num_layer_groups must divide num_layers: got {groups} for {self.num_layers}; "
            f"{nearest_divisors(self.num_layers, groups)} do.",
        )
        require(
            self.position != "rope" or self.head_dim % 2 == 0,
            f"rope turns pairs of features, so head_dim must be even: got {self.head_dim}.",
        )
        width = self.embedding_dim or self.embed_dim
        require(
            self.position != "sinusoidal" or width % 2 == 0,
            f"sinusoids come in pairs of sine and cosine, so embed_dim must be even: got {width}.",
        )
        require(self.window is None or self.window >= 0, f"window must be at least 0 tokens: got {self.window}.")
        require(self.global_every >= 0, f"global_every must be at least 0: got {self.global_every}.")
        require(
            self.relative_position != "t5" or 4 <= self.relative_buckets < 4 * self.relative_max_distance,
            "t5 halves its buckets for the signs, and each half for near and far: relative_buckets must be at least 4 "
            f"and relative_max_distance above a quarter of it: got {self.relative_buckets} and "
            f"{self.relative_max_distance}.",
        )
        require(
            self.relative_position != "disentangled"
            or not self.relative_buckets
            or (self.relative_buckets >= 4 and self.relative_max_distance > self.relative_buckets // 2 + 1),
            "disentangled keeps half its buckets for near distances: relative_buckets must be 0 or at least 4, and "
            f"relative_max_distance above half of it: got {self.relative_buckets} and {self.relative_max_distance}.",
        )
        require(
            self.relative_position != "disentangled"
            or (self.attention_scale is None and self.num_kv_heads in (None, self.num_heads)),
            "disentangled attention has a scale of its own and one key head a query head: got attention_scale "
            f"{self.attention_scale} and num_kv_heads {self.num_kv_heads}; leave both None.",
        )
        require(
            self.conv_width == 0 or self.conv_width % 2 == 1,
            f"a convolution is centred on its token, so conv_width must be odd: got {self.conv_width}.",
        )
        require(
            not self.first_differs or self.num_layer_groups is None,
            f"layers that share parameters are alike: got num_layer_groups {self.num_layer_groups} with a first layer "
            f"of its own (conv_width {self.conv_width}, first_attention_norm {self.first_attention_norm}, "
            f"embedding_dim {self.embedding_dim}).",
        )
        require(
            self.first_attention_norm or self.norm_placement == "pre",
            "first_attention_norm is a norm before attention: without it norm_placement must be pre, got post.",
        )
        require(
            not self.position_scale or self.position == "sinusoidal",
            f"position_scale needs sinusoidal positions: got position {self.position}.",
        )
        require(
            self.position_offset == 0 or self.position == "learned",
            f"position_offset needs learned positions: got {self.position_offset} with position {self.position}.",
        )
        require(
            self.local_rope_theta is None or (self.position == "rope" and self.window is not None),
            f"local_rope_theta needs position rope and a window: got {self.local_rope_theta} with position "
            f"{self.position} and window {self.window}.",
        )
        require_finite(self)

    def _check_layer(self) -> None:
        if self.layer == "attention":
            require(self.bidirectional, "attention sees both sides: leave bidirectional True without recurrent layers.")
            return
        for f in dataclasses.fields(self):
            require(
                f.name in _OF_RECURRENT or getattr(self, f.name) == f.default,
                f"{f.name} is not for layers of {self.layer}: leave it at {f.default}; got {getattr(self, f.name)}.",
            )
        require(
            (self.activation in ("tanh", "relu")) if self.layer == "rnn" else self.activation == "gelu",
            f"layer rnn needs activation tanh or relu, and lstm and gru the default gelu: got {self.activation} for "
            f"{self.layer}.",
        )
        require(self.position != "rope", "rope is for attention: position must be another for recurrent layers.")
        require(
            self.remat != "feed_forward",
            f"remat feed_forward needs layers of attention: give none, dots or full for {self.layer}.",
        )
        require(
            self.embed_dim % self.num_directions == 0,
            f"embed_dim is shared by both directions, so it must be even: got {self.embed_dim}.",
        )

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def num_cells(self) -> int:
        """Cells a direction of a recurrent layer."""
        return self.embed_dim // self.num_directions

    @property
    def head_dim(self) -> int:
        return self.attention_head_dim or self.embed_dim // self.num_heads

    @property
    def operands(self) -> str:
        """Dtype of the operands of the layers' linear maps."""
        return self.product_dtype or self.dtype

    @property
    def biases(self) -> "Biases":
        """Which parts have biases, settled."""
        attention, mlp, norm = (
            self.use_bias if own is None else own for own in (self.attention_bias, self.mlp_bias, self.norm_bias)
        )
        return Biases(attention, mlp, mlp if self.mlp_out_bias is None else self.mlp_out_bias, norm)

    @property
    def first_differs(self) -> bool:
        """Whether layer 0 has other parameters than the rest, and so lies apart from their stack."""
        is_wider = self.layer != "attention" and self.embedding_dim not in (None, self.embed_dim)
        return self.conv_width > 0 or not self.first_attention_norm or is_wider

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Each layer's window; None sees the whole document."""
        is_global = [self.global_every > 0 and i % self.global_every == 0 for i in range(self.num_layers)]
        return tuple(None if self.window is None or g else self.window for g in is_global)


@dataclass(frozen=True, repr=False)
class HeadConfig(ShortRepr):
    """The head on the encoder: a transform (dense map, activation, norm), then logits.

    None is BERT's choice: for masked_lm a transform with the encoder's activation and biases and a norm; for
    classification one with tanh, a bias and no norm; for heads that read every token no transform at all.
    """

    transform: bool | None = None
    """Whether there is a transform."""
    activation: Activation | None = None
    """Activation of the transform."""
    norm: bool | None = None
    """Whether the transform ends with a norm."""
    dense_bias: bool | None = None
    """Whether the transform's dense map has a bias."""
    out_bias: bool = True
    """Whether the logits have a bias."""
    tied: bool = True
    """masked_lm: logits are products with the token embedding; if off, with a table of their own."""

    def __post_init__(self):
        require(
            self.transform is not False or (self.activation, self.norm, self.dense_bias) == (None, None, None),
            f"activation, norm and dense_bias are the transform's: got {self.activation}, {self.norm} and "
            f"{self.dense_bias} without it.",
        )
        require_finite(self)


@dataclass(frozen=True, repr=False)
class DecoderConfig(ShortRepr):
    """The decoder of an encoder-decoder. Its layers are like the encoder's and also attend to the encoder's output."""

    num_layers: int | None = None
    """Layers of the decoder; None is as many as the encoder has."""
    tied: bool = True
    """Logits are products with the token embedding; if off, with a table of their own."""
    logit_scale: float = 1.0
    """Factor of the vectors that logits are made of (in a T5 with tied embeddings embed_dim ** -0.5)."""
    start_id: int | None = None
    """Id of the token that a decoder starts from; None takes the tokenizer's token before a text, or else padding (T5).
    """
    end_id: int | None = None
    """Id of the token that ends a target; None takes the tokenizer's token after a text."""

    def __post_init__(self):
        require(
            self.num_layers is None or self.num_layers > 0,
            f"num_layers must be above 0 or None: got {self.num_layers}.",
        )
        require_positive(self, "logit_scale")
        for name in ("start_id", "end_id"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{name} is a token's id, at least 0, or None: got {value}.")
        require_finite(self)


_OF_SAMPLED = ("temperature", "top_k", "top_p", "seed")
_OF_BEAMS = ("length_penalty", "early_stopping")


@dataclass(frozen=True, repr=False)
class GenerationConfig(ShortRepr):
    """How a decoder writes. None takes the value in the model's folder, or else the value in brackets."""

    max_new_tokens: int | None = None
    """Tokens of the longest text, its end included [as many as a target has in training, or 128]."""
    min_new_tokens: int | None = None
    """Tokens before a text may end [0]."""
    num_beams: int | None = None
    """Beams that are searched at once; 1 writes greedily, the likeliest token each time [1]."""
    length_penalty: float | None = None
    """Beam search: a text's score is its log-probability divided by its length to this power [1]."""
    early_stopping: bool | Literal["never"] | None = None
    """Beam search stops at num_beams finished texts (True), when a better text is unlikely (False), or when none is
    possible (never) [False]."""
    sample: bool | None = None
    """Sample each token at random, by `seed`, instead of taking the likeliest [False]."""
    temperature: float | None = None
    """Sampling: logits are divided by it [1]."""
    top_k: int | None = None
    """Sampling: draw only from this many of the likeliest tokens; 0 draws from all [0]."""
    top_p: float | None = None
    """Sampling: draw only from the fewest tokens whose probabilities add up to this [1]."""
    repetition_penalty: float | None = None
    """Factor that makes tokens less likely that the text already has [1]."""
    no_repeat_ngram_size: int | None = None
    """No sequence of this many tokens may occur twice in a text; 0 allows any [0]."""
    seed: int | None = None
    """Sampling: with the same seed a text is the same, whatever other texts are asked about [0]."""

    def __post_init__(self):
        least = {"max_new_tokens": 1, "min_new_tokens": 0, "num_beams": 1, "top_k": 0, "no_repeat_ngram_size": 0,
                 "seed": 0}  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            require(value is None or value >= low, f"generation.{name} is at least {low}: got {value}.")
        for name in ("temperature", "repetition_penalty"):
            value = getattr(self, name)
            require(value is None or value > 0, f"generation.{name} must be above 0: got {value}.")
        require(
            self.top_p is None or 0 < self.top_p <= 1,
            f"generation.top_p is a probability above 0 and at most 1: got {self.top_p}.",
        )
        require_finite(self)

    def check(self) -> None:
        """Raise ConfigError for settings that contradict each other, or that would not be read."""
        given = {name for name, value in vars(self).items() if value is not None}
        require(
            not (self.sample and (self.num_beams or 1) > 1),
            f"beam search does not sample: got generation.sample with generation.num_beams {self.num_beams}. Give "
            f"--generation.num-beams 1, or --generation.sample False.",
        )
        for names, is_read, way_out in (
            (_OF_SAMPLED, self.sample, "sampling: give --generation.sample True, or leave them out"),
            (_OF_BEAMS, (self.num_beams or 1) > 1, "beam search: give --generation.num-beams 4, or leave them out"),
        ):
            unread = [f"generation.{name}" for name in names if name in given]
            require(is_read or not unread, f"{' and '.join(unread)} would not be read without {way_out}.")

    def over(self, own: "GenerationConfig") -> "GenerationConfig":
        """`own`, overridden by the settings of this config that are not None. Settings of sampling (or beams) in `own`
        are dropped if the result does not sample (or has one beam)."""
        merged = vars(own) | {name: value for name, value in vars(self).items() if value is not None}
        for names, is_read in ((_OF_SAMPLED, merged["sample"]), (_OF_BEAMS, (merged["num_beams"] or 1) > 1)):
            merged |= {} if is_read else {name: getattr(self, name) for name in names}
        return GenerationConfig(**merged)
