"""Whatever is loaded is written: the same arrays, config and texts come back, here and in transformers."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from flax_encoder.commands import main
from flax_encoder.config import ConfigError, DecoderConfig, HeadConfig
from flax_encoder.families import FAMILIES
from flax_encoder.families.configs import read_head
from flax_encoder.nn.decoder import EncoderDecoder
from flax_encoder.nn.partition import flatten
from flax_encoder.published.generation_settings import read_settings
from flax_encoder.published.load import load_pretrained
from flax_encoder.published.model import Pretrained, PretrainedModel
from flax_encoder.published.write import write_pretrained

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = [(f, task) for f in FAMILIES if f.is_in_transformers for task in (None, *f.heads)]
KEPT = ("config", "task", "head", "pooling", "label_names", "pad_id", "decoder", "problem_type", "fresh")


def made(family, task, has_pooler=True) -> Pretrained:
    """A small model of random weights, as `load_pretrained` would give it."""
    small = {"vocab_size": 11, "num_layers": 2, "embed_dim": 12, "num_heads": 2, "mlp_dim": 5, "max_length": 9}
    presets = next(f.presets for f in FAMILIES if f.presets and f.rows[:4] == family.rows[:4])
    config = dataclasses.replace(next(iter(family.presets.values()), next(iter(presets.values()))), **small)
    config = dataclasses.replace(config, attention_head_dim=config.attention_head_dim and 6)
    head, pooling = read_head(family, task, {}) if task else (HeadConfig(), "cls")
    decoder = None
    if task == "text_to_text":
        decoder = DecoderConfig(num_layers=1, tied=True, logit_scale=config.embed_dim**-0.5)
        model = EncoderDecoder(config, decoder, rngs=nnx.Rngs(0))
    else:
        has_pooler = has_pooler and bool(family.pooler) and task in (None, "masked_lm")
        outputs = (family.heads[task].num_outputs or 3) if task else 0
        model = PretrainedModel(config, task, head, outputs, pooling, has_pooler, rngs=nnx.Rngs(0))
    draw = np.random.default_rng(0)
    graphdef, params = nnx.split(model)
    params = jax.tree.map(lambda x: draw.standard_normal(x.shape).astype(np.float32), params)
    pad = config.position_offset - 1 if family.counts_real_tokens else 0
    names = ["a", "b", "c"] if task in ("classification", "token_classification") else None
    kind = "multi_label_classification" if task == "classification" else None
    settings = read_settings(GOLDEN, {"decoder_start_token_id": 3, "num_beams": 2}) if decoder else None
    return Pretrained(
        nnx.merge(graphdef, params), config, None, family, task, head, pooling, names, pad, fresh=(), decoder=decoder,
        num_outputs=(family.heads[task].num_outputs or 3) if task else 0, settings=settings, problem_type=kind,
    )  # fmt: skip


def parameters(loaded):
    return flatten(nnx.to_pure_dict(nnx.split(loaded.model)[1]))


@pytest.mark.parametrize(("family", "task"), CASES, ids=lambda x: getattr(x, "model_type", x))
def test_every_head_of_every_family_comes_back_as_it_was_written(tmp_path, family, task):
    written = made(family, task)
    architecture = write_pretrained(written, tmp_path / "out")
    assert architecture == (family.heads[task].architectures[0] if task else family.base)
    # Such a folder is opened as a masked LM's where nothing is said.
    back = load_pretrained(tmp_path / "out", task=task if task == "pretraining" else None)
    got, want = parameters(back), parameters(written)
    assert got.keys() == want.keys()
    for path, value in want.items():
        np.testing.assert_array_equal(got[path], value, err_msg=path)
    assert back.task == task and back.fresh == ()
    assert (back.label_names, back.pooling, back.problem_type) == (
        written.label_names, written.pooling, written.problem_type
    )  # fmt: skip
    if written.settings is not None:
        assert back.generation == written.generation and back.decoder == written.decoder


def test_a_folder_goes_through_export_with_all_that_it_had(tmp_path, capsys):
    """A discriminator's head, which no run has, and a decoder with how it writes."""
    for name in ("electra-discriminator", "text_to_text/t5_v1_1"):
        main(["export", str(GOLDEN / name), str(tmp_path / name)])
        before, after = load_pretrained(GOLDEN / name), load_pretrained(tmp_path / name)
        for path, value in parameters(before).items():
            np.testing.assert_array_equal(parameters(after)[path], value, err_msg=path)
        assert all(getattr(after, part) == getattr(before, part) for part in KEPT)
    assert "a ElectraForPreTraining" in capsys.readouterr().out
    main(["export", str(GOLDEN / "electra-discriminator"), str(tmp_path / "alone"), "--task", "none"])
    assert load_pretrained(tmp_path / "alone").task is None


def test_a_head_that_is_not_there_is_not_exported(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["export", str(GOLDEN / "bert-masked_lm"), str(tmp_path / "out"), "--task", "classification"])
    assert "of its classification head: --task none exports the encoder without it" in capsys.readouterr().err


@pytest.mark.parametrize(("tied", "scale"), [(True, 12**-0.5), (True, 1.0), (False, 12**-0.5), (False, 1.0)])
def test_every_kind_of_t5_logits_comes_back(tmp_path, tied, scale):
    family = next(f for f in FAMILIES if f.model_type == "t5")
    plain = made(family, "text_to_text")
    decoder = DecoderConfig(num_layers=1, tied=tied, logit_scale=scale)
    model = EncoderDecoder(plain.config, decoder, rngs=nnx.Rngs(1))
    write_pretrained(dataclasses.replace(plain, model=model, decoder=decoder), tmp_path / "out")
    back = load_pretrained(tmp_path / "out")
    assert back.decoder == decoder
    ids = np.array([[5, 6, 7]])
    want = dataclasses.replace(plain, model=model, decoder=decoder)(ids, decoder_input_ids=ids).logits
    np.testing.assert_array_equal(back(ids, decoder_input_ids=ids).logits, want)
    with pytest.raises(ConfigError, match=r"by embed_dim \*\* -0.5 or not at all: got logit_scale 0.7"):
        write_pretrained(dataclasses.replace(plain, decoder=DecoderConfig(logit_scale=0.7)), tmp_path / "other")


def test_what_transformers_has_not_is_not_written(tmp_path):
    neobert = next(f for f in FAMILIES if f.model_type == "neobert")
    with pytest.raises(ConfigError, match="transformers has no NeoBERT"):
        write_pretrained(made(neobert, None), tmp_path / "out")
    bert = made(FAMILIES[0], None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    with pytest.raises(ConfigError, match=r"must be empty or new: it has notes.txt"):
        write_pretrained(bert, tmp_path / "full")


@pytest.fixture
def t5(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "text_to_text/t5" / name, tmp_path)
    return tmp_path


@pytest.mark.parity
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_opens_a_written_decoder_and_writes_the_same(tmp_path, tied):
    torch = pytest.importorskip("torch", reason="compares with torch: pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers")
    loaded = load_pretrained(GOLDEN / "text_to_text" / ("t5" if tied else "t5_v1_1"))
    write_pretrained(loaded, tmp_path / "out")
    model, info = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    ids = np.array([[5, 6, 7, 8], [9, 4, 3, 2]])
    with torch.no_grad():
        want = model.eval()(input_ids=torch.tensor(ids), decoder_input_ids=torch.tensor(ids)).logits.numpy()
    got = loaded(ids, decoder_input_ids=ids).logits
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()
    text = model.generate(torch.tensor(ids), max_new_tokens=7).numpy()
    np.testing.assert_array_equal(loaded.generate(ids, max_new_tokens=7)[:, : text.shape[1]], text)


def test_one_token_embedding_is_read_by_any_of_its_names(t5):
    """T5's three names; where the encoder's own and the decoder's differ, the encoder alone has its own."""
    from safetensors.numpy import load_file, save_file

    ids, file = np.array([[5, 6, 7]]), t5 / "model.safetensors"
    tensors = load_file(file)
    whole = load_pretrained(t5)
    want = whole(ids).last_hidden_state
    token = tensors.pop("shared.weight")
    tensors.pop("lm_head.weight", None)
    names = ("encoder.embed_tokens.weight", "shared.weight", "decoder.embed_tokens.weight")
    for present in (names[:1], names[2:], names[1:], names):
        save_file(tensors | dict.fromkeys(present, token), file)
        got = load_pretrained(t5)
        assert got.decoder == whole.decoder and parameters(got).keys() == parameters(whole).keys()
        np.testing.assert_array_equal(got.model.encoder.embedding.token[...], token, err_msg=str(present))
    save_file(tensors | {names[0]: token, names[1]: token[::-1].copy()}, file)
    with pytest.raises(ConfigError, match=r"embed_tokens.weight and shared.weight must be equal, .* --task none on"):
        load_pretrained(t5)
    np.testing.assert_array_equal(load_pretrained(t5, task="none")(ids).last_hidden_state, want)
    # Madlad's: a decoder's table that serves both, and logits of their own.
    config = json.loads((t5 / "config.json").read_text())
    (t5 / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    save_file(tensors | {names[2]: token, "lm_head.weight": token[::-1].copy()}, file)
    loaded = load_pretrained(t5)
    assert not loaded.decoder.tied and loaded.fresh == ()


