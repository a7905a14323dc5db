"""T5 (Raffel et al., arXiv 1910.10683) and T5 1.1 (Shazeer, arXiv 2002.05202): the encoder, with its decoder or not."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from flax_encoder.config import ConfigError, DecoderConfig, EncoderConfig, from_dict
from flax_encoder.families.bert import classes
from flax_encoder.families.family import (
    Family,
    Field,
    Head,
    Row,
    activation,
    activation_name,
    linear,
    norm,
    table,
    understood,
)

BLOCK = "encoder.block.{i}.layer"
DECODER = "decoder.block.{i}.layer"


def _attention_rows(theirs: str, ours: str) -> tuple[Row, ...]:
    parts = (("q", "query"), ("k", "key"), ("v", "value"))
    rows = (row for part, name in parts for row in linear(f"{theirs}.{part}", f"{ours}.{name}"))
    return (*rows, *linear(f"{theirs}.o", f"{ours}.out", "from_heads"))


def _feed_forward_rows(theirs: str, ours: str) -> tuple[Row, ...]:
    return (
        *(row._replace(when=(f"{ours}.gate.kernel", name == "wi_1")) for name in ("wi", "wi_1")
          for row in linear(f"{theirs}.{name}", f"{ours}.up")),
        *linear(f"{theirs}.wi_0", f"{ours}.gate"),
        *linear(f"{theirs}.wo", f"{ours}.down"),
    )  # fmt: skip


DECODER_ROWS = (
    *table("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "decoder.relative"),
    *_attention_rows(f"{DECODER}.0.SelfAttention", "decoder.layers.attention"),
    *norm(f"{DECODER}.0.layer_norm", "decoder.layers.attention_norm"),
    *_attention_rows(f"{DECODER}.1.EncDecAttention", "decoder.layers.cross_attention"),
    *norm(f"{DECODER}.1.layer_norm", "decoder.layers.cross_attention_norm"),
    *_feed_forward_rows(f"{DECODER}.2.DenseReluDense", "decoder.layers.feed_forward"),
    *norm(f"{DECODER}.2.layer_norm", "decoder.layers.feed_forward_norm"),
    *norm("decoder.final_layer_norm", "decoder.final_norm"),
    *table("lm_head.weight", "head.token"),
)


def read_decoder(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> DecoderConfig:
    """What tie_word_embeddings stands for besides: the first T5 scales what logits are made of, 1.1 does not."""
    is_scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True) is not False)
    own = tensors.get("lm_head.weight")
    shared = tensors.get("shared.weight")
    # A table of its own that is not there is made anew, but for a T5Model, which has no logits.
    is_lacking = config.get("tie_word_embeddings", True) is False and config.get("architectures") != ["T5Model"]
    with understood("a field of this t5 config"):
        return from_dict(
            DecoderConfig,
            {
                "num_layers": config.get("num_decoder_layers") or config.get("num_layers", 6),
                "tied": not is_lacking if own is None else shared is None or np.array_equal(own, shared),
                "logit_scale": config.get("d_model", 512) ** -0.5 if is_scaled else 1.0,
            },
        )


def write_decoder(config: EncoderConfig, decoder: DecoderConfig) -> dict[str, Any]:
    """The fields that `read_decoder` reads, for transformers of version 4 and 5, which scale by either of the last two.

    Raises:
      ConfigError: logits are scaled as no T5 scales them.
    """
    scales = {config.embed_dim**-0.5: True, 1.0: False}
    if decoder.logit_scale not in scales:
        raise ConfigError(
            f"T5 scales vectors before its logits by embed_dim ** -0.5 or not at all: got logit_scale "
            f"{decoder.logit_scale} for {config.embed_dim}."
        )
    is_scaled = scales[decoder.logit_scale]
    return {
        "num_decoder_layers": decoder.num_layers or config.num_layers,
        "is_encoder_decoder": True,
        "tie_word_embeddings": is_scaled,
        "scale_decoder_outputs": is_scaled,
    }


TABLES = ("encoder.embed_tokens.weight", "shared.weight", "decoder.embed_tokens.weight")


def _one_token_embedding(tensors: Mapping[str, np.ndarray], task: str | None) -> Mapping[str, np.ndarray]:
    """One table of tokens, named `shared`, of the three names that it can have.

    The encoder's own is the encoder's, and the decoder's the decoder's; `shared` stands for either where it is not
    there, and they for it. Raises:
      ConfigError: encoder and decoder are both loaded and theirs differ, which one embedding cannot be.
    """
    before = "transformer." if any(name.startswith("transformer.") for name in tensors) else ""
    found = {name: tensors[before + name] for name in TABLES if before + name in tensors}
    if not found:
        return tensors
    out = {name: value for name, value in tensors.items() if name.removeprefix(before) not in TABLES}
    out[f"{before}shared.weight"] = of_encoder = next(iter(found.values()))
    if task == "text_to_text":
        of_decoder = next(found[name] for name in reversed(TABLES) if name in found)
        if not np.array_equal(of_encoder, of_decoder):
            names = [next(iter(found)), next(name for name in reversed(TABLES) if name in found)]
            raise ConfigError(
                f"{' and '.join(names)} must be equal, for encoder and decoder share one token embedding here: they "
                f'differ. task="none", --task none on the command line, loads the encoder with its own.'
            )
        # Logits are tied to `shared`, whatever the encoder and the decoder read.
        if "lm_head.weight" not in out and not np.array_equal(found.get("shared.weight", of_encoder), of_encoder):
            out["lm_head.weight"] = found["shared.weight"]
    return out


def _read_feed_forward(name: str) -> tuple[str, bool]:
    is_gated, name = name.startswith("gated-"), name.removeprefix("gated-")
    # What is called gated-gelu was trained with the tanh form.
    return ("gelu_tanh" if is_gated and name == "gelu" else activation("feed_forward_proj").read(name)), is_gated


def _write_feed_forward(name: str, is_gated: bool) -> str:
    if not is_gated:
        return activation_name(name)
    return (
        "gated-gelu"
        if name == "gelu_tanh"
        else f"gated-{activation_name(name)}"
        if name != "gelu"
        else "gated-gelu_python"
    )


t5_small = EncoderConfig(
    vocab_size=32_128, num_layers=6, embed_dim=512, num_heads=8, attention_head_dim=64, mlp_dim=2048,
    activation="relu", norm="rms_norm", norm_placement="pre", norm_epsilon=1e-6, position="none",
    relative_position="t5", attention_scale=1.0, use_bias=False, dropout_rate=0.1, attention_dropout_rate=0.1,
)  # fmt: skip
t5_v1_1_small = dataclasses.replace(
    t5_small, num_layers=8, num_heads=6, mlp_dim=1024, activation="gelu_tanh", gated=True
)
T5 = Family(
    model_type="t5",
    fixed={
        "norm": "rms_norm", "norm_placement": "pre", "position": "none", "relative_position": "t5",
        "attention_scale": 1.0, "use_bias": False,
    },
    fields=(
        Field("vocab_size", "vocab_size", 32_128),
        Field("d_model", "embed_dim", 512),
        Field("d_kv", "attention_head_dim", 64),
        Field("d_ff", "mlp_dim", 2048),
        Field("num_layers", "num_layers", 6),
        Field("num_heads", "num_heads", 8),
        Field("relative_attention_num_buckets", "relative_buckets", 32),
        Field("relative_attention_max_distance", "relative_max_distance", 128),
        Field("dropout_rate", ("dropout_rate", "attention_dropout_rate"), 0.1, lambda rate: (rate, rate),
              lambda rate, _: rate),
        Field("layer_norm_epsilon", "norm_epsilon", 1e-6),
        Field("feed_forward_proj", ("activation", "gated"), "relu", _read_feed_forward, _write_feed_forward),
    ),
    rows=(
        *table("shared.weight", "embedding.token"),
        *table("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative.table"),
        *_attention_rows(f"{BLOCK}.0.SelfAttention", "layers.attention"),
        *norm(f"{BLOCK}.0.layer_norm", "layers.attention_norm"),
        *_feed_forward_rows(f"{BLOCK}.1.DenseReluDense", "layers.feed_forward"),
        *norm(f"{BLOCK}.1.layer_norm", "layers.feed_forward_norm"),
        *norm("encoder.final_layer_norm", "final_norm"),
    ),
    heads={
        "token_classification": Head(("T5ForTokenClassification",), classes("classifier"), {"transform": False}),
        "text_to_text": Head(
            ("T5ForConditionalGeneration", "T5WithLMHeadModel", "T5Model"), DECODER_ROWS, tied="lm_head.weight",
            prefix="",
        ),
    },
    decoder=read_decoder,
    write_decoder=write_decoder,
    arranged=_one_token_embedding,
    prefix="transformer.",
    base="T5EncoderModel",
    must={"is_encoder_decoder": (True, False)},
    ignored=frozenset({
        # Derived from feed_forward_proj, or the decoder's.
        "dense_act_fn", "is_gated_act", "num_decoder_layers", "tie_word_embeddings", "scale_decoder_outputs",
        "n_positions", "position_embedding_type",
    }),
    aliases={"hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers",
             "head_dim": "d_kv"},
    leftovers=(
        r"^decoder\.", r"^lm_head\.",  # the encoder alone, of a folder that has both
        r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",  # never read, says T5
    ),
    presets={
        "t5_small": t5_small,
        "t5_base": dataclasses.replace(t5_small, num_layers=12, embed_dim=768, num_heads=12, mlp_dim=3072),
        "t5_v1_1_small": t5_v1_1_small,
        **{
            f"t5_v1_1_{name}": dataclasses.replace(
                t5_v1_1_small, num_layers=layers, embed_dim=embed, num_heads=heads, mlp_dim=mlp
            )
            for name, layers, embed, heads, mlp in (
                ("base", 12, 768, 12, 2048),
                ("large", 24, 1024, 16, 2816),
                ("xl", 24, 2048, 32, 5120),
                ("xxl", 24, 4096, 64, 10_240),
            )
        },
    },
)  # fmt: skip
