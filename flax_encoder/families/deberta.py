"""DeBERTa v2 and v3 (He et al., arXiv 2006.03654 and 2111.09543)."""

import dataclasses

from flax_encoder.config import ConfigError
from flax_encoder.families.bert import (
    COMMON,
    EMBEDDING_ROWS,
    LAYER,
    MLP_ROWS,
    OUT_ROWS,
    TIED,
    bert_base,
    classes,
    multiple_choice,
    plain_heads,
)
from flax_encoder.families.family import Family, Field, Head, Row, activation, linear, norm, table

NAMES = {"c2p": "c2p", "p2c": "p2c", "c2p+p2c": "p2c|c2p"}


def _read_relative(is_relative: bool, terms: str | list[str] | None, norms: str) -> tuple[str, str, bool]:
    terms = "+".join(sorted(terms.replace(" ", "").lower().split("|") if isinstance(terms, str) else terms or ()))
    if is_relative != (terms in NAMES):
        raise ConfigError(
            "relative_attention needs one of c2p and p2c in pos_att_type, and those need it: got "
            f"relative_attention {is_relative} with pos_att_type {terms or None}."
        )
    return ("disentangled", terms, "layer_norm" in norms) if is_relative else ("none", "c2p+p2c", False)


def _write_relative(kind: str, terms: str, has_norm: bool) -> tuple[bool, str | None, str]:
    if kind != "disentangled":
        return False, None, "none"
    return True, NAMES[terms], "layer_norm" if has_norm else "none"


V3_HEAD = "lm_predictions.lm_head"  # the same computation under other names
deberta_v3_base = dataclasses.replace(
    bert_base, vocab_size=128_100, num_token_types=0, norm_epsilon=1e-7, position="none",
    relative_position="disentangled", relative_buckets=256, relative_max_distance=512,
)  # fmt: skip
DEBERTA = Family(
    model_type="deberta-v2",
    fixed={},
    fields=(
        *(f._replace(default={"vocab_size": 128_100, "hidden_size": 1536, "num_hidden_layers": 24,
                              "num_attention_heads": 24, "intermediate_size": 6144, "layer_norm_eps": 1e-7
                              }.get(f.theirs, f.default)) for f in COMMON),
        Field("type_vocab_size", "num_token_types", 0),
        Field("attention_head_size", "attention_head_dim", None),
        Field("position_biased_input", "position", True, lambda is_on: "learned" if is_on else "none",
              lambda position: position == "learned"),
        Field(("relative_attention", "pos_att_type", "norm_rel_ebd"),
              ("relative_position", "disentangled_terms", "relative_norm"), (False, None, "none"),
              _read_relative, _write_relative),
        Field("position_buckets", "relative_buckets", -1, lambda count: max(count, 0), lambda count: count or -1),
        Field(("max_relative_positions", "max_position_embeddings"), ("relative_max_distance", "max_length"), (-1, 512),
              lambda reach, length: (reach if reach > 0 else length, length)),
        Field("share_att_key", "share_relative_projections", False),
        Field("conv_kernel_size", "conv_width", 0),
        activation("conv_act", "conv_activation", "tanh"),
    ),
    rows=(
        *EMBEDDING_ROWS,
        *(row for theirs, ours in (("query_proj", "query"), ("key_proj", "key"), ("value_proj", "value"),
                                   ("pos_key_proj", "position_key"), ("pos_query_proj", "position_query"))
          for row in linear(f"{LAYER}.attention.self.{theirs}", f"layers.attention.{ours}")),
        *OUT_ROWS,
        *MLP_ROWS,
        *table("encoder.rel_embeddings.weight", "relative.table"),
        *norm("encoder.LayerNorm", "relative.norm"),
        Row(("encoder.conv.conv.weight",), (("first.convolution.conv.kernel", "conv"),)),
        Row(("encoder.conv.conv.bias",), (("first.convolution.conv.bias", "flat"),)),
        *norm("encoder.conv.LayerNorm", "first.convolution.norm"),
    ),
    heads={
        "masked_lm": Head(
            ("DebertaV2ForMaskedLM",),
            (
                *linear(("cls.predictions.transform.dense", f"{V3_HEAD}.dense"), "head.dense"),
                *norm(("cls.predictions.transform.LayerNorm", f"{V3_HEAD}.LayerNorm"), "head.norm"),
                *table("cls.predictions.decoder.weight", "head.token"),
                Row(("cls.predictions.decoder.bias", "cls.predictions.bias", f"{V3_HEAD}.bias"),
                    (("head.bias", "flat"),), num_written=2),
            ),
            fields=(TIED,),
            tied="cls.predictions.decoder.weight",
        ),
        "classification": Head(
            ("DebertaV2ForSequenceClassification",), classes("classifier", "pooler.dense"),
            fields=(activation("pooler_hidden_act"),),
        ),
        **plain_heads("DebertaV2"),
        **multiple_choice("DebertaV2", "pooler.dense", fields=(activation("pooler_hidden_act"),)),
    },
    prefix="deberta.",
    base="DebertaV2Model",
    must={"conv_groups": (1,), "z_steps": (0, 1)},
    # Which names the head's tensors have; and what was never read.
    ignored=frozenset({"legacy", "position_embedding_type"}),
    # The last is made, and not used, where norm_rel_ebd asks for it and relative_attention is off.
    leftovers=(r"mask_predictions\.", r"embeddings\.position_embeddings\.", r"^(deberta\.)?encoder\.LayerNorm\."),
    presets={"deberta_v3_base": deberta_v3_base},
)  # fmt: skip
