"""Choices: each read with the context by itself, one softmax over a document's choices, and a run of them."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import SMALL, assert_trees_close, random_tokens, split_model

from flax_encoder.data.sources.opening import Source
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


def put(records, tokenizer, folder, num_parts=1):
    parts = [Part("train", len(some), functools.partial(iter, some.tolist())) for some in np.array_split(
        np.fromiter(records, object), num_parts)]  # fmt: skip
    source = Source(parts, "f")
    return prepare(source, tokenizer, folder, COLUMNS, held_out=HeldOut(0.2), workers=1)


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
def test_documents_with_other_numbers_of_choices_are_refused_by_name(tokenizer, tmp_path, num_parts, monkeypatch):
    monkeypatch.setattr("flax_encoder.data.store.tokenizing._BATCH_CHARACTERS", 1)
    records = [pick(0), pick(1), pick(2, 4)._replace(where="c.jsonl, row 3"), pick(3, 4)]
    with pytest.raises(DataError, match=r"as many texts as the others: c\.jsonl, row 3 has 5, those before it 4"):
        put(records, tokenizer, tmp_path / "s", num_parts)


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
