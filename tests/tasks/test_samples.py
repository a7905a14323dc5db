"""Held-out texts that a model is asked about at every evaluation: what is asked, and how the answers are read."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from flax_encoder.config import RunConfig
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.records import Record
from flax_encoder.data.store.encoding import encode_records
from flax_encoder.data.store.tokenizing import token_dtype
from flax_encoder.data.tokens.byte_pairs import train_byte_pairs
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from flax_encoder.runs.load import load
from flax_encoder.runs.loaded import memory_split
from flax_encoder.tasks.samples import GAP, NUM_SAMPLES, answered, filled_sentences, gapped_sentences
from flax_encoder.training.run_log import SAMPLES, read_metrics
from tests.runs import TINY, WORDS, losses, tiny, with_fields
from tests.test_train import Stops
from train import train

LINES = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 9 + i % 13)) + f" {i} unseenword" for i in range(1, 90)]
LONG = [" ".join(LINES[i : i + 6]) for i in range(20)]
TOKENIZERS = {"WordPiece": lambda: train_wordpiece(LINES, 150), "byte pairs": lambda: train_byte_pairs(LINES, 420)}


def split_of(texts, tokenizer):
    records = [Record((text,)) for text in texts]
    return memory_split(encode_records(records, tokenizer, Columns(), {}, token_dtype(tokenizer)))


@pytest.mark.parametrize("texts", [LINES, LONG], ids=["short", "long"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_gap_is_one_whole_word_of_the_text(kind, texts):
    tokenizer = TOKENIZERS[kind]()
    sentences = gapped_sentences(split_of(texts, tokenizer), tokenizer, NUM_SAMPLES)
    assert len(sentences) == NUM_SAMPLES and max(len(sentence.gaps) for sentence in sentences) == 2
    for sentence in sentences:
        text = tokenizer.decode(sentence.tokens).strip()
        assert any(line.startswith(text) for line in texts)
        for gap in sentence.gaps:
            before, word, after = (
                tokenizer.decode(part).strip()
                for part in (sentence.tokens[:gap], sentence.tokens[[gap]], sentence.tokens[gap + 1 :])
            )
            assert word in {*WORDS, "unseenword"} and f"{before} {word} {after}".strip() == text


@pytest.mark.parametrize("looks_back", [False, True])
@pytest.mark.parametrize("unit", [(1, 1), (8, 3)])
def test_a_model_that_is_right_fills_in_every_word(looks_back, unit):
    tokenizer = train_wordpiece(LINES, 150)
    split = split_of(LINES, tokenizer)
    samples = filled_sentences(RunConfig(data=TINY.data), tokenizer, split, unit, looks_back=looks_back)
    batch, masked = samples.batch, tokenizer.special("mask")
    rows, length = batch["tokens"].shape
    assert rows % unit[0] == 0 and length % unit[1] == 0 and rows >= NUM_SAMPLES
    assert ((batch["tokens"] == masked).any() and (batch["segment_ids"] > 0).any(1).sum() == NUM_SAMPLES) != looks_back
    sentences = gapped_sentences(split, tokenizer, NUM_SAMPLES)
    outputs = {"tokens": np.full((rows, length, 3), masked), "probabilities": np.full((rows, length, 3), 0.1)}
    for row, sentence in enumerate(sentences):
        for number, gap in enumerate(sentence.gaps):
            at = gap if looks_back else number  # with [CLS] before, what predicts a token has its number
            outputs["tokens"][row, at] = masked, sentence.tokens[gap], 7  # the mask itself is likelier, and no word
    read = samples.read(outputs)
    assert [sample.says for sample in read] == [sample.right for sample in read]
    for sample, sentence in zip(read, sentences, strict=True):
        assert sample.text.count(GAP) == len(sentence.gaps) == len(sample.right)
        whole = sample.text
        for word in sample.right:
            whole = whole.replace(GAP, word, 1)
        assert whole == tokenizer.decode(sentence.tokens)


def test_a_text_without_words_has_no_samples():
    tokenizer = train_wordpiece(LINES, 150)
    assert filled_sentences(RunConfig(data=TINY.data), tokenizer, split_of(["1 2 3"] * 9, tokenizer)) is None


@pytest.mark.parametrize(
    "answer, right, says, shown",
    [
        ({"label": "a", "probability": 0.5}, "b", "a", "b"),
        ({"score": 0.25}, 1.0, "0.25", "1"),
        ({"labels": ()}, ("x", "y"), "none", "x, y"),
        ({"answer": "", "score": 0.5}, ((3, "the list"),), "", "the list"),
        ({"text": "ein Wort"}, "das Wort", "ein Wort", "das Wort"),
    ],
)
def test_an_answer_is_shown_beside_what_is_right(answer, right, says, shown):
    tokenizer = train_wordpiece(LINES, 150)
    split = split_of(["the list returns"], tokenizer)
    sample = answered(split, 0, answer, right, tokenizer, writes=False)
    assert sample == ("the list returns", (says,), (shown,))
    split = dataclasses.replace(split, values={"text_lengths": np.array([[2, 1]])})
    assert answered(split, 0, answer, right, tokenizer, writes=True).text == "the list"
    assert answered(split, 0, {"vectors": np.zeros(3)}, right, tokenizer, writes=False) is None


@pytest.fixture(scope="module")
def on_one_device():
    devices = jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args: devices[:1])
        yield


@pytest.fixture(scope="module")
def watched(corpus, tmp_path_factory, on_one_device):
    """A masked LM's run of twelve steps that is evaluated at every fourth."""
    config = tiny(
        corpus, tmp_path_factory.mktemp("watched") / "run", steps=12, eval_every=4, checkpoint_every=12,
        model__num_layers=1,
    )  # fmt: skip
    train(config)
    return config


def test_the_last_samples_are_what_the_run_fills_in(watched):
    run, lines = load(watched.run_dir), read_metrics(pathlib.Path(watched.run_dir), SAMPLES)
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert len({tuple(sample["text"] for sample in line["samples"]) for line in lines}) == 1
    for sample in lines[-1]["samples"]:
        filled = run.fill_mask(sample["text"].replace(GAP, "[MASK]"), 1)
        assert [word["token"] for [word] in filled] == sample["says"]


def test_a_run_that_is_stopped_and_resumed_keeps_the_same_samples(watched, tmp_path, monkeypatch):
    cut = with_fields(watched, run_dir=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        patch.setattr("flax_encoder.runs.train.StopSignals", lambda: Stops(7))
        assert train(cut) is None
    train(cut)
    want = (pathlib.Path(watched.run_dir) / SAMPLES).read_text()
    assert (tmp_path / "cut" / SAMPLES).read_text() == want
    train(cut)  # a finished run reports again
    assert (tmp_path / "cut" / SAMPLES).read_text() == want
    assert losses(tmp_path / "cut") == losses(pathlib.Path(watched.run_dir))


def test_watching_a_run_changes_no_loss(watched, tmp_path):
    blind = with_fields(watched, run_dir=str(tmp_path / "blind"), eval_every=None)
    train(blind)
    assert losses(tmp_path / "blind") == losses(pathlib.Path(watched.run_dir))
    assert not (tmp_path / "blind" / SAMPLES).exists()


@pytest.mark.parametrize("objective", ["causal_lm", "replaced_token_detection", "sentence_order", "classification"])
def test_other_objectives_are_watched_too(corpus, tmp_path, on_one_device, objective):
    more = {"data__source": str(corpus / "rows.jsonl")} if objective == "classification" else {}
    config = tiny(corpus, tmp_path, steps=2, eval_every=1, eval_batches=1, model__num_layers=1, objective=objective,
                  **more)  # fmt: skip
    train(config)
    lines = read_metrics(tmp_path, SAMPLES)
    assert [len(line["samples"]) for line in lines] == [NUM_SAMPLES] * 2
    if objective == "classification":
        assert {*lines[0]["samples"][0]["right"], *lines[0]["samples"][0]["says"]} <= {"first", "second", "third"}
