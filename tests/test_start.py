"""What a run starts from, and what it refuses to go on with."""

import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from flax_encoder.config import ConfigError
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from flax_encoder.published.load import load_pretrained
from flax_encoder.runs.exchange import import_folder
from flax_encoder.runs.load import load_run
from tests.runs import ROOT, WORDS, tiny, with_fields
from train import Diverged, train


def test_fine_tuning_starts_from_the_pretrained_encoder(corpus, tmp_path, one_device):
    train(tiny(corpus, tmp_path / "pretrained", steps=6))
    config = tiny(
        corpus, tmp_path / "tuned", steps=400, optimizer__learning_rate=1e-2, objective="classification",
        pooling="mean", init_from=str(tmp_path / "pretrained"), model__num_layers=1,  # the pretrained architecture wins
    )  # fmt: skip
    config = with_fields(config, data__source=str(corpus / "rows.jsonl"))
    metrics = train(config)
    assert metrics["eval/accuracy"] > 0.9  # the label stands in the text
    loaded = load_run(tmp_path / "tuned")
    assert loaded.config.model.num_layers == 2
    assert loaded.tokenizer.json == load_run(tmp_path / "pretrained").tokenizer.json
    labels = loaded.classify("calls the given function second 5")
    assert labels[0]["label"] == "second" and abs(sum(x["probability"] for x in labels) - 1) < 1e-5


@pytest.mark.parametrize("objective", ["masked_lm", "classification"])
def test_a_run_starts_from_a_published_folder(corpus, tmp_path, one_device, objective):
    """With nothing learned, what comes out is what went in: settings, tokenizer, encoder, and the head if it fits."""
    folder = pathlib.Path(shutil.copytree(ROOT / "tests" / "golden" / "bert-masked_lm", tmp_path / "published"))
    tokenizer = train_wordpiece(["the list of a value"] * 3, 43)
    (folder / "tokenizer.json").write_text(tokenizer.json)
    config = tiny(
        corpus, tmp_path / "run", steps=1, objective=objective, init_from=str(folder), data__row_length=15,
        optimizer__learning_rate=0.0, pooling="mean" if objective == "classification" else "cls",
    )  # fmt: skip
    train(with_fields(config, data__source=str(corpus / "rows.jsonl")))
    loaded, published = load_run(tmp_path / "run"), load_pretrained(folder)
    assert loaded.config.model.embed_dim == published.config.embed_dim and loaded.tokenizer == published.tokenizer
    text = ["the list of a value"]
    np.testing.assert_array_equal(loaded.tokenizer.encode_batch(text), tokenizer.encode_batch(text))
    assert loaded.config.pooling == config.pooling
    kept = ["encoder"] if objective == "classification" else ["encoder", "head"]
    got, want = ({k: nnx.to_pure_dict(nnx.state(getattr(m, k))) for k in kept} for m in (loaded.model, published.model))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_resuming_with_other_settings_is_refused(corpus, tmp_path, one_device):
    config = tiny(corpus, tmp_path / "run", steps=6)
    train(config)
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate: 0.003 before, 0.1 now") as caught:
        train(with_fields(config, optimizer__learning_rate=0.1))
    assert "--init-from" in str(caught.value)
    train(with_fields(config, model__remat="full", log_every=1))  # changes nothing that is computed


def test_resuming_on_other_text_is_refused(corpus, tmp_path, one_device):
    (tmp_path / "lines.txt").write_text((corpus / "lines.txt").read_text())
    config = tiny(tmp_path, tmp_path / "run", steps=6)
    train(config)
    (tmp_path / "lines.txt").write_text((corpus / "lines.txt").read_text() + "one more line\n")
    with pytest.raises(ConfigError, match=r"prepared contents \w+, and .* began with \w+\. Bring that text back"):
        train(config)


def test_the_text_of_a_run_may_move(corpus, tmp_path, one_device):
    shutil.copy(corpus / "lines.txt", tmp_path / "here.txt")
    config = with_fields(tiny(corpus, tmp_path / "run", steps=6), data__source=str(tmp_path / "here.txt"))
    train(config)
    (tmp_path / "here.txt").rename(tmp_path / "there.txt")
    train(with_fields(config, data__source=str(tmp_path / "there.txt")))


def test_another_vocabulary_after_a_run_that_saved_nothing_is_made(corpus, tmp_path, one_device):
    config = tiny(corpus, tmp_path / "run", optimizer__learning_rate=1e30, optimizer__clip_norm=None)
    with pytest.raises(Diverged):
        train(with_fields(config, data__vocab_size=100))
    train(tiny(corpus, tmp_path / "run", steps=3))
    assert load_run(tmp_path / "run").tokenizer.vocab_size > 100


def test_init_from_is_not_read_by_another_tokenizer(corpus, tmp_path, one_device):
    train(tiny(corpus, tmp_path / "pretrained", steps=3))
    own, other = (tmp_path / name for name in ("pretrained/tokenizer.json", "other.json"))
    other.write_text(train_wordpiece([" ".join(WORDS)] * 3, 90).json)
    config = tiny(corpus, tmp_path / "run", steps=3, init_from=str(tmp_path / "pretrained"))
    with pytest.raises(ConfigError, match=r"data.tokenizer .*other.json is not that of .*pretrained. Leave it out"):
        train(with_fields(config, data__tokenizer=str(other)))
    train(with_fields(config, data__tokenizer=str(own)))


def test_a_classifier_of_other_labels_lends_its_encoder(corpus, tmp_path, one_device):
    rows = tmp_path / "rows.jsonl"
    rows.write_text((corpus / "rows.jsonl").read_text().replace('"label": "', '"label": "new '))
    tuned = tiny(corpus, tmp_path / "tuned", steps=3, objective="classification")
    train(with_fields(tuned, data__source=str(corpus / "rows.jsonl")))
    config = with_fields(
        tuned, run_dir=str(tmp_path / "again"), init_from=str(tmp_path / "tuned"), data__source=str(rows),
        optimizer__learning_rate=0.0,
    )  # fmt: skip
    train(config)
    first, second = (load_run(tmp_path / name) for name in ("tuned", "again"))
    assert second.label_names == [f"new {name}" for name in first.label_names]
    got, want = (nnx.to_pure_dict(nnx.state(run.model)) for run in (second, first))
    jax.tree.map(np.testing.assert_array_equal, got["encoder"], want["encoder"])
    kernels = (np.asarray(params["head"]["out"]["kernel"]) for params in (got, want))
    assert not np.array_equal(*kernels)


def test_an_imported_model_is_not_trained_in_its_own_folder(corpus, tmp_path, one_device):
    folder = pathlib.Path(shutil.copytree(ROOT / "tests" / "golden" / "bert-masked_lm", tmp_path / "published"))
    (folder / "tokenizer.json").write_text(train_wordpiece(["the list of a value"] * 3, 43).json)
    import_folder(folder, tmp_path / "imported")
    with pytest.raises(ConfigError, match=r"a run begins in a folder of its own.*--init-from"):
        train(tiny(corpus, tmp_path / "imported"))
    assert load_run(tmp_path / "imported").step == 0


@pytest.mark.parametrize("is_frozen", [False, True])
def test_word_vectors_are_where_training_starts(corpus, tmp_path, one_device, is_frozen):
    words = [*dict.fromkeys(WORDS), "first", "second", "third"]
    vectors = np.random.default_rng(0).standard_normal((len(words), 32)).astype(np.float32)
    file = tmp_path / "vectors.txt"
    file.write_text("".join(f"{w} {' '.join(map(str, v))}\n" for w, v in zip(words, vectors.tolist(), strict=True)))
    config = tiny(corpus, tmp_path / "run", data__word_vectors=str(file), steps=4)
    config = with_fields(config, optimizer__freeze_embedding=is_frozen)
    train(config)
    loaded = load_run(tmp_path / "run")
    token = np.asarray(loaded.model.encoder.embedding.token[...])
    rows = token[[loaded.tokenizer.encode_batch([w])[0][0] for w in words]]
    np.testing.assert_allclose(rows, vectors, atol=0 if is_frozen else 0.02)
    assert np.array_equal(rows, vectors) == is_frozen
    with pytest.raises(ConfigError, match=r"must be as long as the token .* has 32 numbers a word, the model 64"):
        train(with_fields(config, run_dir=str(tmp_path / "other"), model__embed_dim=64))
