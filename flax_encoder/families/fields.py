"""Fields of published configs that are of no family in particular: what changes nothing, and what must be as it is.

A field that a family's tables do not name is taken, and left unread, by a rule: transformers' class of that model does
not know it either (tests compare the tables with the classes), the folder brings no code of its own that could, and its
name is none that says how some model computes. The rest is refused by name.
"""

import re
from collections.abc import Mapping
from typing import Any

# Fields that change no number of a forward pass in evaluation: bookkeeping, rates of dropout and noise of training,
# generation, token ids that only tokenizers use, and what selects an implementation.
IGNORED = frozenset(
    """
    _attn_implementation_autoset _name_or_path architectures attn_implementation auto_map bad_words_ids
    begin_suppress_tokens bos_token bos_token_id chunk_size_feed_forward classifier_dropout classifier_dropout_prob
    classifiers_size cls_token_id cross_attention_hidden_size decoder_start_token_id deterministic_flash_attn
    directionality diversity_penalty do_sample down_scale_factor dtype early_stopping encoder_no_repeat_ngram_size
    eos_token eos_token_id eos_token_ids experts_implementation exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gap_size generator_hidden_size gradient_checkpointing id2label
    initializer_cutoff_factor initializer_factor initializer_range label2id layers_to_keep length_penalty mask_token
    mask_token_id max_length min_length model_type net_structure_type no_repeat_ngram_size num_beam_groups num_beams
    num_labels num_memory_blocks num_return_sequences output_attentions output_hidden_states output_past
    output_scores pad_token pad_token_id pooler_dropout pooler_fc_size pooler_hidden_size pooler_num_attention_heads
    pooler_num_fc_layers pooler_size_per_head pooler_type prefix pretraining_tp problem_type qa_dropout
    reference_compile remove_invalid_values repad_logits_with_grad repetition_penalty return_dict
    return_dict_in_generate sep_token_id seq_classif_dropout sparse_pred_ignore_index sparse_prediction
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_last_hidden_states
    tie_weights_ tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16
    use_cache vocab_type
    """.split()  # noqa: SIM905 - a list would be sixty lines
)
# Fields that must be this where they are present.
FIXED = {
    "add_cross_attention": (False,), "is_decoder": (False,), "is_encoder_decoder": (False,),
    "per_layer_config": (None,), "position_embedding_type": ("absolute", None), "pruned_heads": ({}, None),
    "quantization_config": (None,),
}  # fmt: skip

# Words that names of fields have in the configs of transformers' models (5.24, some 2,300 names) where they say how
# one computes, or how large it is. A field with such a word is not taken for harmless.
_COMPUTES = re.compile(
    r"(?:^|_)(?:"
    + "|".join(
        """
        act activation activations adapter adapters alibi align alpha anchor apply attention attn audio backbone beta
        bias block blocks bottleneck bucket buckets bypass causal channel channels chunk clamp clip compress compression
        config conv cross ctx cycles decoder delta dense depth depths depthwise dff dilation dilations dim dimension
        dims distil downsample dropout emb embd embed embedding embeddings embeds encoder eps epsilon expand expansion
        expert experts factor feat feature features feed feedforward ff ffn filter fuse fusion gate gated gating geglu
        gelu glu group groups hash hc head heads hidden hyper init inner input intermediate interval kernel key kv
        l2norm lambda langs latent layer layerdrop layernorm layers layerscale length lengths levels linear lm local
        logit logits loop lora low lsh mamba mask mem memory merge mixer mlp mode model moe moving mup n ngpt ngram norm
        normalization normalize norms num offset order ortho output overlap pad padding parallel patch pattern patterns
        pdrop period pool pooler pooling pos position positional positions post pre proj projection projector q qk qkv
        quant quantization quantize quantized queries query rank rate ratio recurrent reduction rel relative relu
        repeats rescale rescaling resid residual resnet resolution rope rotary routed router routing scale scales
        scaling segment separate sequence share shared size sliding soft softcap softcapping sparse sparsity ssm stage
        state std steps stride strides summary swiglu theta tie tied time timestep token topk tp type types unit up
        upsample upsampler upscale use v value values var vision vocab weight weights width window wise
        """.split()  # noqa: SIM905
    )
    + r")(?:$|_)"
)
# And those that say something else all the same: ids of special tokens, notes of transformers, what
# sentence-transformers keeps there, and how a model was trained.
_ASIDE = re.compile(
    r"^(?!use_|has_)(?:[a-z]+_)+token(?:_ids?)?$"
    r"|^_(?:attn_implementation|commit_hash|flash_attn|from_model_config|name_or_path|num_labels)"
    r"|^(?:sbert|sentence_transformers)(?:_|$)|^transformers\."
    r"|^(?:num_)?(?:train|eval)(?:ing)?_(?:epochs?|steps?|batch_size|examples)|(?:^|_)(?:epochs?|warmup|optimizer)(?:$|_)"
    r"|batch_size$|learning_rate$|^weight_decay$|^(?:random_)?seed$"
    r"|(?:^|_)(?:file|path|folder|dir)$|^max_seq(?:uence)?_len(?:gth)?$|^model_(?:name|id|max_length)$"
)


def is_aside(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a field that a family's tables do not name changes nothing, where transformers has the family.

    A folder with code of its own (`auto_map`) may read anything.
    """
    return "auto_map" not in config and (bool(_ASIDE.search(name)) or not _COMPUTES.search(name))
