"""A tag a word: targets, entities, answers, scores, and runs from training to another library's folder."""

import dataclasses
import functools
import itertools
import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import sequence_labeling
from tokenizers import Tokenizer, normalizers
from toy import assert_trees_close, split_model

from flax_encoder.commands import main
from flax_encoder.config import ConfigError, EncoderConfig, HeadConfig, LabelsConfig, MeshConfig, RunConfig
from flax_encoder.data.pipeline import open_data
from flax_encoder.data.rows.batches import Batches, OneByOne
from flax_encoder.data.rows.documents import Documents, Frame, Layout
from flax_encoder.data.rows.targets import TargetInputs, word_targets
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.opening import Source
from flax_encoder.data.sources.records import DataError, Part, Record
from flax_encoder.data.store.encoding import encode_records, words_of_record
from flax_encoder.data.store.prepare import prepare
from flax_encoder.data.store.tokenizing import HeldOut
from flax_encoder.data.tokens.tokenizer import TextTokenizer, train_wordpiece
from flax_encoder.nn.partition import round_up_vocab
from flax_encoder.runs.load import load, load_run
from flax_encoder.runs.loaded import LoadedRun, memory_split
from flax_encoder.tasks import check_task, find_task
from flax_encoder.tasks.token_classification import TokenClassifier, entities_of_tags, marks_entities, score
from flax_encoder.training.sharding import make_mesh, put_batch
from flax_encoder.training.step import init_train_state, make_answer_step
from tests.runs import TINY, with_fields
from train import train

TASK = find_task("token_classification")
NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
PLAIN = ["the", "list", "of", "returns", "called", "an", "unremarkable", "item", ",", "went", "U.S."]
ENTITIES = ["anna", "bob", "anna lee", "bob van lee", "york", "new york", "oslo"]
CUES = {"PER": "saw", "LOC": "to"}  # by the word before it one knows what an entity is


def sentence(rng) -> Record:
    """Words with tags that the words themselves do not decide."""
    tokens, tags = [], []
    for _ in range(rng.randint(2, 5)):
        if rng.random() < 0.4:
            label = rng.choice(sorted(CUES))
            words = [CUES[label], *rng.choice(ENTITIES).split()]
            tags += ["O", *(f"{'I' if i else 'B'}-{label}" for i in range(len(words) - 1))]
        else:
            words = [rng.choice(PLAIN)]
            tags.append("O")
        tokens += words
    return record_of(tokens, tags)


def record_of(tokens, tags):
    ends = list(itertools.accumulate(len(token) + 1 for token in tokens))
    value = tuple((e - 1 - len(w), e - 1, tag) for w, e, tag in zip(tokens, ends, tags, strict=True))
    return Record((" ".join(tokens),), value)


def sentences(count, seed):
    rng = random.Random(seed)
    return list(dict.fromkeys(sentence(rng) for _ in range(count)))


def tags_of(record):
    return [tag for _, _, tag in record.value]


@pytest.fixture(scope="module")
def tokenizer():
    """One that has whole words, pieces of words, and no token at all for a lone accent."""
    text = " ".join([*PLAIN, *ENTITIES, *CUES.values()])
    made = train_wordpiece([text.replace("unremarkable", "un able mark")] * 3, 120)
    again = Tokenizer.from_str(made.json)
    again.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.NFD(), normalizers.StripAccents()])
    return TextTokenizer(again.to_str())


SMALL = EncoderConfig(num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48, max_length=48, num_token_types=2)


@pytest.fixture(scope="module")
def config(tokenizer):
    model = dataclasses.replace(SMALL, vocab_size=round_up_vocab(tokenizer.vocab_size))
    return with_fields(
        TINY, objective="token_classification", model=model, steps=150, checkpoint_every=75, data__row_length=24,
        optimizer__learning_rate=1e-2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def asked(config, tokenizer):
    """A model with random weights, to be asked."""
    graphdef, params = split_model(lambda: TASK.make_model(config, NAMES)(nnx.Rngs(0)))
    return LoadedRun(nnx.merge(graphdef, params), config, tokenizer, NAMES, 0)


# --- entities


MARKS = st.sampled_from(["O", "B", "I", *(f"{mark}-{label}" for mark in "BIES" for label in ("X", "Y", "X-Y"))])


@given(st.lists(MARKS, max_size=9))
def test_entities_are_those_that_seqeval_finds(tags):
    assert entities_of_tags(tags) == sequence_labeling.get_entities(tags)


@pytest.mark.parametrize(
    ("tags", "want"),
    [
        ("B-X I-X O B-X", [("X", 0, 1), ("X", 3, 3)]),  # BIO
        ("I-X I-X B-X O I-Y", [("X", 0, 1), ("X", 2, 2), ("Y", 4, 4)]),  # IOB1
        ("B-X I-X E-X S-Y S-Y", [("X", 0, 2), ("Y", 3, 3), ("Y", 4, 4)]),  # BIOES
        ("B-X I-X L-X U-Y U-Y", [("X", 0, 2), ("Y", 3, 3), ("Y", 4, 4)]),  # BILOU
        ("B-X M-X E-X S-X O", [("X", 0, 2), ("X", 3, 3)]),  # BMES
        ("B I O B", [("_", 0, 1), ("_", 3, 3)]),
        ("O I-X I-Y O", [("X", 1, 1), ("Y", 2, 2)]),
        ("", []),
    ],
)
def test_every_scheme_gives_its_entities(tags, want):
    tags = tags.split()
    assert entities_of_tags(tags) == want
    if any(tag != "O" for tag in tags):
        assert marks_entities(sorted({*tags})) and score([{"tags": tags}], [tags], sorted({*tags}))["f1"] == 1.0


@pytest.mark.parametrize("labels", [["nn", "vb", "in"], ["O", "PER", "LOC"], ["O"], [], None, ["NOUN", "O", "I-X"]])
def test_tags_of_no_scheme_mark_no_entities(labels):
    assert not marks_entities(labels)


def test_scores_are_of_entities_or_where_there_are_none_of_tags():
    golds = [["B-X", "I-X", "O"], ["O", "B-Y"]]
    answers = [{"tags": ["B-X", "I-X", "O"]}, {"tags": ["B-X", "B-Y"]}]
    labels = ["O", "B-X", "I-X", "B-Y"]
    want = {"accuracy": 4 / 5, "precision": 2 / 3, "recall": 1.0, "f1": 0.8}
    assert score(answers, golds, labels) == pytest.approx(want)
    spoken = score([{"tags": ["nn", "vb", "nn"]}], [["nn", "vb", "in"]], ["nn", "vb", "in"])
    assert spoken == pytest.approx({"accuracy": 2 / 3, "precision": 0.5, "recall": 2 / 3, "f1": (2 / 3 + 1) / 3})
    nothing = score([{"tags": ["O", "O"]}], [["O", "B-X"]], labels)
    assert nothing == {"accuracy": 0.5, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert score([], [], labels) == {"accuracy": 0.0}


# --- targets


def rows_of(records, tokenizer, config, tag_ids, *, packing="best-fit", row_length=24, batch_size=4, **options):
    encoded = encode_records(records, tokenizer, Columns("tags"), tag_ids, np.dtype(np.uint16))
    split, frame = memory_split(encoded), Frame.of(tokenizer)
    documents = Documents(split, Layout(long="split"), frame, row_length)
    order = OneByOne([documents.plan(row_length, packing)])
    inputs = TargetInputs(config, tokenizer, documents, row_length, order.plans[0].max_pieces_per_row, False, True)
    batches = Batches(
        [documents], order, word_targets(inputs, **options), row_length=row_length, batch_size=batch_size, seed=0,
        num_batches=-(-len(order) // batch_size), stop_row=len(order), streams=("tags",), with_types=True,
    )  # fmt: skip
    return split, [batches[i] for i in range(len(batches))]


@pytest.mark.parametrize("row_length", [5, 8, 24])
@pytest.mark.parametrize("all_pieces", [False, True])
def test_every_word_of_every_text_is_a_target_once(tokenizer, config, row_length, all_pieces):
    """However long the text and short the row; in rows, its tag stands at its first token, or at each of them."""
    records = [*sentences(40, 1), record_of(PLAIN * 5 + ["anna"], ["O"] * (5 * len(PLAIN)) + ["B-PER"])]
    ids: dict[str, int] = {}
    split, batches = rows_of(records, tokenizer, config, ids, row_length=row_length, all_pieces=all_pieces)
    found: dict[int, list[tuple[int, int]]] = {}
    for batch in batches:
        assert all(batch[name].shape == batch["tokens"].shape for name in ("targets", "target_weights", "owners"))
        for row, slot in zip(*np.nonzero(batch["target_weights"]), strict=True):
            column = batch["target_positions"][row, slot]
            document, start = int(batch["owners"][row, slot]), batch["starts"][row, slot]
            place = start + batch["positions"][row, column] - 1
            assert batch["tokens"][row, column] == split.document(document)[place]
            found.setdefault(document, []).append((int(place), int(batch["targets"][row, slot])))
        assert (batch["owners"][batch["target_weights"] == 0] == -1).all()
    for document, record in enumerate(records):
        tags = split.document_tags(document)
        want = [(i, abs(int(t)) - 1) for i, t in enumerate(tags) if (t != 0 if all_pieces else t > 0)]
        assert sorted(found[document]) == want
        if not all_pieces:
            assert [t for _, t in want] == [ids[tag] for tag in tags_of(record)]


def test_packed_rows_equal_one_text_a_row_forward_and_gradient(tokenizer, config):
    graphdef, params = split_model(lambda: TASK.make_model(config, NAMES)(nnx.Rngs(0)))

    @jax.jit
    def of_batch(params, batch):
        def total(params):
            found = nnx.merge(graphdef, params).loss(batch)
            return found.sum, found

        return jax.grad(total, has_aux=True)(params)

    ids = {name: i for i, name in enumerate(NAMES)}
    records, sums = sentences(11, 2), {}
    for packing in ("best-fit", "one-per-row"):
        _, batches = rows_of(records, tokenizer, config, ids, packing=packing)
        parts = [of_batch(params, {k: v for k, v in b.items() if k not in ("owners", "starts")}) for b in batches]
        sums[packing] = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts)
    assert float(sums["best-fit"][1].count) == sum(len(r.value) for r in records)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), sums["best-fit"][1], sums["one-per-row"][1])
    assert_trees_close(sums["best-fit"][0], sums["one-per-row"][0])


def test_a_mesh_of_devices_equals_one(tokenizer, config):
    ids = {name: i for i, name in enumerate(NAMES)}
    _, [batch, *_] = rows_of(sentences(60, 3), tokenizer, config, ids, batch_size=8)
    make_model, mesh = lambda: TASK.make_model(config, NAMES)(nnx.Rngs(0)), make_mesh(MeshConfig(2, 2, 2))
    import optax

    with jax.set_mesh(mesh):
        graphdef, state, shardings = init_train_state(make_model, optax.sgd(0.1), mesh)
        got = make_answer_step(graphdef, shardings)(state.params, put_batch(batch, mesh))
    params = jax.tree.map(lambda x: jnp.asarray(np.array(x)), state.params)
    plain = {k: jnp.asarray(v) for k, v in batch.items() if k not in ("owners", "starts")}
    want = make_answer_step(graphdef)(params, plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


# --- answers


def test_an_answer_has_a_tag_a_word_and_entities_at_their_characters(asked):
    """Words are those that the record names, or those of the text; each is answered, with tokens or without."""
    records = [r._replace(value=tuple((s, e, None) for s, e, _ in r.value)) for r in sentences(30, 4)]
    records.append(Record(("  anna van lee, saw\tNEW york",)))
    records.append(Record(("bob \u0301 an",), ((0, 3, None), (4, 5, None), (6, 8, None))))
    answers = list(asked.predict(records))
    for record, answer in zip(records, answers, strict=True):
        words = words_of_record(record)
        assert len(answer["tags"]) == len(words) and {*answer["tags"]} <= {*NAMES}
        assert answer["words"] == [record.texts[0][s:e] for s, e in words]
        marked = [(e["label"], e["start"], e["end"]) for e in answer["entities"]]
        assert marked == [(n, words[i][0], words[j][1]) for n, i, j in entities_of_tags(answer["tags"])]
        assert all(record.texts[0][e["start"] : e["end"]] == e["text"] for e in answer["entities"])
        assert all(1 / len(NAMES) <= e["score"] <= 1 for e in answer["entities"])
        json.dumps(answer)
    assert sum(len(a["entities"]) for a in answers) > 9
    assert answers[-2]["words"] == ["anna", "van", "lee", ",", "saw", "NEW", "york"]
    assert answers[-1]["tags"][1] == "O", "an accent alone has no token"


def test_answers_do_not_depend_on_what_is_asked_beside_them(asked):
    records = sentences(25, 5)
    together = list(asked.predict(records))
    for record, answer in zip(records, together, strict=True):
        [alone] = asked.predict([record])
        assert alone["tags"] == answer["tags"]
        scores = [[e["score"] for e in a["entities"]] for a in (alone, answer)]
        np.testing.assert_allclose(*scores, rtol=1e-5)


def test_a_text_longer_than_a_row_is_tagged_piece_by_piece_to_its_end(asked):
    long = record_of([f"{word}" for word in PLAIN * 9], [None] * (9 * len(PLAIN)))
    [answer] = asked.predict([long])
    room = asked.row_length - 2
    tokens, _, _, offsets = asked.tokenizer.encode_flat_with_offsets([*long.texts], np.dtype(np.uint16))
    want = []
    for start in range(0, len(tokens), room):
        piece = offsets[start : start + room]
        # The words that begin in it. A piece that begins within a word is no text of its own.
        inside = [(s, e) for s, e, _ in long.value if piece[0][0] <= s < piece[-1][1]]
        want.append(len(inside))
    assert sum(want) == len(answer["tags"]) == len(long.value)
    first = record_of(answer["words"][: want[0]], [None] * want[0])
    [alone] = asked.predict([first])
    assert alone["tags"][:-1] == answer["tags"][: want[0] - 1]  # the last word may be cut within
    others = list(asked.predict([long, *sentences(9, 6), long]))
    assert others[0]["tags"] == others[-1]["tags"] == answer["tags"]


def test_a_text_of_no_words_has_no_tags(asked):
    assert list(asked.predict([Record(("anna",), ())])) == [{"words": [], "tags": [], "entities": []}]


# --- runs


@pytest.fixture(scope="module")
def store(tokenizer, tmp_path_factory):
    train_set = sentences(300, 7)
    held_out = [record for record in sentences(60, 8) if record not in train_set]
    held_out += [record_of(r.texts[0].split() * 9, tags_of(r) * 9) for r in held_out[:2]]  # longer than rows
    parts = [Part(split, 1, functools.partial(iter, some))
             for split, some in (("train", train_set), ("validation", held_out))]  # fmt: skip
    folder = tmp_path_factory.mktemp("tags") / "store"
    prepare(Source(parts, "f", None), tokenizer, folder, Columns("tags"), held_out=HeldOut(0.0), workers=1)
    return folder, held_out


@pytest.fixture(scope="module")
def trained(store, config, tmp_path_factory):
    """(the run's config, its final metrics)."""
    devices = jax.devices()
    jax.config.update("jax_disable_most_optimizations", True)  # as the tests that run it again do
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args: devices[:1])
        run_dir = tmp_path_factory.mktemp("tagger") / "run"
        config = with_fields(config, run_dir=str(run_dir), data__source=str(store[0]))
        return config, train(config)


def test_a_run_learns_tags_and_is_scored_on_every_held_out_word(trained, store):
    config, metrics = trained
    held_out = store[1]
    run = load_run(config.run_dir)
    data = open_data(run.config, TASK.reading, tokenizer=run.tokenizer, label_names=run.label_names)
    assert run.label_names[0] == "O" and {*run.label_names} == {*NAMES}
    baselines = TASK.baselines(run, data)
    assert baselines["all O"]["f1"] == 0.0 and 0 < baselines["most frequent tag of each word"]["f1"] < 1
    assert baselines["most frequent tag of each word"]["f1"] < metrics["eval/f1"] - 0.1
    # The same scores from the texts as from the store, whose long ones stand in pieces.
    answers = list(run.predict(r._replace(value=tuple((s, e, None) for s, e, _ in r.value)) for r in held_out))
    again = score(answers, [tags_of(r) for r in held_out], run.label_names)
    assert {f"eval/{name}": value for name, value in again.items()} == pytest.approx(
        {k: v for k, v in metrics.items() if k != "eval/loss"}, abs=1e-9
    )
    assert any("which is right" in line for line in TASK.examples(run, data))


def test_an_evaluation_of_some_rows_scores_whole_texts_alone(trained, tmp_path, one_device):
    config, _ = trained
    for batches in (1, 2):
        run_dir = shutil.copytree(config.run_dir, tmp_path / str(batches))
        some = dataclasses.replace(config, run_dir=str(run_dir), eval_batches=batches)
        assert 0 < train(some)["eval/f1"] <= 1


def test_a_run_resumes_bitwise(trained, tmp_path, one_device):
    config, metrics = trained
    run_dir = tmp_path / "run"
    shutil.copytree(config.run_dir, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "150")
    assert train(dataclasses.replace(config, run_dir=str(run_dir))) == metrics
    params = [nnx.to_pure_dict(nnx.split(load_run(path).model)[1]) for path in (config.run_dir, run_dir)]
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_a_run_exported_and_loaded_gives_the_same_answers(trained, tmp_path):
    config, _ = trained
    main(["export", config.run_dir, str(tmp_path / "out")])
    published = json.loads((tmp_path / "out/config.json").read_text())
    assert published["architectures"] == ["BertForTokenClassification"] and "problem_type" not in published
    ours, theirs = load_run(config.run_dir), load(tmp_path / "out")
    assert theirs.config.objective == "token_classification" and theirs.label_names == ours.label_names
    records = sentences(20, 9)
    for mine, other in zip(ours.predict(records), theirs.predict(records), strict=True):
        assert mine["tags"] == other["tags"] and len(mine["entities"]) == len(other["entities"])
        for a, b in zip(mine["entities"], other["entities"], strict=True):
            assert {**a, "score": 0} == {**b, "score": 0} and a["score"] == pytest.approx(b["score"], rel=1e-5)


def test_files_are_tagged_and_scored_by_the_words_that_they_name(trained, store, tmp_path, capsys):
    """Tokens of .jsonl and .conll are the words, one that no token begins too; a text's own words are found."""
    config, held_out = trained[0], store[1][:20]
    rows = [{"tokens": [r.texts[0][s:e] for s, e, _ in r.value], "tags": tags_of(r)} for r in held_out]
    rows.append({"tokens": ["bob", "\u0301", "U.S."], "tags": ["B-PER", "O", "O"]})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ("".join(f"{w} {t}\n" for w, t in zip(row["tokens"], row["tags"], strict=True)) for row in rows)
    (tmp_path / "a.conll").write_text("\n".join(lines))
    (tmp_path / "a.txt").write_text("".join(r.texts[0] + "\n" for r in held_out))
    answers = {}
    for name in ("a.jsonl", "a.conll", "a.txt"):
        main(["predict", config.run_dir, "--input", str(tmp_path / name), "--output", str(tmp_path / f"{name}.jsonl")])
        answers[name] = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert [a["words"] for a in answers["a.jsonl"]] == [row["tokens"] for row in rows]
    assert answers["a.jsonl"] == answers["a.conll"]
    for with_words, without in zip(answers["a.jsonl"], answers["a.txt"], strict=False):
        assert "".join(with_words["words"]) == "".join(without["words"]) and "U.S." not in without["words"]
    want = score(answers["a.jsonl"], [row["tags"] for row in rows], NAMES)
    capsys.readouterr()
    main(["evaluate", config.run_dir, "--data.source", str(tmp_path / "a.jsonl"), "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == pytest.approx(want)
    (tmp_path / "b.jsonl").write_text('{"tokens": ["bob"], "tags": ["PERSON"]}\n')
    with pytest.raises(SystemExit):
        main(["evaluate", config.run_dir, "--data.source", str(tmp_path / "b.jsonl")])
    assert "b.jsonl, row 1 has 'PERSON', the model 'O', 'B-LOC'" in capsys.readouterr().err.replace("line", "row")


def test_words_that_no_token_begins_are_counted(tokenizer):
    records = [record_of(["bob", "\u0301", "U.S."], ["B-PER", "O", "O"]), record_of(["\u0301"], ["O"])]
    records.append(Record(("bob",), ()))
    encoded = encode_records(records, tokenizer, Columns("tags"), {}, np.dtype(np.uint16))
    assert encoded.unread_words == 2 and (encoded.tags > 0).sum() == 2


@pytest.mark.parity
def test_the_pipeline_of_transformers_finds_the_same_entities_in_an_export(trained, tmp_path):
    pytest.importorskip("torch", reason="compares with torch: pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[parity]'")
    config, _ = trained
    main(["export", config.run_dir, str(tmp_path / "out")])
    run = load_run(config.run_dir)
    texts = [r.texts[0] for r in sentences(60, 10)] + ["Anna van Lee, saw unremarkable NEW york", "bob unremarkably"]
    answers = [answer["entities"] for answer in run.predict(texts)]
    assert sum(map(len, answers)) > 30
    counts = [len(run.tokenizer.encode_batch([text])[0]) for text in texts]
    whole = [i for i, text in enumerate(texts) if counts[i] == len(words_of_record(Record((text,))))]  # a token a word
    assert len(whole) > 20
    for strategy, some in (("first", range(len(texts))), ("simple", whole)):
        ask = transformers.pipeline("token-classification", str(tmp_path / "out"), aggregation_strategy=strategy)
        for i in some:
            theirs = [(e["entity_group"], e["start"], e["end"]) for e in ask(texts[i])]
            assert theirs == [(e["label"], e["start"], e["end"]) for e in answers[i]], texts[i]
            np.testing.assert_allclose([e["score"] for e in ask(texts[i])], [e["score"] for e in answers[i]], rtol=1e-4)


# --- settings


def test_a_head_is_plain_unless_a_transform_is_asked_for():
    assert TokenClassifier(SMALL_WITH_VOCABULARY, 5, rngs=nnx.Rngs(0)).head.dense is None
    asked = TokenClassifier(SMALL_WITH_VOCABULARY, 5, HeadConfig(transform=True, norm=True), rngs=nnx.Rngs(0)).head
    assert asked.dense is not None and asked.norm is not None


SMALL_WITH_VOCABULARY = dataclasses.replace(SMALL, vocab_size=64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": HeadConfig(norm=True)}, "with head.transform alone: got None, True and None"),
        ({"data": dataclasses.replace(TINY.data, packing="concatenate")}, "got concatenate"),
        ({"pooling": "mean"}, "pooling is not read by the objective token_classification"),
        ({"objective": "classification", "labels": LabelsConfig(all_pieces=True)}, "labels.all_pieces is not read"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        check_task(dataclasses.replace(RunConfig(objective="token_classification"), **fields))


@pytest.mark.parametrize("labels", [None, ["O"]])
def test_one_tag_is_nothing_to_learn(labels):
    with pytest.raises(DataError, match=f"at least two tags: the data has {len(labels or [])}"):
        TASK.check_labels(labels)
