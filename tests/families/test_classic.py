"""Encoder-decoders, and models from before BERT, have the sizes that their papers and published files give."""

import dataclasses
import math

import jax
import pytest
from flax import nnx

from flax_encoder.config import DecoderConfig
from flax_encoder.families import PRESETS
from flax_encoder.nn.decoder import EncoderDecoder
from flax_encoder.nn.encoder import Encoder
from flax_encoder.nn.partition import abstract_model


def count(make_model) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.to_pure_dict(abstract_model(make_model)[1])))


def test_transformer_base_has_65_million_parameters():
    """Table 3 of arXiv 1706.03762 says so, and "about 37,000 tokens": with 37,000 it is 63 million."""
    size = count(lambda: EncoderDecoder(PRESETS["transformer_base"], rngs=nnx.Rngs(0)))
    assert size == 63_045_632 == pytest.approx(65e6, rel=0.04)


def test_bilstm_is_two_lstms_of_2048_cells_over_300_numbers():
    """4 gates of 2048 x (300 + 2048) weights and two biases, in each direction, as torch.nn.LSTM counts."""
    config = dataclasses.replace(PRESETS["bilstm"], vocab_size=11)
    size = count(lambda: Encoder(config, rngs=nnx.Rngs(0))) - 11 * 300
    assert size == 2 * 4 * 2048 * (300 + 2048 + 2) == 38_502_400


@pytest.mark.parametrize(
    ("name", "tied", "size"),
    [
        ("t5_small", True, 60_506_624),
        ("t5_base", True, 222_903_552),
        ("t5_v1_1_small", False, 76_961_152),
        ("t5_v1_1_base", False, 247_577_856),
        ("t5_v1_1_xl", False, 2_849_757_184),
    ],
)
def test_whole_t5_models_are_as_large_as_their_published_weights(name, tied, size):
    assert count(lambda: EncoderDecoder(PRESETS[name], DecoderConfig(tied=tied), rngs=nnx.Rngs(0))) == size
