"""A run that learns to compare texts: the columns that it reads, its rows, and what can be done with it."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from toy import SMALL

from flax_encoder.commands import main
from flax_encoder.config import ConfigError, ContrastiveConfig, DataConfig
from flax_encoder.data.pipeline import open_data
from flax_encoder.data.rows.documents import Documents, Frame, Layout, assemble, longest_first
from flax_encoder.data.rows.targets import Rows, TargetInputs, group_targets
from flax_encoder.data.sources.choosing import choose_columns
from flax_encoder.data.sources.columns import Table
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.store.store import Split
from flax_encoder.runs.before import scores_before_training
from flax_encoder.runs.embed import load_embedder
from flax_encoder.runs.load import load, with_vectors_of
from flax_encoder.runs.score_file import score_source
from flax_encoder.runs.summary import held_out_answers
from flax_encoder.tasks import TASKS
from flax_encoder.tasks.contrastive import Contrastive
from flax_encoder.tasks.contrastive_loss import cosent, margin_mse
from tests.peer_sentences import TEXTS
from tests.published.test_sentence_parity import PYTHON, peer
from tests.runs import TINY, losses, with_fields
from tests.test_train import Stops
from train import train

TASK = TASKS["contrastive"]
COLUMNS = TASK.reading.columns
WORDS = ["apple", "river", "stone", "cloud", "candle", "window", "garden", "letter", "seven", "green"]

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


@pytest.mark.parametrize(("texts", "loss"), [(2, cosent), (3, margin_mse)])
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
    made = Contrastive(SMALL, ContrastiveConfig(temperature=1 / 7), rngs=nnx.Rngs(0))
    real = batch["target_weights"] > 0
    want = jax.jit(loss)(vectors[real], numbers, np.ones(len(numbers), "f4"), 7.0)
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
