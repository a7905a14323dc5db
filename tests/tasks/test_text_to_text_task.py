"""Text to text: rows, loss and gradients, what is written, runs from text to text, T5 folders, and what is refused."""

import dataclasses
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

from flax_encoder.commands import main
from flax_encoder.config import ConfigError, DecoderConfig, EncoderConfig, GenerationConfig, RunConfig
from flax_encoder.data.rows.batches import Batches, OneByOne
from flax_encoder.data.rows.documents import Documents, Frame
from flax_encoder.data.rows.targets import TargetInputs
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.store.store import Split
from flax_encoder.data.tokens.byte_pairs import train_byte_pairs
from flax_encoder.data.tokens.tokenizer import TextTokenizer
from flax_encoder.nn.decoder import EncoderDecoder
from flax_encoder.published.load import load_pretrained
from flax_encoder.runs.exchange import export_run
from flax_encoder.runs.load import load
from flax_encoder.tasks import TASKS, check_task
from flax_encoder.tasks.text_to_text import TextToText, generation_of, score, with_ids
from flax_encoder.training.run_log import read_metrics
from tests.runs import TINY, losses, with_fields
from tests.test_train import Stops
from train import train

TASK = TASKS["text_to_text"]
T5_LIKE = dataclasses.replace(
    SMALL, position="none", relative_position="t5", relative_max_distance=31, norm="rms_norm", norm_placement="pre",
    norm_epsilon=1e-6, use_bias=False,
)  # fmt: skip
FRAMES = (Frame(0, None, 1), Frame(0, 3, 1), Frame(0, 3, 4, (4,)))


class Ids(TextTokenizer):
    """A tokenizer as far as `with_ids` asks one."""

    def __init__(self, frame: Frame):
        self.__dict__ |= {"json": "", "vocab_size": V, "frame": (frame.first, frame.last)}

    def special(self, role: str) -> int:
        return 0


def random_split(seed: int, num_documents: int = 12, longest: int = 9) -> Split:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, (num_documents, 2))
    total = int(lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths.sum(1))]).astype(np.int64)
    words = np.packbits(np.ones(total, bool), bitorder="little")
    return Split([rng.integers(5, V, total).astype(np.uint16)], [words], offsets, {"text_lengths": lengths})


def batches_of(split, frame, packing="best-fit", *, row_length=17, target_length=19, is_training=True) -> Batches:
    config = with_fields(
        RunConfig(objective="text_to_text"), data__row_length=row_length, data__target_length=target_length
    )
    documents = Documents(split, TASK.reading.layout(config), frame, row_length)
    order = OneByOne([documents.plan(row_length, packing)])
    most = order.plans[0].max_pieces_per_row
    inputs = TargetInputs(config, Ids(frame), documents, row_length, most, is_training, packing == "one-per-row")
    return Batches([documents], order, TASK.reading.targets(inputs), row_length=row_length, batch_size=4, seed=0,
                   num_batches=-(-len(order) // 4), stop_row=len(order))  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(FRAMES), st.sampled_from(["best-fit", "one-per-row"]))
def test_a_decoder_is_given_the_start_and_then_what_it_is_to_write(seed, frame, packing):
    """A source and its target have one segment number; cut texts keep their first tokens, and their end."""
    split, found = random_split(seed, longest=25), []
    start = 0 if frame.first is None else frame.first
    batches = batches_of(split, frame, packing)
    for i in range(len(batches)):
        batch = batches[i]
        for row in range(4):
            if not batch["target_weights"][row].any():
                continue
            for segment in range(1, batch["segment_ids"][row].max() + 1):
                own = batch["segment_ids"][row] == segment
                written = batch["decoder_segment_ids"][row] == segment
                source, target = batch["tokens"][row][own].tolist(), batch["targets"][row][written].tolist()
                assert batch["decoder_tokens"][row][written].tolist() == [start, *target[:-1]]
                assert batch["decoder_positions"][row][written].tolist() == list(range(len(target)))
                assert batch["positions"][row][own].tolist() == list(range(len(source)))
                assert batch["target_weights"][row][written].all() and target[-1] == frame.last
                found.append((source, target))
            assert not batch["target_weights"][row][batch["decoder_segment_ids"][row] == 0].any()
    expected = []
    for document, (source, target) in enumerate(split.values["text_lengths"].astype(int)):
        tokens = split.document(document)
        room = 17 - sum(frame.specials)
        expected.append((frame.around(tokens[:source][:room]).tolist(), [*tokens[source:][:18].tolist(), frame.last]))
        assert len(tokens) == source + target
    assert sorted(found) == sorted(expected)


@functools.cache
def small(smoothing: float = 0.0, tied: bool = True):
    decoder = DecoderConfig(num_layers=2, tied=tied, logit_scale=0.7, end_id=1)
    graphdef, params = split_model(lambda: TextToText(T5_LIKE, decoder, smoothing=smoothing, rngs=nnx.Rngs(0)))

    def loss(params, batch):
        total = nnx.merge(graphdef, params).loss(batch)
        return total.sum, total

    return graphdef, params, jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_packed_pairs_learn_as_if_alone():
    """Loss and gradient of every parameter, the decoder's too."""
    split, sums = random_split(3), []
    _, params, grads = small()
    for packing in ("best-fit", "one-per-row"):
        batches, total = batches_of(split, FRAMES[1], packing), None
        for i in range(len(batches)):
            batch = batches[i]
            batch.pop("owners", None)
            one = grads(params, batch)
            total = one if total is None else jax.tree.map(jnp.add, total, one)
        sums.append(total)
    ((loss, packed), gradient), ((other_loss, alone), other_gradient) = sums
    assert float(packed.count) == float(alone.count) == split.values["text_lengths"][:, 1].sum() + len(split)
    np.testing.assert_allclose([loss, packed.metrics["correct"]], [other_loss, alone.metrics["correct"]], rtol=1e-5)
    assert_trees_close(gradient, other_gradient)


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_that_of_each_next_token_with_a_share_spread_evenly(tied):
    smoothing, (graphdef, params, _) = 0.3, small(0.3, tied)
    batch = batches_of(random_split(4), FRAMES[0])[0]
    both = jax.jit(lambda p, b: (nnx.merge(graphdef, p)(b), nnx.merge(graphdef, p).loss(b)))
    logits, total = both(params, batch)
    logits = np.asarray(logits, np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = np.take_along_axis(log_probabilities, batch["targets"][..., None], -1)[..., 0]
    each = (1 - smoothing) * own + smoothing * log_probabilities.mean(-1)
    np.testing.assert_allclose(total.sum, -(each * batch["target_weights"]).sum(), rtol=1e-5)
    correct = (logits.argmax(-1) == batch["targets"]) * batch["target_weights"]
    assert float(total.metrics["correct"]) == correct.sum()


def test_what_is_drawn_depends_on_the_source_and_the_seed_alone():
    config = with_fields(RunConfig(objective="text_to_text"), generation__sample=True, generation__max_new_tokens=7)
    rng, written = np.random.default_rng(0), {}
    tokens = rng.integers(5, V, (4, 11)).astype(np.int32)
    segments = (np.arange(11) < [[11], [7], [9], [3]]).astype(np.int32)
    for seed in (0, 1):
        own = with_fields(config, generation__seed=seed)
        graphdef, params = split_model(lambda own=own: TextToText(
            T5_LIKE, DecoderConfig(), generation_of(own), seed=own.generation.seed, rngs=nnx.Rngs(0)))  # fmt: skip
        outputs = jax.jit(lambda params, batch, graphdef=graphdef: nnx.merge(graphdef, params).outputs(batch))
        for name, order in (("as they are", [0, 1, 2, 3]), ("otherwise", [2, 0, 3, 1])):
            batch = {"tokens": tokens[order], "segment_ids": segments[order]}
            written[seed, name] = np.asarray(outputs(params, batch)["text"])[np.argsort(order)]
    np.testing.assert_array_equal(written[0, "as they are"], written[0, "otherwise"])
    assert (written[0, "as they are"] != written[1, "as they are"]).any()
    assert written[0, "otherwise"].shape == (4, 1, 7)


def test_scores_are_sacrebleus_and_rouge_scores():
    answers = [{"text": "the cat sat on the mat"}, {"text": "a dog"}]
    scores = score(answers, ["the cat sat on the mat", "a dog ran far away"], None)
    import sacrebleu
    from rouge_score import rouge_scorer

    texts, golds = [a["text"] for a in answers], [["the cat sat on the mat", "a dog ran far away"]]
    assert scores["bleu"] == sacrebleu.corpus_bleu(texts, golds).score
    assert scores["chrf"] == sacrebleu.corpus_chrf(texts, golds).score
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    each = [scorer.score(gold, text) for gold, text in zip(golds[0], texts, strict=True)]
    for name in ("rouge1", "rouge2", "rougeL"):
        assert scores[name] == pytest.approx(np.mean([s[name].fmeasure for s in each]))
    assert scores["rouge1"] == pytest.approx((1 + 2 * 2 / 7) / 2)


# --- runs


@pytest.fixture(scope="module", autouse=True)
def first_device():
    """Runs are on the first of the suite's virtual devices."""
    devices = jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args: devices[:1])
        yield


WORDS = ["red", "blue", "green", "river", "stone", "cloud", "candle"]


def pairs(count: int = 2500) -> list[dict[str, str]]:
    """Words and the same from last to first."""
    rng = np.random.default_rng(0)
    some = {tuple(rng.choice(WORDS, rng.integers(2, 5)).tolist()) for _ in range(count)}
    return [{"question": " ".join(words), "reply": " ".join(words[::-1])} for words in sorted(some)]


def reversing(folder, run_dir, **fields) -> RunConfig:
    config = with_fields(
        TINY, objective="text_to_text", run_dir=str(run_dir), steps=300, log_every=50, checkpoint_every=150,
        batch_size=16, data__source=str(folder / "pairs.jsonl"), data__text_column="question",
        data__text_pair_column="reply", data__vocab_size=420, data__row_length=32,
        model__position="none", model__relative_position="t5", model__norm="rms_norm", model__use_bias=False,
        model__init_std=0.1, model__embed_dim=48, optimizer__learning_rate=5e-3, decoder__num_layers=1,
    )  # fmt: skip
    return with_fields(config, **fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as f:
        f.writelines(json.dumps(pair) + "\n" for pair in pairs())
    return folder


@pytest.fixture(scope="module")
def reversed_run(folder):
    jax.config.update("jax_disable_most_optimizations", True)  # as conftest.py has it for tests, which this precedes
    return reversing(folder, folder / "run"), train(reversing(folder, folder / "run"))


def test_a_run_that_learns_to_reverse_reverses(folder, reversed_run):
    config, metrics = reversed_run
    assert metrics["eval/bleu"] > 90 and metrics["eval/rougeL"] > 0.95 and metrics["eval/loss"] < 0.1
    run = load(config.run_dir)
    asked = ["green cloud", "", "stone red river candle", " blue  "]
    answers = list(run.predict(asked))
    assert [a.get("text") for a in answers[:3:2]] == ["cloud green", "candle river red stone"]
    assert answers[1] == {"error": "the text has no token"}
    beams = run.with_settings(GenerationConfig(num_beams=3, length_penalty=0.5))
    assert [a.get("text") for a in beams.predict(asked)][:3:2] == ["cloud green", "candle river red stone"]
    short = run.with_settings(GenerationConfig(max_new_tokens=1))
    assert len(run.tokenizer.encode_batch([next(iter(short.predict(asked)))["text"]])[0]) <= 1
    baselines = TASK.baselines(run, _data_of(run))
    assert baselines["the source itself"]["rouge1"] == 1.0 and baselines["the source itself"]["bleu"] < 50


def _data_of(run):
    from flax_encoder.data.pipeline import open_data

    return open_data(run.config, run.task.reading, tokenizer=run.tokenizer)


def test_commands_write_and_score_files(folder, reversed_run, capsys):
    config, _ = reversed_run
    (folder / "in.txt").write_text("green cloud\nstone red\n")
    main(["predict", config.run_dir, "--input", str(folder / "in.txt"), "--output", str(folder / "out.jsonl"),
          "--generation.num-beams", "2"])  # fmt: skip
    lines = [json.loads(line)["text"] for line in (folder / "out.jsonl").read_text().splitlines()]
    assert lines == ["cloud green", "red stone"]
    (folder / "some.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs()[:40]))
    capsys.readouterr()
    main(["evaluate", config.run_dir, "--data.source", str(folder / "some.jsonl"), "--data.text-column", "question",
          "--data.text-pair-column", "reply", "--json", "--generation.num-beams", "2"])  # fmt: skip
    assert json.loads(capsys.readouterr().out)["bleu"] > 90
    with pytest.raises(SystemExit):
        main(["predict", config.run_dir, "--input", str(folder / "in.txt"), "--output", "-",
              "--generation.num-beams", "2", "--generation.sample", "true"])  # fmt: skip
    assert "beam search does not sample" in capsys.readouterr().err


def test_a_run_that_is_stopped_goes_on_to_the_same_losses(folder, reversed_run, monkeypatch):
    config, _ = reversed_run
    config = dataclasses.replace(config, run_dir=str(folder / "stopped"))
    with monkeypatch.context() as patch:
        patch.setattr("flax_encoder.runs.train.StopSignals", lambda **options: Stops(50))
        assert train(config) is None
    assert train(config) is not None
    assert losses(folder / "stopped") == losses(folder / "run")


def test_a_run_goes_out_as_a_t5_folder_and_starts_another(folder, reversed_run, tmp_path):
    config, metrics = reversed_run
    assert export_run(config.run_dir, tmp_path / "t5") == "T5ForConditionalGeneration"
    ours, theirs = load(config.run_dir), load(tmp_path / "t5")
    asked = ["green cloud", "stone red river candle"]
    assert list(theirs.predict(asked)) == list(ours.predict(asked))
    assert theirs.config.decoder == dataclasses.replace(ours.config.decoder, num_layers=1)
    said = json.loads((tmp_path / "t5/generation_config.json").read_text())
    assert said["max_new_tokens"] == ours.config.data.target_length and said["eos_token_id"] == 1
    # The factor of attention lies in the queries there.
    pretrained = load_pretrained(tmp_path / "t5")
    ids = ours.tokenizer.encode_rows(asked[:1])[0][0][None]
    target = np.array([[0, 7, 9]])
    logits = EncoderDecoder.__call__(ours.model, jnp.asarray(ids), jnp.asarray(target))
    got = pretrained(ids, decoder_input_ids=target).logits
    np.testing.assert_allclose(got, logits, atol=2e-4 * np.abs(logits).max())
    more = train(reversing(folder, tmp_path / "more", init_from=str(tmp_path / "t5"), steps=2, checkpoint_every=2,
                           optimizer__learning_rate=1e-6))  # fmt: skip
    assert more["eval/loss"] == pytest.approx(metrics["eval/loss"], rel=0.05, abs=2e-3)


def test_a_prefix_stands_before_every_source(folder, tmp_path):
    config = reversing(folder, tmp_path / "run", data__prefix="reverse: ", steps=2, checkpoint_every=2, log_every=1)
    train(config)
    run = load(config.run_dir)
    split = _data_of(run).stores[0].validation
    source = run.tokenizer.decode(split.document(0)[: int(split.values["text_lengths"][0, 0])])
    assert source.startswith("reverse: ")
    plain = run.with_settings(prefix="")
    asked = [f"{words['question']}" for words in pairs()[:3]]
    assert list(run.predict(asked)) == list(plain.predict([f"reverse: {text}" for text in asked]))
    assert read_metrics(tmp_path / "run")


# --- what is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__position": "learned", "model__relative_position": "none"}, "a decoder needs model.position to be"),
        ({"data__packing": "concatenate"}, "stays whole"),
        ({"head__transform": False}, "no head besides the logits"),
        ({"generation__num_beams": 3, "generation__sample": True}, r"does not sample: .* Give --generation\.num-"),
        ({"generation__temperature": 0.5}, r"generation\.temperature would not be read.*--generation\.sample True"),
        ({"generation__length_penalty": 0.5}, r"length_penalty would not be read.*--generation\.num-beams"),
        ({"data__last_row_length": 16}, r"data\.last_row_length is not read by the objective text_to_text"),
    ],
)
def test_settings_that_make_no_such_model_are_refused(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        check_task(with_fields(reversing(tmp_path, tmp_path / "run"), **fields))


def test_settings_of_writing_are_of_tasks_that_write():
    for fields in ({"generation__num_beams": 2}, {"decoder__num_layers": 2}, {"data__prefix": "a"}):
        with pytest.raises(ConfigError, match="is not read by the objective masked_lm"):
            check_task(with_fields(RunConfig(), **fields))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "red", "reply": "  "}, r"a source and its target must have text: column 'reply' of .*line 2"),
        ({"question": "", "reply": "red"}, r"a source and its target must have text: column 'question'"),
        ({"question": "red"}, r"column 'reply'"),
        ({"question": "red", "reply": 3}, r"a text column must hold strings"),
    ],
)
def test_a_row_without_a_source_or_a_target_is_named(tmp_path, row, message):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (pairs()[0], row, *pairs()[1:])))
    with pytest.raises(DataError, match=message):
        train(reversing(tmp_path, tmp_path / "run"))


def test_columns_that_are_not_there_are_listed(folder, tmp_path):
    with pytest.raises(DataError, match=r"no column 'answer'.*question, reply.*--data\.text-pair-column"):
        train(reversing(folder, tmp_path / "run", data__text_pair_column="answer"))
    with pytest.raises(DataError, match=r"which column is the source and target\? .*question, reply"):
        train(reversing(folder, tmp_path / "run", data__text_pair_column=None))


def test_a_decoder_takes_its_ids_from_the_tokenizer_or_names_what_is_missing():
    tokenizer = train_byte_pairs(["a b c"], 400)
    assert with_ids(DecoderConfig(), tokenizer) == DecoderConfig(start_id=0, end_id=1)
    assert with_ids(DecoderConfig(start_id=5), tokenizer).start_id == 5
    with pytest.raises(ConfigError, match=r"decoder\.end_id must be a token's id: got 999, the tokenizer has"):
        with_ids(DecoderConfig(end_id=999), tokenizer)
    with pytest.raises(ConfigError, match=r"the tokenizer has no token after a text.*--decoder\.end-id"):
        with_ids(DecoderConfig(), Ids(Frame(0, 3, None)))


def test_what_is_asked_of_writing_wins_over_what_a_run_says():
    own = GenerationConfig(num_beams=4, length_penalty=2.0, max_new_tokens=9)
    assert GenerationConfig().over(own) == own
    assert GenerationConfig(num_beams=2).over(own) == dataclasses.replace(own, num_beams=2)
    assert GenerationConfig(num_beams=1).over(own) == GenerationConfig(num_beams=1, max_new_tokens=9)
    drawn = GenerationConfig(num_beams=1, sample=True, top_p=0.5).over(own)
    assert drawn == GenerationConfig(num_beams=1, sample=True, top_p=0.5, max_new_tokens=9)


def test_a_model_whose_encoder_has_rope_is_told_what_a_decoder_needs():
    with pytest.raises(ConfigError, match=r"a decoder needs model\.position to be none or sinusoidal: got rope"):
        EncoderDecoder(EncoderConfig(vocab_size=11, position="rope"), rngs=nnx.Rngs(0))


# --- span corruption


def spans_config(folder, run_dir, **fields) -> RunConfig:
    (folder / "lines.txt").write_text("".join(f"{p['question']} {p['reply']}\n" for p in pairs(300)))
    config = reversing(folder, run_dir, objective="span_corruption", data__source=str(folder / "lines.txt"), steps=2,
                       checkpoint_every=2, data__text_column=None, data__text_pair_column=None,
                       data__held_out_rate=0.1)  # fmt: skip
    return with_fields(config, **fields)


def test_a_tokenizer_without_sentinels_is_told_how_many_are_needed_and_how_to_get_them(tmp_path):
    (tmp_path / "tokenizer.json").write_text(_wordpiece().json)
    with pytest.raises(DataError, match=r"up to 2 spans, the tokenizer 0 sentinels.*Without --data\.tokenizer one is"):
        train(spans_config(tmp_path, tmp_path / "run", data__tokenizer=str(tmp_path / "tokenizer.json")))


def _wordpiece():
    from flax_encoder.data.tokens.tokenizer import train_wordpiece

    return train_wordpiece([p["question"] for p in pairs(50)], 100)


@pytest.mark.slow
def test_text_to_text_goes_on_from_span_corruption_with_the_decoder(folder, tmp_path, capsys):
    metrics = train(spans_config(tmp_path, tmp_path / "spans"))
    assert np.isfinite(metrics["eval/loss"])
    spans = load(tmp_path / "spans")
    train(reversing(folder, tmp_path / "run", init_from=str(tmp_path / "spans"), steps=1, checkpoint_every=1,
                    optimizer__learning_rate=0.0))  # fmt: skip
    assert "new parameters: none" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "run").params, spans.params)
    assert export_run(tmp_path / "spans", tmp_path / "t5") == "T5ForConditionalGeneration"
