"""Every setting of a run, its default, and the rules it must satisfy, in one tree of frozen dataclasses.

`configs/NAME.py` builds a `RunConfig`; `train.py` turns the same tree into typed command-line overrides; a
checkpoint stores it as JSON. The first lines of a field's comment are its `--help`.
"""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar, Union

T = TypeVar("T")

Activation = Literal[
    "gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu2", "relu6", "leaky_relu", "mish", "tanh", "sigmoid",
    "identity",
]  # fmt: skip


class ConfigError(ValueError):
    """A setting breaks a rule. The message gives the rule, the values and a way out."""


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise ConfigError(rule)


def _require_rates(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0.0 <= value <= 1.0, f"{name} is a probability between 0 and 1: got {value}.")


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{name} must be above 0: got {value}.")


# Settings that recurrent layers, and what stands around them, read.
_OF_RECURRENT = (
    "vocab_size", "layer", "bidirectional", "num_layers", "num_layer_groups", "embed_dim", "embedding_dim",
    "embedding_scale", "num_token_types", "activation", "norm", "norm_placement", "norm_epsilon", "embedding_norm",
    "position", "max_length", "position_offset", "position_scale", "use_bias", "norm_bias", "init_std", "dropout_rate",
    "dtype", "scan_layers", "remat",
)  # fmt: skip
# Settings of an EncoderConfig that its parameters do not depend on.
FREE_OF_PARAMETERS = (
    "dropout_rate", "attention_dropout_rate", "dtype", "attention_implementation", "scan_layers", "remat"
)  # fmt: skip


class Biases(NamedTuple):
    attention: bool
    mlp: bool
    mlp_out: bool
    norm: bool


@dataclass(frozen=True)
class EncoderConfig:
    """The architecture. Axes are B batch, T length, N heads, K key/value heads, H head_dim, D embed, F MLP."""

    vocab_size: int = 0
    """Rows of the embedding table; 0 takes the tokenizer's size."""
    layer: Literal["attention", "rnn", "lstm", "gru"] = "attention"
    """What a layer is: attention and feed-forward, or Elman's network (of activation tanh or relu), LSTM or GRU."""
    bidirectional: bool = True
    """Recurrent layers: half of embed_dim reads each row forward and half backward, not all of it forward."""
    num_layers: int = 12
    num_layer_groups: int | None = None
    """Sets of parameters, each run by num_layers / num_layer_groups layers in succession (ALBERT has 1); None is one
    a layer."""
    embed_dim: int = 768
    """D, the width of the residual stream."""
    embedding_dim: int | None = None
    """Width of the embeddings, which a linear map then brings to embed_dim (ALBERT, ELECTRA), or the first recurrent
    layer; None embeds in embed_dim."""
    embedding_scale: float = 1.0
    """Factor of the token vectors before anything is added (Vaswani et al.: embed_dim ** 0.5)."""
    num_token_types: int = 0
    """Kinds of tokens with a vector each, such as BERT's sentence A and B; 0 has none."""
    num_heads: int = 12
    """N."""
    attention_head_dim: int | None = None
    """H, the width of a head; None is embed_dim / num_heads. Modules read `head_dim`, where that is settled."""
    num_kv_heads: int | None = None
    """K, key/value heads shared by num_heads / K query heads each; None is num_heads."""
    attention_scale: float | None = None
    """Factor of the attention logits; None is H ** -0.5 (T5 has 1)."""
    mlp_dim: int = 3072
    """F, the inner width of the feed-forward block (of each half, if gated)."""
    activation: Activation = "gelu"
    gated: bool = False
    """act(x W_gate) * (x W_up): with gelu it is GeGLU, with silu SwiGLU (Shazeer, arXiv 2002.05202)."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_placement: Literal["pre", "post"] = "post"
    """post normalises after each residual sum (BERT); pre normalises each block's input and the final output."""
    norm_epsilon: float = 1e-12
    embedding_norm: bool | None = None
    """Normalise the embeddings; None does in post-norm stacks."""
    first_attention_norm: bool = True
    """False leaves out the norm before the first attention of a pre-norm stack, whose embeddings have one
    (ModernBERT)."""
    position: Literal["learned", "sinusoidal", "rope", "none"] = "learned"
    """What each token is told of its place; relative_position is about pairs of them."""
    max_length: int = 512
    """Longest row that learned positions can serve; the other kinds have no such limit."""
    position_offset: int = 0
    """Rows of the table of learned positions before the first token's (RoBERTa has 2)."""
    position_scale: bool = False
    """A learned factor of the sinusoids (Hua et al., arXiv 2202.10447)."""
    rope_theta: float = 10_000.0
    local_rope_theta: float | None = None
    """rope_theta of the layers with a window; None is the same."""
    relative_position: Literal["none", "alibi", "t5", "disentangled"] = "none"
    """What attention adds for the distance of two tokens: a slope a head (ALiBi), a learned scalar a head and bucket,
    the same in all layers (T5), or products of contents and learned vectors of distances (DeBERTa)."""
    relative_buckets: int = 32
    """t5: buckets of both signs together. disentangled: of each sign; 0 has one bucket a distance."""
    relative_max_distance: int = 128
    """From this distance on, all is one bucket."""
    disentangled_terms: Literal["c2p", "p2c", "c2p+p2c"] = "c2p+p2c"
    """Which products: content to position, position to content (He et al., arXiv 2006.03654, equation 4)."""
    share_relative_projections: bool = True
    """disentangled: distances go through the contents' own query and key projections (DeBERTa v2, v3)."""
    relative_norm: bool = True
    """disentangled: normalise the vectors of distances (DeBERTa v2, v3)."""
    conv_width: int = 0
    """Tokens that a convolution beside the first layer spans (DeBERTa v2: 3); 0 has none."""
    conv_activation: Activation = "gelu"
    window: int | None = None
    """Each token sees this many tokens to either side; None sees its whole document."""
    global_every: int = 1
    """With a window: layers 0, global_every, 2 global_every ... see the whole document instead; 0 means none does."""
    use_bias: bool = True
    """Biases in linear layers and in layer norm, where none of the next four says otherwise."""
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    mlp_out_bias: bool | None = None
    """Bias of the feed-forward block's last map; None is mlp_bias."""
    norm_bias: bool | None = None
    init_std: float = 0.02
    """Standard deviation of the truncated normal that kernels and embeddings start from."""
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Operands of matrix products. Parameters, accumulation, norms, softmax and loss are always float32."""
    attention_implementation: Literal["reference", "chunked", "rows", "splash", "flash", "cudnn"] | None = None
    """None picks the fastest that can serve."""
    scan_layers: bool = True
    """Run the stacked layers by `lax.scan` (quick to compile) or unrolled (quicker to run); same parameters."""
    remat: Literal["none", "feed_forward", "dots", "full"] = "none"
    """What the backward pass recomputes: chains of elementwise operations at most, the feed-forward blocks' first
    product too, whose result is the largest they keep, all but matrix products, or everything in a layer."""

    def __post_init__(self):
        _require_positive(
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
            _require(value is None or value > 0, f"{name} must be above 0 or None: got {value}.")
        _require_rates(self, "dropout_rate", "attention_dropout_rate")
        for name in ("num_token_types", "position_offset", "relative_buckets", "conv_width"):
            value = getattr(self, name)
            _require(value >= 0, f"{name} must be at least 0: got {value}.")
        _require(self.vocab_size >= 0, f"vocab_size must be at least 0 (0 is the tokenizer's): got {self.vocab_size}.")
        self._check_layer()
        _require(
            self.layer != "attention" or self.attention_head_dim is not None or self.embed_dim % self.num_heads == 0,
            f"num_heads must divide embed_dim: got {self.num_heads} for {self.embed_dim}; "
            f"{_nearest_divisors(self.embed_dim, self.num_heads)} do, and with attention_head_dim set any does.",
        )
        _require(
            self.num_kv_heads is None or (self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0),
            f"num_kv_heads must divide num_heads: got {self.num_kv_heads} for {self.num_heads}.",
        )
        groups = self.num_layer_groups or self.num_layers
        _require(
            self.num_layers % groups == 0,
            f"num_layer_groups must divide num_layers: got {groups} for {self.num_layers}; "
            f"{_nearest_divisors(self.num_layers, groups)} do.",
        )
        _require(
            self.position != "rope" or self.head_dim % 2 == 0,
            f"rope turns pairs of features, so head_dim must be even: got {self.head_dim}.",
        )
        width = self.embedding_dim or self.embed_dim
        _require(
            self.position != "sinusoidal" or width % 2 == 0,
            f"sinusoids come in pairs of sine and cosine, so embed_dim must be even: got {width}.",
        )
        _require(self.window is None or self.window >= 0, f"window must be at least 0 tokens: got {self.window}.")
        _require(self.global_every >= 0, f"global_every must be at least 0: got {self.global_every}.")
        _require(
            self.relative_position != "t5" or 4 <= self.relative_buckets < 4 * self.relative_max_distance,
            "t5 halves its buckets for the signs, and each half for near and far: relative_buckets must be at least 4 "
            f"and relative_max_distance above a quarter of it: got {self.relative_buckets} and "
            f"{self.relative_max_distance}.",
        )
        _require(
            self.relative_position != "disentangled"
            or not self.relative_buckets
            or (self.relative_buckets >= 4 and self.relative_max_distance > self.relative_buckets // 2 + 1),
            "disentangled keeps half its buckets for near distances: relative_buckets must be 0 or at least 4, and "
            f"relative_max_distance above half of it: got {self.relative_buckets} and {self.relative_max_distance}.",
        )
        _require(
            self.relative_position != "disentangled"
            or (self.attention_scale is None and self.num_kv_heads in (None, self.num_heads)),
            "disentangled attention has a scale of its own and one key head a query head: got attention_scale "
            f"{self.attention_scale} and num_kv_heads {self.num_kv_heads}; leave both None.",
        )
        _require(
            self.conv_width == 0 or self.conv_width % 2 == 1,
            f"a convolution is centred on its token, so conv_width must be odd: got {self.conv_width}.",
        )
        _require(
            not self.first_differs or self.num_layer_groups is None,
            f"layers that share parameters are alike: got num_layer_groups {self.num_layer_groups} with a first layer "
            f"of its own (conv_width {self.conv_width}, first_attention_norm {self.first_attention_norm}, "
            f"embedding_dim {self.embedding_dim}).",
        )
        _require(
            self.first_attention_norm or self.norm_placement == "pre",
            "first_attention_norm is a norm before attention: without it norm_placement must be pre, got post.",
        )
        _require(
            not self.position_scale or self.position == "sinusoidal",
            f"position_scale is a factor of sinusoids: got position {self.position}.",
        )
        _require(
            self.position_offset == 0 or self.position == "learned",
            f"position_offset is of learned positions: got {self.position_offset} with position {self.position}.",
        )
        _require(
            self.local_rope_theta is None or self.window is not None,
            f"local_rope_theta is of layers with a window: got {self.local_rope_theta} and window None.",
        )

    def _check_layer(self) -> None:
        if self.layer == "attention":
            _require(self.bidirectional, "attention sees both sides: bidirectional is for recurrent layers.")
            return
        for f in dataclasses.fields(self):
            _require(
                f.name in _OF_RECURRENT or getattr(self, f.name) == f.default,
                f"{f.name} is not for layers of {self.layer}: leave it at {f.default}; got {getattr(self, f.name)}.",
            )
        _require(
            (self.activation in ("tanh", "relu")) if self.layer == "rnn" else self.activation == "gelu",
            f"activation is of rnn layers, tanh or relu, and of no other recurrent layer: got {self.activation} for "
            f"{self.layer}.",
        )
        _require(self.position != "rope", "rope is for attention: position must be another for recurrent layers.")
        _require(
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


@dataclass(frozen=True)
class HeadConfig:
    """What an objective puts on the encoder: a transform (dense, activation, norm), then logits.

    None is what BERT has: masked_lm the encoder's activation and biases, and a norm; classification tanh, a bias and
    no norm.
    """

    transform: bool = True
    activation: Activation | None = None
    norm: bool | None = None
    dense_bias: bool | None = None
    """Bias of the transform's dense map."""
    out_bias: bool = True
    """Bias of the logits."""
    tied: bool = True
    """masked_lm: logits are products with the token embedding; else with a table of their own."""

    def __post_init__(self):
        _require(
            self.transform or (self.activation, self.norm, self.dense_bias) == (None, None, None),
            f"activation, norm and dense_bias are the transform's: got {self.activation}, {self.norm} and "
            f"{self.dense_bias} without it.",
        )


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder behind an encoder, of layers like the encoder's that also read its output."""

    num_layers: int | None = None
    """None is as many as the encoder has."""
    tied: bool = True
    """Logits are products with the token embedding; else with a table of their own."""
    logit_scale: float = 1.0
    """Factor of the vectors that logits are made of (T5, where tied: embed_dim ** -0.5)."""

    def __post_init__(self):
        _require(
            self.num_layers is None or self.num_layers > 0,
            f"num_layers must be above 0 or None: got {self.num_layers}.",
        )
        _require_positive(self, "logit_scale")


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows."""

    source: str | tuple[str, ...] = "tfds:python_docs"
    """`tfds:NAME[/CONFIG]`, `hf:NAME[:CONFIG]`, a prepared store, or files: a path or quoted glob ending in .txt or
    .jsonl (either also .gz or .zst) or in .parquet. Several are mixed."""
    weights: tuple[float, ...] | None = None
    """Of several sources: the shares of rows from each; None reads all equally often."""
    text_column: str | None = None
    """None takes the column `text`, or the only column of strings."""
    label_column: str = "label"
    """The column that classification predicts."""
    text_unit: Literal["paragraph", "line", "file"] = "paragraph"
    """What one document is in a .txt file; paragraphs are separated by blank lines."""
    held_out_rate: float = 0.02
    """Share of documents kept for evaluation, chosen by a hash of their text; unused if the source has a test split."""
    tokenizer: str | None = None
    """A tokenizer.json, or a folder with a tokenizer's files; None takes that of init_from or of a prepared store, else
    trains a WordPiece on the training text."""
    vocab_size: int = 8192
    """Size of a tokenizer that is made here."""
    word_vectors: str | None = None
    """A GloVe or word2vec file, text or binary, whose vectors the token embedding starts from. Without data.tokenizer
    its first vocab_size words are the tokens."""
    row_length: int = 128
    """T, tokens in a row; documents are packed into rows, and longer ones split (classification: cut)."""
    last_row_length: int | None = None
    """Rows of this length instead in the run's last steps; a batch then has as many tokens, in other rows."""
    last_rate: float = 0.1
    """With last_row_length: the share of steps that have it."""
    packing: Literal["best-fit", "one-per-row", "concatenate"] = "best-fit"
    """best-fit fills rows with whole documents; concatenate cuts their endless text every row_length tokens."""
    buckets: tuple[int, ...] = ()
    """With one-per-row: shorter lengths for batches of short documents, such as 32 64; each is compiled once."""
    workers: int = 0
    """Processes that make batches; 0 makes them in threads of the training process."""
    verify: bool = False
    """Compare every prepared file with its checksum first; sizes are always compared."""
    cache_dir: str | None = None
    """Prepared text; None is $FLAX_ENCODER_CACHE, else ~/.cache/flax_encoder."""

    def __post_init__(self):
        _require_rates(self, "held_out_rate", "last_rate")
        _require_positive(self, "vocab_size")
        _require(
            self.row_length >= 3, f"a row holds [CLS], one token and [SEP] at least: got row_length {self.row_length}."
        )
        _require(
            self.last_row_length is None or self.last_row_length >= 3,
            f"a row holds [CLS], one token and [SEP] at least: got last_row_length {self.last_row_length}.",
        )
        _require(
            not self.buckets or (self.packing == "one-per-row" and all(3 <= b < self.row_length for b in self.buckets)),
            f"buckets are lengths from 3 to below row_length, with packing one-per-row: got {self.buckets} with "
            f"row_length {self.row_length} and packing {self.packing}.",
        )
        _require(self.workers >= 0, f"workers must be at least 0: got {self.workers}.")
        _require(len(self.sources) > 0, "data.source must name at least one source.")
        _require(
            self.weights is None or (len(self.weights) == len(self.sources) and min(self.weights) > 0),
            f"weights are one number above 0 for each source: got {self.weights} for {len(self.sources)} sources.",
        )

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def final_row_length(self) -> int:
        return self.last_row_length or self.row_length


@dataclass(frozen=True)
class MaskingConfig:
    """Masked-LM corruption (Devlin et al., arXiv 1810.04805, section 3.1)."""

    kind: Literal["token", "whole_word", "span"] = "token"
    """What is masked together: single tokens, all of a word, or runs of words (Joshi et al., arXiv 1907.10529)."""
    rate: float = 0.15
    """Share of a row's ordinary tokens that are predicted in training."""
    last_rate: float | None = None
    """What the rate goes to, straight, by the last step (Ankner et al., arXiv 2305.15096); None keeps it."""
    eval_rate: float = 0.15
    mask_rate: float = 0.8
    """Of those, the share replaced by [MASK] ..."""
    random_rate: float = 0.1
    """... and by a random token; the rest stay as they are."""
    mean_span_words: float = 5.0
    """With kind span: words in a span, on average before it is cut ..."""
    max_span_words: int = 10
    """... at this many."""
    budget: int | None = None
    """M, slots for predicted tokens in a row; None is enough for the rate and a little for a last word or span."""

    def __post_init__(self):
        _require_rates(self, "rate", "eval_rate", "mask_rate", "random_rate")
        _require(self.rate > 0 and self.eval_rate > 0, "rate and eval_rate must be above 0: nothing would be learned.")
        _require(
            self.last_rate is None or 0 < self.last_rate <= 1,
            f"last_rate is a probability above 0, or None: got {self.last_rate}.",
        )
        _require(
            self.mask_rate + self.random_rate <= 1.0,
            f"mask_rate + random_rate is at most 1: got {self.mask_rate} + {self.random_rate}.",
        )
        _require(
            self.mean_span_words >= 1 and self.max_span_words >= 1,
            f"a span has at least one word: got mean_span_words {self.mean_span_words}, max_span_words "
            f"{self.max_span_words}.",
        )

    @property
    def rates(self) -> tuple[float, float]:
        """In the first step, and in the last."""
        return self.rate, self.rate if self.last_rate is None else self.last_rate


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "stable_adamw", "lamb", "lion", "muon", "soap", "adafactor", "schedule_free"] = "adamw"
    """adamw (Loshchilov and Hutter, arXiv 1711.05101); stable_adamw, whose updates are clipped (Wortsman et al., arXiv
    2304.13013); lamb (You et al., arXiv 1904.00962); lion (Chen et al., arXiv 2302.06675); muon (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon) and soap (Vyas et al., arXiv 2409.11321), which take the layers' matrices and
    leave embeddings, head, norms and biases to adamw; adafactor, relative to each parameter's size (Shazeer and Stern,
    arXiv 1804.04235); schedule_free, which evaluates and saves its average (Defazio et al., arXiv 2405.15682)."""
    learning_rate: float = 5e-4
    """Peak rate; with muon, of what adamw has."""
    muon_learning_rate: float = 0.02
    """Peak rate of muon's matrices."""
    b1: float = 0.9
    """Decay of the mean gradient; with schedule_free, weight of the average where gradients are taken."""
    b2: float = 0.98
    """Decay of the mean square; with lion, of the mean gradient that is kept."""
    epsilon: float = 1e-6
    muon_momentum: float = 0.95
    muon_dtype: Literal["bfloat16", "float32"] = "float32"
    """Operands of muon's products; its authors' are bfloat16."""
    soap_every: int = 10
    """Steps between SOAP's QR decompositions."""
    weight_decay: float = 0.01
    """Decoupled and times the learning rate, on matrices and embeddings; never on biases and norms."""
    freeze_embedding: bool = False
    """Leave the token embedding as it starts, such as from data.word_vectors or init_from."""
    clip_norm: float | None = 1.0
    """Gradients with a larger global norm are scaled down to it; None never clips."""
    schedule: Literal["linear", "cosine", "wsd"] = "linear"
    """After the warm-up: straight or cosine to the final rate, or (wsd) constant and then down over decay_rate."""
    warmup_rate: float = 0.06
    """Share of the run spent rising from 0; with linear, 0.5 makes a triangle."""
    decay_rate: float = 0.2
    """With wsd: share of the run spent falling; 0 never falls."""
    decay_shape: Literal["linear", "one_minus_sqrt"] = "linear"
    """With wsd: how it falls (one_minus_sqrt: Hägele et al., arXiv 2405.18392, and ModernBERT)."""
    final_rate: float = 0.0
    """What the learning rate falls to, as a share of the peak."""

    def __post_init__(self):
        _require_rates(self, "warmup_rate", "decay_rate", "final_rate", "b1", "b2", "muon_momentum")
        _require_positive(self, "soap_every")
        _require(
            self.learning_rate >= 0 and self.muon_learning_rate >= 0,
            f"learning rates are at least 0: got {self.learning_rate} and {self.muon_learning_rate}.",
        )
        _require(
            self.clip_norm is None or self.clip_norm > 0, f"clip_norm must be above 0 or None: got {self.clip_norm}."
        )
        _require(
            self.schedule != "wsd" or self.warmup_rate + self.decay_rate <= 1.0,
            f"warmup_rate + decay_rate is at most 1: got {self.warmup_rate} + {self.decay_rate}.",
        )
        _require(
            self.schedule == "wsd" or self.decay_shape == "linear",
            f"decay_shape is of schedule wsd: got {self.decay_shape} with {self.schedule}.",
        )
        _require(
            self.name != "schedule_free" or (self.schedule == "wsd" and self.decay_rate == 0),
            "schedule_free averages instead of decaying: give schedule wsd and decay_rate 0 with it; got "
            f"{self.schedule} and {self.decay_rate}.",
        )


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; the product is the number of devices used."""

    data: int = -1
    """Rows are split, parameters copied. -1 takes the devices that the other axes leave."""
    fsdp: int = 1
    """Rows and parameters are both split."""
    tensor: int = 1
    """Heads, MLP and vocabulary are split."""
    num_processes: int = 1
    """That train together, as one on each of several machines; the mesh is over all their devices. They find each other
    by what started them (Slurm, Kubernetes, Open MPI, Cloud TPU), or by JAX_COORDINATOR_ADDRESS (host:port of the
    first) and JAX_PROCESS_ID, and share run_dir."""

    def __post_init__(self):
        _require(
            self.data == -1 or self.data > 0, f"mesh.data is at least 1, or -1 for all that are left: got {self.data}."
        )
        _require_positive(self, "fsdp", "tensor", "num_processes")


class Stage(NamedTuple):
    """Steps up to number `end_step` whose batches are [batch_size, row_length]."""

    end_step: int
    batch_size: int
    row_length: int


@dataclass(frozen=True)
class RunConfig:
    """A run: what is learned, from what, how, and where it is written."""

    run_dir: str = "runs/run"
    """Holds config.json, tokenizer.json, metrics.jsonl, checkpoints/ and TensorBoard events. Run again to resume.
    A recipe that leaves it has runs/NAME, after its own."""
    init_from: str | None = None
    """A run folder whose encoder (and tokenizer) to start from; parts that differ, such as the head, start fresh."""
    objective: Literal["masked_lm", "classification"] = "masked_lm"
    steps: int = 1000
    budget_minutes: float | None = None
    """End after this much training, compiling and evaluations not counted, if the steps are not done before. The
    learning rate then goes by the share of steps or of time, whichever is larger; the rest of the settings by steps."""
    batch_size: int = 32
    """Rows in a step, over all devices."""
    first_batch_size: int | None = None
    """Rows in the first step; batches then double in size until they have batch_size. Each size is compiled once."""
    batch_warmup_rate: float = 0.1
    """With first_batch_size: the share of steps that have smaller batches."""
    num_microbatches: int = 1
    """Gradients are accumulated over this many equal parts of a batch; the update is the same. CPUs are fastest with
    2,000 to 4,000 tokens in each (LOG.md)."""
    seed: int = 0
    pooling: Literal["cls", "mean", "late"] = "cls"
    """What classification reads of a document: its first token, the mean of its tokens, or late, the mean of the
    logits of its tokens."""
    compare_with_scratch: bool = False
    """After a run with init_from, train the same model without it, and report both."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int | None = None
    """Steps between evaluations on held-out text; None evaluates once, at the end."""
    eval_batches: int | None = None
    """Batches of each evaluation; None reads all held-out text."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written at the end and before a signal stops the run."""
    keep_checkpoints: int = 2
    model: EncoderConfig = field(default_factory=EncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        _require_positive(
            self, "steps", "batch_size", "num_microbatches", "log_every", "checkpoint_every", "keep_checkpoints"
        )
        for name in ("eval_every", "eval_batches", "budget_minutes", "first_batch_size"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} must be above 0 or None: got {value}.")
        _require(
            self.mesh.num_processes == 1 or not self.compare_with_scratch,
            f"compare_with_scratch trains a second run, in one process: got mesh.num_processes "
            f"{self.mesh.num_processes}. Train that run by a command of its own.",
        )
        _require(
            self.batch_size % self.num_microbatches == 0,
            f"num_microbatches must divide batch_size: got {self.num_microbatches} for {self.batch_size}; "
            f"{_nearest_divisors(self.batch_size, self.num_microbatches)} do.",
        )
        first = self.first_batch_size or self.batch_size
        _require(
            first <= self.batch_size and first % self.num_microbatches == 0,
            f"first_batch_size is at most batch_size, and num_microbatches divides it: got {first} for a batch_size of "
            f"{self.batch_size} and {self.num_microbatches} microbatches.",
        )
        _require_rates(self, "batch_warmup_rate")
        last_rate = self.data.last_rate if self.data.last_row_length else 0.0
        _require(
            first == self.batch_size or self.batch_warmup_rate + last_rate <= 1.0,
            "batches have grown before rows change length: batch_warmup_rate + data.last_rate is at most 1, got "
            f"{self.batch_warmup_rate} + {last_rate}.",
        )
        longest = max(self.data.row_length, self.data.final_row_length)
        _require(
            self.data.word_vectors is None or self.init_from is None,
            "the token embedding starts from data.word_vectors or from init_from: got both.",
        )
        _require(
            self.model.position != "learned" or longest <= self.model.max_length,
            f"learned positions reach max_length: got data.row_length {longest} for "
            f"model.max_length {self.model.max_length}.",
        )
        tokens = self.batch_size * self.data.row_length
        _require(
            tokens % (self.data.final_row_length * self.num_microbatches) == 0,
            f"a batch keeps its tokens when rows change length, in num_microbatches equal parts: {self.batch_size} "
            f"rows of {self.data.row_length} are {tokens} tokens, not a multiple of {self.num_microbatches} times "
            f"data.last_row_length {self.data.final_row_length}.",
        )
        if self.objective == "masked_lm":
            rate = max(*self.masking.rates, self.masking.eval_rate)
            needed = math.ceil(rate * longest)
            _require(
                self.masking.budget is None or self.masking.budget >= needed,
                f"masking.budget must hold the masked tokens of a full row: got {self.masking.budget}, and a rate of "
                f"{rate} of {longest} tokens needs {needed}.",
            )
        else:
            _require(
                self.data.packing != "concatenate" and self.data.last_row_length is None,
                "classification needs whole documents, in rows of one length: data.packing best-fit or one-per-row, "
                "and no data.last_row_length.",
            )
            _require(
                len(self.data.sources) == 1,
                f"classification takes one source, whose labels it learns: got {len(self.data.sources)}.",
            )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The run's parts, within which all batches have one size: their sizes grow straight, rounded down."""
        data, full = self.data, self.batch_size
        sizes = [self.first_batch_size or full]
        while sizes[-1] < full:
            sizes.append(min(2 * sizes[-1], full))
        growing = self.steps * self.batch_warmup_rate
        starts = [round(growing * (size - sizes[0]) / max(full - sizes[0], 1)) for size in sizes]
        stages = [Stage(end, size, data.row_length) for end, size in zip(starts[1:], sizes[:-1], strict=True)]
        if data.last_row_length is not None:
            stages.append(Stage(self.steps - round(self.steps * data.last_rate), full, data.row_length))
        stages.append(Stage(self.steps, full * data.row_length // data.final_row_length, data.final_row_length))
        ends = [0, *(stage.end_step for stage in stages)]
        return tuple(stage for start, stage in zip(ends, stages, strict=False) if start < stage.end_step)


def _nearest_divisors(n: int, near: int) -> str:
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    below, above = [d for d in divisors if d < near], [d for d in divisors if d > near]
    return " and ".join(map(str, below[-1:] + above[:1]))


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as JSON-ready dictionaries; `from_dict` is its inverse."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: Any, path: str = "") -> T:
    """Build `cls` from nested dictionaries. An unknown name or a wrong type is a ConfigError that names it."""
    if not isinstance(values, dict):
        raise ConfigError(f"{path.rstrip('.') or cls.__name__} must be a section of settings: got {values!r}.")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"unknown field {path}{unknown[0]}; known are {', '.join(sorted(known))}.")
    parsed = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            parsed[name] = from_dict(hint, value, f"{path}{name}.")  # type: ignore[arg-type]
        else:
            parsed[name] = _checked(value, hint, path + name)
    return cls(**parsed)


def _checked(value: Any, hint: Any, name: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
        elif option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        elif typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            return tuple(_checked(v, typing.get_args(option)[0], name) for v in value)
        elif type(value) is option:
            return value
    raise ConfigError(f"{name} must be {hint}: got {value!r}.")


def differences(a: Any, b: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Fields (dotted) whose values differ between two trees of one type."""
    found: dict[str, tuple[Any, Any]] = {}
    for f in dataclasses.fields(a):
        left, right = getattr(a, f.name), getattr(b, f.name)
        if dataclasses.is_dataclass(left):
            found |= differences(left, right, f"{path}{f.name}.")
        elif left != right:
            found[path + f.name] = (left, right)
    return found
