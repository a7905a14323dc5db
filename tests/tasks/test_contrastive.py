"""Texts that are compared: the loss over a whole batch, its gradient in parts and over devices, and a run of it."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import SMALL, assert_trees_close, split_model

from flax_encoder.commands import main
from flax_encoder.config import ConfigError, ContrastiveConfig, DataConfig, OptimizerConfig
from flax_encoder.data.pipeline import open_data
from flax_encoder.data.rows.documents import Documents, Frame, Layout, assemble, longest_first
from flax_encoder.data.rows.targets import Rows, TargetInputs, group_targets
from flax_encoder.data.sources.columns import Table, choose_columns
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.store.store import Split
from flax_encoder.runs.before import scores_before_training
from flax_encoder.runs.embed import load_embedder
from flax_encoder.runs.load import load, with_vectors_of
from flax_encoder.runs.score_file import score_source
from flax_encoder.runs.summary import held_out_answers
from flax_encoder.tasks import TASKS
from flax_encoder.tasks.contrastive import Contrastive, score
from flax_encoder.tasks.contrastive_loss import cosent, cosines, info_nce, margin_mse
from flax_encoder.tasks.ranking import collection_of, rank_scores, ranks
from flax_encoder.training.parameters import join, split, trained
from flax_encoder.training.step import TrainState, coupled_gradient, make_train_step
from tests.peer_sentences import TEXTS
from tests.published.test_sentence_parity import PYTHON, peer
from tests.runs import TINY, losses, with_fields
from tests.test_train import Stops
from train import train

TASK = TASKS["contrastive"]
COLUMNS = TASK.reading.columns
WORDS = ["apple", "river", "stone", "cloud", "candle", "window", "garden", "letter", "seven", "green"]
SGD = optax.sgd(1.0)  # the parameters' change is the gradient


# --- the losses


FAST = {symmetric: jax.jit(functools.partial(info_nce, symmetric=symmetric)) for symmetric in (False, True)}
FAST_COSENT, FAST_MARGIN = jax.jit(cosent), jax.jit(margin_mse)


def slow_info_nce(vectors, keys, weights, scale, symmetric):
    """Written anchor by anchor, in float64."""
    real = [i for i in range(len(vectors)) if weights[i]]
    loss = correct = 0.0
    for i in real:
        own_texts = (keys[i, 0], keys[i, 1])
        others = [
            vectors[j, k] for j in real for k in range(1, vectors.shape[1])
            if keys[j, k] not in own_texts and not (k == 1 and keys[j, 0] == keys[i, 0])
        ]  # fmt: skip
        logits = scale * np.array([vectors[i, 0] @ v for v in (vectors[i, 1], *others)])
        own = np.log(np.exp(logits).sum()) - logits[0]
        correct += logits[0] > max(logits[1:], default=-np.inf)
        if symmetric:
            others = [vectors[j, 0] for j in real if keys[j, 0] not in own_texts and keys[j, 1] != keys[i, 1]]
            logits = scale * np.array([vectors[i, 1] @ v for v in (vectors[i, 0], *others)])
            own = (own + np.log(np.exp(logits).sum()) - logits[0]) / 2
        loss += own
    return loss, len(real), correct


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([2, 4]), st.booleans())
def test_the_loss_is_the_slow_ones_whatever_texts_are_equal(data, n, symmetric):
    """Keys are drawn from so few that anchors, positives and negatives equal one another in every way."""
    A = 7
    keys = np.array(data.draw(st.lists(st.integers(0, data.draw(st.sampled_from([2, 5, 40]))),
                                       min_size=A * n, max_size=A * n))).reshape(A, n)  # fmt: skip
    weights = np.array(data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=A, max_size=A)))
    x = np.random.default_rng(int(keys.sum())).standard_normal((A, n, 5))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    words = np.stack([np.zeros_like(keys), keys], -1).astype(np.int32)  # equal in one word, told apart by the other
    got = FAST[symmetric](x.astype("f4"), words, weights.astype("f4"), 7.0)
    loss, count, correct = slow_info_nce(x, keys, weights, 7.0, symmetric)
    np.testing.assert_allclose(got.sum, loss, rtol=1e-5, atol=1e-5)
    assert (got.count, got.metrics["correct"]) == (count, correct)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=5, max_size=5), st.integers(0, 99))
def test_cosent_is_the_sum_over_all_pairs_in_the_wrong_order(numbers, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((len(numbers) + 1, 2, 5))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    cosine = (x[:, 0] * x[:, 1]).sum(-1)
    pairs = [(i, j) for i, a in enumerate(numbers) for j, b in enumerate(numbers) if a > b]
    want = np.log(1 + sum(np.exp(7 * (cosine[j] - cosine[i])) for i, j in pairs))
    weights = np.array([1.0] * len(numbers) + [0.0], "f4")
    got = FAST_COSENT(x.astype("f4"), np.array([*numbers, 9.0], "f4"), weights, 7.0)
    np.testing.assert_allclose(got.sum, want, rtol=1e-5, atol=1e-6)
    assert got.count == 1 and got.metrics["compared"] == len(pairs)
    assert got.metrics["correct"] == sum(cosine[i] > cosine[j] for i, j in pairs)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 9, width=32), st.booleans()), min_size=5, max_size=5), st.integers(0, 99))
def test_margin_mse_is_the_squared_error_of_every_margin(rows, seed):
    """Whatever stands in empty slots, which have no gradient."""
    numbers, weights = (np.array(column, "f4") for column in zip(*rows, strict=True))
    x = np.random.default_rng(seed).standard_normal((len(rows), 3, 7)).astype("f4")
    vectors = np.where(weights[:, None, None] > 0, x / np.linalg.norm(x, axis=-1, keepdims=True), 0.0)
    margins = [7 * (own[0] @ own[1] - own[0] @ own[2]) for own in vectors.astype("f8")]
    errors = [(m - y) ** 2 for m, y, w in zip(margins, numbers, weights, strict=True) if w]
    got = FAST_MARGIN(vectors, numbers, weights, 7.0)
    np.testing.assert_allclose(got.sum, sum(errors), rtol=1e-4, atol=1e-4)
    assert got.count == len(errors) == got.metrics["compared"]
    assert got.metrics["correct"] == sum(m * y > 0 for m, y, w in zip(margins, numbers, weights, strict=True) if w)


@pytest.mark.parametrize("n", [2, 3])
def test_blocks_of_rows_are_all_at_once(n, monkeypatch):
    """Of a batch whose logits are many, and the gradient."""
    rng = np.random.default_rng(0)
    vectors = cosines(jnp.asarray(rng.standard_normal((12, n, 5)), jnp.float32))
    keys, weights = jnp.asarray(rng.integers(0, 9, (12, n, 2)) // 4, jnp.int32), jnp.asarray([1.0] * 11 + [0.0])

    def all_losses():
        def of(vectors):
            losses = [info_nce(vectors, keys, weights, 7.0, symmetric=True)]
            losses += [cosent(vectors, jnp.arange(12.0) // 3, weights, 7.0)] if n == 2 else []
            return sum(loss.sum for loss in losses), losses

        return jax.jit(jax.value_and_grad(of, has_aux=True))(vectors)

    want = all_losses()
    monkeypatch.setattr("flax_encoder.tasks.contrastive_loss._AT_ONCE", {2: 30, 3: 1}[n])  # two rows, one row
    got = all_losses()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


# --- its gradient: packed, in parts, over devices

ROWS, M, N = 8, 2, 3  # two documents of three texts in each row, but for every third
DROPPED = dataclasses.replace(SMALL, dropout_rate=0.3, attention_dropout_rate=0.2)
LEARNED = ContrastiveConfig(learn_temperature=True, symmetric=True, widths=(30, 7), temperature=0.2)


def make_batch(rows=ROWS):
    rng = np.random.default_rng(0)
    batch = {name: np.zeros((rows, 23), np.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["target_weights"] = np.zeros((rows, M), np.float32)
    batch["text_keys"] = np.zeros((rows, M, N, 2), np.int32)
    for r in range(rows):
        lengths = [3, 4, 2, 4, 3, 5][: 3 if r % 3 == 2 else 6]
        begin = 0
        for s, length in enumerate(lengths):
            some = (r, slice(begin, begin + length))
            batch["tokens"][some], batch["segment_ids"][some] = rng.integers(0, 37, length), s + 1
            batch["positions"][some] = np.arange(length)
            begin += length
        batch["target_weights"][r, : len(lengths) // N] = 1
        batch["text_keys"][r, : len(lengths) // N] = rng.integers(0, 9, (len(lengths) // N, N, 2)) // 4
    return jax.tree.map(jnp.asarray, batch)


@functools.cache
def model(config=SMALL, contrastive=LEARNED):
    return split_model(lambda: Contrastive(config, contrastive, rngs=nnx.Rngs(0)))


def test_packed_texts_have_the_vectors_that_they_have_alone():
    """However they are pooled; and the gradient of the loss."""
    graphdef, params = model()
    poolings = [model(SMALL, dataclasses.replace(LEARNED, pooling=p))[0] for p in ("mean", "cls", "lasttoken")]
    packed = make_batch(3)
    alone = {name: np.zeros((18, 5), np.int32) for name in ("tokens", "segment_ids", "positions")}
    for r, s in np.ndindex(3, 6):
        own = np.asarray(packed["segment_ids"][r]) == s + 1
        for name, rows in alone.items():
            rows[6 * r + s, : own.sum()] = 1 if name == "segment_ids" else np.asarray(packed[name][r])[own]
    alone["text_keys"] = np.zeros((18, 1, 1, 2), np.int32)

    def vectors(params, batch):
        return jnp.stack([nnx.merge(graph, params)(batch).reshape(3, M, N, -1) for graph in poolings])

    def gradient(params, batch):
        return jax.grad(lambda p: nnx.merge(graphdef, p).coupled_loss(
            nnx.merge(graphdef, p)(batch).reshape(3, M, N, -1), packed).sum)(params)  # fmt: skip

    both = jax.jit(lambda params, batch: (vectors(params, batch), gradient(params, batch)))
    (got, got_grads), (want, want_grads) = both(params, packed), both(params, alone)
    real = np.asarray(packed["target_weights"]) > 0
    np.testing.assert_allclose(np.asarray(got)[:, real], np.asarray(want)[:, real], rtol=0, atol=1e-5)
    assert np.abs(got[0] - got[1]).max() > 0.1 < np.abs(got[1] - got[2]).max()
    assert_trees_close(got_grads, want_grads)


def test_microbatches_are_one_batch_with_the_same_dropout():
    """The loss and the gradient of all representations at once, whose parts have the parts' keys."""
    graphdef, params = model(DROPPED)
    batch, key = make_batch(), jax.random.key(3)
    mask = trained(OptimizerConfig(freeze=("encoder.layers.0",)), params)
    own, rest = split(params, mask)

    def model_of(own, rest):
        return nnx.merge(graphdef, join(own, rest, mask))

    def whole(own):
        made, halves = model_of(own, rest), jax.tree.map(lambda x: jnp.stack([x[::2], x[1::2]]), batch)
        vectors = jax.lax.map(lambda xs: made.represent(xs[0], key=xs[1]), (halves, jax.random.split(key, 2)))
        loss = made.coupled_loss(jnp.swapaxes(vectors, 0, 1).reshape(ROWS, M, N, -1), batch)
        return loss.sum, loss

    want, loss = jax.jit(jax.grad(whole, has_aux=True))(own)
    got, total = jax.jit(lambda own: coupled_gradient(model_of, own, rest, batch, key, 2))(own)
    np.testing.assert_allclose(total.sum, loss.sum, rtol=1e-6)
    assert (total.count, total.metrics["correct"]) == (loss.count, loss.metrics["correct"])
    assert_trees_close(got, want)
    assert abs(float(update(1)[1].sum) - float(loss.sum)) > 1e-2, "dropout must have moved it"


@functools.cache
def update(num_microbatches, mesh_shape=None):
    """(change of the parameters, loss) of one step."""
    graphdef, params = model()
    state = jax.tree.map(jnp.array, TrainState(jnp.int32(0), params, SGD.init(params)))  # the step takes it away
    before = jax.tree.map(np.array, params)
    batch, step = make_batch(), functools.partial(make_train_step, graphdef, SGD, num_microbatches=num_microbatches)
    if mesh_shape is None:
        new, metrics = step()(state, batch)
    else:
        mesh = jax.make_mesh(mesh_shape, ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3)
        copied, rows = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)) for spec in (
            (), (("data", "fsdp"),)))  # fmt: skip
        shardings = jax.tree.map(lambda x: copied, state)
        with jax.set_mesh(mesh):
            new, metrics = step(shardings=shardings)(jax.device_put(state, shardings), jax.device_put(batch, rows))
    return jax.tree.map(lambda a, b: np.asarray(a) - b, new.params, before), metrics.loss


@pytest.mark.parametrize(("num_microbatches", "mesh"), [(4, None), (1, (8, 1, 1)), (2, (2, 2, 2))])
def test_microbatches_and_devices_make_the_update_of_one_batch(num_microbatches, mesh):
    """Every anchor is told from the texts of all rows, wherever these are."""
    want, loss = update(1)
    got, total = update(num_microbatches, mesh)
    np.testing.assert_allclose(total.sum, loss.sum, rtol=1e-5)
    assert float(total.count) == float(loss.count) == 14
    assert_trees_close(got, want)


# --- ranked lists


def test_ranks_are_those_of_sorted_likeness_and_ndcg_is_scikit_learns():
    from sklearn.metrics import ndcg_score

    rng = np.random.default_rng(0)
    keys = rng.integers(0, 30, (25, 2, 1))
    keys = np.concatenate([keys, keys], -1)
    found = collection_of([*keys, *rng.integers(100, 110, (12, 1, 2))])
    assert len(found.queries) == len({*keys[:, 0, 0]}) and len(found.texts) >= 25 // 2
    likeness = rng.standard_normal((len(found.queries), len(found.texts)))
    got = list(ranks(found, lambda some: likeness[some]))
    gains = []
    for row, relevant, own, ours in zip(likeness, found.relevant, found.own, got, strict=True):
        row = row.copy()
        if own >= 0 and own not in relevant:
            row[own] = -9
        order = np.argsort(-row)
        np.testing.assert_array_equal(ours, sorted(int(np.flatnonzero(order == r)[0]) + 1 for r in relevant))
        truth = np.isin(np.arange(len(row)), relevant).astype(float)
        gains.append(ndcg_score(truth[None], row[None], k=10))
    np.testing.assert_allclose(rank_scores(got)["ndcg_at_10"], np.mean(gains), rtol=1e-9)


def test_scores_by_hand():
    """A query's positives are those of all documents with it; equal likeness is no success; its own text is not its."""
    scores = rank_scores([np.array([1, 12]), np.array([2])])
    assert scores == {
        "accuracy_at_1": 0.5, "mrr": 0.75, "recall_at_10": 0.75, "recall_at_100": 1.0,
        "ndcg_at_10": pytest.approx((1 / (1 + 1 / np.log2(3)) + 1 / np.log2(3)) / 2),
    }  # fmt: skip
    same = np.array([[1.0, 0], [1.0, 0]], np.float32)
    keys = np.arange(8, dtype=np.int32).reshape(2, 2, 2)
    answers = [{"score": 1.0, "vectors": same, "text_keys": own} for own in keys]
    assert score(answers, [None, None])["accuracy_at_1"] == 0.0
    assert score(answers[:1], [None])["accuracy_at_1"] == 1.0
    own = {"vectors": same[:1], "text_keys": keys[0, :1]}
    assert score([answers[0], own], [None, None])["accuracy_at_1"] == 1.0
    assert score([own], [None]) == {}
    numbers = score([{"score": s} for s in (0.1, 0.9, 0.4)], [1.0, 3.0, 2.0])
    assert numbers["spearman"] == 1.0 and 0.9 < numbers["pearson"] < 1.0
    margins = [{"score": 0.5, "vectors": np.array([[1, 0], [0.5, 0], [x, 0]], np.float32)} for x in (0.4, 0.0, 0.2)]
    assert score(margins, [1.0, 3.0, 2.0])["spearman"] == 1.0, "a number of three texts is of the lead of the second"


# --- columns


@pytest.mark.parametrize(
    ("kinds", "texts", "label"),
    [
        ({"text": "str", "score": "float"}, ("text",), None),
        ({"anchor": "str", "positive": "str"}, ("anchor", "positive"), None),
        ({"query": "str", "positive": "str", "negative": "str"}, ("query", "positive", "negative"), None),
        ({"negative_2": "str", "question": "str", "negative_1": "str", "answer": "str", "negative_10": "str"},
         ("question", "answer", "negative_1", "negative_2", "negative_10"), None),
        ({"query": "str", "positive": "str", "negatives": "list[str]"}, ("query", "positive", "negatives"), None),
        ({"sentence1": "str", "sentence2": "str", "score": "float"}, ("sentence1", "sentence2"), "score"),
        ({"anchor": "str", "positive": "str", "negative": "str", "score": "float"},
         ("anchor", "positive", "negative"), None),
        ({"query": "str", "positive": "str", "negative": "str", "margin": "float"},
         ("query", "positive", "negative"), "margin"),
    ],
)  # fmt: skip
def test_texts_and_numbers_are_found_by_their_names(kinds, texts, label):
    layout = choose_columns(Table(kinds, "t"), DataConfig(), COLUMNS)
    assert layout.columns == (*texts, *([] if label is None else [label])) and layout.label == label
    assert all(repr(name) in "".join(layout.notes) for name in layout.columns if name not in ("text", "label"))
    row = {name: {"str": name, "float": 2.5}.get(kind, [name, "more"]) for name, kind in kinds.items()}
    record = layout.make(row)
    assert record.value == (None if label is None else 2.5)
    assert record.texts == (*texts, *(["more"] if "negatives" in texts else []))


def test_a_number_needs_a_pair_or_a_triple_and_a_second_text_a_column():
    table = Table({"text": "str", "other": "str", "score": "float"}, "t")
    with pytest.raises(DataError, match=r"a number is of a pair .* and a negative: t is read as 1 a row"):
        choose_columns(table, DataConfig(text_column="text", label_column="score"), COLUMNS)
    with pytest.raises(DataError, match="there is no column 'positive'"):
        choose_columns(table, DataConfig(text_column="text", text_pair_column="positive"), COLUMNS)
    named = choose_columns(table, DataConfig(text_column="text", text_pair_column="other"), COLUMNS)
    assert named.columns == ("text", "other", "score")
    triples = Table({"query": "str", "positive": "str", "negative": "str", "score": "float"}, "t")
    named = choose_columns(triples, DataConfig(label_column="score"), COLUMNS)
    assert named.columns == ("query", "positive", "negative", "score")


# --- rows


def test_texts_of_a_document_stand_apart_in_its_row():
    """Each with its own special tokens and positions, a single text twice; the row's room is shared."""
    frame = Frame(pad=0, first=1, last=2, between=(2,))
    for lengths, row in {
        (2, 1, 3): [1, 10, 11, 2, 1, 12, 2, 1, 13, 14, 15, 2, 0, 0],
        (3,): [1, 10, 11, 12, 2, 1, 10, 11, 12, 2, 0, 0, 0, 0],
        (2, 9): [1, 10, 11, 2, 1, *range(12, 20), 2],  # the longer is cut to what is left
        (7, 9): [1, *range(10, 15), 2, 1, *range(17, 22), 2],
    }.items():
        tokens, n = np.arange(10, 10 + sum(lengths), dtype=np.uint16), len(lengths)
        values = {"text_keys": np.arange(n, dtype=np.uint64)[None] + 7}
        values |= {"text_lengths": np.array([lengths])} if n > 1 else {}
        split = Split([tokens], [np.zeros(2, np.uint8)], np.array([0, len(tokens)]), values)
        documents = Documents(split, Layout("apart"), frame, 14)
        plan, batch, first = documents.plan(14), frame.empty(1, 14), np.zeros(1, np.int64)
        pieces = plan.rows(first, 0)
        assemble(documents, pieces, batch, first)
        assert batch["tokens"][0].tolist() == row
        starts = np.flatnonzero(np.array(row) == 1)
        assert documents.num_segments == len(starts) == max(n, 2)
        assert np.flatnonzero(np.diff(batch["segment_ids"][0], prepend=0) > 0).tolist() == starts.tolist()
        assert np.flatnonzero((batch["positions"][0] == 0) & (batch["segment_ids"][0] > 0)).tolist() == starts.tolist()
        targets = group_targets(TargetInputs(None, None, documents, 14, 3, True, True))
        made = targets(Rows(batch, None, None, pieces.address, pieces, 0))
        assert made["target_weights"].tolist() == [[1, 0, 0]] and made["owners"].tolist() == [[0, -1, -1]]
        assert made["text_keys"][0, 0, :, 0].tolist() == ([7, 7] if n == 1 else [*range(7, 7 + n)])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(5, 60))
def test_the_longest_text_is_cut_first(lengths, room):
    want = list(lengths)
    while sum(want) > room:  # a token at a time, of the longest
        want[want.index(max(want))] -= 1
    got = longest_first(np.array([lengths]), room)[0]
    assert sorted(got) == sorted(want) and (got <= lengths).all()


def test_some_numbers_are_refused_and_prompts_go_with_their_store(tmp_path):
    pairs = make_pairs(40, number=True)
    source = write(tmp_path / "numbers.jsonl", pairs)
    validation = write(tmp_path / "none.jsonl", [*make_pairs(9, 1), {"anchor": "a", "positive": " "}])
    config = contrastive_run(tmp_path, "x", source, data__validation=validation)
    data = open_data(config, TASK.reading)
    assert len(data.stores[0].validation) == 9, "a text of blanks is none"
    assert "targets" in data.train[0] and "targets" not in data.evaluation[0]
    split = data.stores[0].train
    split.values["number"][3] = np.nan
    documents = Documents(split, Layout("apart"), Frame.of(data.tokenizer), 48)
    with pytest.raises(DataError, match="either every pair of texts has a number or none has: 1 of"):
        group_targets(TargetInputs(config, data.tokenizer, documents, 48, 3, True))
    asked = with_fields(config, data__source=str(data.stores[0].folder), data__validation=None)
    with pytest.raises(DataError, match=r"was prepared with none, the run has \['q: ', ''\]"):
        open_data(with_fields(asked, contrastive=ContrastiveConfig(query_prompt="q: ")), TASK.reading)
    numbers = open_data(with_fields(config, objective="regression", data__validation=None), TASKS["regression"].reading)
    with pytest.raises(DataError, match=r"need their hashes, which the store .* lacks"):
        open_data(with_fields(asked, data__source=str(numbers.stores[0].folder)), TASK.reading)


# --- runs


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_pairs(count, seed=0, number=False):
    """A few words, and the same in another order with one of them left out; or with a number, how many are left."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        words = [*rng.permutation(WORDS)[:5], f"n{i % 50}"]
        kept = int(rng.integers(1, 7)) if number else 5
        rows.append({"anchor": " ".join(words), "positive": " ".join(rng.permutation(words)[:kept])})
        rows[-1] |= {"score": kept} if number else {}
    return rows


def contrastive_run(folder, name, source, **fields):
    return with_fields(
        TINY, objective="contrastive", run_dir=str(folder / name), data__source=source, data__text_unit="paragraph",
        data__row_length=48, data__cache_dir=str(folder / "cache"), steps=12, log_every=1, model__num_token_types=2,
        model__position="learned", model__norm_placement="post", **fields,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """(folder, config, metrics) of a run on pairs with prompts, on one device."""
    folder, devices = tmp_path_factory.mktemp("contrastive"), jax.devices()
    source = write(folder / "pairs.jsonl", make_pairs(300))
    config = contrastive_run(
        folder, "whole", source, num_microbatches=2, model__dropout_rate=0.1,
        contrastive=ContrastiveConfig(widths=(32, 8), learn_temperature=True, query_prompt="find: ",
                                      document_prompt="text "),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args: devices[:1])
        jax.config.update("jax_disable_most_optimizations", True)  # as in the tests, whose losses are compared
        return folder, config, train(config)


def test_a_run_resumes_to_the_bit_and_its_loss_falls(trained_run, tmp_path, one_device, monkeypatch):
    _, config, metrics = trained_run
    cut = with_fields(config, run_dir=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        patch.setattr("flax_encoder.runs.train.StopSignals", lambda **options: Stops(5))
        assert train(cut) is None
    assert train(cut) == metrics
    whole = losses(pathlib.Path(config.run_dir))
    assert losses(tmp_path / "cut") == whole
    assert whole[12][0] < whole[1][0]
    assert {"eval/loss", "eval/accuracy", "eval/temperature", "eval/accuracy_at_1", "eval/ndcg_at_10"} <= {*metrics}
    assert metrics["eval/temperature"] != 0.05


def test_embed_predict_evaluate_and_export_have_the_same_vectors(trained_run, tmp_path, one_device):
    """Prompts, pooling and length 1 included, of a run and of the folder that it is exported to."""
    _, config, _ = trained_run
    run, pairs = load(config.run_dir), make_pairs(20, seed=5)
    answers = list(run.predict([(p["anchor"], p["positive"]) for p in pairs]))
    main(["export", config.run_dir, str(tmp_path / "out")])
    for place in (config.run_dir, tmp_path / "out"):
        embedder = load_embedder(place)
        assert embedder.normalize and embedder.prompts == {"query": "find: ", "document": "text "}
        queries, _ = embedder.embed([p["anchor"] for p in pairs], prompt_name="query")
        texts, _ = embedder.embed([p["positive"] for p in pairs], prompt_name="document")
        np.testing.assert_allclose(np.linalg.norm(texts, axis=-1), 1, rtol=1e-5)
        np.testing.assert_allclose([a["vectors"] for a in answers], np.stack([queries, texts], 1), rtol=0, atol=1e-5)
    np.testing.assert_allclose([a["score"] for a in answers], (queries * texts).sum(-1), rtol=0, atol=1e-5)
    asked, said = write(tmp_path / "p.jsonl", pairs), str(tmp_path / "a.jsonl")
    main(["predict", config.run_dir, "--input", asked, "--output", said])
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [{*line} for line in lines] == [{"score"}] * 20

    scores, _, _ = score_source(run, DataConfig(source=asked), print)
    order = np.argsort(-(queries @ texts.T), axis=1)
    np.testing.assert_allclose(scores["accuracy_at_1"], (order[:, 0] == np.arange(20)).mean())
    np.testing.assert_allclose(scores["mrr"], (1 / (1 + (order == np.arange(20)[:, None]).argmax(1))).mean())
    corpus = write(tmp_path / "more.jsonl", [{"text": p["anchor"]} for p in pairs] + [{"text": pairs[0]["positive"]}])
    harder, _, about = score_source(run, DataConfig(source=asked), print, corpus)
    assert "among 21 more texts" in about and harder["mrr"] <= scores["mrr"]
    more = np.concatenate([texts, embedder.embed([p["anchor"] for p in pairs], prompt_name="document")[0]])
    likeness = queries @ more.T
    likeness[np.arange(20), 20 + np.arange(20)] = -1  # a query's own text
    order = np.argsort(-likeness, axis=1)
    np.testing.assert_allclose(harder["mrr"], (1 / (1 + (order == np.arange(20)[:, None]).argmax(1))).mean())
    with pytest.raises(DataError, match=r"a corpus is a line of a \.txt file or a row with .* each: which"):
        score_source(run, DataConfig(source=asked), print, asked)
    numbers = write(tmp_path / "n.jsonl", make_pairs(30, 3, number=True))
    main(["predict", config.run_dir, "--input", numbers, "--output", said])
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 30
    scores, _, _ = score_source(run, DataConfig(source=numbers), print)
    assert {*scores} == {"pearson", "spearman"}


@pytest.mark.parity
def test_sentence_transformers_opens_an_exported_run_with_the_same_vectors(trained_run, tmp_path):
    if PYTHON is None:
        pytest.skip("needs sentence-transformers, here or in TORCH_PYTHON")
    main(["export", trained_run[1].run_dir, str(tmp_path / "out")])
    peer("encode", tmp_path / "out")
    theirs, embedder = np.load(tmp_path / "out/got.npz"), load_embedder(trained_run[1].run_dir)
    assert {*theirs} == {"query", "document", "default"}
    for name in theirs:
        ours, _ = embedder.embed(TEXTS, prompt_name=None if name == "default" else name)
        kept = [i for i, text in enumerate(TEXTS) if text]  # of no text there is no vector here
        np.testing.assert_allclose(ours[kept], theirs[name][kept], rtol=0, atol=2e-5, err_msg=name)


def test_the_model_before_training_is_a_baseline_beside_shared_words(trained_run, one_device):
    """What a run began from scores as it did there."""
    _, config, metrics = trained_run
    run = load(config.run_dir)
    data = open_data(run.config, TASK.reading, tokenizer=run.tokenizer)
    follower = dataclasses.replace(run, config=dataclasses.replace(run.config, init_from=config.run_dir))
    before = scores_before_training(follower, data)
    assert {f"eval/{name}": pytest.approx(value, rel=1e-4) for name, value in before.items()} == metrics
    gone = dataclasses.replace(run, config=dataclasses.replace(run.config, init_from=f"{config.run_dir}-gone"))
    assert scores_before_training(gone, data) is None
    assert held_out_answers(run, data) == {}, "pairs without numbers have no right value"
    rows = TASK.baselines(run, data)
    assert rows["TF-IDF"]["mrr"] > rows["shared words"]["mrr"] - 0.1 > 0.5


def test_one_text_is_learned_from_two_dropouts(tmp_path, one_device):
    (tmp_path / "one.txt").write_text("\n\n".join(pair["anchor"] for pair in make_pairs(200)))
    singles = contrastive_run(tmp_path, "one", str(tmp_path / "one.txt"), model__dropout_rate=0.1)
    with pytest.raises(ConfigError, match=r"dropout_rate is 0\. Give --model\.dropout-rate 0\.1, or a second text"):
        train(with_fields(singles, run_dir=str(tmp_path / "x"), model__dropout_rate=0.0))
    metrics = train(singles)
    assert metrics["eval/accuracy"] == 1.0 and "eval/mrr" not in metrics
    seen = losses(pathlib.Path(singles.run_dir))
    assert seen[12][0] < seen[1][0]
    with pytest.raises(DataError, match="`embed` the texts"):
        main_raising(["predict", singles.run_dir, "--input", singles.data.source, "--output", "-"])
    with pytest.raises(DataError, match="a score needs pairs of texts"):
        score_source(load(singles.run_dir), singles.data, print)


@pytest.mark.parametrize(("texts", "loss"), [(2, FAST_COSENT), (3, FAST_MARGIN)])
def test_numbers_reach_the_loss_of_pairs_or_of_triples(trained_run, tmp_path, texts, loss):
    rows = make_pairs(60, number=True)
    if texts == 3:
        rows = [{**row, "negative": rows[i - 1]["positive"], "margin": row.pop("score")} for i, row in enumerate(rows)]
    config = with_fields(trained_run[1], data__source=write(tmp_path / "numbers.jsonl", rows),
                         contrastive=ContrastiveConfig())  # fmt: skip
    batch = open_data(config, TASK.reading).train[0]
    numbers = batch["targets"][batch["target_weights"] > 0]
    assert {*numbers} <= {*range(1, 7)} and len({*numbers}) > 2
    vectors = np.random.default_rng(0).standard_normal((*batch["text_keys"].shape[:3], 30)).astype("f4")
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    made = nnx.merge(*model(SMALL, ContrastiveConfig(temperature=1 / 7)))
    real = batch["target_weights"] > 0
    want = loss(vectors[real], numbers, np.ones(len(numbers), "f4"), 7.0)
    got = made.coupled_loss(jnp.asarray(vectors), jax.tree.map(jnp.asarray, batch))
    np.testing.assert_allclose(got.sum, want.sum, rtol=1e-5)
    config = with_fields(config, contrastive=ContrastiveConfig(loss="infonce"))
    assert "targets" not in open_data(config, TASK.reading).train[0]


def main_raising(arguments):
    """The command, without its way of showing errors."""
    import argparse

    from flax_encoder.commands import predict

    parser = argparse.ArgumentParser()
    predict.add_options(parser)
    predict.run(parser.parse_args(arguments[1:]))


def test_what_cannot_be_learned_is_said_before_training(trained_run, tmp_path, one_device):
    _, config, _ = trained_run
    one_row = {"num_microbatches": 1, "batch_size": 1, "data__packing": "one-per-row", "run_dir": str(tmp_path / "x")}
    one_text = {"num_microbatches": 1, "batch_texts": 1, "run_dir": str(tmp_path / "x")}
    for alone, option in ((one_row, "size"), (one_text, "texts")):
        says = rf"two documents: .* batches of \d rows hold 1\.0\. Give more of them a batch \(--batch-{option} 32"
        with pytest.raises(ConfigError, match=says):
            train(with_fields(config, **alone))
    wide = ContrastiveConfig(widths=(64,))
    with pytest.raises(ConfigError, match=r"contrastive\.widths are at most .*: got \(64,\) for model\.embed_dim 32"):
        train(with_fields(config, run_dir=str(tmp_path / "x"), contrastive=wide))
    for loss, texts in {"cosent": "pairs of texts", "margin_mse": "an anchor, a positive and one negative"}.items():
        with pytest.raises(ConfigError, match=f"{loss} learns the numbers of {texts}, and the texts have none"):
            train(with_fields(config, run_dir=str(tmp_path / "x"), contrastive=ContrastiveConfig(loss=loss)))
    pairs = write(tmp_path / "numbers.jsonl", make_pairs(60, number=True))
    margins = with_fields(config, run_dir=str(tmp_path / "x"), contrastive=ContrastiveConfig(loss="margin_mse"))
    with pytest.raises(ConfigError, match=r"takes an anchor, a positive and one negative a row: got 2 texts\."):
        train(with_fields(margins, data__source=pairs))
    with pytest.raises(ConfigError, match="takes one source"):
        train(with_fields(config, run_dir=str(tmp_path / "x"), data__source=(config.data.source,) * 2))
    with pytest.raises(ConfigError, match="a corpus is searched by vectors, which classification does not make"):
        score_source(dataclasses.replace(load(config.run_dir), config=with_fields(config, objective="classification",
                     contrastive=ContrastiveConfig())), config.data, print, "c.txt")  # fmt: skip


def test_a_sentence_folder_says_how_the_vectors_that_it_starts_have_been_pooled(trained_run, tmp_path):
    """Trained from or opened, its own pooling and prompts are what the vectors are made by, and it is said."""
    _, config, _ = trained_run
    run, folder = load(config.run_dir), tmp_path / "published"
    main(["export", config.run_dir, str(folder)])
    pooling = folder / "1_Pooling/config.json"
    flags = json.loads(pooling.read_text())
    flags |= {name: name == "pooling_mode_max_tokens" for name in flags if name.startswith("pooling_mode_")}
    pooling.write_text(json.dumps(flags))
    opened = load(folder, objective="contrastive")
    assert opened.config.contrastive.pooling == opened.model.settings.pooling == "max"
    pair = [("the list returns a value", "of each item in order")]
    [answer], embedder = list(opened.predict(pair)), load_embedder(folder)
    one, other = (embedder.embed(list(texts), prompt_name=name)[0] for texts, name in (
        ((pair[0][0],), "query"), ((pair[0][1],), "document")))  # fmt: skip
    np.testing.assert_allclose(answer["score"], (one @ other.T).item(), rtol=0, atol=1e-5)
    said = []
    start = dataclasses.replace(run.config, init_from=str(folder), contrastive=ContrastiveConfig())
    settled = with_vectors_of(start, str(folder), said.append)
    assert settled.contrastive.pooling == "max" and settled.contrastive.prompts == ("find: ", "text ")
    assert any("contrastive.pooling is 'max'" in line for line in said)
    assert with_vectors_of(settled, str(folder), said.append) == settled  # as it is resumed
