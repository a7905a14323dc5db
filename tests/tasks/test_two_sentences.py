"""Sentence order and next sentence: pairs are what they say, the loss is the papers', both heads go out and in."""

import collections
import dataclasses
import json
import os
import random
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_encoder.config import ConfigError, EncoderConfig, MaskingConfig, RunConfig
from flax_encoder.data.pipeline import open_data
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from flax_encoder.published.load import load_pretrained
from flax_encoder.runs.as_published import published_config
from flax_encoder.runs.exchange import export_run
from flax_encoder.runs.load import load, read_origin
from flax_encoder.tasks import check_task, find_task
from flax_encoder.tasks.two_sentences import SentencePairLM
from tests.runs import WORDS, losses, tiny, with_fields
from tests.test_train import Stops
from tests.toy import SMALL, save_run, split_model
from train import train

OBJECTIVES = {"sentence_order": "order", "next_sentence": "next"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Texts of one to five sentences."""
    draw, path = random.Random(3), tmp_path_factory.mktemp("texts")
    lines = []
    for i in range(300):
        sentences = [" ".join(draw.choices(WORDS, k=draw.randint(2, 7))) for _ in range(draw.randint(1, 5))]
        lines.append(". ".join(sentences) + f" {i}.\n")
    (path / "lines.txt").write_text("".join(lines))
    return path


def batches(texts, objective, tmp_path, **fields):
    config = tiny(texts, tmp_path, objective=objective, steps=4, **{"data__row_length": 96} | fields)
    return open_data(config, find_task(objective).reading), config


def restored(batch):
    """The rows before tokens were masked."""
    tokens = batch["tokens"].copy()
    for b, m in np.argwhere(batch["target_weights"] > 0):
        tokens[b, batch["target_positions"][b, m]] = batch["targets"][b, m]
    return tokens


def pairs(batch, tokenizer):
    """Of each pair (first segment, second segment, its target), and of each text that is no pair its tokens."""
    first, last = tokenizer.frame
    found, single = [], []
    tokens = restored(batch)
    for b, p in np.argwhere(batch["segment_ids"].max(1)[:, None] > np.arange(batch["pair_weights"].shape[1])):
        (at,) = np.nonzero(batch["segment_ids"][b] == p + 1)
        ids = tokens[b, at].tolist()
        assert batch["pair_positions"][b, p] == at[0] and ids[0] == first and ids[-1] == last
        inner = ids[1:-1]
        if not batch["pair_weights"][b, p]:
            assert last not in inner
            single.append(inner)
            continue
        middle = inner.index(last)
        found.append((inner[:middle], inner[middle + 1 :], int(batch["pair_targets"][b, p])))
        types = batch.get("token_types")
        if types is not None:
            assert types[b, at].tolist() == [0] * (middle + 2) + [1] * (len(inner) - middle)
    return found, single


def is_made_of(segment, documents):
    """Whether a segment is a stretch of a document, or the end of one and then the beginnings of others."""

    def begins(rest):
        return any(d[: len(rest)] == rest or (rest[: len(d)] == d and begins(rest[len(d) :])) for d in documents)

    return any(d[i : i + len(segment)] == segment or (segment[: len(d) - i] == d[i:] and begins(segment[len(d) - i :]))
               for d in documents for i in range(len(d)))  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("unit", ["sentence", "word"])
def test_pairs_are_segments_of_the_texts_in_the_order_that_they_say(texts, tmp_path, objective, unit):
    data, _ = batches(texts, objective, tmp_path, model__num_token_types=2, sentences__unit=unit)
    split, tokenizer = data.stores[0].train, data.tokenizer
    documents = {tuple(split.document(i)[:-1].tolist()) for i in range(len(split))}
    whole = {tuple(split.document(i).tolist()) for i in range(len(split))}
    starts = {document[:n] for document in documents for n in range(len(document))}
    stop, counts = tokenizer.id_of("."), collections.Counter()
    for number in range(4):
        found, single = pairs(data.train[number], tokenizer)
        for text in single:
            assert tuple(text) in whole and (unit == "word" or stop not in text[:-2])
        for first, second, target in found:
            counts[target] += 1
            together = tuple(first + second)
            if target == 0:
                assert together in documents
            elif objective == "sentence_order":
                assert tuple(second + first) in documents
            else:
                assert tuple(first) in starts and together not in documents
                assert is_made_of(tuple(second), whole)
            earlier = second if target and objective == "sentence_order" else first
            assert unit == "word" or earlier[-1] == stop
    assert sum(counts.values()) > 40 and 0.3 < counts[1] / sum(counts.values()) < 0.7


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_is_a_function_of_its_number_and_every_process_makes_its_own_rows(texts, tmp_path, objective):
    fields = {"masking__kind": "whole_word"}
    data, config = batches(texts, objective, tmp_path, **fields)
    half = open_data(config, find_task(objective).reading, process=(1, 2))
    for number in (2, 0):
        one, again, mine = data.train[number], data.train[number], half.train[number]
        for name, rows in one.items():
            np.testing.assert_array_equal(rows, again[name])
            np.testing.assert_array_equal(rows[4:], mine[name])


def test_texts_that_cannot_be_cut_are_refused_with_a_way_out(tmp_path, texts):
    (tmp_path / "lines.txt").write_text("".join(f"the list returns item {i}\n" for i in range(60)))
    with pytest.raises(DataError, match=r"of the \d+ texts .* none has two, .*--sentences\.unit word"):
        batches(tmp_path, "sentence_order", tmp_path / "run")
    batches(tmp_path, "sentence_order", tmp_path / "run", sentences__unit="word")
    (tmp_path / "lines.txt").write_text("".join(f"{i}\n" for i in range(60)))
    with pytest.raises(DataError, match="between two of its words"):
        batches(tmp_path, "next_sentence", tmp_path / "run", sentences__unit="word", data__vocab_size=60)
    for fields, message in (
        ({"data__packing": "concatenate"}, "stays whole"), ({"model": EncoderConfig(layer="gru")}, "first token"),
        ({"data__source": ("a", "b")}, "takes one source"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            check_task(with_fields(RunConfig(objective="next_sentence"), **fields))


def draw_batch(rows=4):
    generator = np.random.default_rng(1)
    segments = np.array([[1] * 6 + [2] * 9 + [0] * 2, [1] * 17, [1] * 8 + [2] * 4 + [0] * 5, [1] * 5 + [0] * 12])
    positions = np.where(segments, np.arange(17) - np.where(segments == 2, (segments == 1).sum(1, keepdims=True), 0), 0)
    batch = {
        "tokens": generator.integers(0, 37, (rows, 17)), "segment_ids": segments, "positions": positions,
        "target_positions": generator.integers(0, 5, (rows, 3)), "targets": generator.integers(0, 37, (rows, 3)),
        "pair_positions": np.array([[0, 6], [0, 0], [0, 8], [0, 0]]),
        "pair_targets": generator.integers(0, 2, (rows, 2)),
    }  # fmt: skip
    batch = {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}
    weights = jnp.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]], jnp.float32)
    return batch | {
        "target_weights": weights,
        "pair_weights": jnp.array([[1, 1], [1, 0], [0, 1], [0, 0]], jnp.float32),
    }


def make():
    return SentencePairLM(SMALL, weight=0.7, rngs=nnx.Rngs(0))


def test_the_loss_is_that_of_masked_words_plus_that_of_the_pairs():
    graphdef, params = split_model(make)
    model, batch = nnx.merge(graphdef, params), draw_batch()
    total = jax.jit(model.loss)(batch)
    hidden = model.encoder(batch["tokens"], batch["segment_ids"], batch["positions"])
    logits = np.asarray(model.pair_logits(hidden, batch), np.float64)
    masked, pair = np.asarray(model(batch), np.float64), 0.0
    nats = lambda row, target: np.log(np.exp(row).sum()) - row[target]  # noqa: E731
    first = sum(nats(masked[b, m], batch["targets"][b, m]) for b, m in np.argwhere(batch["target_weights"]))
    for b in range(4):
        own = [nats(logits[b, p], batch["pair_targets"][b, p]) for p in np.flatnonzero(batch["pair_weights"][b])]
        pair += float(batch["target_weights"][b].sum()) * np.mean(own) if own else 0.0
    np.testing.assert_allclose(total.sum, first + 0.7 * pair, rtol=1e-5)
    # Any split of the rows has the same sums, and so makes the same update.
    halves = jax.jit(model.loss)({name: x[:2] for name, x in batch.items()}), jax.jit(model.loss)(
        {name: x[2:] for name, x in batch.items()})  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), total, halves[0] + halves[1])
    np.testing.assert_allclose(total.metrics["masked"], first, rtol=1e-5)
    assert float(total.count) == 8 and float(total.metrics["pairs"]) == 4


BERT = EncoderConfig(num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, num_token_types=2, max_length=32)
MODELS = {
    "next_sentence": (BERT, "BertForPreTraining"),
    "sentence_order": (dataclasses.replace(BERT, num_layer_groups=1, embedding_dim=16), "AlbertForPreTraining"),
}


@pytest.fixture(scope="module", params=MODELS)
def run(request, texts, tmp_path_factory):
    """A run of each, the one stopped half-way and gone on with, the other of no step; and folders for transformers."""
    folder, (model, architecture) = tmp_path_factory.mktemp(request.param), MODELS[request.param]
    whole = tiny(texts, folder / "whole", objective=request.param, model=model, steps=8, model__dropout_rate=0.1,
                 masking=MaskingConfig(rate=0.2))  # fmt: skip
    if request.param == "sentence_order":
        save_run(whole, train_wordpiece((texts / "lines.txt").read_text().splitlines(), 256))
    else:
        cut, devices = dataclasses.replace(whole, run_dir=str(folder / "cut")), jax.devices()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "devices", lambda *args: devices[:1])
            metrics = train(whole)
            with pytest.MonkeyPatch.context() as stopping:
                stopping.setattr("flax_encoder.runs.train.StopSignals", lambda: Stops(3))
                assert train(cut) is None
            assert train(cut) == metrics
        assert losses(folder / "cut") == losses(folder / "whole")
        assert {"eval/accuracy", "eval/pair_accuracy", "eval/masked_loss", "eval/pair_loss"} <= set(metrics)
    assert export_run(whole.run_dir, folder / "out") == architecture
    return whole, folder / "out"


IDS = np.array([[2, 9, 17, 3, 30, 8, 3]], np.int32)
TYPES = np.array([[0, 0, 0, 0, 1, 1, 1]], np.int32)


def outputs(run):
    """(masked-LM logits, the pair's logits) of a row, by the run itself."""
    model = load(run.run_dir).model
    rows = (jnp.asarray(IDS), jnp.ones_like(IDS), jnp.arange(7, dtype=jnp.int32)[None], jnp.asarray(TYPES))
    hidden = model.encoder(*rows)
    pair = model.pair_logits(hidden, {"pair_positions": jnp.zeros((1, 1), jnp.int32)})[:, 0]
    return np.asarray(model.head(hidden, model.encoder.embedding.token[...])), np.asarray(pair)


def test_a_run_resumes_to_the_bit_and_its_heads_go_out_and_in(run):
    whole, folder = run
    logits, pair = outputs(whole)
    published = load_pretrained(folder, task="pretraining")(IDS, token_type_ids=TYPES)
    np.testing.assert_allclose(published.logits, logits, atol=2e-5)
    np.testing.assert_allclose(published.pair_logits, pair, atol=2e-5)
    assert load_pretrained(folder).task == "masked_lm"  # what such a folder is asked for, if nothing else is said
    record, params = read_origin(folder, whole.objective)
    assert record.config.objective == whole.objective and {"encoder", "head", "pair_head"} == set(params)
    assert load(whole.run_dir).fill_mask("the [MASK] returns a value.", 2)[0][0]["probability"] > 0


def test_a_head_answers_only_the_question_that_it_learned(run):
    whole, folder = run
    other = next(name for name in MODELS if name != whole.objective)
    with pytest.raises(ConfigError, match=f"pretraining head is of {whole.objective}, .*asked for is {other}"):
        load(folder, objective=other)
    assert load(folder, head="pretraining").config.objective == whole.objective
    with pytest.raises(ConfigError, match=rf"{other} \(there {whole.objective}\)"):
        published_config(dataclasses.replace(whole, objective=other), None, "pretraining")


SCRIPT = """
import json, sys, torch, transformers
kind = getattr(transformers, sys.argv[2])
model, info = kind.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
asked = json.loads(sys.argv[3])
with torch.no_grad():
    out = model.eval()(input_ids=torch.tensor(asked["ids"]), token_type_ids=torch.tensor(asked["types"]))
pair = out.seq_relationship_logits if "seq_relationship_logits" in out else out.sop_logits
print(json.dumps([out.prediction_logits.tolist(), pair.tolist()]))
"""


def test_transformers_gives_the_same_numbers_of_both_heads(run):
    if (python := os.environ.get("TORCH_PYTHON")) is None:
        pytest.skip("compares with torch: set TORCH_PYTHON to a Python that has torch and transformers")
    whole, folder = run
    asked = json.dumps({"ids": IDS.tolist(), "types": TYPES.tolist()})
    kind = MODELS[whole.objective][1]
    done = subprocess.run([python, "-c", SCRIPT, str(folder), kind, asked], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for theirs, ours in zip(json.loads(done.stdout.splitlines()[-1]), outputs(whole), strict=True):
        np.testing.assert_allclose(theirs, ours, atol=2e-5)
