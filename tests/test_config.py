"""Settings: every rule says its values, every name is checked, every field is read."""

import ast
import dataclasses
import json
import math
import pathlib

import pytest

import flax_encoder
from flax_encoder.config import (
    ConfigError,
    DataConfig,
    EncoderConfig,
    HeadConfig,
    MaskingConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    differences,
    from_dict,
    to_dict,
)

PACKAGE = pathlib.Path(flax_encoder.__file__).parent
CUT = MeshConfig(context=4)
UNUSUAL = RunConfig(
    init_from="runs/other",
    eval_every=7,
    num_microbatches=4,
    budget_minutes=0.5,
    first_batch_size=16,
    model=EncoderConfig(num_kv_heads=3, window=5, position="rope", attention_implementation="chunked"),
    data=DataConfig(source="texts/*.txt", text_column="body"),
    masking=MaskingConfig(rate=0.3),
    optimizer=OptimizerConfig(name="muon", clip_norm=None),
    mesh=MeshConfig(fsdp=2),
)


@pytest.mark.parametrize("config", [RunConfig(), UNUSUAL])
def test_a_config_survives_the_way_through_json(config):
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_fields_left_out_take_their_defaults():
    assert from_dict(RunConfig, {"model": {"num_layers": 3}}) == RunConfig(model=EncoderConfig(num_layers=3))


def test_whole_numbers_serve_as_floats():
    value = from_dict(OptimizerConfig, {"learning_rate": 1}).learning_rate
    assert value == 1.0 and type(value) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 1}, "unknown field stepz; known are autoencoder, batch_size, batch_texts, "),
        ({"model": {"depth": 1}}, r"unknown field model\.depth; known are activation, "),
        ({"steps": "many"}, "steps must be .*int.*: got 'many'"),
        ({"steps": 1.5}, r"steps must be .*int.*: got 1\.5"),
        ({"steps": True}, "steps must be .*int.*: got True"),
        ({"steps": None}, "steps must be .*int.*: got None"),
        ({"compare_with_scratch": 1}, "compare_with_scratch must be .*bool.*: got 1"),
        ({"eval_every": "2"}, r"eval_every must be int \| 'epoch' \| None: got '2'"),
        ({"optimizer": {"learning_rate": "1e-3"}}, r"optimizer\.learning_rate must be .*float.*: got '1e-3'"),
        ({"optimizer": {"learning_rate": True}}, r"optimizer\.learning_rate must be .*float.*: got True"),
        ({"model": {"norm": "batch_norm"}}, r"model\.norm must be .*layer_norm.*: got 'batch_norm'"),
        ({"model": 3}, "model must be .*: got 3"),
        ({"model": None}, "model must be .*: got None"),
    ],
)
def test_unknown_names_and_wrong_types_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(RunConfig, values)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        *[(EncoderConfig, {name: 0}, f"{name} must be above 0: got 0") for name in (
            "num_layers", "embed_dim", "num_heads", "mlp_dim", "max_length"
        )],
        *[(EncoderConfig, {name: 0.0}, rf"{name} must be above 0: got 0\.0") for name in (
            "norm_epsilon", "rope_theta", "init_std"
        )],
        (EncoderConfig, {"dropout_rate": 1.5}, r"dropout_rate is a probability between 0 and 1: got 1\.5"),
        (EncoderConfig, {"attention_dropout_rate": -0.1}, r"attention_dropout_rate is a probability .*: got -0\.1"),
        (EncoderConfig, {"vocab_size": -1}, "vocab_size must be at least 0 .*: got -1"),
        (EncoderConfig, {"embed_dim": 100, "num_heads": 8}, "got 8 for 100; 5 and 10 do"),
        (EncoderConfig, {"num_kv_heads": 5}, "num_kv_heads must divide num_heads: got 5 for 12"),
        (EncoderConfig, {"num_kv_heads": 0}, "num_kv_heads must divide num_heads: got 0 for 12"),
        (EncoderConfig, {"embed_dim": 21, "num_heads": 3, "position": "rope"}, "head_dim must be even: got 7"),
        (EncoderConfig, {"embed_dim": 21, "num_heads": 3, "position": "sinusoidal"}, "embed_dim must be even: got 21"),
        *[(EncoderConfig, {name: 0}, f"{name} must be above 0 or None: got 0") for name in (
            "num_layer_groups", "embedding_dim", "attention_head_dim"
        )],
        (EncoderConfig, {"attention_scale": 0.0}, r"attention_scale must be above 0 or None: got 0\.0"),
        (EncoderConfig, {"local_rope_theta": 0.0}, r"local_rope_theta must be above 0 or None: got 0\.0"),
        *[(EncoderConfig, {name: -1}, f"{name} must be at least 0: got -1") for name in (
            "num_token_types", "position_offset", "relative_buckets", "conv_width"
        )],
        (EncoderConfig, {"num_layer_groups": 5}, "got 5 for 12; 4 and 6 do"),
        (EncoderConfig, {"relative_position": "t5", "relative_buckets": 3}, "got 3 and 128"),
        (EncoderConfig, {"relative_position": "disentangled", "relative_buckets": 256}, "got 256 and 128"),
        (EncoderConfig, {"relative_position": "disentangled", "attention_scale": 1.0}, "got attention_scale 1.0"),
        (EncoderConfig, {"conv_width": 2}, "must be odd: got 2"),
        (EncoderConfig, {"conv_width": 3, "num_layer_groups": 1}, "got num_layer_groups 1 with a first layer"),
        (EncoderConfig, {"first_attention_norm": False}, "norm_placement must be pre, got post"),
        (EncoderConfig, {"position_scale": True}, "position_scale needs sinusoidal positions: got position learned"),
        (EncoderConfig, {"position": "rope", "position_offset": 2}, "got 2 with position rope"),
        (EncoderConfig, {"local_rope_theta": 1e4, "position": "rope"}, "got 10000.0 with position rope and window N"),
        (EncoderConfig, {"local_rope_theta": 1e4, "window": 4}, "got 10000.0 with position learned and window 4"),
        (HeadConfig, {"transform": False, "norm": True}, "got None, True and None without it"),
        (EncoderConfig, {"window": -1}, "window must be at least 0 tokens: got -1"),
        (EncoderConfig, {"global_every": -1}, "global_every must be at least 0: got -1"),
        (DataConfig, {"held_out_rate": 2.0}, r"held_out_rate is a probability .*: got 2\.0"),
        (DataConfig, {"vocab_size": 0}, "vocab_size must be above 0: got 0"),
        (DataConfig, {"row_length": 2}, "got row_length 2"),
        (MaskingConfig, {"rate": 0.0}, "rate and eval_rate must be above 0"),
        (MaskingConfig, {"eval_rate": 0.0}, "rate and eval_rate must be above 0"),
        (MaskingConfig, {"mask_rate": 1.2}, r"mask_rate is a probability .*: got 1\.2"),
        (MaskingConfig, {"mask_rate": 0.7, "random_rate": 0.6}, r"at most 1: got 0\.7 \+ 0\.6"),
        (OptimizerConfig, {"b1": 1.1}, r"b1 is a probability .*: got 1\.1"),
        (OptimizerConfig, {"b2": 1.0}, r"below 1: got 0\.9, 1\.0 and 0\.95"),
        (OptimizerConfig, {"weight_decay": -0.1}, r"weight_decay and epsilon are at least 0: got -0\.1 and"),
        (OptimizerConfig, {"weight_decay": math.nan}, "weight_decay and epsilon are at least 0: got nan and"),
        (OptimizerConfig, {"learning_rate": -1.0}, r"at least 0: got -1\.0 and 0\.02"),
        (OptimizerConfig, {"clip_norm": 0.0}, r"clip_norm must be above 0 or None: got 0\.0"),
        (OptimizerConfig, {"schedule": "wsd", "warmup_rate": 0.9}, r"at most 1: got 0\.9 \+ 0\.2"),
        (OptimizerConfig, {"soap_every": 0}, "soap_every must be above 0: got 0"),
        (OptimizerConfig, {"decay_shape": "one_minus_sqrt"}, "0.2 and linear with linear; got 0.2 and one_minus_sqrt"),
        (OptimizerConfig, {"schedule": "cosine", "decay_rate": 0.1}, "need schedule wsd: .* cosine; got 0.1 and"),
        (OptimizerConfig, {"schedule": "constant", "final_rate": 0.1}, "leave final_rate at 0, .*; got 0.1"),
        (OptimizerConfig, {"name": "schedule_free"}, "give schedule constant with it; got linear"),
        (OptimizerConfig, {"name": "schedule_free", "schedule": "wsd"}, "got wsd"),
        (MeshConfig, {"data": 0}, "at least 1, or -1 for all that are left: got 0"),
        (MeshConfig, {"fsdp": 0}, "mesh.fsdp is at least 1, or -1 for all that are left: got 0"),
        (MeshConfig, {"tensor": -1}, "got -1 for data and tensor. Give the others, such as --mesh.data 1"),
        (MeshConfig, {"context": -2}, "mesh.context is at least 1, or -1 for all that are left: got -2"),
        (MeshConfig, {"num_processes": -1}, "mesh.num_processes is at least 1: got -1"),
        (RunConfig, {"mesh": CUT, "data": DataConfig(row_length=30)}, "30 tokens for context 4; 28 and 32 do"),
        (RunConfig, {"mesh": CUT, "data": DataConfig(target_length=3)}, "got data.target_length 3 for context 4"),
        (RunConfig, {"mesh": CUT, "model": EncoderConfig(layer="gru")}, "got context 4 with model.layer gru"),
        (EncoderConfig, {"product_dtype": "float8"}, "float8 beside dtype bfloat16 .* got 'float8', dtype float32"),
        (RunConfig, {"mesh": MeshConfig(tensor=2), "model": EncoderConfig(dtype="bfloat16", product_dtype="float8")},
         "got 2 with model.product_dtype float8. Give --mesh.tensor 1"),
        (RunConfig, {"mesh": CUT, "model": EncoderConfig(relative_position="disentangled")}, "got context 4 with mod"),
        (RunConfig, {"mesh": CUT, "model": EncoderConfig(attention_implementation="rows")}, "got context 4; leave mod"),
        (RunConfig, {"mesh": MeshConfig(num_processes=2), "compare_with_scratch": True}, "got mesh.num_processes 2"),
        *[(RunConfig, {name: 0}, f"{name} must be above 0: got 0") for name in (
            "steps", "batch_size", "num_microbatches", "log_every", "checkpoint_every", "keep_checkpoints"
        )],
        (EncoderConfig, {"layer": "gru", "position": "none", "remat": "feed_forward"}, "none, dots or full for gru"),
        (RunConfig, {"keep_every": 1200}, "a multiple of checkpoint_every, .* got 1200 for 500; 1000 does"),
        (RunConfig, {"keep_every": 0}, "got 0 for 500; 500 does"),
        (RunConfig, {"eval_every": 0}, "eval_every must be above 0 or None: got 0"),
        (RunConfig, {"eval_batches": -3}, "eval_batches must be above 0 or None: got -3"),
        (RunConfig, {"batch_size": 32, "num_microbatches": 3}, "got 3 for 32; 2 and 4 do"),
        (RunConfig, {"budget_minutes": 0.0}, r"budget_minutes must be above 0 or None: got 0\.0"),
        (RunConfig, {"budget_minutes": -1.0}, r"budget_minutes must be above 0 or None: got -1\.0"),
        (RunConfig, {"first_batch_size": 0}, "first_batch_size must be above 0 or None: got 0"),
        (RunConfig, {"first_batch_size": 64}, "got 64 for a batch_size of 32 and 1 microbatches"),
        (RunConfig, {"first_batch_size": 6, "num_microbatches": 4}, "got 6 for a batch_size of 32 and 4 microbatches"),
        (RunConfig, {"batch_warmup_rate": 1.5}, r"batch_warmup_rate is a probability .*: got 1\.5"),
        (RunConfig, {"first_batch_size": 8, "batch_warmup_rate": 0.5, "data": DataConfig(
            last_row_length=256, last_rate=0.6)}, r"at most 1, got 0\.5 \+ 0\.6"),
        (RunConfig, {"data": DataConfig(word_vectors="v"), "init_from": "r"}, "from init_from: got both"),
        (RunConfig, {"data": DataConfig(row_length=513)}, "got data.row_length 513 for model.max_length 512"),
    ],
)  # fmt: skip
def test_each_rule_says_its_values(cls, values, message):
    with pytest.raises(ConfigError, match=message):
        cls(**values)


@pytest.mark.parametrize(
    ("values", "stages"),
    [
        ({}, [(100, 32, 128)]),
        ({"first_batch_size": 32}, [(100, 32, 128)]),
        # A straight rise over 40 steps from 4 rows to 32: eight rows from the sixth step on, for 4/28 have gone by.
        ({"first_batch_size": 4, "batch_warmup_rate": 0.4}, [(6, 4, 128), (17, 8, 128), (40, 16, 128), (100, 32, 128)]),
        ({"first_batch_size": 12, "batch_warmup_rate": 0.5}, [(30, 12, 128), (50, 24, 128), (100, 32, 128)]),
        ({"first_batch_size": 16, "batch_warmup_rate": 0.0}, [(100, 32, 128)]),
        ({"first_batch_size": 16, "batch_warmup_rate": 1.0}, [(100, 16, 128)]),
        ({"data": DataConfig(last_row_length=256)}, [(90, 32, 128), (100, 16, 256)]),
        ({"data": DataConfig(last_row_length=256, last_rate=1.0)}, [(100, 16, 256)]),
        ({"first_batch_size": 16, "batch_warmup_rate": 0.2, "data": DataConfig(last_row_length=512, last_rate=0.8)},
         [(20, 16, 128), (100, 8, 512)]),
    ],
)  # fmt: skip
def test_batches_double_up_to_their_full_size_and_then_rows_change_length(values, stages):
    assert [stage[:3] for stage in RunConfig(steps=100, **values).stages] == stages


def test_differences_are_the_fields_that_differ():
    other = dataclasses.replace(UNUSUAL, seed=3, mesh=MeshConfig(fsdp=4))
    assert differences(UNUSUAL, UNUSUAL) == {}
    assert differences(UNUSUAL, other) == {"seed": (0, 3), "mesh.fsdp": (2, 4)}


def fields(cls):
    for field in dataclasses.fields(cls):
        yield cls, field.name
        if dataclasses.is_dataclass(field.default_factory):
            yield from fields(field.default_factory)


def attributes_read(tree):
    """Names after a dot, outside __post_init__, which checks a field without using it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        yield from attributes_read(node)


def test_every_field_is_read_by_something():
    files = [*PACKAGE.rglob("*.py"), PACKAGE.parent / "train.py"]
    read = {name for file in files for name in attributes_read(ast.parse(file.read_text("utf-8")))}
    unread = [f"{cls.__name__}.{name}" for cls, name in fields(RunConfig) if name not in read]
    assert not unread


def test_settings_show_what_is_not_the_default_as_python_makes_it():
    names = {cls.__name__: cls for cls in (RunConfig, DataConfig, EncoderConfig, OptimizerConfig)}
    for config in (
        RunConfig(),
        RunConfig(steps=7, data=DataConfig(source=("a", "b"), row_length=64), optimizer=OptimizerConfig(b2=0.9)),
        EncoderConfig(num_layers=2, window=6),
    ):
        assert eval(repr(config), names) == config
    assert repr(RunConfig(model=EncoderConfig(num_layers=2))) == "RunConfig(model=EncoderConfig(num_layers=2))"
