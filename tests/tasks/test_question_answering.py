"""Answers in passages: targets, loss, the best spans, windows, SQuAD's scores, and a run from text to answers."""

import functools
import json

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from toy import SMALL, V, assert_trees_close, split_model

from flax_encoder.config import LabelsConfig, RunConfig
from flax_encoder.data.rows.batches import Batches, OneByOne
from flax_encoder.data.rows.documents import Documents, Frame
from flax_encoder.data.rows.targets import TargetInputs
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.opening import Source
from flax_encoder.data.sources.records import DataError, Part, Record
from flax_encoder.data.store.encoding import NO_ANSWER
from flax_encoder.data.store.prepare import prepare
from flax_encoder.data.store.store import Split
from flax_encoder.data.store.tokenizing import HeldOut
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from flax_encoder.runs.exchange import export_run
from flax_encoder.runs.load import load
from flax_encoder.tasks import TASKS
from flax_encoder.tasks.question_answering import QuestionAnswering, best_spans, score, sentences
from flax_encoder.tasks.task import Question
from flax_encoder.training.run_log import read_metrics
from tests.runs import TINY, losses, with_fields
from tests.test_train import Stops
from train import train

TASK = TASKS["question_answering"]
THINGS = ["apple", "river", "stone", "cloud", "candle", "window", "garden", "letter"]
COLORS = ["red", "blue", "green", "white", "black", "yellow"]


def ask(seed, has_answer=True, length=4):
    """A passage that names the colors of some things, and a question for one of them."""
    rng = np.random.default_rng(seed)
    things = rng.permutation(THINGS)[:length].tolist()
    words = [f"the {thing} is {rng.choice(COLORS)}" for thing in things]
    asked = things[rng.integers(length)] if has_answer else THINGS[0] if THINGS[0] not in things else "door"
    passage = "  ".join(f"{word} ." for word in words)
    if not has_answer:
        return Record((f"what color is the {asked}", passage), ())
    before = passage.index(f"{asked} is ") + len(f"{asked} is ")
    color = passage[before:].split()[0]
    return Record((f"what color is the {asked}", passage), ((before, color),))


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([text for i in range(30) for text in ask(i).texts] + ["door", "ö"], 160)


def batches_of(split, frame, row_length, overlap, batch_size=2, is_training=True, packing="best-fit"):
    config = with_fields(RunConfig(objective="question_answering"), data__row_length=row_length,
                         data__window_overlap=overlap)  # fmt: skip
    documents = Documents(split, TASK.reading.layout(config), frame, row_length)
    order = OneByOne([documents.plan(row_length, packing)])
    most = order.plans[0].max_pieces_per_row
    inputs = TargetInputs(config, None, documents, row_length, most, is_training, not is_training)
    return Batches([documents], order, TASK.reading.targets(inputs), row_length=row_length, batch_size=batch_size,
                   seed=0, num_batches=-(-len(order) // batch_size), stop_row=len(order))  # fmt: skip


def random_split(seed, num_documents=9, longest=30):
    """Questions and passages of random tokens, some without an answer."""
    rng = np.random.default_rng(seed)
    lengths = np.stack([rng.integers(1, 5, num_documents), rng.integers(1, longest, num_documents)], 1)
    first = (rng.random(num_documents) * lengths[:, 1]).astype(np.int32)
    last = first + (rng.random(num_documents) * np.minimum(4, lengths[:, 1] - first)).astype(np.int32)
    answers = np.where(rng.random((num_documents, 1)) < 0.3, NO_ANSWER, np.stack([first, last], 1)).astype(np.int32)
    total = int(lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths.sum(1))]).astype(np.int64)
    values = {"text_lengths": lengths.astype(np.uint32), "answers": answers}
    words = np.packbits(np.ones(total, bool), bitorder="little")
    return Split([rng.integers(5, V, total).astype(np.uint16)], [words], offsets, values)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(12, 40), st.sampled_from([0, 3, 6]),
       st.sampled_from([Frame(0, 1, 2, (2,)), Frame(0, 1, 2, (2, 2))]))  # fmt: skip
def test_a_target_is_the_answer_where_a_window_holds_it_whole_and_else_the_first_token(
    seed, row_length, overlap, frame
):
    split = random_split(seed)
    batches = batches_of(split, frame, row_length, overlap, is_training=False)
    documents, seen = batches.documents[0], set()
    for i in range(len(batches)):
        batch = batches[i]
        for row, slot in np.argwhere(batch["target_weights"] > 0):
            window = int(batch["owners"][row, slot])
            seen.add(window)
            document = int(documents.source[window])
            begin, end = batch["passages"][row, slot]
            passage = split.document(document)[int(split.values["text_lengths"][document, 0]) :]
            start = int(documents.window_start[window])
            np.testing.assert_array_equal(batch["tokens"][row, begin:end], passage[start : start + end - begin])
            first, last = split.values["answers"][document]
            at = batch["target_positions"][row, slot] + batch["targets"][row, slot]
            if first >= start and last < start + end - begin:
                np.testing.assert_array_equal(batch["tokens"][row, at[0] : at[1] + 1], passage[first : last + 1])
                assert begin <= at[0] <= at[1] < end
            else:
                assert (at == batch["target_positions"][row, slot]).all() and batch["positions"][row, at[0]] == 0
    assert seen == set(range(len(documents.source)))


@functools.cache
def small():
    graphdef, params = split_model(lambda: QuestionAnswering(SMALL, longest_answer=4, rngs=nnx.Rngs(0)))

    def loss(params, batch):
        total = nnx.merge(graphdef, params).loss(batch)
        return total.sum, total

    grads = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return graphdef, params, grads, jax.jit(lambda p, b: nnx.merge(graphdef, p).outputs(b))


def test_packed_windows_learn_and_answer_as_if_alone():
    """Loss, gradient and the best spans; padding is no part of either."""
    split, frame = random_split(3), Frame(0, 1, 2, (2,))
    _, params, grads, outputs = small()
    sums, spans = [], []
    for packing in ("best-fit", "one-per-row"):
        batches = batches_of(split, frame, 23, 5, 2, False, packing)
        total, of_window = None, {}
        for i in range(len(batches)):
            batch = batches[i]
            owners = batch.pop("owners")
            one = grads(params, batch)
            total = one if total is None else jax.tree.map(jnp.add, total, one)
            out = {name: np.asarray(x) for name, x in outputs(params, batch).items()}
            for row, slot in np.argwhere(owners >= 0):
                of_window[int(owners[row, slot])] = {name: x[row, slot] for name, x in out.items()}
        sums.append(total)
        spans.append(of_window)
    ((loss, packed), gradient), ((other_loss, alone), other_gradient) = sums
    assert float(packed.count) == float(alone.count) > len(split)
    np.testing.assert_allclose([loss, packed.metrics["correct"]], [other_loss, alone.metrics["correct"]], rtol=1e-5)
    assert_trees_close(gradient, other_gradient)
    assert spans[0].keys() == spans[1].keys()
    for window, out in spans[0].items():
        real = out["scores"] > -1e29
        for name, values in out.items():
            mask = real if values.shape else ...
            np.testing.assert_allclose(values[mask], spans[1][window][name][mask], rtol=1e-4, err_msg=name)


def test_the_loss_is_the_mean_of_two_softmaxes_over_the_segments_own_tokens():
    split, frame = random_split(4), Frame(0, 1, 2, (2,))
    graphdef, params, grads, _ = small()
    batch = batches_of(split, frame, 23, 5)[0]
    logits = np.asarray(jax.jit(lambda p, b: nnx.merge(graphdef, p)(b))(params, batch), np.float64)
    want, correct = 0.0, 0
    for row, slot in np.argwhere(batch["target_weights"] > 0):
        first = int(batch["target_positions"][row, slot])
        own = logits[row][batch["segment_ids"][row] == batch["segment_ids"][row, first]]
        target = batch["targets"][row, slot]
        want += np.mean([np.log(np.exp(own[:, i]).sum()) - own[target[i], i] for i in (0, 1)])
        correct += (own.argmax(0) == target).all()
    (_, total), _ = grads(params, batch)
    np.testing.assert_allclose(total.sum, want, rtol=1e-5)
    count = float(total.count)
    assert TASK.report(total) == {"loss": float(total.sum) / count, "accuracy": correct / count}


jit_best_spans = jax.jit(best_spans, static_argnums=2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 3, 40]))
def test_the_best_spans_are_those_of_all_pairs(seed, longest):
    rng = np.random.default_rng(seed)
    T = 23
    log_probabilities = np.log(rng.dirichlet(np.ones(T) * 0.3, (1, 2, 2))).transpose(0, 1, 3, 2).astype(np.float32)
    log_probabilities = np.maximum(log_probabilities, -80)
    inside = np.zeros((1, 2, T), bool)
    inside[0, 0, 4:19] = inside[0, 1, 20:22] = True
    found = jit_best_spans(jnp.asarray(log_probabilities), jnp.asarray(inside), longest)
    starts, ends, scores = map(np.asarray, found)
    for m in range(2):
        pairs = [
            (log_probabilities[0, m, s, 0] + log_probabilities[0, m, e, 1], s, e)
            for s in np.flatnonzero(inside[0, m]) for e in range(s, min(s + longest, T)) if inside[0, m, e]
        ]  # fmt: skip
        want = sorted((float(p[0]) for p in pairs), reverse=True)[:20]
        found = scores[0, m] > -1e29
        np.testing.assert_allclose(scores[0, m][found], want, rtol=1e-5)
        by_place = {(s, e): p for p, s, e in pairs}
        for s, e, p in zip(starts[0, m][found], ends[0, m][found], scores[0, m][found], strict=True):
            np.testing.assert_allclose(by_place[s, e], p, rtol=1e-5)


def window_out(spans, null):
    """A window's outputs from {(start, end): score}."""
    starts, ends = np.array([*spans]).reshape(-1, 2).T
    scores = np.array([*spans.values()], np.float32)
    return {"starts": starts[None], "ends": ends[None], "scores": scores[None], "null": np.array([null], np.float32)}


PASSAGE = "In Zürich  lives Ada Byron."
OFFSETS = np.array([[0, 3], [0, 2], [3, 9], [11, 16], [16, 20], [21, 26], [26, 27]])  # the first is the question's


def asked(*windows, starts=(0, 3), **settings):
    config = RunConfig(objective="question_answering", labels=LabelsConfig(**settings))
    return TASK.answer(Question(
        windows, None, config, Record(("who", PASSAGE)), starts[: len(windows)], OFFSETS, np.array([1, 6])
    ))  # fmt: skip


def test_an_answer_is_the_likeliest_span_of_all_windows_in_characters_of_the_passage():
    first = window_out({(1, 1): -2.0, (3, 4): -3.0, (0, 0): -1e30}, -0.1)
    second = window_out({(0, 1): -1.0, (0, 2): -4.0}, -0.2)
    answer = asked(first, second)
    assert answer == {"answer": "Ada Byron", "start": 17, "end": 26, "score": pytest.approx(np.exp(-1))}
    assert PASSAGE[answer["start"] : answer["end"]] == answer["answer"]
    # The same span of two windows is one candidate, with the better score.
    listed = asked(first, second, num_candidates=9)["candidates"]
    assert [c["answer"] for c in listed] == ["Ada Byron", "Zürich", "Ada Byron."]
    assert len(asked(first, second, num_candidates=2)["candidates"]) == 2


def test_no_answer_is_given_only_where_it_may_be_and_every_window_leaves_it_likelier():
    best = {(3, 4): -2.0}
    none = {"answer": "", "start": None, "end": None}
    assert asked(window_out(best, -1.0))["answer"] == "Ada Byron"  # data without such questions
    assert asked(window_out(best, -1.0), null_threshold=0.0) == none | {"score": pytest.approx(np.exp(-1))}
    assert asked(window_out(best, -1.0), null_threshold=1.5)["answer"] == "Ada Byron"
    assert asked(window_out(best, -3.0), null_threshold=0.0)["answer"] == "Ada Byron"
    assert asked(window_out(best, -3.0), null_threshold=-1.5) == none | {"score": pytest.approx(np.exp(-3))}
    two = (window_out(best, -5.0), window_out({(0, 0): -9.0}, 0.0))
    assert asked(*two, null_threshold=0.0)["answer"] == "Ada Byron"  # one window is sure of it
    listed = asked(window_out(best, -1.0), null_threshold=0.0, num_candidates=2)["candidates"]
    assert [c["answer"] for c in listed] == ["", "Ada Byron"]
    assert asked(window_out({(0, 0): -1e30}, 0.0))["answer"] == ""  # a passage without a token


def test_scores_are_squads():
    """Worked out by hand from the published rules."""
    golds = [[(0, "the Eiffel Tower"), (9, "Eiffel Tower in Paris")], [], [(3, "1,000")], [(0, "a red fox")]]
    answers = [{"answer": text} for text in ("Eiffel tower!", "", "1000", "the fox jumps")]
    found = score(answers, golds)
    # third: "1,000" is "1000"; fourth: {fox, jumps} against {red, fox}, one in common, 2 * 1 / 4
    assert found == pytest.approx({
        "exact_match": 3 / 4, "f1": 3.5 / 4, "has_answer_exact_match": 2 / 3, "has_answer_f1": 2.5 / 3,
        "no_answer_exact_match": 1.0, "no_answer_f1": 1.0,
    })  # fmt: skip
    # The nearest of several golds counts, for each measure by itself: {Eiffel, in, Paris} against 2 and 4 words.
    found = score([{"answer": "Eiffel in Paris"}], golds[:1])
    assert found == pytest.approx({"exact_match": 0.0, "f1": 2 * 3 / 7})
    # Words count as often as they occur in both.
    assert score([{"answer": "dog dog cat"}], [[(0, "dog bird")]])["f1"] == pytest.approx(2 * 1 / 5)
    assert score([{"answer": "fox"}, {"answer": ""}], [[], [(0, "fox")]])["f1"] == 0.0
    assert score([{"answer": "the"}], [[(0, "...")]])["exact_match"] == 1.0  # both are nothing


def test_a_text_is_cut_into_sentences_after_their_ends():
    assert sentences(" One. Two? 3.5 is three!  Four") == ["One.", "Two?", "3.5 is three!", "Four"]


@pytest.fixture(scope="module")
def store(tokenizer, tmp_path_factory):
    """Questions of which a fifth has no answer, prepared."""
    records = [ask(i, has_answer=i % 5 > 0) for i in range(400)]
    source = Source([Part("train", 340, functools.partial(iter, records[:340])),
                     Part("test", 60, functools.partial(iter, records[340:]))], "f")  # fmt: skip
    folder = tmp_path_factory.mktemp("qa") / "store"
    return prepare(source, tokenizer, folder, Columns("answers", 2, 2), held_out=HeldOut(0.0), workers=1)


def config_of(store, run_dir, **fields):
    return with_fields(
        TINY, objective="question_answering", run_dir=str(run_dir), data__source=str(store.folder),
        data__text_unit="paragraph", data__vocab_size=8192, **fields,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    """A run of a few steps on one device."""
    folder, devices = tmp_path_factory.mktemp("qa") / "run", jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args: devices[:1])
        jax.config.update("jax_disable_most_optimizations", True)  # as in the tests, whose losses are compared
        metrics = train(config_of(store, folder, steps=12, log_every=1, model__num_token_types=2,
                                  model__position="learned", model__norm_placement="post"))  # fmt: skip
    return folder, metrics


def test_a_run_learns_resumes_and_says_how_well_it_answers(store, run, tmp_path, one_device, monkeypatch):
    folder, metrics = run
    assert {"eval/exact_match", "eval/f1", "eval/has_answer_f1", "eval/no_answer_exact_match"} <= metrics.keys()
    config = config_of(store, tmp_path / "cut", steps=12, log_every=1, model__num_token_types=2,
                       model__position="learned", model__norm_placement="post")  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("flax_encoder.runs.train.StopSignals", lambda **options: Stops(5))
        assert train(config) is None
    assert train(config) == metrics  # though a setting that was left open has been settled since
    assert losses(tmp_path / "cut") == losses(folder)
    first, *_, last = (loss for loss, _ in losses(folder).values())
    assert last < first
    assert load(folder).config.labels.null_threshold == 0.0 and config.labels.null_threshold is None
    assert any("eval/f1" in line for line in read_metrics(folder))


def test_a_run_on_questions_that_all_have_an_answer_never_gives_none(store, tokenizer, tmp_path):
    config = RunConfig(objective="question_answering")
    assert TASK.settle(config, FakeData(store)).labels.null_threshold == 0.0
    answered = [ask(i) for i in range(20)]
    source = Source([Part("train", 20, functools.partial(iter, answered))], "g")
    other = prepare(source, tokenizer, tmp_path / "s", Columns("answers", 2, 2), held_out=HeldOut(0.1), workers=1)
    assert TASK.settle(config, FakeData(other)) == config
    asked_for = with_fields(config, labels__null_threshold=2.0)
    assert TASK.settle(asked_for, FakeData(store)) == asked_for


class FakeData:
    def __init__(self, *stores):
        self.stores = stores


def test_a_passage_longer_than_a_row_is_answered_in_characters_of_it(run):
    """And whatever a batch has besides changes nothing."""
    loaded = load(run[0])
    long = ask(7, length=8)
    assert len(loaded.tokenizer.encode_batch([long.texts[1]])[0]) > loaded.row_length
    answers = list(loaded.predict([ask(i).texts for i in range(5)] + [long.texts]))
    for record, answer in zip([*(ask(i) for i in range(5)), long], answers, strict=True):
        if answer["start"] is not None:
            assert record.texts[1][answer["start"] : answer["end"]] == answer["answer"] != ""
    alone = next(loaded.predict([long.texts]))
    assert alone | {"score": 0} == answers[-1] | {"score": 0}
    np.testing.assert_allclose(alone["score"], answers[-1]["score"], rtol=1e-4)
    with pytest.raises(DataError, match="question_answering reads 2 texts a record: one has 1"):
        next(loaded.predict(["what color is the river"]))


def test_a_run_is_exported_and_opened_again_with_the_same_answers(run, tmp_path):
    assert export_run(run[0], tmp_path / "out") == "BertForQuestionAnswering"
    loaded, again = load(run[0]), load(tmp_path / "out")
    assert again.config.objective == "question_answering" and not again.fresh
    assert "id2label" not in json.loads((tmp_path / "out" / "config.json").read_text())
    texts = [ask(i).texts for i in range(8)]
    for ours, theirs in zip(loaded.predict(texts), again.predict(texts), strict=True):
        if ours["answer"]:  # a published folder does not say whether there may be none
            assert ours["answer"] == theirs["answer"]
            np.testing.assert_allclose(ours["score"], theirs["score"], rtol=1e-4)


def test_sharded_equals_single_device():
    split, frame = random_split(5, 30), Frame(0, 1, 2, (2,))
    _, params, grads, _ = small()
    batch = batches_of(split, frame, 23, 5, batch_size=8)[0]
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(batch, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    copied = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    assert_trees_close(grads(copied, sharded)[1], grads(params, batch)[1])


@pytest.mark.parity
def test_transformers_opens_an_exported_run_and_answers_the_same(run, tmp_path):
    """Over the windows that its tokenizer makes of long passages, in characters; and its loss of a row is ours."""
    torch = pytest.importorskip("torch", reason="compares with torch: pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers", reason="compares with transformers: pip install -e '.[parity]'")
    export_run(run[0], tmp_path / "out")
    opened = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out", output_loading_info=True)
    model, info = opened[0].eval(), opened[1]
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours, records = load(run[0]), [ask(7, length=8), ask(8, length=3)]
    T, overlap = ours.row_length, TASK.reading.layout(ours.config).overlap
    for record, answer in zip(records, ours.predict(records), strict=True):
        rows = tokenizer(*record.texts, truncation="only_second", max_length=T, stride=overlap, return_tensors="np",
                         return_overflowing_tokens=True, return_offsets_mapping=True, padding=True)  # fmt: skip
        names = ("input_ids", "token_type_ids", "attention_mask")
        with torch.no_grad():
            out = model(**{name: torch.tensor(rows[name]) for name in names})
        best, nulls = (-np.inf, 0, 0), []
        for i in range(len(rows["input_ids"])):
            inside = np.array([s == 1 for s in rows.sequence_ids(i)])
            allowed = inside.copy()
            allowed[0] = True
            start, end = (
                np.where(allowed, torch.log_softmax(
                    logits[i].masked_fill(torch.tensor(~allowed), -torch.inf), -1).numpy(), -np.inf)
                for logits in (out.start_logits, out.end_logits)
            )  # fmt: skip
            nulls.append(start[0] + end[0])
            for s in np.flatnonzero(inside):
                for e in range(s, min(s + ours.config.labels.longest_answer, len(inside))):
                    if inside[e]:
                        offsets = rows["offset_mapping"][i]
                        best = max(best, (start[s] + end[e], offsets[s][0], offsets[e][1]))
        assert len(nulls) > 1 or record is records[1]
        if min(nulls) > best[0]:
            want = {"answer": "", "start": None, "end": None, "score": np.exp(min(nulls))}
        else:
            want = {"answer": record.texts[1][best[1] : best[2]], "start": best[1], "end": best[2],
                    "score": np.exp(best[0])}  # fmt: skip
        assert answer | {"score": 0} == want | {"score": 0}
        np.testing.assert_allclose(answer["score"], want["score"], rtol=1e-3)

    ids = tokenizer(*records[1].texts, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**ids, start_positions=torch.tensor([9]), end_positions=torch.tensor([11])).loss
    types, shape = ids["token_type_ids"].numpy().astype(np.int32), ids["input_ids"].shape
    total = ours.model.loss({
        "tokens": jnp.asarray(ids["input_ids"].numpy(), jnp.int32), "segment_ids": jnp.ones(shape, jnp.int32),
        "positions": jnp.arange(shape[1], dtype=jnp.int32)[None], "token_types": jnp.asarray(types),
        "target_positions": jnp.zeros((1, 1), jnp.int32), "target_weights": jnp.ones((1, 1)),
        "targets": jnp.array([[[9, 11]]], jnp.int32),
    })  # fmt: skip
    np.testing.assert_allclose(float(total.sum), float(theirs), rtol=1e-5)
