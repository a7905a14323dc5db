"""Real published weights, where they have been fetched; FLAX_ENCODER_ASSETS names their folder."""

import os
import pathlib

import numpy as np
import pytest

from flax_encoder.published.load import load_pretrained
from flax_encoder.runs.load import load

ASSETS = pathlib.Path(os.environ.get("FLAX_ENCODER_ASSETS", pathlib.Path.home() / ".cache" / "flax-encoder-assets"))


def asset(name):
    if not (ASSETS / name / ".done").exists():
        pytest.skip(f"no real weights at {ASSETS / name}")
    return ASSETS / name


def test_a_real_masked_lm_with_old_names_knows_what_a_capital_is():
    guesses = load(asset("bert_tiny_mlm")).fill_mask("Paris is the capital of [MASK].")[0]
    assert guesses[0]["token"] == "city" and guesses[0]["probability"] > 0.1


def test_real_sentence_vectors_put_like_by_like():
    loaded = load_pretrained(asset("minilm"))
    texts = ["A cat sleeps on the sofa.", "A kitten naps on a couch.", "The bank raised its interest rates."]
    first, last = loaded.tokenizer.special("first"), loaded.tokenizer.special("last")
    rows = [[first, *ids, last] for ids in loaded.tokenizer.encode_batch(texts)]
    length = max(map(len, rows))
    ids = np.array([row + [0] * (length - len(row)) for row in rows])
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    hidden = loaded(ids, mask).last_hidden_state
    vectors = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    likeness = vectors @ vectors.T
    assert likeness[0, 1] > 0.6 > 0.3 > max(likeness[0, 2], likeness[1, 2])


@pytest.mark.parity
@pytest.mark.parametrize("name", ["minilm", "bert_tiny_mlm", "albert_smiles"])
def test_real_weights_give_torchs_numbers(name):
    torch = pytest.importorskip("torch", reason="compares with torch: pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers")
    folder = asset(name)
    loaded = load_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = transformers.AutoModelForMaskedLM if loaded.task == "masked_lm" else transformers.AutoModel
    if (folder / "pytorch_model.bin").exists():
        model = kind.from_config(config)
        tensors = torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu")
        assert not model.load_state_dict(tensors, strict=False).missing_keys
        model.tie_weights()
    else:
        model = kind.from_pretrained(folder)
    r = np.random.default_rng(0)
    ids, mask = r.integers(5, config.vocab_size, (3, 17)), np.arange(17) < np.array([[17], [9], [3]])
    with torch.no_grad():
        want = model.eval()(torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True)
    got = loaded(ids, mask)
    pairs = list(zip(got.hidden_states, want.hidden_states, strict=True))
    pairs += [(got.logits, want.logits)] if loaded.task else []
    for ours, theirs in pairs:
        theirs = theirs.numpy()
        assert np.abs(ours - theirs)[mask].max() <= 2e-5 * np.abs(theirs).max()
    if loaded.task and name != "albert_smiles":
        guesses = np.argsort(-got.logits[mask], axis=-1)[:, :5]
        np.testing.assert_array_equal(guesses, np.argsort(-want.logits.numpy()[mask], axis=-1)[:, :5])
