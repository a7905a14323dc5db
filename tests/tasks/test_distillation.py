"""Distillation: its loss by a slow reference, and a teacher that stands beside a run and is no part of it."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from flax_encoder.config import ConfigError, DataConfig, DistillationConfig, EncoderConfig, RunConfig
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from flax_encoder.nn.partition import flatten
from flax_encoder.published.load import load_pretrained
from flax_encoder.runs.exchange import export_run
from flax_encoder.runs.load import load
from flax_encoder.runs.loaded import model_factory
from flax_encoder.runs.teacher import open_teacher
from flax_encoder.tasks import TASKS, MaskedLM, check_task
from flax_encoder.tasks.distillation import relations_of, spread_layers
from flax_encoder.training.checkpoint import read_params
from flax_encoder.training.run_log import read_metrics
from flax_encoder.training.step import Teacher, init_train_state, make_train_step
from tests.runs import losses, tiny, with_fields
from tests.test_train import Stops
from tests.toy import save_run, split_model
from train import train

BIG = EncoderConfig(vocab_size=31, num_layers=3, embed_dim=12, num_heads=2, mlp_dim=14, max_length=19)
SMALL = dataclasses.replace(BIG, num_layers=2, mlp_dim=10)
B, T, M = 4, 13, 3


def draw_batch(seed=0):
    generator = np.random.default_rng(seed)
    segments = np.array([[1] * 6 + [2] * 5 + [0] * 2, [1] * 13, [1] * 4 + [2] * 9, [1] * 3 + [2] * 3 + [0] * 7])
    positions = np.concatenate([[np.arange(T) - np.searchsorted(row, row)] for row in np.where(segments, segments, 9)])
    at = np.stack([generator.choice(6, M, replace=False) for _ in range(B)])
    weights = np.ones((B, M), np.float32)
    weights[0, 0] = weights[3, 1:] = 0
    batch = {
        "tokens": generator.integers(0, 31, (B, T)), "segment_ids": segments,
        "positions": np.where(segments, positions, 0),
        "target_positions": at, "targets": generator.integers(0, 31, (B, M)),
    }  # fmt: skip
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()} | {"target_weights": jnp.asarray(weights)}


def make(config, distillation=None, seed=0):
    graphdef, params = split_model(lambda: MaskedLM(config, distillation=distillation, rngs=nnx.Rngs(0)), seed)
    return nnx.merge(graphdef, params)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def slow_terms(student, teacher, batch, settings):
    """The formulas of the papers, term by term and token by token."""
    numbers = {name: np.asarray(x) for name, x in batch.items()}
    rows = [batch[name] for name in ("tokens", "segment_ids", "positions")]
    states, logits = [], []
    for model in (student, teacher):
        hidden, found = jax.jit(lambda rows, model=model: model.encoder(*rows, every_layer=True))(rows)
        states.append(np.asarray(found, np.float64))
        logits.append(np.asarray(model.logits(hidden, batch), np.float64))
    sums = dict.fromkeys(("task", "soft", "hidden", "relation"), 0.0)
    segments, weights, heat = numbers["segment_ids"], numbers["target_weights"], settings.temperature
    pairs = [(-1, -1)] if not settings.layer_map else [(i + 1, k) for i, k in enumerate(settings.layer_map)]
    for b in range(B):
        for m in np.flatnonzero(weights[b]):
            sums["task"] -= np.log(softmax(logits[0][b, m])[numbers["targets"][b, m]])
            p, q = softmax(logits[1][b, m] / heat), softmax(logits[0][b, m] / heat)
            sums["soft"] += heat**2 * (p * np.log(p / q)).sum()
        real = np.flatnonzero(segments[b])
        hidden = relation = 0.0
        for t in real:
            for i, k in pairs:
                x, y = states[0][i, b, t], states[1][k, b, t]
                far = np.square(x - y).mean() if settings.hidden_loss == "mse" else (
                    1 - x @ y / np.sqrt((x @ x) * (y @ y)))  # fmt: skip
                hidden += far / len(real)
            mine = np.flatnonzero(segments[b] == segments[b, t])
            for name in settings.relations:
                p, q = (slow_relation(model, states[j], b, t, mine, name, settings)
                        for j, model in ((1, teacher), (0, student)))  # fmt: skip
                relation += (p * np.log(p / q)).sum(-1).mean() / len(real)
        sums["hidden"] += hidden * weights[b].sum()
        sums["relation"] += relation * weights[b].sum()
    return sums


def slow_relation(model, states, b, t, seen, name, settings):
    """[A, seen]: how token t weighs those that it sees, in the last layer of a post-norm stack."""
    layer = nnx.merge(*nnx.split(model.encoder.layers))
    x = states[model.encoder.config.num_layers - 1, b]
    made = {}
    for part in ("query", "key", "value"):
        linear = getattr(layer.attention, part)
        kernel, bias = (np.asarray(p[...], np.float64)[-1] for p in (linear.kernel, linear.bias))
        made[part] = np.einsum("TD,DNH->TNH", x, kernel) + bias
    first, second = ("query", "key") if name == "attention" else (name, name)
    heads = made[first].shape[1] if name == "attention" else settings.relation_heads or made[first].shape[1]
    first, second = (made[part].reshape(T, heads, -1) for part in (first, second))
    return softmax(np.einsum("AH,SAH->AS", first[t], second[seen]) / np.sqrt(first.shape[-1]))


@pytest.mark.parametrize(
    "settings",
    [
        DistillationConfig(teacher="x", task_weight=2.0, soft_weight=5.0, temperature=3.0, hidden_weight=1.5),
        DistillationConfig(teacher="x", soft_weight=0.0, hidden_weight=0.7, hidden_loss="mse", layer_map=(1, 3),
                           relation_weight=2.0, relation_heads=3),
        DistillationConfig(teacher="x", relation_weight=0.3, relations=("attention", "value")),
    ],
    ids=["distilbert", "tinybert-minilm2", "minilm1"],
)  # fmt: skip
def test_the_loss_is_the_formula_of_its_paper(settings):
    student, teacher, batch = make(SMALL, settings), make(BIG, seed=1), draw_batch()
    total = jax.jit(lambda batch: student.loss(batch, teacher=teacher))(batch)
    want = slow_terms(student, teacher, batch, settings)
    sums = {name: value for name, value in want.items() if getattr(settings, f"{name}_weight") or name == "task"}
    for name, value in sums.items():
        np.testing.assert_allclose(total.metrics[name], value, rtol=2e-5, err_msg=name)
    assert set(total.metrics) == {"correct", *sums}
    np.testing.assert_allclose(
        total.sum, sum(getattr(settings, f"{name}_weight") * value for name, value in sums.items()), rtol=2e-5
    )
    assert float(total.count) == float(batch["target_weights"].sum())
    # Any split of the rows has the same sums, and so makes the same update.
    loss = jax.jit(lambda batch: student.loss(batch, teacher=teacher))
    halves = [loss({name: x[rows] for name, x in batch.items()}) for rows in (slice(0, 2), slice(2, 4))]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), total, halves[0] + halves[1])


def test_a_teacher_that_is_the_student_leaves_the_data_alone_to_learn_from():
    settings = DistillationConfig(teacher="x", hidden_weight=1.0, relation_weight=1.0)
    student, batch = make(BIG, settings, seed=3), draw_batch()
    same = make(BIG, seed=3)
    total, plain = jax.jit(lambda batch: (student.loss(batch, teacher=same), student.loss(batch)))(batch)
    np.testing.assert_allclose(total.sum, plain.sum, rtol=1e-5)
    for name in ("soft", "hidden", "relation"):
        assert abs(float(total.metrics[name])) < 1e-4


def test_relations_of_a_packed_document_are_those_of_it_alone():
    settings = DistillationConfig(teacher="x", relation_weight=1.0, relations=("attention", "query", "key", "value"))
    encoder, batch = make(BIG).encoder, draw_batch()
    x = jax.random.normal(jax.random.key(0), (B, T, BIG.embed_dim))
    packed = relations_of(encoder, x, 2, batch, settings)
    alone = {"segment_ids": jnp.ones((1, 5), jnp.int32), "positions": jnp.arange(5, dtype=jnp.int32)[None]}
    for whole, one in zip(packed, relations_of(encoder, x[:1, 6:11], 2, alone, settings), strict=True):
        np.testing.assert_allclose(whole[:1, :, 6:11, 6:11], one, atol=2e-6)
        assert not np.asarray(whole)[0, :, 6:11, :6].any()


def test_only_the_student_is_updated():
    settings = DistillationConfig(teacher="x", hidden_weight=1.0, relation_weight=1.0)
    graphdef, params = nnx.split(make(BIG, seed=1))
    before = jax.tree.map(np.asarray, params)
    student, state, _ = init_train_state(lambda: MaskedLM(SMALL, distillation=settings, rngs=nnx.Rngs(0)),
                                         tx := optax.adam(0.1))  # fmt: skip
    began = jax.tree.map(np.asarray, state.params)
    step = make_train_step(student, tx, num_microbatches=2, teacher=Teacher(graphdef, params))
    state, _ = step(state, draw_batch())
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, params), before)
    size = sum(x.size for x in jax.tree.leaves(began))
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * size + 1  # the student's alone
    assert all(np.abs(a - b).max() > 0 for a, b in zip(*map(jax.tree.leaves, (state.params, began)), strict=True))


def test_layers_are_spread_as_distilberts_were():
    assert spread_layers(6, 12) == (0, 2, 4, 7, 9, 11)
    assert spread_layers(3, 3) == (0, 1, 2) and spread_layers(1, 12) == (0,) and spread_layers(2, 12) == (0, 11)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"soft_weight": 0.0}, "a teacher is there to be learned from"),
        ({"soft_weight": -1.0}, "at least 0"),
        ({"teacher": None, "hidden_weight": 1.0}, "give --distillation.teacher FOLDER"),
        ({"layer_map": (1, 2)}, "Give --distillation.hidden-weight too"),
        ({"relations": ()}, "at least one"),
        ({"relation_layer": -1}, "at least 0"),
        ({"initial_layers": (-1, 2)}, "at least 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        DistillationConfig(**({"teacher": "x"} | fields))


def test_settings_that_do_not_fit_the_run_are_refused():
    teacher = DistillationConfig(teacher="x", hidden_weight=1.0, layer_map=(1, 2, 3))
    with pytest.raises(ConfigError, match=r"for each of the student's: got .*1, 2, 3.* for model.num_layers 12"):
        check_task(RunConfig(distillation=teacher))
    with pytest.raises(ConfigError, match=r"one place"):
        RunConfig(init_from="y", distillation=DistillationConfig(teacher="x", initial_layers="spread"))
    with pytest.raises(ConfigError, match=r"distillation\.\w+ is not read by the objective regression"):
        check_task(RunConfig(objective="regression", distillation=DistillationConfig(teacher="x")))


@pytest.fixture(scope="module")
def home(corpus, tmp_path_factory):
    """A teacher of three layers and a classifier of three classes, which nobody trained."""
    home = tmp_path_factory.mktemp("distillation")
    tokenizer = train_wordpiece((corpus / "lines.txt").read_text().splitlines(), 256)
    model = EncoderConfig(num_layers=3, embed_dim=16, num_heads=2, mlp_dim=24, max_length=32)
    for name, objective, labels in (
        ("teacher", "masked_lm", None), ("classes", "classification", ["first", "second", "third"])
    ):  # fmt: skip
        save_run(RunConfig(str(home / name), objective=objective, model=model, data=DataConfig(row_length=32)),
                 tokenizer, labels)  # fmt: skip
    return home


def student(home, corpus, run_dir="run", teacher="teacher", **fields):
    settings = DistillationConfig(teacher=str(home / teacher))
    return with_fields(tiny(corpus, home / run_dir, steps=10, distillation=settings), **fields)


def settled(config, tokenizer=None, labels=None, before=None):
    return open_teacher(config).settle(config, tokenizer, labels, lambda message: None, before)


def test_a_student_resumes_to_the_bit_and_is_exported_as_any_masked_lm(home, corpus, one_device, monkeypatch, tmp_path):
    """Its teacher may have moved meanwhile; its checkpoint has the student's parameters alone."""
    whole = student(home, corpus, "whole", model__dropout_rate=0.1, distillation__hidden_weight=1.0,
                    distillation__relation_weight=1.0, distillation__initial_layers="spread")  # fmt: skip
    metrics = train(whole)
    cut = dataclasses.replace(whole, run_dir=str(home / "cut"))
    with monkeypatch.context() as stopping:
        stopping.setattr("flax_encoder.runs.train.StopSignals", lambda: Stops(4))
        assert train(cut) is None
    shutil.copytree(home / "teacher", home / "moved")
    assert train(with_fields(cut, distillation__teacher=str(home / "moved"))) == metrics
    assert losses(pathlib.Path(cut.run_dir)) == losses(pathlib.Path(whole.run_dir))
    assert set(metrics) == {"eval/loss", "eval/accuracy", "eval/perplexity"}
    lines = [line for line in read_metrics(pathlib.Path(whole.run_dir)) if "soft_loss" in line]
    assert lines and {"task_loss", "hidden_loss", "relation_loss"} <= set(lines[0])
    with pytest.raises(ConfigError, match=r"with the teacher that it began with: .*give another --run-dir"):
        train(with_fields(cut, distillation__teacher=whole.run_dir, steps=10))

    saved = flatten(read_params(pathlib.Path(whole.run_dir)))
    assert {name.partition(".")[0] for name in saved} == {"encoder", "head"}
    assert {value.shape[0] for name, value in saved.items() if ".layers." in name} == {2}
    run = load(whole.run_dir)
    assert run.config.model.num_layers == 2 and run.config.model.norm_placement == "post"
    assert export_run(whole.run_dir, tmp_path / "out") == "DistilBertForMaskedLM"
    row = run.row("the list returns a value")
    length = int((row["segment_ids"] > 0).sum())
    batch = {name: jnp.asarray(x[:, :length]) for name, x in row.items()}
    batch["target_positions"] = jnp.arange(length, dtype=jnp.int32)[None]
    published = load_pretrained(tmp_path / "out")
    np.testing.assert_allclose(published(np.asarray(batch["tokens"])).logits, run.model(batch), atol=1e-5)


def test_a_student_starts_from_its_teachers_layers(home, corpus):
    config, _, _ = settled(student(home, corpus, distillation__initial_layers="spread"))
    teacher = open_teacher(config)
    _, state, _ = init_train_state(model_factory(config, None), optax.sgd(0.1))
    theirs = flatten(teacher.run.params)
    for layers, want in (("spread", (0, 2)), ((1, 0), (1, 0))):
        own = with_fields(config, distillation__initial_layers=layers)
        for name, value in flatten(teacher.initial_params(own, state.params, lambda message: None)).items():
            expected = np.asarray(theirs[name])[list(want)] if ".layers." in name else theirs[name]
            np.testing.assert_array_equal(value, expected, err_msg=name)


def test_a_narrower_student_has_the_numbers_of_the_features_that_it_keeps(home, corpus):
    """All tokens, half of the features, heads and units; the same ones in every kernel."""
    asked = student(home, corpus, distillation__initial_layers="spread", distillation__initial_width=8)
    config, _, _ = settled(asked)
    teacher = open_teacher(config)
    big, small = teacher.run.config.model, config.model
    assert (big.embed_dim, small.embed_dim, small.head_dim) == (16, 8, big.head_dim)
    assert (small.num_heads * 2, small.mlp_dim * 2) == (big.num_heads, big.mlp_dim)
    _, state, _ = init_train_state(model_factory(config, None), optax.sgd(0.1))
    theirs, said = {name: np.asarray(x) for name, x in flatten(teacher.run.params).items()}, []
    got = flatten(teacher.initial_params(config, state.params, said.append))
    assert not any("new parameters" in line for line in said)
    table = np.asarray(theirs["encoder.embedding.token"])
    features = np.sort(np.argsort(-np.square(table).sum(0))[:8])
    np.testing.assert_array_equal(got["encoder.embedding.token"], table[:, features])
    np.testing.assert_array_equal(got["head.dense.kernel"], theirs["head.dense.kernel"][np.ix_(features, features)])
    up, query = "encoder.layers.feed_forward.up.kernel", "encoder.layers.attention.query.kernel"
    np.testing.assert_array_equal(got[up], theirs[up][[0, 2]][:, features, : small.mlp_dim])
    np.testing.assert_array_equal(got[query], theirs[query][[0, 2]][:, features, : small.num_heads])
    assert got["encoder.embedding.token"].shape[0] == table.shape[0]


def test_a_teacher_that_cannot_be_learned_from_is_refused_with_a_way_out(home, corpus):
    of_other = train_wordpiece(["une liste de valeurs"] * 9, 60)
    for fields, given, message in (
        ({}, (of_other,), r"one vocabulary: the run has \d+ tokens, .* has \d+, and token \d+ is .*--data.tokenizer"),
        ({"init_from": "runs/x"}, (of_other,), r"--init-from must be of the teacher's vocabulary too"),
        ({"model__vocab_size": 512}, (), r"as many rows as its teacher's: got model.vocab_size 512 for 256"),
        ({"distillation__hidden_weight": 1.0}, (), r"as wide as its teacher: got model.embed_dim 32 for 16"),
        ({"distillation__relation_weight": 1.0}, (), r"--distillation.relation-heads 2"),
        ({"distillation__relation_weight": 1.0, "distillation__relations": ("attention",)}, (),
         r"--distillation.relations query key value"),
        ({"data__row_length": 64}, (), r"reach 32 tokens.*Give --data.row-length 32"),
        ({"model__num_layers": 4, "distillation__initial_layers": "spread"}, (), r"at most as many: .* 4 for 3"),
        ({"distillation__initial_layers": "spread", "distillation__initial_width": 12}, (),
         r"whole heads .*: got 12 of a teacher .* 16 features and 2 heads .*Multiples of 8 below 16 do"),
        ({"distillation__hidden_weight": 1.0, "distillation__layer_map": (1, 4), "model__embed_dim": 16}, (),
         r"layer_map goes up to 3"),
        ({"objective": "classification"}, (), r"predicts what the run predicts, classification: .* head of masked_lm"),
        ({"objective": "classification", "distillation__teacher": str(home / "classes")}, (None, ["yes", "no"]),
         r"class by class: .* first, second, third, the run yes, no"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            settled(student(home, corpus, **fields), *given)
    assert settled(student(home, corpus, model__embed_dim=16, distillation__hidden_weight=1.0))[1] is not None


def test_a_classifier_learns_from_a_classifier(home, corpus):
    """Its labels and its tokenizer are the teacher's; of soft targets alone a perfect student has nothing to learn."""
    asked = student(home, corpus, teacher="classes", objective="classification")
    config, tokenizer, labels = settled(asked)
    teacher = open_teacher(asked).run
    assert labels == ["first", "second", "third"] and tokenizer.hash == teacher.tokenizer.hash
    batch = draw_batch() | {"target_positions": jnp.zeros((B, M), jnp.int32)}
    batch |= {"targets": batch["targets"] % 3}
    own = with_fields(teacher.config, distillation=dataclasses.replace(config.distillation, task_weight=0.0))
    graphdef, _ = nnx.split(model_factory(own, labels)())
    same = nnx.merge(graphdef, nnx.split(teacher.model)[1])
    loss = jax.jit(lambda student, batch: student.loss(batch, teacher=teacher.model))
    total = loss(same, batch)
    assert abs(float(total.sum)) < 1e-4 < float(total.metrics["task"]) and "confusion" in total.metrics
    fresh = loss(model_factory(own, labels)(), batch)
    assert float(fresh.sum) > 1e-3
    assert TASKS["classification"].report(fresh)["soft_loss"] > 0
