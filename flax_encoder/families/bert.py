"""BERT (Devlin et al., arXiv 1810.04805) and those that keep its layers: RoBERTa (arXiv 1907.11692), XLM-R
(arXiv 1911.02116), ELECTRA (arXiv 2003.10555), ALBERT (arXiv 1909.11942), DistilBERT (arXiv 1910.01108), MosaicBERT
(arXiv 2312.17482)."""

import dataclasses

from flax_encoder.config import ConfigError, EncoderConfig
from flax_encoder.families.family import (
    Family,
    Field,
    Head,
    Row,
    activation,
    activation_name,
    fused,
    linear,
    norm,
    table,
)

SIZE = (
    Field("vocab_size", "vocab_size", 30_522),
    Field("hidden_size", "embed_dim", 768),
    Field("num_hidden_layers", "num_layers", 12),
    Field("num_attention_heads", "num_heads", 12),
    Field("intermediate_size", "mlp_dim", 3072),
)
DROPOUT = (
    Field("hidden_dropout_prob", "dropout_rate", 0.1),
    Field("attention_probs_dropout_prob", "attention_dropout_rate", 0.1),
)
COMMON = (*SIZE, *DROPOUT, activation("hidden_act"), Field("layer_norm_eps", "norm_epsilon", 1e-12))
MAX_LENGTH = Field("max_position_embeddings", "max_length", 512)


def _types(count: int) -> int:
    if count == 0:
        raise ConfigError("every token has a type there: num_token_types must be at least 1, got 0.")
    return count


TYPES = Field("type_vocab_size", "num_token_types", 2, write=_types)
TIED = Field("tie_word_embeddings", "tied", True)

EMBEDDING_ROWS = (
    *table("embeddings.word_embeddings.weight", "embedding.token"),
    *table("embeddings.position_embeddings.weight", "embedding.position"),
    *table("embeddings.token_type_embeddings.weight", "embedding.token_type"),
    *norm("embeddings.LayerNorm", "embedding.norm"),
)
LAYER = "encoder.layer.{i}"
OUT_ROWS = (
    *linear(f"{LAYER}.attention.output.dense", "layers.attention.out", "from_heads"),
    *norm(f"{LAYER}.attention.output.LayerNorm", "layers.attention_norm"),
)
MLP_ROWS = (
    *linear(f"{LAYER}.intermediate.dense", "layers.feed_forward.up"),
    *linear(f"{LAYER}.output.dense", "layers.feed_forward.down"),
    *norm(f"{LAYER}.output.LayerNorm", "layers.feed_forward_norm"),
)
ROWS = (
    *EMBEDDING_ROWS,
    *(row for part in ("query", "key", "value")
      for row in linear(f"{LAYER}.attention.self.{part}", f"layers.attention.{part}")),
    *OUT_ROWS,
    *MLP_ROWS,
)  # fmt: skip
POOLER = tuple(linear("pooler.dense", "pooler.dense"))


def decoder(name: str, *biases: str) -> tuple[Row, ...]:
    """Vocabulary logits: a table of their own where they are not tied, and a bias that can go by several names."""
    return (
        *table(f"{name}.weight", "head.token"),
        Row((f"{name}.bias", *biases), (("head.bias", "flat"),), num_written=1 + len(biases)),
    )


def classes(out: str, dense: str | None = None) -> tuple[Row, ...]:
    return (*(linear(dense, "head.dense") if dense else ()), *linear(out, "head.out"))


def plain_heads(name: str) -> dict[str, Head]:
    """Heads that are one linear map of each token."""
    no_transform = {"transform": False}
    return {
        "token_classification": Head((f"{name}ForTokenClassification",), classes("classifier"), no_transform),
        "question_answering": Head((f"{name}ForQuestionAnswering",), classes("qa_outputs"), no_transform),
    }


def multiple_choice(name: str, dense: str, out: str = "classifier", **more) -> dict[str, Head]:
    """One number for each of the rows that are choices of a question."""
    head = Head((f"{name}ForMultipleChoice",), classes(out, dense), num_outputs=1, **more)
    return {"multiple_choice": head}


def masked_lm_rows(transform: str, norm_name: str, out: str, *biases: str) -> tuple[Row, ...]:
    return (*linear(transform, "head.dense"), *norm(norm_name, "head.norm"), *decoder(out, *biases))


def pretraining(name: str, masked_lm: Head, dense: str, out: str, objective: str) -> dict[str, Head]:
    """The head of masked_lm, and beside it two logits of a text's two segments."""
    rows = (*masked_lm.rows, *linear(dense, "pair_head.dense"), *linear(out, "pair_head.out"))
    return {"pretraining": dataclasses.replace(
        masked_lm, architectures=(f"{name}ForPreTraining",), rows=rows, num_outputs=2, objective=objective
    )}  # fmt: skip


PREDICTIONS = "cls.predictions"
BERT_MASKED_LM = Head(
    ("BertForMaskedLM", "BertForPreTraining"),
    masked_lm_rows(
        f"{PREDICTIONS}.transform.dense",
        f"{PREDICTIONS}.transform.LayerNorm",
        f"{PREDICTIONS}.decoder",
        f"{PREDICTIONS}.bias",
    ),
    fields=(TIED,),
    tied=f"{PREDICTIONS}.decoder.weight",
)
bert_base = EncoderConfig(vocab_size=30_522, num_token_types=2, dropout_rate=0.1, attention_dropout_rate=0.1)
BERT = Family(
    model_type="bert",
    fixed={},
    fields=(*COMMON, MAX_LENGTH, TYPES),
    rows=ROWS,
    heads={
        "masked_lm": BERT_MASKED_LM,
        "classification": Head(("BertForSequenceClassification",), classes("classifier", "bert.pooler.dense")),
        **plain_heads("Bert"),
        **multiple_choice("Bert", "bert.pooler.dense"),
        "next_sentence": Head(
            ("BertForNextSentencePrediction",), classes("cls.seq_relationship", "bert.pooler.dense"), num_outputs=2
        ),
        **pretraining("Bert", BERT_MASKED_LM, "bert.pooler.dense", "cls.seq_relationship", "next_sentence"),
    },
    prefix="bert.",
    base="BertModel",
    pooler=POOLER,
    leftovers=(r"cls\.seq_relationship\.",),
    presets={
        "bert_base": bert_base,
        "bert_large": dataclasses.replace(bert_base, num_layers=24, embed_dim=1024, num_heads=16, mlp_dim=4096),
        # Turc et al., arXiv 1908.08962, table 1.
        **{
            f"bert_{name}": dataclasses.replace(
                bert_base, num_layers=layers, embed_dim=width, num_heads=width // 64, mlp_dim=4 * width
            )
            for name, layers, width in (("tiny", 2, 128), ("mini", 4, 256), ("small", 4, 512), ("medium", 8, 512))
        },
    },
)

MOSAIC_BERT = dataclasses.replace(
    BERT,
    marker="alibi_starting_size",
    is_in_transformers=False,
    fixed={"position": "none", "relative_position": "alibi", "gated": True, "mlp_bias": False, "mlp_out_bias": True},
    fields=(*COMMON, TYPES),
    ignored=frozenset({"max_position_embeddings"}),
    must={"hidden_act": ("gelu",)},
    rows=(
        *EMBEDDING_ROWS,
        *fused(f"{LAYER}.attention.self.Wqkv",
               *((f"layers.attention.{part}", "linear") for part in ("query", "key", "value"))),
        *OUT_ROWS,
        *fused(f"{LAYER}.mlp.gated_layers", ("layers.feed_forward.gate", "linear"),
               ("layers.feed_forward.up", "linear")),
        *linear(f"{LAYER}.mlp.wo", "layers.feed_forward.down"),
        *norm(f"{LAYER}.mlp.layernorm", "layers.feed_forward_norm"),
    ),
    presets={
        "mosaicbert_base": dataclasses.replace(
            bert_base, vocab_size=30_528, position="none", relative_position="alibi", gated=True, mlp_bias=False,
            mlp_out_bias=True, attention_dropout_rate=0.0,
        )
    },
)  # fmt: skip


def _roberta_positions(length: int, offset: int) -> tuple[int, int]:
    if offset == 0:
        raise ConfigError("positions begin after the padding's: position_offset must be at least 1, got 0.")
    return length + offset, offset - 1


roberta_base = dataclasses.replace(
    bert_base, vocab_size=50_265, num_token_types=1, position_offset=2, norm_epsilon=1e-5
)
# Positions begin after the padding's, so its id is the first one's offset, and shortens the table's reach.
ROBERTA_POSITIONS = Field(
    ("max_position_embeddings", "pad_token_id"), ("max_length", "position_offset"), (512, 1),
    read=lambda rows, pad: (rows - pad - 1, pad + 1),
    write=_roberta_positions,
)  # fmt: skip
ROBERTA = Family(
    model_type="roberta",
    fixed={},
    fields=(COMMON[0]._replace(default=50_265), *COMMON[1:], TYPES, ROBERTA_POSITIONS),
    rows=ROWS,
    heads={
        "masked_lm": Head(
            ("RobertaForMaskedLM",),
            masked_lm_rows("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"),
            {"activation": "gelu"},
            (TIED,),
            tied="lm_head.decoder.weight",
        ),
        "classification": Head(
            ("RobertaForSequenceClassification",), classes("classifier.out_proj", "classifier.dense")
        ),
        **plain_heads("Roberta"),
        **multiple_choice("Roberta", "roberta.pooler.dense"),
    },
    prefix="roberta.",
    base="RobertaModel",
    pooler=POOLER,
    counts_real_tokens=True,
    presets={"roberta_base": roberta_base},
)  # fmt: skip
XLM_ROBERTA = dataclasses.replace(
    ROBERTA,
    model_type="xlm-roberta",
    fields=(*COMMON, TYPES, ROBERTA_POSITIONS),
    base="XLMRobertaModel",
    heads={
        task: dataclasses.replace(head, architectures=tuple(f"XLM{name}" for name in head.architectures))
        for task, head in ROBERTA.heads.items()
    },
    presets={"xlm_roberta_base": dataclasses.replace(roberta_base, vocab_size=250_002)},
)

def _read_summary(name: str | None, kind: str, has_dense: bool) -> str:
    if kind != "first" or not has_dense:
        raise ConfigError(
            f"multiple choice reads the first token through a dense map, summary_type first and summary_use_proj true: "
            f"got {kind} and {has_dense}."
        )
    return activation("summary_activation").read(name or "linear")


electra_small = dataclasses.replace(bert_base, embedding_dim=128, embed_dim=256, num_heads=4, mlp_dim=1024)
ELECTRA = Family(
    model_type="electra",
    fixed={},
    fields=(
        *(f._replace(default={"num_attention_heads": 4, "intermediate_size": 1024}.get(f.theirs, f.default))
          for f in COMMON if f.theirs != "hidden_size"),
        MAX_LENGTH,
        TYPES,
        Field(
            ("embedding_size", "hidden_size"), ("embedding_dim", "embed_dim"), (128, 256),
            read=lambda narrow, wide: (None if narrow == wide else narrow, wide),
            write=lambda narrow, wide: (narrow or wide, wide),
        ),
    ),
    rows=(*ROWS, *linear("embeddings_project", "embedding.projection")),
    heads={
        "masked_lm": Head(
            ("ElectraForMaskedLM",),
            masked_lm_rows("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head"),
            {"activation": "gelu"},
            (TIED,),
            tied="generator_lm_head.weight",
        ),
        "discriminator": Head(
            ("ElectraForPreTraining",),
            classes("discriminator_predictions.dense_prediction", "discriminator_predictions.dense"),
            fields=(activation("hidden_act"),),
            num_outputs=1,
        ),
        "classification": Head(
            ("ElectraForSequenceClassification",), classes("classifier.out_proj", "classifier.dense"),
            {"activation": "gelu"},
        ),
        **plain_heads("Electra"),
        **multiple_choice("Electra", "sequence_summary.summary", fields=(
            Field(("summary_activation", "summary_type", "summary_use_proj"), "activation", ("gelu", "first", True),
                  _read_summary, lambda name: (activation_name(name), "first", True)),
        )),
    },
    prefix="electra.",
    base="ElectraModel",
    ignored=frozenset({"summary_last_dropout"}),
    presets={
        "electra_small": electra_small,
        "electra_base": bert_base,
    },
)  # fmt: skip

albert_base_v2 = dataclasses.replace(
    bert_base, vocab_size=30_000, num_layer_groups=1, embedding_dim=128, activation="gelu_tanh", dropout_rate=0.0,
    attention_dropout_rate=0.0,
)  # fmt: skip
ALBERT_MASKED_LM = Head(
    ("AlbertForMaskedLM", "AlbertForPreTraining"),
    masked_lm_rows("predictions.dense", "predictions.LayerNorm", "predictions.decoder", "predictions.bias"),
    fields=(TIED,),
    tied="predictions.decoder.weight",
)
GROUP = "encoder.albert_layer_groups.{i}.albert_layers.0"
ALBERT = Family(
    model_type="albert",
    fixed={},
    fields=(
        *(f._replace(default=default) for f, default in zip(SIZE, (30_000, 4096, 12, 64, 16_384), strict=True)),
        *(f._replace(default=0.0) for f in DROPOUT),
        activation("hidden_act", default="gelu_new"),
        Field("layer_norm_eps", "norm_epsilon", 1e-12),
        MAX_LENGTH,
        TYPES,
        Field("num_hidden_groups", "num_layer_groups", 1),
        # The map from embeddings to the stack is always there, however wide they are.
        Field("embedding_size", "embedding_dim", 128, write=lambda width: width or 0),
    ),
    rows=(
        *EMBEDDING_ROWS,
        *linear("encoder.embedding_hidden_mapping_in", "embedding.projection"),
        *(row for part in ("query", "key", "value")
          for row in linear(f"{GROUP}.attention.{part}", f"layers.attention.{part}")),
        *linear(f"{GROUP}.attention.dense", "layers.attention.out", "from_heads"),
        *norm(f"{GROUP}.attention.LayerNorm", "layers.attention_norm"),
        *linear(f"{GROUP}.ffn", "layers.feed_forward.up"),
        *linear(f"{GROUP}.ffn_output", "layers.feed_forward.down"),
        *norm(f"{GROUP}.full_layer_layer_norm", "layers.feed_forward_norm"),
    ),
    heads={
        "masked_lm": ALBERT_MASKED_LM,
        "classification": Head(("AlbertForSequenceClassification",), classes("classifier", "albert.pooler")),
        **plain_heads("Albert"),
        **multiple_choice("Albert", "albert.pooler"),
        **pretraining("Albert", ALBERT_MASKED_LM, "albert.pooler", "sop_classifier.classifier", "sentence_order"),
    },
    prefix="albert.",
    base="AlbertModel",
    pooler=tuple(linear("pooler", "pooler.dense")),
    must={"inner_group_num": (1,)},
    leftovers=(r"sop_classifier\.",),
    presets={"albert_base_v2": albert_base_v2},
)  # fmt: skip

BLOCK = "transformer.layer.{i}"
DISTILBERT = Family(
    model_type="distilbert",
    fixed={"norm_epsilon": 1e-12},
    fields=(
        Field("vocab_size", "vocab_size", 30_522),
        Field("dim", "embed_dim", 768),
        Field("n_layers", "num_layers", 6),
        Field("n_heads", "num_heads", 12),
        Field("hidden_dim", "mlp_dim", 3072),
        Field("dropout", "dropout_rate", 0.1),
        Field("attention_dropout", "attention_dropout_rate", 0.1),
        activation("activation"),
        MAX_LENGTH,
    ),
    rows=(
        *EMBEDDING_ROWS,
        *(row for part, ours in (("q", "query"), ("k", "key"), ("v", "value"))
          for row in linear(f"{BLOCK}.attention.{part}_lin", f"layers.attention.{ours}")),
        *linear(f"{BLOCK}.attention.out_lin", "layers.attention.out", "from_heads"),
        *norm(f"{BLOCK}.sa_layer_norm", "layers.attention_norm"),
        *linear(f"{BLOCK}.ffn.lin1", "layers.feed_forward.up"),
        *linear(f"{BLOCK}.ffn.lin2", "layers.feed_forward.down"),
        *norm(f"{BLOCK}.output_layer_norm", "layers.feed_forward_norm"),
    ),
    heads={
        "masked_lm": Head(
            ("DistilBertForMaskedLM",),
            masked_lm_rows("vocab_transform", "vocab_layer_norm", "vocab_projector"),
            fields=(TIED,),
            tied="vocab_projector.weight",
        ),
        "classification": Head(
            ("DistilBertForSequenceClassification",), classes("classifier", "pre_classifier"), {"activation": "relu"}
        ),
        **plain_heads("DistilBert"),
        **multiple_choice("DistilBert", "pre_classifier", fixed={"activation": "relu"}),
    },
    prefix="distilbert.",
    base="DistilBertModel",
    # How the table of positions began, not how it is read; and what was never read.
    ignored=frozenset({"sinusoidal_pos_embds", "position_embedding_type"}),
    aliases={"hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"},
    presets={"distilbert_base": dataclasses.replace(bert_base, num_layers=6, num_token_types=0)},
)  # fmt: skip
