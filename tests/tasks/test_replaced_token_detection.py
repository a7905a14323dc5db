"""Replaced token detection: its loss by a slow reference, shared embeddings, and both models handed on."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import losses, tiny, with_fields

from flax_encoder.config import ConfigError, EncoderConfig, GeneratorConfig, MaskingConfig, Phase, RunConfig
from flax_encoder.data.pipeline import open_data
from flax_encoder.nn.partition import flatten
from flax_encoder.published.load import load_pretrained
from flax_encoder.runs.exchange import export_run, import_folder
from flax_encoder.runs.load import load
from flax_encoder.tasks import check_task, find_task
from flax_encoder.tasks.replaced_token_detection import ReplacedTokenDetection, generator_config, replace
from flax_encoder.training.step import init_train_state, make_train_step
from tests.test_train import Stops
from train import train

ELECTRA = EncoderConfig(
    vocab_size=128, num_layers=2, embed_dim=32, embedding_dim=16, num_heads=4, mlp_dim=64, num_token_types=2
)
CONFIG = RunConfig(
    objective="replaced_token_detection", model=ELECTRA, masking=MaskingConfig(mask_rate=1.0, random_rate=0.0),
    generator=GeneratorConfig(width=0.5),
)  # fmt: skip
B, T, M = 4, 24, 4


def draw_batch(seed=0):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(5, 128, (B, T)).astype(np.int32)
    segments = np.repeat(np.array([[1] * 10 + [2] * 10 + [0] * 4], np.int32), B, 0)
    positions = np.repeat(np.array([[*range(10), *range(10), 0, 0, 0, 0]], np.int32), B, 0)
    at = np.sort(np.stack([generator.choice(20, M, replace=False) for _ in range(B)]), 1).astype(np.int32)
    targets = np.take_along_axis(tokens, at, 1)
    weights = np.ones((B, M), np.float32)
    weights[0, -1], at[0, -1] = 0, 0  # a slot that nothing is in
    masked = tokens.copy()
    for b, m in np.argwhere(weights > 0):
        masked[b, at[b, m]] = 4
    batch = {"tokens": masked, "segment_ids": segments, "positions": positions}
    batch |= {"target_positions": at, "targets": targets, "target_weights": weights}
    return {name: jnp.asarray(x) for name, x in batch.items()}, tokens


def make(config, seed=0):
    return ReplacedTokenDetection(config, rngs=nnx.Rngs(seed))


def test_the_loss_equals_the_formula_of_the_papers():
    batch, originals = draw_batch()
    model = make(CONFIG)
    total = jax.jit(lambda batch: model.loss(batch))(batch)

    logits = np.asarray(model.generator(batch), np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    drawn = np.asarray(jax.random.categorical(jax.random.key(0), jnp.asarray(logits, jnp.float32)))
    generator, count, tokens = 0.0, 0, originals.copy()
    for b in range(B):
        for m in range(M):
            if batch["target_weights"][b, m]:
                generator -= log_probabilities[b, m, batch["targets"][b, m]]
                tokens[b, batch["target_positions"][b, m]] = drawn[b, m]
                count += 1
    scores = np.asarray(model(batch | {"tokens": jnp.asarray(tokens)}), np.float64)
    detection, real = 0.0, np.asarray(batch["segment_ids"]) > 0
    for b, t in np.argwhere(real):
        p = 1 / (1 + np.exp(-scores[b, t]))
        detection -= np.log(p if tokens[b, t] != originals[b, t] else 1 - p)
    np.testing.assert_allclose(total.count, count)
    np.testing.assert_allclose(total.metrics["generator"], generator, rtol=1e-5)
    np.testing.assert_allclose(total.metrics["detector"], detection, rtol=1e-5)
    np.testing.assert_allclose(total.sum, generator + 50 * 0.15 * detection, rtol=1e-5)
    assert float(total.metrics["replaced"]) == (tokens != originals)[real].sum() > 0


def test_a_draw_that_is_right_is_no_replacement():
    batch, originals = draw_batch()
    tokens, is_replaced = replace(batch, batch["targets"])
    np.testing.assert_array_equal(tokens, originals)
    assert not is_replaced.any()
    others = (batch["targets"] + 1) % 128
    _, is_replaced = replace(batch, others)
    assert int(is_replaced.sum()) == int(batch["target_weights"].sum())


@pytest.mark.parametrize("sharing", ["embedding", "disentangled", "none"])
def test_embeddings_are_shared_as_the_config_says(sharing):
    """Of the token table, what each loss teaches: one table by both; the generator's by its own loss alone, while the
    encoder reads it; or each its own."""
    config = with_fields(CONFIG, generator__sharing=sharing)
    graphdef, params = nnx.split(make(config))
    batch, _ = draw_batch()

    def part(params, name):
        return nnx.merge(graphdef, params).loss(batch).metrics[name]

    def gradient(name):
        flat = flatten(nnx.to_pure_dict(jax.jit(jax.grad(lambda p: part(p, name)))(params)))
        return {path: float(jnp.abs(x).max()) > 0 for path, x in flat.items() if path.rpartition(".")[2] in (
            "token", "base")}  # fmt: skip

    ours, theirs = {
        "embedding": ("encoder.embedding.token", "encoder.embedding.token"),
        "disentangled": ("encoder.embedding.token", "encoder.embedding.base"),
        "none": ("encoder.embedding.token", "generator.encoder.embedding.token"),
    }[sharing]
    want = {ours: True, theirs: ours == theirs}
    assert gradient("detector") == want
    assert gradient("generator") == {ours: ours == theirs, theirs: True}


def test_microbatches_make_the_update_of_one_batch_but_for_their_draws():
    """With one draw possible, since the generator is sure of it, any split of the rows is the same update."""
    import optax

    config = with_fields(CONFIG, generator__temperature=1e-6)
    batch, _ = draw_batch()
    ends = []
    for parts in (1, 2):
        graphdef, state, _ = init_train_state(lambda: make(config), tx := optax.sgd(0.1))
        state, metrics = make_train_step(graphdef, tx, num_microbatches=parts)(state, batch)
        ends.append((jax.device_get(state.params), float(metrics.loss.sum)))
    np.testing.assert_allclose(ends[0][1], ends[1][1], rtol=1e-5)
    for one, other in zip(*(jax.tree.leaves(params) for params, _ in ends), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1.0, np.abs(one).max()))


def test_the_detectors_loss_is_weighed_by_the_rate_of_its_batch(corpus):
    """As it falls in training, and by evaluation's own; what the model says of a batch goes by the batch."""
    config = tiny(corpus, "none", objective="replaced_token_detection", steps=11, masking__rate=0.3,
                  masking__last_rate=0.1, masking__eval_rate=0.2, generator__detection_weight=20.0)  # fmt: skip
    check_task(config)
    data = open_data(config, find_task(config.objective).reading)
    found = [set(data.train[number]["detection_weight"].ravel().tolist()) for number in (0, 5, 10)]
    np.testing.assert_allclose([x for weights in found for x in weights], [6, 4, 2], rtol=1e-6)
    np.testing.assert_allclose(data.evaluation[0]["detection_weight"], 4, rtol=1e-6)
    phases = (Phase(share=0.5), Phase(share=0.5, masking_rate=0.05))
    phased = open_data(dataclasses.replace(with_fields(config, masking__last_rate=None), phases=phases),
                       find_task(config.objective).reading)  # fmt: skip
    np.testing.assert_allclose([phased.train[n]["detection_weight"].max() for n in (4, 5, 6, 10)], [6, 6, 1, 1])
    model, (batch, _) = make(CONFIG), draw_batch()
    plain, weighed = model.loss(batch), model.loss(batch | {"detection_weight": jnp.full((B, 1), 3.0)})
    np.testing.assert_allclose(
        weighed.sum - weighed.metrics["generator"], (plain.sum - plain.metrics["generator"]) * 3 / 7.5, rtol=1e-5
    )


def test_settings_that_cannot_be_are_refused():
    for fields, message in (
        ({"model": EncoderConfig(layer="lstm", embed_dim=32, num_layers=1)}, "attention"),
        ({"generator__sharing": "disentangled", "init_from": "runs/x"}, "disentangled"),
        ({"head": dataclasses.replace(CONFIG.head, transform=False)}, "dense"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_task(with_fields(CONFIG, **fields))
    with pytest.raises(ConfigError, match=r"generator\.width is not read"):
        check_task(RunConfig(generator=GeneratorConfig(width=0.5)))


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """A run, and the same one stopped half-way and gone on with."""
    folder = tmp_path_factory.mktemp("detection")
    fields = {"objective": "replaced_token_detection", "generator__width": 0.5, "generator__sharing": "disentangled",
              "model": dataclasses.replace(ELECTRA, vocab_size=0, dropout_rate=0.1), "steps": 12}  # fmt: skip
    whole = tiny(corpus, folder / "whole", **fields)
    cut, devices = dataclasses.replace(whole, run_dir=str(folder / "cut")), jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args: devices[:1])
        metrics = train(whole)
        with pytest.MonkeyPatch.context() as stopping:
            stopping.setattr("flax_encoder.runs.train.StopSignals", lambda: Stops(5))
            assert train(cut) is None
        assert train(cut) == metrics
    return whole, cut, metrics


def test_a_run_learns_and_both_its_models_are_handed_on(runs, tmp_path):
    config, cut, metrics = runs
    assert losses(pathlib.Path(cut.run_dir)) == losses(pathlib.Path(config.run_dir))
    first, *_, last = (loss for loss, _ in losses(pathlib.Path(config.run_dir)).values())
    assert last < first and metrics["eval/accuracy"] >= metrics["eval/unreplaced"] - 0.02
    run = load(config.run_dir)
    ids = np.array([[5, 9, 17, 30, 8]], np.int32)
    positions = jnp.arange(5, dtype=jnp.int32)[None]
    batch = {"tokens": jnp.asarray(ids), "segment_ids": jnp.ones((1, 5), jnp.int32), "positions": positions}
    want = np.asarray(run.model(batch))

    assert export_run(config.run_dir, tmp_path / "encoder") == "ElectraForPreTraining"
    published = load_pretrained(tmp_path / "encoder")
    np.testing.assert_allclose(published(ids).logits, want, atol=2e-6 * np.abs(want).max())
    # Its layers are as wide as the shared embedding, which is what BERT has.
    assert export_run(config.run_dir, tmp_path / "generator", part="generator") == "BertForMaskedLM"
    generator = load_pretrained(tmp_path / "generator")
    logits = np.asarray(run.model.generator(batch | {"target_positions": positions}))
    np.testing.assert_allclose(generator(ids).logits, logits, atol=2e-6 * np.abs(logits).max())
    with pytest.raises(ConfigError, match="has encoder, generator"):
        export_run(config.run_dir, tmp_path / "other", part="decoder")


def test_a_published_discriminator_goes_in_and_out_with_the_same_numbers(runs, tmp_path):
    config, *_ = runs
    export_run(config.run_dir, tmp_path / "first")
    import_folder(tmp_path / "first", tmp_path / "imported")
    assert json.loads((tmp_path / "imported" / "config.json").read_text())["objective"] == "replaced_token_detection"
    export_run(tmp_path / "imported", tmp_path / "second")
    one, other = load_pretrained(tmp_path / "first"), load_pretrained(tmp_path / "second")
    ids = np.array([[5, 9, 17, 30, 8]], np.int32)
    np.testing.assert_array_equal(one(ids).logits, other(ids).logits)


def test_generator_config_shares_the_width_of_embeddings():
    small = generator_config(CONFIG)
    assert (small.num_heads, small.embed_dim, small.mlp_dim, small.embedding_dim) == (2, 16, 32, None)
    assert generator_config(with_fields(CONFIG, generator__width=0.25)).embedding_dim == 16
