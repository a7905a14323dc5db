"""Causal language modelling: no token sees a later one or another document, and masked_lm goes on from it."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_encoder.config import ConfigError, EncoderConfig, RunConfig
from flax_encoder.data.rows.packing import Pieces
from flax_encoder.data.rows.targets import Rows, _next_token_targets
from flax_encoder.runs.load import load, read_origin
from flax_encoder.runs.loaded import model_factory
from flax_encoder.runs.start import like_origin, start_from
from flax_encoder.tasks import check_task
from flax_encoder.tasks.causal_lm import CausalLM
from tests.runs import losses, tiny
from tests.toy import SMALL, B, T, V, random_tokens, split_model
from train import train

SEGMENTS = jnp.asarray(np.array([[1] * 9 + [2] * 10 + [0] * 4, [1] * 23], np.int32))
POSITIONS = jnp.asarray(np.array([[*range(9), *range(10), 0, 0, 0, 0], [*range(23)]], np.int32))
KINDS = {
    "learned": {},
    "rope with windows": {"position": "rope", "window": 4, "global_every": 3, "norm_placement": "pre"},
    "t5": {"position": "none", "relative_position": "t5"},
    "disentangled": {"position": "none", "relative_position": "disentangled", "relative_buckets": 8},
    "lstm": {},
}


def model_of(kind):
    config = EncoderConfig(vocab_size=V, num_layers=2, embed_dim=SMALL.embed_dim, layer="lstm", bidirectional=False)
    if kind != "lstm":
        config = dataclasses.replace(SMALL, **KINDS[kind])
    graphdef, params = split_model(lambda: CausalLM(config, rngs=nnx.Rngs(0)))
    return jax.jit(lambda tokens: nnx.merge(graphdef, params)(
        {"tokens": tokens, "segment_ids": SEGMENTS, "positions": POSITIONS}))  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_sees_a_later_one_or_another_document(kind):
    logits, tokens = model_of(kind), random_tokens((B, T))
    before = np.asarray(logits(tokens))
    for row, column, seen in ((0, 4, range(4, 9)), (0, 12, range(12, 19)), (1, 0, range(23)), (1, 22, [22])):
        after = np.asarray(logits(tokens.at[row, column].set((tokens[row, column] + 1) % V)))
        changed = {(int(b), int(t)) for b, t in np.argwhere((before != after).any(-1))}
        assert changed <= {(row, t) for t in seen}, f"token {column} is seen by another"
        assert (row, column) in changed and (len(seen) == 1 or len(changed) > 1)


def test_the_targets_are_the_next_tokens_of_each_document():
    tokens = np.array([[3, 4, 5, 6, 7, 0, 0], [8, 9, 10, 11, 12, 13, 14]])
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 3, 3]])
    pieces = Pieces(*[np.zeros(0, int)] * 7)
    rows = Rows({"tokens": tokens, "segment_ids": segments}, None, None, np.zeros(2, np.uint64), pieces, 0)
    made = _next_token_targets(rows)
    np.testing.assert_array_equal(made["target_weights"], [[1, 1, 0, 1, 0, 0, 0], [0, 1, 1, 1, 0, 1, 0]])
    np.testing.assert_array_equal(made["targets"], [[4, 5, 0, 7, 0, 0, 0], [0, 10, 11, 12, 0, 14, 0]])


def test_models_that_look_ahead_otherwise_are_refused():
    for fields, message in (
        ({"layer": "lstm"}, r"half of each lstm layer.*--model.no-bidirectional"),
        ({"conv_width": 3}, r"convolution of 3 tokens.*--model.conv-width 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_task(RunConfig(objective="causal_lm", model=EncoderConfig(**fields)))


def test_a_run_learns_and_masked_lm_goes_on_from_it_with_all_its_parameters(corpus, tmp_path, one_device):
    whole = tiny(corpus, tmp_path / "whole", objective="causal_lm", steps=14, model__dropout_rate=0.1)
    metrics = train(whole)
    first, *_, last = (loss for loss, _ in losses(pathlib.Path(whole.run_dir)).values())
    assert last < first and 0 < metrics["eval/accuracy"] < 1

    run, said = load(whole.run_dir), []
    masked = dataclasses.replace(run.config, objective="masked_lm", init_from=whole.run_dir, seed=1)
    record, _ = read_origin(whole.run_dir, "masked_lm")
    assert like_origin(masked, record, has_head=False) == masked
    begun = nnx.to_pure_dict(nnx.split(model_factory(masked, None)())[1])
    begun = start_from(masked, None, jax.tree.map(jnp.asarray, begun), said.append)
    assert said == [f"started from {whole.run_dir}; new parameters: none"]
    jax.tree.map(np.testing.assert_array_equal, begun, run.params)
