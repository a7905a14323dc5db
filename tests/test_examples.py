"""The examples of public docstrings, as they are typed."""

import doctest
import inspect
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_encoder

GOLDEN = pathlib.Path(__file__).parent / "golden"
FUNCTIONS = [name for name in flax_encoder.__all__ if inspect.isfunction(getattr(flax_encoder, name))]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """What examples call runs/movie, runs/first, bert and t5."""
    for name, source in {"runs/movie": "runs/classification", "runs/first": "runs/masked_lm", "bert": "bert-masked_lm",
                         "t5": "text_to_text/t5"}.items():  # fmt: skip
        shutil.copytree(GOLDEN / source, tmp_path / name)
    size = json.loads((tmp_path / "bert/config.json").read_text())["vocab_size"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", *(f"w{i}" for i in range(size - 7))]
    (tmp_path / "bert/vocab.txt").write_text("\n".join(words))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_has_an_example_that_runs(name, folders):
    names = {each: getattr(flax_encoder, each) for each in flax_encoder.__all__}
    names |= {"np": np, "jax": jax, "jnp": jnp, "nnx": nnx}
    [test, *_] = doctest.DocTestFinder(recurse=False).find(inspect.unwrap(names[name]), name, globs=names)
    assert test.examples, f"{name} has no example"
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert not said, "".join(said)
