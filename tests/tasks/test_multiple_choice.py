"""Choices: each read with the context by itself, one softmax over a document's choices, and a run of them."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import SMALL, assert_trees_close, random_tokens, split_model

from flax_encoder.config import DataConfig
from flax_encoder.data.rows.batches import Batches, OneByOne
from flax_encoder.data.rows.documents import Documents, Frame
from flax_encoder.data.rows.targets import HOST_FIELDS, TargetInputs
from flax_encoder.data.sources.opening import Source, open_source
from flax_encoder.data.sources.records import DataError, LabelError, Part, Record
from flax_encoder.data.store.prepare import prepare
from flax_encoder.data.store.tokenizing import HeldOut
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from flax_encoder.runs.exchange import export_run
from flax_encoder.runs.load import load
from flax_encoder.tasks import TASKS
from flax_encoder.tasks.multiple_choice import MultipleChoice, score
from tests.runs import TINY, losses, with_fields
from tests.test_train import Stops
from train import train

TASK = TASKS["multiple_choice"]
COLUMNS = TASK.reading.columns
MODEL = dataclasses.replace(SMALL, vocab_size=83, max_length=64)
WORDS = ["apple", "river", "stone", "cloud", "candle", "window", "garden", "letter", "seven", "green"]


def pick(seed, n=3, right=None):
    """A context, and n choices of which one names two of its words."""
    rng = np.random.default_rng(seed)
    context = rng.permutation(WORDS)[:6].tolist()
    choices = [" ".join(rng.permutation([w for w in WORDS if w not in context])[:2]) for _ in range(n)]
    right = int(rng.integers(n)) if right is None else right
    choices[right] = " ".join(rng.permutation(context)[:2])
    return Record((" ".join(context), *choices), str(right))


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([" ".join(WORDS)] * 2, 83)


def put(records, tokenizer, folder, num_parts=1, held_out=0.2):
    parts = [Part("train", len(some), functools.partial(iter, some.tolist())) for some in np.array_split(
        np.fromiter(records, object), num_parts)]  # fmt: skip
    source = Source(parts, "f")
    return prepare(source, tokenizer, folder, COLUMNS, held_out=HeldOut(held_out), workers=1)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_packed_choices_are_weighed_as_if_alone(pooling):
    """The logits, and the gradient of the loss; three choices of two documents in one row, then each in its own."""
    graphdef, params = split_model(lambda: MultipleChoice(SMALL, pooling, rngs=nnx.Rngs(0)))
    call = jax.jit(lambda p, batch: nnx.merge(graphdef, p)(batch))
    grad = jax.jit(jax.grad(lambda p, batch: nnx.merge(graphdef, p).loss(batch).sum))
    rows, positions = random_tokens((6, 4)), jnp.tile(jnp.arange(4, dtype=jnp.int32), (6, 1))
    packed = {
        "tokens": rows.reshape(1, -1), "segment_ids": jnp.repeat(jnp.arange(1, 7, dtype=jnp.int32), 4)[None],
        "positions": positions.reshape(1, -1), "targets": jnp.array([[2, 1, 0]], jnp.int32),
        "target_positions": jnp.array([[[0, 4, 8], [12, 16, 20], [0, 0, 0]]], jnp.int32),
        "target_weights": jnp.array([[1, 1, 0]], jnp.float32),
    }  # fmt: skip
    apart = {
        "tokens": rows.reshape(2, -1), "segment_ids": jnp.tile(packed["segment_ids"][:, :12], (2, 1)),
        "positions": positions.reshape(2, -1), "targets": jnp.array([[2], [1]], jnp.int32),
        "target_positions": jnp.tile(packed["target_positions"][:, :1], (2, 1, 1)),
        "target_weights": jnp.ones((2, 1), jnp.float32),
    }  # fmt: skip
    logits = call(params, packed)
    assert logits.shape == (1, 3, 3)
    np.testing.assert_allclose(logits[0, :2], call(params, apart)[:, 0], rtol=0, atol=1e-5)
    assert_trees_close(grad(params, packed), grad(params, apart))
    # Choices do not see one another: another third choice moves its own logit alone.
    changed = call(params, packed | {"tokens": packed["tokens"].at[0, 8:12].set((rows[2] + 1) % 30)})
    moved = np.asarray(changed - logits)[0, :2]
    assert abs(moved[0, 2]) > 1e-4 and np.abs(np.delete(moved.ravel(), 2)).max() < 1e-5
    if pooling == "cls":
        mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
        sharded = jax.device_put(apart, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
        copied = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        assert_trees_close(grad(copied, sharded), grad(params, apart))


def test_the_number_of_a_choice_is_kept_whichever_are_right(tokenizer, tmp_path):
    """Numbers that are never right have a place too: labels are not renumbered, nor named, nor must all be trained."""
    records = [pick(i, 4, right=[1, 3][i % 2]) for i in range(40)] + [pick(99, 4, right=2)]
    store = put(records, tokenizer, tmp_path / "s", num_parts=2)
    assert store.label_names is None
    splits = [store.train, store.validation]
    texts = {tuple(tokenizer.decode(s.document(i)).split()): int(s.values["labels"][i])
             for s in splits for i in range(len(s))}  # fmt: skip
    assert texts == {tuple(" ".join(r.texts).split()): int(r.value) for r in records}
    with pytest.raises(LabelError, match="unknown label '30'"):
        put([*records, records[0]._replace(value="30")], tokenizer, tmp_path / "t")


@pytest.mark.parametrize("num_parts", [1, 2])
def test_a_document_with_fewer_choices_than_others_has_no_more(tokenizer, tmp_path, num_parts, monkeypatch):
    """Its loss in a store of others is that in a store of its kind, with label smoothing too."""
    monkeypatch.setattr("flax_encoder.data.store.tokenizing._BATCH_CHARACTERS", 1)
    counts = [2, 4, 3, 2, 3, 4]
    records = [pick(i, n) for i, n in enumerate(counts)]
    store = put(records, tokenizer, tmp_path / "mixed", num_parts, 0.0)
    assert store.train.values["text_lengths"].shape == (6, 5)
    graphdef, params = split_model(lambda: MultipleChoice(MODEL, smoothing=0.1, rngs=nnx.Rngs(0)))
    call = jax.jit(lambda p, batch: nnx.merge(graphdef, p).loss(batch))

    def loss(store):
        batch = all_rows(store, tokenizer)
        found = call(params, {name: x for name, x in batch.items() if name not in HOST_FIELDS})
        return float(found.sum), float(found.count), batch

    total, count, batch = loss(store)
    has = (batch["target_positions"] >= 0).sum(-1)[batch["target_weights"] > 0]
    assert sorted(has.tolist()) == sorted(counts) and count == 6
    apart = [loss(put([r for r in records if len(r.texts) == n + 1], tokenizer, tmp_path / str(n), 1, 0.0))[:2]
             for n in (2, 3, 4)]  # fmt: skip
    np.testing.assert_allclose((total, count), np.sum(apart, 0), rtol=1e-5)


def all_rows(store, tokenizer):
    config = with_fields(TINY, objective="multiple_choice", data__row_length=64)
    documents = Documents(store.train, TASK.reading.layout(config), Frame.of(tokenizer), 64)
    order = OneByOne([documents.plan(64)])
    inputs = TargetInputs(config, tokenizer, documents, 64, order.plans[0].max_pieces_per_row, True, True)
    batches = Batches([documents], order, TASK.reading.targets(inputs), row_length=64, batch_size=len(order), seed=0,
                      num_batches=1, stop_row=len(order))  # fmt: skip
    return batches[0]


def test_a_choice_that_is_blank_is_never_the_right_one(tmp_path):
    rows = [{"context": "a", "choices": ["b", " "], "label": label} for label in (0, 1)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(str(tmp_path / "rows.jsonl"), DataConfig(), COLUMNS, tmp_path)
    with pytest.raises(DataError, match=r"the right choice has some text: .*line 2.* holds 1, which is blank"):
        list(source.records("train"))


def test_accuracy_is_the_share_of_right_choices():
    assert score([{"choice": 2}, {"choice": 0}, {"choice": 1}], ["2", "1", "1"]) == {"accuracy": pytest.approx(2 / 3)}


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    """(store, config, metrics) of a run of a few steps on one device."""
    folder, devices = tmp_path_factory.mktemp("choices"), jax.devices()
    store = put([pick(i) for i in range(300)], tokenizer, folder / "store")
    config = with_fields(
        TINY, objective="multiple_choice", run_dir=str(folder / "whole"), data__source=str(store.folder),
        data__text_unit="paragraph", data__vocab_size=8192, data__row_length=48, steps=12, log_every=1,
        model__num_token_types=2, model__position="learned", model__norm_placement="post",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args: devices[:1])
        jax.config.update("jax_disable_most_optimizations", True)  # as in the tests, whose losses are compared
        return store, config, train(config)


def test_a_run_resumes_evaluates_predicts_and_is_exported(trained, tmp_path, one_device, monkeypatch):
    store, config, metrics = trained
    cut = with_fields(config, run_dir=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        patch.setattr("flax_encoder.runs.train.StopSignals", lambda **options: Stops(5))
        assert train(cut) is None
    assert train(cut) == metrics
    assert losses(tmp_path / "cut") == losses(pathlib.Path(config.run_dir))
    run = load(config.run_dir)
    rows = TASK.baselines(run, FakeData(store))
    assert rows["most tokens of the context"]["accuracy"] == 1.0 > rows["most frequent place"]["accuracy"] > 0

    records = [pick(i) for i in range(500, 520)]
    answers = list(run.predict(records))
    for record, answer in zip(records[:4], answers, strict=False):
        np.testing.assert_allclose(sum(answer["probabilities"]), 1, rtol=1e-5)
        assert answer["probability"] == max(answer["probabilities"]) == answer["probabilities"][answer["choice"]]
        np.testing.assert_allclose(next(run.predict([record]))["probabilities"], answer["probabilities"], rtol=1e-4)
    # Another number of choices than in training, and another order of them.
    texts = (records[0].texts[0], *records[0].texts[:0:-1], "seven")
    more = next(run.predict([texts]))["probabilities"]
    assert len(more) == 4
    np.testing.assert_allclose(np.divide(*more[:2]), np.divide(*answers[0]["probabilities"][:0:-1]), rtol=1e-3)
    # Records with other numbers of choices beside them.
    mixed = [records[1], Record(texts), pick(600, 2)]
    for record, answer in zip(mixed, run.predict(mixed), strict=True):
        assert len(answer["probabilities"]) == len(record.texts) - 1
        np.testing.assert_allclose(answer["probabilities"], next(run.predict([record]))["probabilities"], rtol=1e-4)
    with pytest.raises(DataError, match="multiple_choice reads 3 to 27 texts a record: one has 2"):
        next(run.predict([texts[:2]]))

    assert export_run(config.run_dir, tmp_path / "out") == "BertForMultipleChoice"
    again = load(tmp_path / "out")
    assert again.config.objective == "multiple_choice" and not again.fresh
    for ours, theirs in zip(answers, again.predict(records), strict=True):
        np.testing.assert_allclose(ours["probabilities"], theirs["probabilities"], rtol=1e-4)


@pytest.mark.parity
def test_transformers_opens_an_exported_run_and_chooses_the_same(trained, tmp_path):
    torch = pytest.importorskip("torch", reason="compares with torch: pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers", reason="compares with transformers: pip install -e '.[parity]'")
    export_run(trained[1].run_dir, tmp_path / "out")
    opened = transformers.AutoModelForMultipleChoice.from_pretrained(tmp_path / "out", output_loading_info=True)
    model, info = opened[0].eval(), opened[1]
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    records = [pick(i) for i in range(6)]
    for record, answer in zip(records, load(trained[1].run_dir).predict(records), strict=True):
        context, *choices = record.texts
        rows = tokenizer([context] * len(choices), choices, padding=True, return_tensors="pt")
        with torch.no_grad():
            want = torch.softmax(model(**{name: x[None] for name, x in rows.items()}).logits[0], -1)
        np.testing.assert_allclose(answer["probabilities"], want.numpy(), rtol=1e-4)


class FakeData:
    def __init__(self, *stores):
        self.stores = stores
