"""Folders that sentence-transformers wrote give its vectors here, and ours give ours there.

The library may be in this Python or in another, whose path is in TORCH_PYTHON.
"""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from flax_encoder.commands import main
from flax_encoder.runs.embed import load_embedder
from tests.peer_sentences import TEXTS

pytestmark = pytest.mark.parity
ASSETS = pathlib.Path.home() / ".cache/flax-encoder-assets"
PEER = pathlib.Path(__file__).parents[1] / "peer_sentences.py"
PYTHON = sys.executable if importlib.util.find_spec("sentence_transformers") else os.environ.get("TORCH_PYTHON")


def peer(*arguments):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}
    done = subprocess.run([PYTHON, str(PEER), *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    if PYTHON is None:
        pytest.skip("needs sentence-transformers, here or in TORCH_PYTHON")
    root = tmp_path_factory.mktemp("peer")
    peer("make", root)
    return sorted(path.parent for path in root.glob("*/want.npz"))


def assert_same(got, want, name):
    finite = np.isfinite(want)
    np.testing.assert_array_equal(finite, np.isfinite(got), err_msg=name)
    scale = np.abs(want[finite]).max()
    np.testing.assert_allclose(got[finite], want[finite], rtol=0, atol=2e-5 * scale, err_msg=name)


@pytest.mark.skipif(not (ASSETS / "minilm/.done").exists(), reason="needs the asset minilm")
def test_minilm_has_the_same_vectors_in_both_libraries(tmp_path):
    if PYTHON is None:
        pytest.skip("needs sentence-transformers, here or in TORCH_PYTHON")
    shutil.copytree(ASSETS / "minilm", tmp_path / "minilm")
    peer("encode", tmp_path / "minilm")
    want = np.load(tmp_path / "minilm/got.npz")["default"]
    with jax.default_matmul_precision("highest"):
        got, _ = load_embedder(tmp_path / "minilm").embed(TEXTS)
    assert_same(got, want, "minilm")


def test_both_libraries_give_the_same_vectors_of_each_others_folders(folders, tmp_path):
    assert len(folders) == 17
    with jax.default_matmul_precision("highest"):
        for folder in folders:
            want, embedder = np.load(folder / "want.npz"), load_embedder(folder)
            for name in want:
                got, _ = embedder.embed(TEXTS, prompt_name=None if name == "default" else name)
                assert_same(got, want[name], f"{folder.name} {name}")
            main(["export", str(folder), str(tmp_path / folder.name)])
    peer("encode", *(tmp_path / folder.name for folder in folders))
    for folder in folders:
        want, got = np.load(folder / "want.npz"), np.load(tmp_path / folder.name / "got.npz")
        assert {*got} == {*want}
        for name in want:
            assert_same(got[name], want[name], f"{folder.name} {name}, ours")
