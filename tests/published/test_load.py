"""Published folders in and out: heads, runs, and everything that can be wrong with a folder."""

import dataclasses
import json
import logging
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from flax_encoder.commands import main
from flax_encoder.config import ConfigError, DataConfig, EncoderConfig, RunConfig, to_dict
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from flax_encoder.nn.partition import round_up_vocab
from flax_encoder.published.load import is_published, load_pretrained
from flax_encoder.published.weights import WeightsError, read_weights
from flax_encoder.runs.exchange import export_run, import_folder
from flax_encoder.runs.load import load, load_run
from flax_encoder.runs.loaded import model_factory
from flax_encoder.training.checkpoint import Checkpoints
from flax_encoder.training.step import TrainState

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TEXTS = ["the list holds a value", "each item of the list is a value"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(TEXTS * 3, 43)


@pytest.fixture
def folder(tmp_path):
    """A writable copy of the tiny BERT with its masked-LM head."""
    return pathlib.Path(shutil.copytree(GOLDEN / "bert-masked_lm", tmp_path / "bert"))


def edit(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def change_tensors(folder, change):
    tensors = read_weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_the_task_is_what_the_architecture_says_or_the_weights_hold(folder):
    assert load_pretrained(folder).task == "masked_lm"
    edit(folder, architectures=...)
    assert load_pretrained(folder).task == "masked_lm"
    edit(folder, architectures=["BertForPreTraining"])
    assert load_pretrained(folder).task == "masked_lm"
    for name, task in (("xlm-roberta-token_classification", "token_classification"), ("t5-encoder", None)):
        other = pathlib.Path(shutil.copytree(GOLDEN / name, folder.parent / name))
        edit(other, architectures=...)
        assert load_pretrained(other).task == task
    edit(folder, architectures=["BertForDreaming"])
    with pytest.raises(ConfigError, match=r"'BertForDreaming' of bert is not known; known are BertModel, BertForMask"):
        load_pretrained(folder)
    with pytest.raises(ConfigError, match=r"bert has no discriminator head; it has masked_lm, classif"):
        load_pretrained(folder, task="discriminator")


def test_a_missing_head_is_made_anew_and_named_and_another_one_left_out(folder, caplog):
    with caplog.at_level(logging.WARNING):
        loaded = load_pretrained(folder, task="classification", num_labels=7)
    assert "has no head.dense.bias, head.dense.kernel, head.out.bias, head.out.kernel: newly initialized" in caplog.text
    assert "left out cls.predictions.bias" in caplog.text
    assert loaded.fresh == ("head.dense.bias", "head.dense.kernel", "head.out.bias", "head.out.kernel")
    assert loaded(np.array([[5, 6, 7]])).logits.shape == (1, 7)


def test_pretraining_tensors_beside_the_model_are_left_out_and_named(folder, caplog):
    D = load_pretrained(folder).config.embed_dim
    pretraining = {
        "cls.seq_relationship.weight": np.ones((2, D), np.float32),
        "cls.seq_relationship.bias": np.zeros(2, np.float32),
        "bert.pooler.dense.weight": np.eye(D, dtype=np.float32),
        "bert.pooler.dense.bias": np.zeros(D, np.float32),
    }
    change_tensors(folder, lambda tensors: tensors.update(pretraining))
    with caplog.at_level(logging.WARNING):
        out = load_pretrained(folder)(np.array([[5, 6, 7]]))
    assert "left out cls.seq_relationship.bias, cls.seq_relationship.weight" in caplog.text
    np.testing.assert_allclose(out.pooler_output, np.tanh(out.last_hidden_state[:, 0]), atol=1e-6)


def test_unknown_tensors_are_refused_unless_allowed(folder):
    change_tensors(folder, lambda tensors: tensors.update({"bert.extra.weight": np.ones(3, np.float32)}))
    with pytest.raises(ConfigError, match=r"tensors that nothing here reads: bert.extra.weight. allow_unused=True"):
        load_pretrained(folder)
    assert load_pretrained(folder, allow_unused=True).task == "masked_lm"


def test_the_encoder_alone_is_loaded_whatever_head_stands_on_it(folder, caplog):
    """Also one that nobody here knows; what is not understood of the encoder itself is still refused."""
    want = load_pretrained(folder)(np.array([[5, 6, 7]])).last_hidden_state
    edit(folder, architectures=["BertForDreaming"])
    change_tensors(folder, lambda tensors: tensors.update({"dreams.out.weight": np.ones((3, 3), np.float32)}))
    with pytest.raises(ConfigError, match=r'task="none" .on the command line --task none. loads the encoder without'):
        load_pretrained(folder)
    loaded = load_pretrained(folder, task="none")
    assert (loaded.task, loaded.fresh) == (None, ())
    assert "dreams.out.weight" in caplog.text and "cls.predictions.bias" in caplog.text
    np.testing.assert_allclose(loaded(np.array([[5, 6, 7]])).last_hidden_state, want, atol=1e-6)
    change_tensors(folder, lambda tensors: tensors.update({"bert.encoder.adapter.weight": np.ones(3, np.float32)}))
    with pytest.raises(ConfigError, match=r"nothing here reads: bert.encoder.adapter.weight. allow_unused=True .* --a"):
        load_pretrained(folder, task="none")


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "auto_model.", "model.module.", "any thing."])
def test_what_a_whole_files_names_begin_with_is_left_out(folder, wrapper, caplog):
    tensors = read_weights(folder)
    save_file({wrapper + name: value for name, value in tensors.items()}, folder / "model.safetensors")
    loaded = load_pretrained(folder)
    assert f"left out the prefix {wrapper} of all names of tensors" in caplog.text
    assert (loaded.task, loaded.fresh) == ("masked_lm", ())
    # Where some names lack it, nobody knows what they are: the message says what would do.
    save_file({wrapper + n if "bert" in n else n: v for n, v in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(ConfigError) as error:
        load_pretrained(folder)
    way_out = str(error.value).partition("without it: ")[2].rstrip(".")
    save_file(eval(way_out, {"tensors": read_weights(folder)}), folder / "model.safetensors")
    assert load_pretrained(folder).fresh == ()


def test_num_labels_counts_before_id2label_and_names_are_those_of_as_many(tmp_path, caplog):
    """As in transformers 5."""
    folder = pathlib.Path(shutil.copytree(GOLDEN / "bert-classification", tmp_path / "bert"))
    edit(folder, num_labels=4, id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1})
    assert load_pretrained(folder).label_names == ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]
    assert "id2label names 2 of 4 labels" in caplog.text
    edit(folder, num_labels=..., id2label={str(i): f"class {i}" for i in (3, 1, 0, 2)})
    assert load_pretrained(folder).label_names == [f"class {i}" for i in range(4)]
    edit(folder, num_labels=2)
    with pytest.raises(ConfigError, match=r"tensor classifier.weight must have shape \[2, \d+\], says config.json"):
        load_pretrained(folder)


def test_fields_that_are_taken_unread_are_named(folder, caplog):
    edit(folder, language="english", name="Bert")
    load_pretrained(folder)
    assert "config.json has fields that nothing reads: language, name" in caplog.text


def test_what_is_no_published_folder_is_told_what_it_lacks(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, way_out in (("bert-base-uncased", "bert-base-uncased"), ("someone/model", "model")):
        assert is_published(name)
        with pytest.raises(ConfigError, match=rf"no folder at {name}.* `hf download {name} --local-dir {way_out}`"):
            load(name)
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "absent")
    assert "hf download" not in str(error.value)
    edit(folder, model_type=...)
    assert is_published(folder)
    with pytest.raises(ConfigError, match=r"config.json must name its model_type: got None"):
        load(folder)
    (folder / "config.json").unlink()
    assert is_published(folder)
    with pytest.raises(ConfigError, match=r"must have config.json, .* there is model.safetensors"):
        load(folder)
    with pytest.raises(ConfigError, match=r"model.safetensors is a file; give the folder that it is in"):
        load(folder / "model.safetensors")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    assert not is_published(tmp_path / "run")
    with pytest.raises(ConfigError, match="is a run folder, which load_run opens"):
        load_pretrained(tmp_path / "run")


def test_missing_tensors_of_the_encoder_are_named(folder):
    change_tensors(folder, lambda tensors: tensors.pop("bert.encoder.layer.1.output.dense.weight"))
    with pytest.raises(ConfigError, match=r"needs tensors that are missing: bert.encoder.layer.1.output.dense.weight"):
        load_pretrained(folder)


def test_wrong_shapes_are_named_with_both(folder):
    edit(folder, vocab_size=50)
    with pytest.raises(ConfigError, match=r"word_embeddings.weight must have shape \[50, \d+\], .*: found \[43, \d+\]"):
        load_pretrained(folder)


def test_two_tensors_of_one_meaning_are_refused(folder):
    """Whichever was read, the other would be lost without a word."""
    name = "embeddings.word_embeddings.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: np.zeros_like(tensors[f"bert.{name}"])}))
    with pytest.raises(ConfigError, match=rf"{name} and .*{name} are two of one meaning"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": "3", "id2label": ...}, "num_labels must be one whole number: got '3'"),
        ({"id2label": ["a"]}, "id2label, .*, is not understood"),
        ({"id2label": {"a": "b"}}, "id2label, .*, is not understood"),
        ({"pad_token_id": [1]}, r"pad_token_id must be one whole number: got \[1\]"),
    ],
)
def test_a_field_of_another_kind_is_named(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(ConfigError, match=message):
        load_pretrained(folder)


def test_json_that_is_no_config_is_named(folder):
    (folder / "config.json").write_text("[" * 100_000)
    assert is_published(folder)  # by its weights
    with pytest.raises(ConfigError, match="is no JSON"):
        load_pretrained(folder)
    (folder / "config.json").write_text("5")
    with pytest.raises(ConfigError, match="must be a JSON object: got int"):
        load_pretrained(folder)


def test_a_tied_decoder_that_differs_is_refused(folder):
    name = "cls.predictions.decoder.weight"
    wrong = 1 + read_weights(folder)["bert.embeddings.word_embeddings.weight"]
    change_tensors(folder, lambda tensors: tensors.update({name: wrong}))
    with pytest.raises(ConfigError, match=f"{name} must equal the token embedding"):
        load_pretrained(folder)


@pytest.mark.parametrize("task", ["masked_lm", "none"])
def test_the_embedding_is_read_by_either_of_its_tied_names(folder, task):
    tokens = np.array([[2, 7, 8, 3]])
    want = load_pretrained(folder, task=task)(tokens).last_hidden_state
    table = "bert.embeddings.word_embeddings.weight"
    change_tensors(folder, lambda t: t.update({"cls.predictions.decoder.weight": t.pop(table)}))
    np.testing.assert_array_equal(load_pretrained(folder, task=task)(tokens).last_hidden_state, want)
    edit(folder, tie_word_embeddings=False)  # then it is a table of logits, and there is none of tokens
    with pytest.raises(ConfigError, match=f"tensors that are missing: {table}"):
        load_pretrained(folder, task=task)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool"])
def test_whole_numbers_are_no_weights(folder, dtype):
    name = "bert.encoder.layer.1.output.dense.weight"
    change_tensors(folder, lambda t: t.update({name: (t[name] * 10).astype(dtype)}))
    with pytest.raises(ConfigError, match=f"{name} must hold floating-point numbers: it holds {dtype}. Quantized"):
        load_pretrained(folder)


def test_damaged_weights_and_configs_are_named(folder, tmp_path):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"model.safetensors is truncated"):
        load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json is no JSON"):
        load_pretrained(folder)
    with pytest.raises(ConfigError, match=r"no folder at .*nothing\. Give a run folder"):
        load_pretrained(tmp_path / "nothing")


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder):
    (folder / "tokenizer.json").write_text(train_wordpiece([" ".join("abcdefghijklmnopqrstuvwxyz")] * 2, 60).json)
    with pytest.raises(DataError, match=r"gives 'z' the id 56, and the embedding has 43 rows"):
        load_pretrained(folder)


def test_the_embedding_must_hold_the_highest_id_however_few_the_tokens(folder, tokenizer):
    content = json.loads(tokenizer.json)
    content["model"]["vocab"]["list"] = 43
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"gives 'list' the id 43, and the embedding has 43 rows"):
        load_pretrained(folder)


def test_ids_and_rows_that_the_model_cannot_take_are_refused(folder):
    loaded = load_pretrained(folder)
    with pytest.raises(DataError, match=r"must lie in 0 .. 42: got 5 .. 43"):
        loaded(np.array([[5, 43]]))
    with pytest.raises(DataError, match=r"must lie in 0 .. 42: got 5 .. 4294967301"):
        loaded(np.array([[5, 5 + 2**32]]))
    with pytest.raises(DataError, match=r"rows of 15 tokens: got 16"):
        loaded(np.full((1, 16), 5))
    ids = np.full((2, 5), 5)
    with pytest.raises(DataError, match=r"token types must lie in 0 .. \d: got 9 .. 9"):
        loaded(ids, token_type_ids=np.full((2, 5), 9))
    # Past the annotations, which tests check.
    for wrong in ([5, 6], [[5], [6, 7]], [[5.0]], np.zeros((0, 3), int), np.zeros((2, 0), int)):
        with pytest.raises(DataError, match="token ids must be"):
            loaded._ids_and_mask(wrong, None)
    for shape in ((2, 1), (1, 5), (2, 9), (5,)):
        with pytest.raises(DataError, match=r"attention_mask must have a number for each token, \(2, 5\): got"):
            loaded._ids_and_mask(ids, np.ones(shape))


MODEL = EncoderConfig(num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, max_length=40)


def make_run(path, tokenizer, label_names=None, **model) -> RunConfig:
    """A run folder as training leaves it, with parameters that are no zeros and ones."""
    model = dataclasses.replace(MODEL, vocab_size=round_up_vocab(tokenizer.vocab_size), **model)
    objective = "classification" if label_names else "masked_lm"
    data = DataConfig(row_length=32)
    config = RunConfig(run_dir=str(path), objective=objective, model=model, data=data, seed=3)
    params = nnx.to_pure_dict(nnx.split(model_factory(config, label_names)())[1])
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + jnp.asarray(0.1 * draw.standard_normal(x.shape), jnp.float32), params)
    run = {"config": to_dict(config), "tokenizer": tokenizer.json, "label_names": label_names}
    with Checkpoints(path, keep=1) as checkpoints:
        checkpoints.save(TrainState(jnp.zeros((), jnp.int32), params, {}), 7, run)
    return config


@pytest.mark.parametrize(
    ("labels", "model", "architecture"),
    [
        (None, {"num_token_types": 2}, "BertForMaskedLM"),
        (["no", "yes", "maybe"], {"num_token_types": 1}, "BertForSequenceClassification"),
        (None, {}, "DistilBertForMaskedLM"),
        (None, {"num_token_types": 2, "num_layer_groups": 1, "embedding_dim": 10}, "AlbertForMaskedLM"),
        (None, {"position": "rope", "norm_placement": "pre", "gated": True, "use_bias": False, "embedding_norm": True,
                "first_attention_norm": False, "window": 4, "global_every": 2}, "ModernBertForMaskedLM"),
    ],
)  # fmt: skip
def test_a_run_exported_and_loaded_gives_the_same_answers(tmp_path, tokenizer, labels, model, architecture, capsys):
    make_run(tmp_path / "run", tokenizer, labels, **model)
    main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert f"a {architecture}" in capsys.readouterr().out
    assert is_published(tmp_path / "out") and not is_published(tmp_path / "run")
    ours, again = load_run(tmp_path / "run"), load(tmp_path / "out")
    assert again.label_names == labels

    def ask(model):
        return model.classify("the value of a list") if labels else model.fill_mask("the [MASK] of a list")[0]

    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    has_types = model.get("num_token_types", 0) >= 2
    assert ("token_type_ids" in settings["model_input_names"]) == has_types
    if labels and ours.config.model.position == "learned":  # no more is read than there are positions
        room = ours.config.model.max_length - 2
        assert ours.classify("value " * 999) == ours.classify("value " * room)
    for mine, theirs in zip(ask(ours), ask(again), strict=True):
        assert mine.keys() == theirs.keys()
        np.testing.assert_allclose(mine["probability"], theirs["probability"], rtol=1e-5)
    import_folder(tmp_path / "out", tmp_path / "back")
    assert ask(load_run(tmp_path / "back")) == ask(again)


def test_exports_are_rounded_only_as_asked(tmp_path, tokenizer):
    make_run(tmp_path / "run", tokenizer, num_token_types=2)
    export_run(tmp_path / "run", tmp_path / "low", "bfloat16")
    assert {t.dtype.name for t in read_weights(tmp_path / "low").values()} == {"bfloat16"}
    assert json.loads((tmp_path / "low" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_pretrained(tmp_path / "low").task == "masked_lm"


def test_a_model_that_no_family_can_say_is_not_exported(tmp_path, tokenizer):
    make_run(tmp_path / "run", tokenizer, position="sinusoidal", position_scale=True, norm_placement="pre")
    with pytest.raises(ConfigError, match=r"no published family can say this model; nearest: .*position sinusoidal"):
        export_run(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"transformers has no NeoBERT: it can read no folder of neobert"):
        export_run(tmp_path / "run", tmp_path / "out", model_type="neobert")
    with pytest.raises(ConfigError, match=r"model_type 'gpt' is not known; known are albert"):
        export_run(tmp_path / "run", tmp_path / "out", model_type="gpt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"must be empty or new: it has notes.txt"):
        export_run(tmp_path / "run", tmp_path / "full")


def test_a_folder_without_a_head_is_no_run_to_ask_but_one_to_start_from(tmp_path, tokenizer, caplog):
    folder = pathlib.Path(shutil.copytree(GOLDEN / "electra-discriminator", tmp_path / "plain"))
    (folder / "tokenizer.json").write_text(tokenizer.json)
    with pytest.raises(DataError, match=r"the folder has no head\.bias, head\.dense\.bias"):
        load(folder, head="none").fill_mask("a [MASK]")
    with pytest.raises(DataError, match="this one is replaced_token_detection"):
        load(folder).fill_mask("a [MASK]")
    with caplog.at_level(logging.WARNING):
        import_folder(folder, tmp_path / "run", head="none")
    assert "needs head.bias, head.dense.bias" in caplog.text
    assert load_run(tmp_path / "run").config.model.embedding_dim == load_pretrained(folder).config.embedding_dim


def classifier_folder(tmp_path, tokenizer):
    make_run(tmp_path / "run", tokenizer, ["no", "yes"], num_token_types=2)
    export_run(tmp_path / "run", tmp_path / "published")
    return tmp_path / "published"


def test_a_classifier_that_is_not_there_is_left_out(tmp_path, tokenizer):
    """Nobody knows its classes; the encoder is a run to start from, and is exported alone."""
    folder = classifier_folder(tmp_path, tokenizer)
    tensors = read_weights(folder)
    change_tensors(folder, lambda tensors: [tensors.pop(f"classifier.{part}") for part in ("weight", "bias")])
    import_folder(folder, tmp_path / "imported")
    assert load_run(tmp_path / "imported").config.objective == "masked_lm"
    assert export_run(folder, tmp_path / "out", encoder_only=True) == "BertModel"
    name = "embeddings.word_embeddings.weight"
    np.testing.assert_array_equal(read_weights(tmp_path / "out")[name], tensors[f"bert.{name}"])


def test_a_classifier_is_asked_by_its_problem_type(tmp_path, tokenizer):
    folder = classifier_folder(tmp_path, tokenizer)
    assert load(folder).config.objective == "classification"
    edit(folder, problem_type="multi_label_classification")
    run = load(folder)
    assert run.config.objective == "multi_label" and set(next(run.predict(["the value"]))["probabilities"]) == {
        "no", "yes"}  # fmt: skip
    edit(folder, problem_type="regression")
    with pytest.raises(DataError, match=r"head\.out\.bias of shape \[1\]: the folder's is \[2\]"):
        load(folder)
    edit(folder, problem_type="ranking")
    with pytest.raises(DataError, match="classification head of problem_type 'ranking': known are multi_label"):
        load(folder)


def test_the_command_line_ends_with_a_message(tmp_path, folder, capsys):
    for arguments in (["import", str(folder), str(tmp_path / "run")], ["fill-mask", str(folder), "a [MASK]"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "a run needs a tokenizer, and the folder has none: looked for tokenizer.json" in capsys.readouterr().err
