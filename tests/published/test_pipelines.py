"""An exported run in transformers' own pipeline gives the answers that `predict` gives of the run."""

import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_encoder.config import DataConfig, EncoderConfig, HeadConfig, RunConfig
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from flax_encoder.nn.partition import abstract_model
from flax_encoder.runs.exchange import export_run
from flax_encoder.runs.load import load_run
from flax_encoder.runs.loaded import model_factory
from flax_encoder.runs.record import RunRecord
from flax_encoder.training.checkpoint import Checkpoints
from flax_encoder.training.step import TrainState

PYTHON = sys.executable if importlib.util.find_spec("torch") else os.environ.get("TORCH_PYTHON")
PEER = pathlib.Path(__file__).parents[1] / "peer_pipelines.py"
TEXTS = ["the list of a value", "a value in the list returns", "of each item in order", "calls the given function once"]
MODEL = EncoderConfig(num_layers=2, embed_dim=24, num_heads=3, mlp_dim=40, max_length=40, num_token_types=2,
                      norm_placement="post", embedding_norm=True)  # fmt: skip


def ask(*questions: dict) -> list:
    """The pipelines' answers."""
    if PYTHON is None:
        pytest.skip("compares with transformers' pipelines: set TORCH_PYTHON to a Python that has torch and them")
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    done = subprocess.run([PYTHON, str(PEER)], input=lines, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", "null"))]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(run, folder) of an objective: large weights, drawn at random, so that answers differ from text to text."""
    tokenizer = train_wordpiece(TEXTS * 3, 120)

    def make(objective: str, names: list[str] | None, **fields):
        folder = tmp_path_factory.mktemp(objective)
        model = EncoderConfig(**vars(MODEL) | {"vocab_size": tokenizer.vocab_size})
        config = RunConfig(
            objective=objective, model=model, run_dir=str(folder / "run"), data=DataConfig(row_length=32), **fields
        )
        _, abstract = abstract_model(model_factory(config, names))
        generator = np.random.default_rng(5)
        params = jax.tree.map(
            lambda x: jnp.asarray(0.5 * generator.standard_normal(x.shape), x.dtype), nnx.to_pure_dict(abstract)
        )
        with Checkpoints(folder / "run", keep=1) as checkpoints:
            record = RunRecord(config, tokenizer, names)
            checkpoints.save(TrainState(jnp.ones((), jnp.int32), params, {}), 1, record.to_json())
        export_run(folder / "run", folder / "out")
        return load_run(folder / "run"), str(folder / "out")

    return make


@pytest.mark.parity
def test_texts_are_classified_alike(exported):
    run, folder = exported("classification", ["no", "yes", "maybe"])
    several, other = exported("multi_label", ["cheap", "good", "fast"])
    number, third = exported("regression", None)
    texts = {"kind": "text-classification", "inputs": TEXTS}
    two = [*itertools.pairwise(TEXTS)]
    pairs = {"kind": "text-classification", "inputs": [{"text": a, "text_pair": b} for a, b in two]}
    every, plain = {"top_k": None}, {"function_to_apply": "none"}
    of_one, of_pairs, of_several, of_number = ask(
        texts | {"folder": folder, "options": every}, pairs | {"folder": folder, "options": every},
        texts | {"folder": other, "options": every}, texts | {"folder": third, "options": plain},
    )  # fmt: skip
    for theirs, asked in ((of_one, TEXTS), (of_pairs, two)):
        for one, answer in zip(theirs, run.predict(asked), strict=True):
            scores = {x["label"]: x["score"] for x in one}
            assert max(scores, key=scores.__getitem__) == answer["label"]
            for label, probability in answer["probabilities"].items():
                np.testing.assert_allclose(probability, scores[label], rtol=1e-4, atol=1e-7)
    for one, answer in zip(of_several, several.predict(TEXTS), strict=True):
        scores = {x["label"]: x["score"] for x in one}
        assert {label for label, score in scores.items() if score > 0.5} == set(answer["labels"])
        for label, probability in answer["probabilities"].items():
            np.testing.assert_allclose(probability, scores[label], rtol=1e-4, atol=1e-7)
    for [one], answer in zip(of_number, number.predict(TEXTS), strict=True):
        np.testing.assert_allclose(answer["score"], one["score"], rtol=1e-4, atol=1e-5)


@pytest.mark.parity
def test_masks_are_filled_alike(exported):
    run, folder = exported("masked_lm", None, head=HeadConfig(transform=True))
    texts = [text.replace("list", "[MASK]") for text in TEXTS[:2]]
    [theirs] = ask({"kind": "fill-mask", "folder": folder, "inputs": texts, "options": {"top_k": 3}})
    for text, one in zip(texts, theirs, strict=True):
        [ours] = run.fill_mask(text, top=3)
        likely = [x for x in one if x["token_str"] not in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")]
        assert likely
        for a, b in zip(ours, likely, strict=False):
            assert a["token"] == run.tokenizer.token(b["token"])
            np.testing.assert_allclose(a["probability"], b["score"], rtol=1e-4)


@pytest.mark.parity
def test_questions_are_answered_alike(exported):
    run, folder = exported("question_answering", None)
    asked = [(a, b) for a in TEXTS for b in TEXTS if a != b]
    inputs = [{"question": a, "context": b} for a, b in asked]
    options = {"max_answer_len": 30, "doc_stride": 8, "max_seq_len": 32}
    [theirs] = ask({"kind": "question-answering", "folder": folder, "inputs": inputs, "options": options})
    if theirs is None:
        pytest.skip("transformers 5 has no pipeline for question answering")
    for (_, context), one, answer in zip(asked, theirs, run.predict(asked), strict=True):
        assert (one["answer"], one["start"], one["end"]) == (answer["answer"], answer["start"], answer["end"])
        assert context[answer["start"] : answer["end"]] == answer["answer"]
