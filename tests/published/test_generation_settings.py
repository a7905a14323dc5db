"""generation_config.json: each field is honoured as transformers honours it, changes nothing, or is refused by name."""

import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_encoder.config import ConfigError
from flax_encoder.data.sources.records import DataError
from flax_encoder.nn.generation import Generation
from flax_encoder.nn.logit_rules import LogitRules, apply_rules
from flax_encoder.published.generation_settings import read_settings
from flax_encoder.published.load import load_pretrained

T5 = pathlib.Path(__file__).parents[1] / "golden/text_to_text/t5"
IDS = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
V, T, B, M = 7, 6, 3, 5
id_lists = st.lists(st.integers(0, V - 1), min_size=1, max_size=3).map(tuple)
rules = st.builds(
    LogitRules,
    repetition_penalty=st.sampled_from([1.0, 0.5, 2.0]),
    no_repeat_ngram_size=st.integers(0, 4),
    encoder_no_repeat_ngram_size=st.integers(0, 4),
    bad_words_ids=st.lists(id_lists, max_size=3).map(tuple),
    min_new_tokens=st.integers(0, 4),
    forced_bos_id=st.none() | st.integers(0, V - 1),
    forced_eos_ids=st.just(()) | id_lists,
    suppress_ids=st.just(()) | id_lists,
    begin_suppress_ids=st.just(()) | id_lists,
)


def plain_rules(rules, scores, text, source, ends):
    """One text at a time, as the rules are written down; `text` and `source` are lists without padding."""
    scores = np.array(scores, np.float64)
    for i in set(text):
        p = rules.repetition_penalty
        scores[i] = scores[i] * p if scores[i] < 0 else scores[i] / p
    for n, tokens in ((rules.no_repeat_ngram_size, text), (rules.encoder_no_repeat_ngram_size, source)):
        for start in range(len(tokens) - n + 1 if n and len(text) >= n - 1 else 0):
            if tokens[start : start + n - 1] == text[len(text) - n + 1 :]:
                scores[tokens[start + n - 1]] = -np.inf
    for word in rules.bad_words_ids:
        before = list(word[:-1])
        if word not in [(e,) for e in ends] and len(before) <= len(text) and text[len(text) - len(before) :] == before:
            scores[word[-1]] = -np.inf
    if len(text) - 1 < rules.min_new_tokens:
        scores[list(ends)] = -np.inf
    if rules.forced_bos_id is not None and len(text) == 1:
        scores[:], scores[rules.forced_bos_id] = -np.inf, 0
    if rules.forced_eos_ids and len(text) == T - 1:
        scores[:] = -np.inf
        scores[list(rules.forced_eos_ids)] = 0
    scores[list(rules.suppress_ids)] = -np.inf
    if len(text) == 1 + (rules.forced_bos_id is not None):
        scores[list(rules.begin_suppress_ids)] = -np.inf
    return scores


@settings(max_examples=60, deadline=None)
@given(
    rules=rules, lengths=st.tuples(*[st.integers(1, T - 1)] * B), seed=st.integers(0, 2**32 - 1),
    ends=st.just(()) | id_lists,
)  # fmt: skip
def test_rules_on_arrays_are_the_rules_one_text_at_a_time(rules, lengths, seed, ends):
    """Of three tokens in nine texts much repeats. What stands behind the text, or pads the source, changes nothing."""
    r = np.random.default_rng(seed)
    text, source = r.integers(0, 3, (B, T)), r.integers(0, 3, (B, M))
    scores = r.standard_normal((B, V)).astype(np.float32)
    real = np.array([[1] * M, [0, 0] + [1] * (M - 2), [1] * (M - 3) + [0] * 3], bool)
    with jax.disable_jit():
        got = apply_rules(rules, *map(jnp.asarray, (scores, text, lengths, source, real)), ends)
    for i in range(B):
        want = plain_rules(rules, scores[i], text[i, : lengths[i]].tolist(), source[i][real[i]].tolist(), ends)
        np.testing.assert_allclose(got[i], want, rtol=1e-6, err_msg=str(i))


def read(tmp_path, published=None, **fields):
    if fields:
        (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    return read_settings(tmp_path, published or {})


def test_each_field_stands_for_a_setting(tmp_path):
    said = read(
        tmp_path, {"pad_token_id": 3, "num_beams": 9}, num_beams=4, max_length=21, min_length=5, eos_token_id=[1, 5],
        decoder_start_token_id=2, no_repeat_ngram_size=3, encoder_no_repeat_ngram_size=2, repetition_penalty=1.5,
        length_penalty=0.5, early_stopping="never", bad_words_ids=[[4], [5, 6]], forced_bos_token_id=7,
        forced_eos_token_id=1, suppress_tokens=[8], begin_suppress_tokens=[9], top_k=5, temperature=0.5, bos_token_id=3,
        transformers_version="4", use_cache=True, num_return_sequences=1, typical_p=1.0, top_p=None,
    )  # fmt: skip
    rules = LogitRules(1.5, 3, 2, ((4,), (5, 6)), 4, 7, (1,), (8,), (9,))
    assert said.generation() == Generation(
        max_new_tokens=20, start_id=2, end_id=(1, 5), pad_id=3, num_beams=4, length_penalty=0.5, early_stopping="never",
        rules=rules,
    )  # fmt: skip
    assert said.generation(num_beams=1, max_length=4, eos_token_id=6, end_id=6, suppress_tokens=[]) == Generation(
        max_new_tokens=3, start_id=2, end_id=6, pad_id=3, rules=rules._replace(suppress_ids=())
    )
    assert said.generation(True, num_beams=1, top_p=0.9) == Generation(
        max_new_tokens=20, start_id=2, end_id=(1, 5), pad_id=3, is_drawn=True, temperature=0.5, top_k=5, top_p=0.9,
        rules=rules,
    )  # fmt: skip


def test_what_says_the_same_twice_is_settled_as_transformers_settles_it(tmp_path):
    said = read(tmp_path, max_length=9, max_new_tokens=3, min_new_tokens=1, min_length=8)
    assert (said.generation().max_new_tokens, said.generation().rules.min_new_tokens) == (3, 1)


def test_a_folder_without_the_file_says_it_in_its_config(tmp_path):
    assert read(tmp_path, {"num_beams": 3, "d_model": 5, "length_penalty": 2.0}).generation() == Generation(
        num_beams=3, length_penalty=2.0
    )


def test_drawing_that_the_folder_asks_for_has_the_top_k_that_the_file_means(tmp_path):
    assert read(tmp_path, do_sample=True).generation() == Generation(is_drawn=True, top_k=50)
    assert read(tmp_path, do_sample=True, top_k=0).generation() == Generation(is_drawn=True)
    assert read(tmp_path, do_sample=True, temperature=0.7).generation(False) == Generation()
    with pytest.raises(ValueError, match=r"does not sample: give num_beams=1, or do not sample \(do_sample=False\)"):
        read(tmp_path, do_sample=True, num_beams=2).generation()


@pytest.mark.parametrize("field", [
    {"typical_p": 0.9}, {"penalty_alpha": 0.6}, {"num_return_sequences": 3}, {"guidance_scale": 1.5},
    {"sequence_bias": [[[3], 1.0]]}, {"num_beam_groups": 2}, {"watermarking_config": {}}, {"min_p": 0.1},
    {"something_of_tomorrow": 3},
])  # fmt: skip
def test_what_is_not_done_is_refused_by_name_when_text_is_asked_for(tmp_path, field):
    """And the advice works: told otherwise, it writes."""
    said = read(tmp_path, **field)
    (name,) = field
    with pytest.raises(DataError, match=rf"generation_config.json asks for what is not done: {name} .*{name}=None"):
        said.generation()
    assert said.generation(**{name: None}) == Generation()
    if name != "something_of_tomorrow":
        with pytest.raises(ValueError, match=f"{name} is not done here"):
            said.generation(**field)


@pytest.mark.parametrize(("field", "message"), [
    ({"num_beams": "4"}, "num_beams must be a whole number: got '4'"),
    ({"eos_token_id": [1, "2"]}, "eos_token_id must be a list of token ids"),
    ({"decoder_start_token_id": [0, 1]}, "decoder_start_token_id must be a whole number"),
    ({"bad_words_ids": [5]}, "bad_words_ids must be a list of token ids: got"),
    ({"early_stopping": "soon"}, 'early_stopping must be true, false or "never"'),
    ({"do_sample": 1}, "do_sample must be true or false: got 1"),
])  # fmt: skip
def test_a_value_of_another_kind_is_named(tmp_path, field, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **field)


def test_a_setting_that_is_not_known_lists_the_known(tmp_path):
    with pytest.raises(ValueError, match=r"generate has no setting 'beams'; it has bad_words_ids, "):
        read(tmp_path).generation(beams=3)


def folder_that_says(tmp_path, said):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(T5 / name, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(IDS | said))
    return load_pretrained(tmp_path)


def test_a_folder_writes_as_it_says(tmp_path):
    """The texts are transformers'."""
    source = np.array([[5, 7, 9, 11, 13, 1], [6, 8, 10, 12, 14, 1]])
    said = {"num_beams": 3, "no_repeat_ngram_size": 2, "eos_token_id": [1, 9], "max_new_tokens": 6,
            "suppress_tokens": [10], "min_new_tokens": 2}  # fmt: skip
    got = folder_that_says(tmp_path, said).generate(source)
    assert got.tolist() == [[0, 18, 4, 4, 2, 37, 37], [0, 18, 20, 20, 9, 0, 0]]


def draw_settings(r: np.random.Generator, vocab_size: int) -> dict:
    def ids(n):
        return [int(i) for i in r.choice(np.arange(2, vocab_size), n, replace=False)]

    choices = {
        "num_beams": lambda: int(r.integers(2, 5)), "no_repeat_ngram_size": lambda: int(r.integers(1, 4)),
        "encoder_no_repeat_ngram_size": lambda: int(r.integers(1, 3)), "min_new_tokens": lambda: int(r.integers(1, 5)),
        "repetition_penalty": lambda: float(r.choice([0.7, 1.3, 2.5])), "forced_bos_token_id": lambda: ids(1)[0],
        "eos_token_id": lambda: [1, *ids(int(r.integers(1, 3)))], "forced_eos_token_id": lambda: ids(1)[0],
        "bad_words_ids": lambda: [ids(1), ids(2), ids(1) * 2, ids(3)], "suppress_tokens": lambda: ids(3),
        "begin_suppress_tokens": lambda: ids(4), "decoder_start_token_id": lambda: ids(1)[0],
        "max_length": lambda: int(r.integers(7, 13)), "min_length": lambda: int(r.integers(1, 6)),
    }  # fmt: skip
    said = {name: draw() for name, draw in choices.items() if r.random() < 0.35}
    if "min_new_tokens" in said:
        said.pop("min_length", None)
    if "max_length" not in said:
        said["max_new_tokens"] = int(r.integers(6, 14))
    if "num_beams" in said:
        early = [True, False, "never"][r.integers(3)]
        said |= {"length_penalty": float(r.choice([0.5, 2.0, -1.0])), "early_stopping": early}
    return said


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(int(os.environ.get("PARITY_CASES", "6"))))
def test_transformers_writes_the_same_texts(tmp_path, seed):
    torch = pytest.importorskip("torch", reason="compares with torch: pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers")
    r = np.random.default_rng(seed)
    vocab_size = json.loads((T5 / "config.json").read_text())["vocab_size"]
    said = draw_settings(r, vocab_size)
    ids = r.integers(2, vocab_size, (3, 7))
    mask = np.ones_like(ids)
    if "encoder_no_repeat_ngram_size" not in said:  # there torch takes padding for text
        mask[1, 5:] = ids[1, 5:] = 0
    with jax.default_matmul_precision("highest"):
        got = folder_that_says(tmp_path, said).generate(ids, mask)
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    want = model.generate(torch.tensor(ids), attention_mask=torch.tensor(mask)).numpy()

    def padded(text):
        """Alike after the end, where torch pads some texts with the end's id, and as long."""
        is_end = np.isin(text[:, 1:], said.get("eos_token_id", [1]))
        is_over = np.cumsum(is_end, axis=1) - is_end > 0
        text = np.concatenate([text[:, :1], np.where(is_over, 0, text[:, 1:])], axis=1)
        return np.pad(text, [(0, 0), (0, 20 - text.shape[1])])

    np.testing.assert_array_equal(padded(got), padded(want), err_msg=str(said))
