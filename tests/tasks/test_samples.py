"""Held-out texts that a model is asked about at every evaluation: what is asked, and how the answers are read."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from flax_encoder.config import DecoderConfig, EncoderConfig, RunConfig
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.records import Record
from flax_encoder.data.store.encoding import encode_records
from flax_encoder.data.store.tokenizing import token_dtype
from flax_encoder.data.tokens.byte_pairs import train_byte_pairs
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from flax_encoder.runs.loaded import memory_split
from flax_encoder.tasks import TASKS
from flax_encoder.tasks.samples import GAP, NUM_SAMPLES, answered, filled_sentences, gapped_sentences
from flax_encoder.tasks.text_to_text import with_ids
from flax_encoder.training.step import make_outputs_step
from tests.runs import TINY, WORDS
from tests.toy import split_model

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
        ({"answer": "", "score": 0.5}, ((3, "the list"),), "none", "the list"),
        ({"answer": "", "score": 0.5}, (), "none", "none"),
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


@pytest.mark.parametrize("objective", ["masked_lm", "causal_lm", "replaced_token_detection", "sentence_order"])
def test_every_objective_that_predicts_words_can_be_asked(objective):
    tokenizer, task = train_wordpiece(LINES, 150), TASKS[objective]
    model = EncoderConfig(vocab_size=192, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24, max_length=40)
    config = RunConfig(objective=objective, model=model, data=TINY.data)
    samples = task.samples(config, tokenizer, split_of(LINES, tokenizer), (1, 1))
    graphdef, params = split_model(lambda: task.make_model(config, None)(nnx.Rngs(0)))
    outputs = make_outputs_step(graphdef)(params, samples.batch)
    read = samples.read({name: np.asarray(x) for name, x in outputs.items()})
    assert len(read) == NUM_SAMPLES and all(len(sample.says) == len(sample.right) for sample in read)
    assert np.all(np.diff(np.asarray(outputs["probabilities"])) <= 0)


@pytest.mark.parametrize(
    ("objective", "kind", "unit"),
    [("span_corruption", "byte pairs", (1, 1)), ("autoencoder", "WordPiece", (8, 3))],
)
def test_what_is_written_stands_beside_what_was_taken_away(objective, kind, unit):
    tokenizer, task = TOKENIZERS[kind](), TASKS[objective]
    position = {"position": "none", "relative_position": "t5"} if objective == "span_corruption" else {"max_length": 40}
    model = EncoderConfig(vocab_size=448, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24, **position)
    decoder = with_ids(DecoderConfig(), tokenizer)
    config = RunConfig(objective=objective, model=model, decoder=decoder, data=TINY.data)
    samples = task.samples(config, tokenizer, split_of(LINES, tokenizer), unit)
    batch = samples.batch
    assert batch["tokens"].shape[0] % unit[0] == 0 and batch["tokens"].shape[1] % unit[1] == 0
    told = samples.read({"text": batch["targets"][:, None]})  # by a model that is right
    assert len(told) == NUM_SAMPLES
    for text, says, right in told:
        assert says == right and all(right)
        kept = text.split(GAP) if objective == "span_corruption" else []
        whole = "".join(x for pair in zip(kept, (*right, ""), strict=True) for x in pair) if kept else right[0]
        # Spans may begin within a word.
        assert any(line.replace(" ", "").startswith(whole.replace(" ", "")) for line in LINES)
        assert len(text.replace(GAP, "")) <= len(whole) and (len(kept) > 1) == (GAP in text)
    graphdef, params = split_model(lambda: task.make_model(config, None)(nnx.Rngs(0)))
    text = np.asarray(make_outputs_step(graphdef)(params, batch)["text"])
    assert len(samples.read({"text": text})) == NUM_SAMPLES
    # Each token is the likeliest after those before it.
    given = np.concatenate([batch["decoder_tokens"][:, :1], text[:, 0, :-1]], 1)
    rows = batch | {"decoder_tokens": given, "decoder_segment_ids": np.ones_like(given), "decoder_positions":
                    np.broadcast_to(np.arange(given.shape[1], dtype=np.int32), given.shape)}  # fmt: skip
    logits = jax.jit(lambda params, rows: nnx.merge(graphdef, params)(rows))(params, rows)
    is_text = np.cumsum(text[:, 0] == decoder.end_id, 1) == 0
    np.testing.assert_array_equal(np.asarray(logits.argmax(-1))[is_text], text[:, 0][is_text])
