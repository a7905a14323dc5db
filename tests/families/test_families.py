"""Families as data: presets are as large as what is published, and configs are read, written, or refused by name."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from flax_encoder.config import ConfigError, DecoderConfig, EncoderConfig, HeadConfig
from flax_encoder.families import FAMILIES, PRESETS, find_family, preset
from flax_encoder.families.configs import (
    _read_names,
    _unnamed_fields,
    fields_left_unread,
    read_config,
    read_head,
    settled,
    write_config,
)
from flax_encoder.families.fields import is_aside
from flax_encoder.families.tensors import LAYOUTS, export_tensors, import_tensors
from flax_encoder.nn.decoder import EncoderDecoder
from flax_encoder.nn.encoder import Encoder
from flax_encoder.nn.partition import abstract_model, flatten
from flax_encoder.ops.position import apply_rope, rope_tables
from flax_encoder.published.model import PretrainedModel

# Parameters of the encoder, without pooler and heads. The exact counts are those of transformers' modules (AutoModel
# with add_pooling_layer=False; T5EncoderModel) built from the published config.json; beside them what papers and model
# cards say, which counts heads, rounds, or leaves out embeddings.
PUBLISHED = {
    "bert_base": 108_891_648,  # 110M, arXiv 1810.04805, section 3
    "bert_large": 334_092_288,  # 340M, same
    "bert_tiny": 4_369_408,  # 4.4M, arXiv 1908.08962, table 1
    "bert_mini": 11_104_768,  # 11.3M, same
    "bert_small": 28_500_992,  # 29.1M, same
    "bert_medium": 41_110_528,  # 41.7M, same
    "roberta_base": 124_055_040,  # 125M, the model card
    "xlm_roberta_base": 277_453_056,  # 270M, arXiv 1911.02116, table 1
    "albert_base_v2": 11_092_992,  # 12M, arXiv 1909.11942, table 1
    "distilbert_base": 66_362_880,  # 66M, arXiv 1910.01108, table 3
    "electra_small": 13_483_008,  # 14M, arXiv 2003.10555, table 1
    "electra_base": 108_891_648,  # 110M, same
    "t5_small": 35_330_816,  # 60M with the decoder, arXiv 1910.10683, section 3.7
    "t5_base": 109_628_544,  # 220M with the decoder, same
    "t5_v1_1_small": 35_332_800,  # 77M with decoder and head, the model card's files
    "t5_v1_1_base": 109_628_544,  # 248M, same
    "t5_v1_1_large": 341_231_104,  # 783M, same
    "t5_v1_1_xl": 1_223_527_424,  # 2.85B, same
    "t5_v1_1_xxl": 4_762_310_656,  # 11.1B, same
    "modernbert_base": 149_014_272,  # 149M, arXiv 2412.13663, section 2.1
    "modernbert_large": 394_781_696,  # 395M, same
    "deberta_v3_base": 183_831_552,  # 184M: 86M and 98M of embeddings, arXiv 2111.09543, table 4
    "eurobert_210m": 211_766_016,  # 210M, arXiv 2503.05500, table 1
    "neobert": 221_665_536,  # 250M with the head, arXiv 2502.19587, section 3
    "mosaicbert_base": 136_777_728,  # 137M, arXiv 2312.17482, section 2
    "transformer_base": 37_846_016,  # 65M with the decoder, arXiv 1706.03762, table 3; see test_classic.py
    "crammed_bert": 119_589_889,  # 120M, arXiv 2212.14034, section 4.2
}


def count(config):
    _, shapes = abstract_model(lambda: Encoder(config, rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", [name for name, config in PRESETS.items() if config.vocab_size])
def test_presets_have_as_many_parameters_as_published(name):
    assert count(PRESETS[name]) == PUBLISHED[name]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.is_in_transformers], ids=lambda f: f.model_type)
def test_presets_survive_the_way_through_their_published_config(family):
    for config in family.presets.values():
        for task in (None, *family.heads):
            head, pooling = read_head(family, task, {}) if task else (HeadConfig(), "cls")
            published = write_config(family, config, task, head, pooling)
            assert find_family(published) is family
            assert settled(read_config(family, published)) == settled(config)


def test_presets_go_by_name():
    assert preset("neobert") == PRESETS["neobert"]
    with pytest.raises(ConfigError, match="no preset 'bert_huge'; known are bert_base, bert_large, "):
        preset("bert_huge")


def test_an_unknown_model_type_lists_the_known():
    with pytest.raises(ConfigError, match=r"model_type 'gpt2', which is not known; known are albert, bert, deberta-v2"):
        find_family({"model_type": "gpt2"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert", "rotary_value": 1}, r"config field rotary_value \(here 1\) is not understood for"),
        ({"model_type": "bert", "colour": 1, "auto_map": {}}, r"which the folder's own code \(auto_map\) may read"),
        ({"model_type": "neobert", "colour": 1}, r"config field colour \(here 1\) is not understood for model_type"),
        ({"model_type": "t5", "d_model": 6, "hidden_size": 8}, "d_model and hidden_size are one for t5: got 6 and 8"),
        ({"model_type": "bert", "is_decoder": True}, "config field is_decoder must be False: got True"),
        ({"model_type": "bert", "position_embedding_type": "relative_key"}, "must be 'absolute' or None: got 'rel"),
        ({"model_type": "bert", "hidden_act": "xielu"}, "hidden_act 'xielu' is not understood; known are gelu, "),
        ({"model_type": "bert", "num_attention_heads": 7}, "num_heads must divide embed_dim: got 7 for 768"),
        ({"model_type": "bert", "num_hidden_layers": "12"}, "num_layers must be .*int.*: got '12'"),
        ({"model_type": "albert", "inner_group_num": 2}, r"inner_group_num must be 1: got 2"),
        ({"model_type": "modernbert", "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2},
         "full_attention at every n-th layer"),
        ({"model_type": "modernbert", "rope_scaling": {"rope_type": "yarn"}}, "rope_type default: got .*yarn"),
        ({"model_type": "eurobert", "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type default: .*linear"),
        ({"model_type": "deberta-v2", "relative_attention": True}, "relative_attention True with pos_att_type None"),
        ({"model_type": "deberta-v2", "conv_groups": 2}, r"conv_groups must be 1: got 2"),
        ({"model_type": "t5", "feed_forward_proj": "gated-magic"}, "feed_forward_proj 'magic' is not understood"),
        ({"model_type": "t5", "feed_forward_proj": 7}, "config field feed_forward_proj, 7, is not understood"),
        ({"model_type": "bert", "hidden_act": ["gelu"]}, r"config field hidden_act, \['gelu'\], is not understood"),
        ({"model_type": "roberta", "pad_token_id": None}, "config field .*pad_token_id.*None.* is not understood"),
        ({"model_type": "modernbert", "local_attention": "x"}, "config field .*local_attention.* is not understood"),
        ({"model_type": "modernbert", "num_hidden_layers": None}, "field of this modernbert config is not"),
        ({"model_type": "modernbert", "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
         "must be by kind of layer, full_attention and sliding_attention: got rope_theta, rope_type"),
        ({"model_type": "deberta-v2", "position_buckets": None}, "is not understood"),
    ],
)  # fmt: skip
def test_what_a_config_says_and_is_not_understood_is_named(config, message):
    with pytest.raises(ConfigError, match=message):
        read_config(find_family(config), config)


ASIDE = (
    "language", "name", "_num_labels", "unk_token_id", "sentence_transformers", "_attn_implementation", "colour",
    "sbert_ce_default_activation_function", "transformers.js_config", "learning_rate", "num_train_epochs",
    "_from_model_config", "vocab_file", "output_dir",
)  # fmt: skip


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.is_in_transformers], ids=lambda f: f.model_type)
def test_a_field_that_computes_nothing_is_taken_and_one_that_some_model_computes_with_is_not(family):
    """By its name, for families that transformers has: no name that any table here reads is taken unread."""
    plain = read_config(family, {})
    for name in ASIDE:
        assert read_config(family, {name: 3}) == plain
        assert fields_left_unread(family, {name: 3}) == [name]
    computing = {n for f in FAMILIES for field in f.fields for n in ([field.theirs] if isinstance(field.theirs, str)
                 else field.theirs)}  # fmt: skip
    computing |= {name for f in FAMILIES for name in (*f.must, *f.aliases, f.marker) if name}
    assert not [name for name in computing - {"pad_token_id"} if is_aside(name, {})]


def test_fields_that_a_class_never_read_may_have_any_value():
    for model_type in ("modernbert", "distilbert", "t5", "deberta-v2", "eurobert"):
        read_config(find_family({"model_type": model_type}), {"position_embedding_type": "sans_pos"})


@pytest.mark.parametrize(("model_type", "config", "same"), [
    ("distilbert", {"hidden_size": 24, "num_attention_heads": 3}, {"dim": 24, "n_heads": 3}),
    ("t5", {"num_hidden_layers": 2, "d_model": 8, "hidden_size": 8}, {"num_layers": 2, "d_model": 8}),
])  # fmt: skip
def test_names_that_transformers_takes_for_others_are_those(model_type, config, same):
    family = find_family({"model_type": model_type})
    assert read_config(family, config) == read_config(family, same) != read_config(family, {})


@pytest.mark.parity
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.is_in_transformers], ids=lambda f: f.model_type)
def test_the_tables_know_every_field_that_transformers_class_has(family):
    """What the class knows, and the tables did not, could be taken unread."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers: pip install -e '.[parity]'")
    own = transformers.AutoConfig.for_model(family.model_type)
    fields = {f.name for f in dataclasses.fields(own)} | set(own.attribute_map)
    assert not {*_unnamed_fields(family, dict.fromkeys(fields))} - set(family.aliases)
    assert set(family.aliases) == {n for n, other in own.attribute_map.items() if other in _read_names(family)}
    assert settled(read_config(family, {})) == settled(read_config(family, own.to_dict()))


@pytest.mark.parametrize("pooling", ["max", "MEAN", 7])
def test_a_pooling_that_is_not_known_is_named(pooling):
    config = {"model_type": "modernbert", "classifier_pooling": pooling}
    with pytest.raises(ConfigError, match=f"pools by cls, mean, late: config.json says {pooling!r}"):
        read_head(find_family(config), "classification", config)


def test_whole_numbers_serve_for_rates():
    config = {"model_type": "bert", "hidden_dropout_prob": 0}
    assert type(read_config(find_family(config), config).dropout_rate) is float


@pytest.mark.parametrize("window, every, layers", [(4, 3, 7), (4, 3, 3), (6, 1, 2), (6, 5, 4), (None, 1, 3), (8, 2, 1)])
def test_the_old_spellings_of_a_config_that_is_written_say_the_same(window, every, layers):
    """A transformers before 5 knows no others, and took its defaults for what it did not find."""
    local = None if window is None else 300.0
    config = dataclasses.replace(
        preset("modernbert_base"), window=window, global_every=every, num_layers=layers, rope_theta=77.0,
        local_rope_theta=local,
    )  # fmt: skip
    written = write_config(find_family({"model_type": "modernbert"}), config)
    old = {name: value for name, value in written.items() if name not in ("layer_types", "rope_parameters")}
    got = read_config(find_family(old), old)
    assert got.windows == config.windows
    assert (got.rope_theta, got.local_rope_theta or 77.0) == (77.0, local or 77.0)


def test_old_spellings_of_a_config_are_read():
    old = {"model_type": "modernbert", "global_attn_every_n_layers": 2, "global_rope_theta": 1e5,
           "local_rope_theta": 2e4, "num_hidden_layers": 4, "local_attention": 32}  # fmt: skip
    config = read_config(find_family(old), old)
    assert config.windows == (None, 16, None, 16)
    assert (config.rope_theta, config.local_rope_theta) == (1e5, 2e4)
    old = {"model_type": "eurobert", "rope_theta": 250_000, "rope_scaling": None, "clf_pooling": "mean"}
    assert read_config(find_family(old), old).rope_theta == 250_000.0
    assert read_head(find_family(old), "classification", old)[1] == "mean"


def test_mosaicbert_is_told_from_bert_by_its_own_field():
    assert find_family({"model_type": "bert", "alibi_starting_size": 512}).base == "BertModel"
    config = read_config(find_family({"model_type": "bert", "alibi_starting_size": 512}), {"alibi_starting_size": 512})
    assert config.relative_position == "alibi"
    assert read_config(find_family({"model_type": "bert"}), {"vocab_size": 7}).relative_position == "none"


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("bert", {"norm_placement": "pre"}, "bert config cannot say this model: .*norm_placement pre"),
        ("bert", {"gated": True}, r"gated True \(there False\)"),
        ("bert", {"window": 4, "global_every": 0}, "windows"),
        ("roberta", {"position_offset": 0}, "roberta"),
        ("albert", {"embedding_dim": None}, "albert"),
        ("distilbert", {"norm_epsilon": 1e-5}, r"norm_epsilon 1e-05 \(there 1e-12\)"),
        ("t5", {"use_bias": True}, "t5 config cannot say"),
        ("modernbert", {"norm": "rms_norm"}, "norm rms_norm"),
    ],
)
def test_a_model_that_a_family_cannot_say_is_refused_with_the_settings(model_type, change, message):
    family = next(f for f in FAMILIES if f.model_type == model_type)
    config = dataclasses.replace(next(iter(family.presets.values())), **change)
    with pytest.raises(ConfigError, match=message):
        write_config(family, config)


def test_a_head_that_a_family_cannot_say_is_refused():
    bert = find_family({"model_type": "bert"})
    with pytest.raises(ConfigError, match=r"head.activation relu \(there gelu\)"):
        write_config(bert, PRESETS["bert_base"], "masked_lm", HeadConfig(activation="relu"))
    with pytest.raises(ConfigError, match="bert has no discriminator head; it has masked_lm"):
        write_config(bert, PRESETS["bert_base"], "discriminator")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_its_inverse(layout):
    shape = {"flat": (3, 4), "as_is": (5, 7), "conv": (3, 5, 7)}.get(layout, (5, 3, 4))
    ours = np.arange(math.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(LAYOUTS[layout].read(LAYOUTS[layout].write(ours), shape), ours)


def test_rotated_pairs_turn_as_torchs_do():
    """Queries and keys made by NeoBERT's kernels, turned as neighbours, have the products that ours have, as halves."""
    D, N, H, T = 6, 3, 8, 5
    draw = np.random.default_rng(0)
    x, kernels = draw.standard_normal((1, T, D)), draw.standard_normal((2, N * H, D))
    angle = np.arange(T)[:, None] * 10_000.0 ** (-np.arange(0, H, 2) / H)
    turned = []
    for kernel in kernels:
        pairs = (x @ kernel.T).reshape(1, T, N, H // 2, 2)
        complex_turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)[None, :, None]
        turned.append(np.stack([complex_turned.real, complex_turned.imag], -1).reshape(1, T, N, H))
    want = np.einsum("btnh,bsnh->bnts", *turned)
    tables = rope_tables(jax.numpy.arange(T)[None], H)
    ours = [np.einsum("btd,dnh->btnh", x, LAYOUTS["rotated_pairs"].read(kernel, (D, N, H))) for kernel in kernels]
    got = np.einsum("btnh,bsnh->bnts", *(apply_rope(jax.numpy.asarray(a, "float32"), tables) for a in ours))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.base)
def test_every_family_writes_each_parameter_once_and_reads_it_back(family):
    """By its tables alone, for every head: those that transformers has are also compared with it (tests/parity.py)."""
    small = {"vocab_size": 11, "num_layers": 3, "embed_dim": 12, "num_heads": 2, "mlp_dim": 5, "max_length": 9}
    config = dataclasses.replace(next(iter(family.presets.values()), PRESETS["roberta_base"]), **small)
    config = dataclasses.replace(config, attention_head_dim=config.attention_head_dim and 6)
    for task in (None, *family.heads):
        head, pooling = read_head(family, task, {}) if task else (HeadConfig(), "cls")
        options = {"task": task, "head": head, "num_outputs": 4, "pooling": pooling}
        make = lambda o=options: PretrainedModel(config, **o, rngs=nnx.Rngs(0))  # noqa: E731
        if task == "text_to_text":
            make = lambda: EncoderDecoder(config, DecoderConfig(tied=False), rngs=nnx.Rngs(0))  # noqa: E731
        _, shapes = abstract_model(make)
        draw = np.random.default_rng(0)
        params = {path: draw.standard_normal(leaf.shape) for path, leaf in flatten(nnx.to_pure_dict(shapes)).items()}
        params = {path: value.astype(np.float32) for path, value in params.items()}
        tensors = export_tensors(family, task, params, config.num_heads)
        back = import_tensors(family, task, tensors, {k: v.shape for k, v in params.items()}, config.num_heads)
        assert not back.unused and back.params.keys() == params.keys()
        for path, value in params.items():
            np.testing.assert_array_equal(back.params[path], value, err_msg=path)


def test_settled_sees_through_the_spelling_of_a_config():
    plain = EncoderConfig(vocab_size=9)
    spelled = dataclasses.replace(
        plain, attention_bias=True, num_kv_heads=12, attention_head_dim=64, embedding_norm=True, attention_scale=0.125,
        num_layer_groups=12, dropout_rate=0.3, relative_buckets=8, rope_theta=3.0,
    )  # fmt: skip
    assert settled(plain) == settled(spelled)
    for change in ({"norm_bias": False}, {"window": 3, "global_every": 0}, {"max_length": 9}, {"num_token_types": 1}):
        assert settled(plain) != settled(dataclasses.replace(plain, **change))
