"""Pre-norm encoders with rotary positions: ModernBERT (Warner et al., arXiv 2412.13663), EuroBERT (Boizard et al.,
arXiv 2503.05500), NeoBERT (Le Breton et al., arXiv 2502.19587); and cramming's (Geiping and Goldstein, 2212.14034)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax_encoder.config import ConfigError, EncoderConfig
from flax_encoder.families.bert import SIZE, TIED, classes, decoder
from flax_encoder.families.family import Family, Field, Head, activation, fused, linear, norm, table

LAYER = "layers.{i}"


def sized(*defaults: int) -> tuple[Field, ...]:
    """vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size."""
    return tuple(f._replace(default=default) for f, default in zip(SIZE, defaults, strict=True))


def _theta(rope: dict[str, Any]) -> float:
    if others := {name: value for name, value in rope.items() if name != "rope_theta" and value != "default"}:
        raise ConfigError(f"rotary positions must be of rope_type default: got {others}, which are not understood.")
    return float(rope["rope_theta"])


def _read_layers(types: list[str] | None, local: int, count: int) -> tuple[int, int, int]:
    every = {
        n: ["full_attention" if n and i % n == 0 else "sliding_attention" for i in range(count)]
        for n in range(count + 1)
    }
    types = every[3] if types is None and count >= 3 else types
    found = next((n for n in (1, *every) if every.get(n) == types), None)
    if found is None:
        raise ConfigError(f"layer_types must be full_attention at every n-th layer from the first: got {types}.")
    return found, local // 2, count


def _write_layers(every: int, window: int | None, count: int) -> tuple[list[str], int, int]:
    full = [window is None or (every > 0 and i % every == 0) for i in range(count)]
    return ["full_attention" if f else "sliding_attention" for f in full], 2 * (64 if window is None else window), count


def _modernize_modernbert(config: dict[str, Any]) -> dict[str, Any]:
    every = config.pop("global_attn_every_n_layers", 3)
    types = [
        "sliding_attention" if every and i % every else "full_attention"
        for i in range(config.get("num_hidden_layers", 22))
    ]
    scaling = config.pop("rope_scaling", None) or {}
    thetas = {
        "full_attention": config.pop("global_rope_theta", None) or 160_000.0,
        "sliding_attention": config.pop("local_rope_theta", None) or 10_000.0,
    }
    given = config.get("rope_parameters") or {}
    if other := sorted(set(given) - set(thetas)):
        raise ConfigError(f"rope_parameters must be by kind of layer, {' and '.join(thetas)}: got {', '.join(other)}.")
    rope = {kind: {"rope_type": "default", "rope_theta": theta, **scaling, **(given.get(kind) or {})}
            for kind, theta in thetas.items()}  # fmt: skip
    return config | {"layer_types": config.get("layer_types") or types, "rope_parameters": rope}


def _older_modernbert(config: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers before 5 reads it; no such field says that the first layer has a window."""
    thetas = {
        name: config["rope_parameters"][kind]["rope_theta"]
        for name, kind in (("global_rope_theta", "full_attention"), ("local_rope_theta", "sliding_attention"))
    }
    full = [i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    every = {"global_attn_every_n_layers": [*full, len(config["layer_types"])][1]} if full else {}
    return thetas | every


MODERN_HEAD_FIELDS = (
    activation("classifier_activation"),
    Field("classifier_bias", "dense_bias", False),
)
MODERN_CLASSES = (*linear("head.dense", "head.dense"), *norm("head.norm", "head.norm"), *classes("classifier"))


def _pooling(given: Any) -> Any:
    if given == "late":  # ours alone; what is no pooling at all is refused for every family
        raise ConfigError("ModernBERT's heads pool by cls or mean: got 'late'.")
    return given


MODERN_POOLING = Field(
    "classifier_pooling", "pooling", "cls", _pooling, lambda ours: ours if ours in ("cls", "mean") else "cls"
)


def _modern_head(name: str, *fields: Field) -> Head:
    return Head((f"ModernBertFor{name}",), MODERN_CLASSES, {"norm": True}, (*MODERN_HEAD_FIELDS, *fields))


modernbert_base = EncoderConfig(
    vocab_size=50_368, num_layers=22, mlp_dim=1152, gated=True, norm_placement="pre", norm_epsilon=1e-5,
    embedding_norm=True, first_attention_norm=False, position="rope", rope_theta=160_000.0, local_rope_theta=10_000.0,
    window=64, global_every=3, use_bias=False, max_length=8192,
)  # fmt: skip
MODERNBERT = Family(
    model_type="modernbert",
    fixed={
        "gated": True, "norm_placement": "pre", "embedding_norm": True, "first_attention_norm": False,
        "position": "rope", "use_bias": False,
    },
    fields=(
        *(f for f in sized(50_368, 768, 22, 12, 1152) if f.theirs != "num_hidden_layers"),
        activation("hidden_activation"),
        Field("max_position_embeddings", "max_length", 8192),
        Field("norm_eps", "norm_epsilon", 1e-5),
        Field("norm_bias", "norm_bias", False, write=bool),
        Field("attention_bias", "attention_bias", False, write=bool),
        Field("mlp_bias", "mlp_bias", False, write=bool),
        Field("attention_dropout", "attention_dropout_rate", 0.0),
        Field("mlp_dropout", "dropout_rate", 0.0),
        Field(("layer_types", "local_attention", "num_hidden_layers"), ("global_every", "window", "num_layers"),
              (None, 128, 22), _read_layers, _write_layers),
        Field("rope_parameters", ("rope_theta", "local_rope_theta"), None,
              lambda rope: (_theta(rope["full_attention"]), _theta(rope["sliding_attention"])),
              lambda theta, local: {
                  kind: {"rope_type": "default", "rope_theta": t}
                  for kind, t in (("full_attention", theta), ("sliding_attention", local or theta))
              }),
    ),
    rows=(
        *table("embeddings.tok_embeddings.weight", "embedding.token"),
        *norm("embeddings.norm", "embedding.norm"),
        *norm(f"{LAYER}.attn_norm", "layers.attention_norm"),
        *fused(f"{LAYER}.attn.Wqkv", *((f"layers.attention.{part}", "linear") for part in ("query", "key", "value"))),
        *linear(f"{LAYER}.attn.Wo", "layers.attention.out", "from_heads"),
        *norm(f"{LAYER}.mlp_norm", "layers.feed_forward_norm"),
        *fused(f"{LAYER}.mlp.Wi", ("layers.feed_forward.gate", "linear"), ("layers.feed_forward.up", "linear")),
        *linear(f"{LAYER}.mlp.Wo", "layers.feed_forward.down"),
        *norm("final_norm", "final_norm"),
    ),
    heads={
        "masked_lm": Head(
            ("ModernBertForMaskedLM",),
            (*MODERN_CLASSES[:-2], *decoder("decoder")),
            fields=(*MODERN_HEAD_FIELDS, Field("decoder_bias", "out_bias", True), TIED),
            tied="decoder.weight",
        ),
        "classification": _modern_head("SequenceClassification", MODERN_POOLING),
        "token_classification": _modern_head("TokenClassification"),
        "question_answering": _modern_head("QuestionAnswering"),
        "multiple_choice": dataclasses.replace(
            _modern_head("MultipleChoice", MODERN_POOLING), num_outputs=1
        ),
    },
    prefix="model.",
    base="ModernBertModel",
    # The last two are published (position_embedding_type is sans_pos in mmBERT and granite) and never read.
    ignored=frozenset({"embedding_dropout", "layer_norm_eps", "position_embedding_type"}),
    modernize=_modernize_modernbert,
    older=_older_modernbert,
    presets={
        "modernbert_base": modernbert_base,
        "modernbert_large": dataclasses.replace(
            modernbert_base, num_layers=28, embed_dim=1024, num_heads=16, mlp_dim=2624
        ),
    },
)  # fmt: skip


def _modernize_eurobert(config: dict[str, Any]) -> dict[str, Any]:
    given = config.pop("rope_scaling", None) or config.get("rope_parameters") or {}
    rope = {"rope_type": "default", "rope_theta": config.pop("rope_theta", 10_000.0), **given}
    renamed = {"classifier_pooling": config.pop("clf_pooling")} if "clf_pooling" in config else {}
    return config | {"rope_parameters": rope} | renamed


eurobert_210m = EncoderConfig(
    vocab_size=128_256, mlp_dim=3072, activation="silu", gated=True, norm="rms_norm", norm_placement="pre",
    norm_epsilon=1e-5, position="rope", rope_theta=250_000.0, use_bias=False, max_length=8192,
)  # fmt: skip
EUROBERT = Family(
    model_type="eurobert",
    fixed={"gated": True, "norm": "rms_norm", "norm_placement": "pre", "position": "rope", "use_bias": False},
    fields=(
        *sized(128_256, 768, 12, 12, 3072),
        Field("num_key_value_heads", "num_kv_heads", None),
        Field("head_dim", "attention_head_dim", None),
        activation("hidden_act", default="silu"),
        Field("max_position_embeddings", "max_length", 8192),
        Field("rms_norm_eps", "norm_epsilon", 1e-5),
        Field("attention_bias", "attention_bias", False, write=bool),
        Field("mlp_bias", "mlp_bias", False, write=bool),
        Field("attention_dropout", "attention_dropout_rate", 0.0),
        Field("rope_parameters", "rope_theta", None, _theta,
              lambda theta: {"rope_type": "default", "rope_theta": theta}),
    ),
    rows=(
        *table("embed_tokens.weight", "embedding.token"),
        *(row for part, ours in (("q", "query"), ("k", "key"), ("v", "value"))
          for row in linear(f"{LAYER}.self_attn.{part}_proj", f"layers.attention.{ours}")),
        *linear(f"{LAYER}.self_attn.o_proj", "layers.attention.out", "from_heads"),
        *(row for part in ("gate", "up", "down")
          for row in linear(f"{LAYER}.mlp.{part}_proj", f"layers.feed_forward.{part}")),
        *norm(f"{LAYER}.input_layernorm", "layers.attention_norm"),
        *norm(f"{LAYER}.post_attention_layernorm", "layers.feed_forward_norm"),
        *norm("norm", "final_norm"),
    ),
    heads={
        "masked_lm": Head(
            ("EuroBertForMaskedLM",),
            decoder("lm_head"),
            {"transform": False},
            (TIED._replace(default=False), Field("mlp_bias", "out_bias", False)),
            tied="lm_head.weight",
        ),
        "classification": Head(
            ("EuroBertForSequenceClassification",),
            classes("classifier", "dense"),
            {"activation": "gelu"},
            (Field("classifier_pooling", "pooling", "late", lambda p: "cls" if p == "bos" else p,
                   lambda p: "bos" if p == "cls" else p),),
        ),
        "token_classification": Head(("EuroBertForTokenClassification",), classes("classifier"), {"transform": False}),
    },
    prefix="model.",
    base="EuroBertModel",
    ignored=frozenset({"hidden_dropout", "position_embedding_type"}),
    modernize=_modernize_eurobert,
    presets={"eurobert_210m": eurobert_210m},
)  # fmt: skip

neobert = EncoderConfig(
    vocab_size=30_522, num_layers=28, mlp_dim=2048, activation="silu", gated=True, norm="rms_norm",
    norm_placement="pre", norm_epsilon=1e-6, position="rope", use_bias=False, max_length=4096,
)  # fmt: skip
NEOBERT = Family(
    model_type="neobert",
    is_in_transformers=False,
    fixed={
        "activation": "silu", "gated": True, "norm": "rms_norm", "norm_placement": "pre", "position": "rope",
        "use_bias": False,
    },
    fields=(
        *(f for f in sized(30_522, 768, 28, 12, 3072) if f.theirs != "intermediate_size"),
        # Two thirds of what the config says, up to a multiple of 8: SwiGLU has three matrices for two.
        Field("intermediate_size", "mlp_dim", 3072, lambda width: 8 * -(-int(2 * width / 3) // 8),
              lambda width: -(-3 * width // 2)),
        Field("norm_eps", "norm_epsilon", 1e-6),
        Field("max_length", "max_length", 1024),
    ),
    rows=(
        *table("encoder.weight", "embedding.token"),
        *norm("transformer_encoder.{i}.attention_norm", "layers.attention_norm"),
        *fused(
            "transformer_encoder.{i}.qkv", ("layers.attention.query", "rotated_pairs"),
            ("layers.attention.key", "rotated_pairs"), ("layers.attention.value", "linear"), split="heads",
        ),
        *linear("transformer_encoder.{i}.wo", "layers.attention.out", "from_heads"),
        *norm("transformer_encoder.{i}.ffn_norm", "layers.feed_forward_norm"),
        *fused("transformer_encoder.{i}.ffn.w12", ("layers.feed_forward.gate", "linear"),
               ("layers.feed_forward.up", "linear")),
        *linear("transformer_encoder.{i}.ffn.w3", "layers.feed_forward.down"),
        *norm("layer_norm", "final_norm"),
    ),
    heads={
        "masked_lm": Head(("NeoBERTLMHead",), decoder("decoder"), {"transform": False, "tied": False}),
        "classification": Head(("NeoBERTForSequenceClassification",), classes("classifier", "dense")),
    },
    prefix="model.",
    base="NeoBERT",
    must={"hidden_act": ("swiglu", "SwiGLU"), "rope": (True,), "rms_norm": (True,), "ngpt": (False,)},
    ignored=frozenset({
        "classifier_init_range", "decoder_init_range", "dim_head", "dropout", "embedding_init_range",
        "flash_attention", "kwargs", "pretrained_model_name_or_path", "tie_word_embeddings", "trust_remote_code",
    }),
    presets={"neobert": neobert},
)  # fmt: skip

# cramming publishes its own configs and modules, which nobody else reads: a preset, and no tables.
crammed_bert = EncoderConfig(
    vocab_size=32_768, num_layers=16, mlp_dim=1536, gated=True, norm_placement="pre", embedding_norm=True,
    position="sinusoidal", position_scale=True, use_bias=False, norm_bias=True, dropout_rate=0.1,
    attention_dropout_rate=0.1,
)  # fmt: skip
