"""The autoencoder: no text is lost on its way, its decoder sees one vector alone, and embed gives that vector."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_encoder.commands.recipe import parse_run_config
from flax_encoder.config import AutoencoderConfig, ConfigError, DataConfig, DecoderConfig, EncoderConfig, RunConfig
from flax_encoder.data.pipeline import open_data
from flax_encoder.nn.partition import flatten
from flax_encoder.runs.embed import load_embedder
from flax_encoder.runs.load import load
from flax_encoder.tasks import check_task, find_task
from flax_encoder.tasks.autoencoder import Autoencoder
from tests.runs import losses, tiny, with_fields
from tests.toy import SMALL, split_model
from train import train

CONFIG = RunConfig(objective="autoencoder", model=SMALL, data=DataConfig(row_length=29))
RECURRENT = RunConfig(
    objective="autoencoder", data=DataConfig(row_length=29),
    model=EncoderConfig(vocab_size=37, layer="gru", position="none", num_layers=1, embed_dim=10, init_std=0.5),
    autoencoder=AutoencoderConfig(is_tied=False, pooling="lasttoken"),
)  # fmt: skip
B, T, S, P = 2, 9, 11, 2


def draw_batch():
    generator = np.random.default_rng(0)
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1] * 9])
    whole = np.array([[1] * 4 + [2] * 6 + [0], [1] * 10 + [0]])
    places = lambda ids: np.where(ids, np.arange(ids.shape[1]) - np.array([np.searchsorted(r, r) for r in np.where(  # noqa: E731
        ids, ids, 9)]), 0)  # fmt: skip
    batch = {
        "tokens": generator.integers(0, 37, (B, T)), "segment_ids": segments, "positions": places(segments),
        "decoder_tokens": generator.integers(0, 37, (B, S)), "decoder_segment_ids": whole,
        "decoder_positions": places(whole), "targets": generator.integers(0, 37, (B, S)),
    }  # fmt: skip
    batch = {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}
    return batch | {
        "target_weights": jnp.asarray(whole > 0, jnp.float32), "document_weights": jnp.array([[1.0, 1.0], [1.0, 0.0]]),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["learned", "rope", "t5", "gru"])
def test_the_decoder_sees_only_its_documents_vector_and_the_text_before(kind):
    """What is written changes with its own document's vector, and with nothing else of the encoder's row."""
    fields = {"learned": {}, "rope": {"position": "rope", "norm_placement": "pre", "window": 2},
              "t5": {"position": "none", "relative_position": "t5"}, "gru": None}[kind]  # fmt: skip
    config = RECURRENT if fields is None else with_fields(CONFIG, model=dataclasses.replace(SMALL, **fields))
    graphdef, params = split_model(lambda: Autoencoder(config, rngs=nnx.Rngs(0)))
    model, batch = nnx.merge(graphdef, params), draw_batch()
    logits = jax.jit(lambda batch: model(batch))
    whole = np.asarray(logits(batch))

    other = np.asarray(logits(batch | {"tokens": batch["tokens"].at[0, 1].add(1) % 37}))
    assert np.abs(other[0, :4] - whole[0, :4]).max(-1).min() > 1e-5, "every token reads the vector"
    np.testing.assert_array_equal(other[0, 4:10], whole[0, 4:10])
    np.testing.assert_array_equal(other[1], whole[1])
    later = np.asarray(logits(batch | {"decoder_tokens": batch["decoder_tokens"].at[0, 7].add(1) % 37}))
    np.testing.assert_array_equal(later[0, :7], whole[0, :7])
    assert np.abs(later[0, 7:10] - whole[0, 7:10]).max(-1).min() > 1e-6

    # The same vector from other tokens gives the same text: it is all that goes through.
    vectors = model.vectors(batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Autoencoder, "vectors", lambda self, batch, key=None: vectors)
        given = batch | {"tokens": (batch["tokens"] + 5) % 37}
        np.testing.assert_allclose(jax.jit(lambda batch: model(batch))(given), whole, atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, RECURRENT], ids=["attention", "gru"])
def test_a_packed_document_is_learned_as_if_alone(config):
    graphdef, params = split_model(lambda: Autoencoder(config, rngs=nnx.Rngs(0)))
    model, batch = nnx.merge(graphdef, params), draw_batch()
    alone = {name: x[:1, 3:7] for name, x in batch.items() if x.shape[1] == T}
    alone |= {name: x[:1, 4:10] for name, x in batch.items() if x.shape[1] == S}
    alone |= {name: jnp.minimum(alone[name], 1) for name in ("segment_ids", "decoder_segment_ids")}
    alone["document_weights"] = jnp.ones((1, 1))
    logits = jax.jit(lambda batch: model(batch))
    np.testing.assert_allclose(logits(alone), logits(batch)[:1, 4:10], atol=2e-5)


def test_a_tied_decoder_has_attention_to_the_vector_alone_of_its_own():
    def paths(**fields):
        config = with_fields(CONFIG, **fields)
        _, params = split_model(lambda: Autoencoder(config, rngs=nnx.Rngs(0)))
        return {path.rpartition(".")[0] for path in flatten(params) if path.startswith("writer.")}

    tied = paths()
    assert tied and all(".cross_attention" in path for path in tied)
    assert "writer.layers.feed_forward.up" in paths(autoencoder=AutoencoderConfig(is_tied=False))
    _, params = split_model(lambda: Autoencoder(CONFIG, rngs=nnx.Rngs(0)))
    assert "encoder.layers.attention.query.kernel" in flatten(params)


def test_settings_that_cannot_be_are_refused():
    for fields, message in (
        ({"decoder": DecoderConfig(num_layers=1)}, r"--autoencoder\.no-is-tied"),
        ({"model__num_layer_groups": 1}, r"--autoencoder\.no-is-tied"),
        ({"model": EncoderConfig(layer="lstm", position="none")}, r"--autoencoder\.no-is-tied"),
        ({"model": EncoderConfig(layer="lstm")}, "needs model.position to be none or sinusoidal"),
        ({"model": EncoderConfig(embed_dim=31, num_heads=1)}, "embed_dim to be even: got 31"),
        ({"data__packing": "concatenate"}, "stays whole"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_task(with_fields(CONFIG, **fields))
    words = ["--objective", "autoencoder", "--autoencoder.no-is-tied"]
    asked = parse_run_config(words, default="configs/quickstart.py")
    assert not asked.autoencoder.is_tied, "what the messages say is an option"
    untied = AutoencoderConfig(is_tied=False)
    check_task(with_fields(CONFIG, decoder=DecoderConfig(num_layers=1), autoencoder=untied))
    with pytest.raises(ConfigError, match="share below 1"):
        AutoencoderConfig(deletion_rate=1.0)


@pytest.mark.parametrize("rate", [0.0, 0.6, 0.999])
def test_words_are_left_out_of_what_is_read_and_of_nothing_that_is_written(corpus, tmp_path, rate):
    config = tiny(corpus, tmp_path, objective="autoencoder", steps=3, autoencoder__deletion_rate=rate)
    data = open_data(config, find_task("autoencoder").reading)
    split, (first, last) = data.stores[0].train, data.tokenizer.frame
    documents = {tuple(split.document(i).tolist()): split for i in range(len(split))}
    words = {document: i for i, document in enumerate(documents)}
    kept = seen = 0
    for number in range(3):
        batch = data.train[number]
        for b, p in np.argwhere(batch["document_weights"] > 0):
            read = batch["tokens"][b][batch["segment_ids"][b] == p + 1].tolist()
            at = batch["decoder_segment_ids"][b] == p + 1
            written, given = batch["targets"][b][at].tolist(), batch["decoder_tokens"][b][at].tolist()
            assert written[-1] == last and tuple(written[:-1]) in words and given == [first, *written[:-1]]
            assert batch["decoder_positions"][b][at].tolist() == list(range(len(written)))
            assert batch["positions"][b][batch["segment_ids"][b] == p + 1].tolist() == list(range(len(read)))
            assert read[0] == first and read[-1] == last and len(read) > 2
            rest = iter(written)
            assert all(token in rest for token in read[1:-1]), "what is left is in its order"
            kept, seen = kept + len(read) - 2, seen + len(written) - 1
        assert (batch["target_weights"] == (batch["decoder_segment_ids"] > 0)).all()
        one_more = data.train[number]
        assert all((one_more[name] == x).all() for name, x in batch.items())
    share = 1 - kept / seen
    assert share == 0 if rate == 0 else abs(share - 0.6) < 0.1 if rate == 0.6 else share > 0.85


def test_a_run_learns_and_embed_gives_its_vectors(corpus, tmp_path, one_device):
    whole = tiny(corpus, tmp_path / "whole", objective="autoencoder", steps=12, model__dropout_rate=0.1)
    metrics = train(whole)
    first, *_, last = (loss for loss, _ in losses(pathlib.Path(whole.run_dir)).values())
    assert last < first and 0 < metrics["eval/accuracy"] < 1

    run, text = load(whole.run_dir), "the list returns a value"
    batch = jax.tree.map(jnp.asarray, run.row(text)) | {"document_weights": jnp.ones((1, 1))}
    vector = np.asarray(run.model.vectors(batch))[0, 0]
    [embedded], _ = load_embedder(whole.run_dir).embed([text])
    np.testing.assert_allclose(embedded, vector / np.linalg.norm(vector), atol=2e-5)
