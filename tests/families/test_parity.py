"""The live comparison with transformers on torch; tests/parity.py is what is compared."""

import numpy as np
import pytest
from parity import cases, compare, is_exact

from flax_encoder.data.tokens.tokenizer import train_wordpiece
from flax_encoder.runs.exchange import export_run
from flax_encoder.runs.load import load_run
from tests.published.test_load import TEXTS, make_run


@pytest.mark.parity
@pytest.mark.parametrize(("family", "task", "seed"), list(cases()))
def test_random_models_agree_with_torch(family, task, seed):
    pytest.importorskip("torch", reason="compares with torch: pip install -e '.[parity]'")
    pytest.importorskip("transformers", reason="compares with transformers: pip install -e '.[parity]'")
    worst = compare(family, task, seed)
    assert is_exact(worst, (family, task, seed)), worst


@pytest.mark.parity
@pytest.mark.parametrize(
    ("labels", "model"),
    [
        (None, {"num_token_types": 2}),
        (["no", "yes", "maybe"], {"num_token_types": 1}),
        (None, {}),
        (None, {"position": "rope", "norm_placement": "pre", "gated": True, "use_bias": False, "embedding_norm": True,
                "first_attention_norm": False, "window": 4, "global_every": 2}),
    ],
)  # fmt: skip
def test_transformers_opens_an_exported_run_and_answers_the_same(tmp_path, labels, model):
    """Model and tokenizer, with no missing or unexpected key."""
    torch = pytest.importorskip("torch", reason="compares with torch: pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers")
    make_run(tmp_path / "run", train_wordpiece(TEXTS * 3, 43), labels, **model)
    export_run(tmp_path / "run", tmp_path / "out")
    kind = transformers.AutoModelForSequenceClassification if labels else transformers.AutoModelForMaskedLM
    theirs, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the value of a list" if labels else f"the {tokenizer.mask_token} of a list"
    rows = tokenizer(text, return_tensors="pt")
    ours = load_run(tmp_path / "run")
    batch = ours.row(text.replace(tokenizer.mask_token, "[MASK]"))
    length = rows["input_ids"].shape[1]
    np.testing.assert_array_equal(rows["input_ids"], np.asarray(batch["tokens"])[:, :length])
    with torch.no_grad():
        logits = theirs.eval()(**rows).logits[0]
    if labels:
        want = dict(zip(labels, torch.softmax(logits, -1).tolist(), strict=True))
        got = {row["label"]: row["probability"] for row in ours.classify(text)}
    else:
        mask = int((rows["input_ids"][0] == tokenizer.mask_token_id).nonzero())
        probabilities = torch.softmax(logits[mask], -1)
        got = {row["token"]: row["probability"] for row in ours.fill_mask(text, top=5)[0]}
        want = {token: probabilities[tokenizer.convert_tokens_to_ids(token)].item() for token in got}
    assert got.keys() == want.keys()
    np.testing.assert_allclose([got[k] for k in got], [want[k] for k in got], rtol=1e-4)
