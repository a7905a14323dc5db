"""A model as StableHLO answers as it does here, in a process that has jax alone."""

import pathlib
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from flax_encoder.commands import main
from flax_encoder.config import ConfigError, EncoderConfig, RunConfig
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from flax_encoder.published.load import read_json
from flax_encoder.runs.as_published import published_config
from flax_encoder.runs.load import load
from flax_encoder.runs.loaded import LoadedRun, model_factory
from flax_encoder.runs.stablehlo import as_function

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TEXTS = ["the list of a value", "a value in the list", "of each item"]
# What runs where this library is not: numpy and jax read the file and the rows.
CLIENT = """
import sys
import numpy as np
from jax import export
program = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
rows = np.load(sys.argv[2])
made = program.call(*(rows[name] for name in rows.files))
np.savez(sys.argv[3], **{name: np.asarray(x) for name, x in made.items()})
assert not any(name.startswith("flax_encoder") for name in sys.modules)
"""


def with_tokenizer(name: str, folder: pathlib.Path) -> pathlib.Path:
    shutil.copytree(GOLDEN / name, folder)
    (folder / "tokenizer.json").write_text(
        train_wordpiece(TEXTS * 3, read_json(folder / "config.json")["vocab_size"]).json
    )
    return folder


@pytest.mark.parametrize("name", ["bert-classification", "modernbert-masked_lm"])
def test_a_program_gives_the_models_numbers_for_any_rows(tmp_path, name):
    pytest.importorskip("flatbuffers", reason="pip install -e '.[stablehlo]'")
    folder = with_tokenizer(name, tmp_path / "folder")
    # In a process of its own: here lengths are checked to be whole numbers, and those of the program are symbols.
    command = [sys.executable, "-m", "flax_encoder", "export", str(folder), str(tmp_path / "model.stablehlo")]
    done = subprocess.run([*command, "--stablehlo"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = load(folder)
    for count, length in ((1, 9), (3, 12)):
        rows = [run.row(text) for text in TEXTS[:count]]
        names = ("tokens", "segment_ids", "token_types")[: 3 if "bert-c" in name else 2]
        batch = {n: np.concatenate([row.get(n, np.zeros_like(row["tokens"])) for row in rows])[:, :length]
                 for n in names}  # fmt: skip
        np.savez(tmp_path / "rows.npz", **{n: x.astype(np.int32) for n, x in batch.items()})
        files = [str(tmp_path / file) for file in ("model.stablehlo", "rows.npz", "out.npz")]
        done = subprocess.run([sys.executable, "-c", CLIENT, *files], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        got = np.load(tmp_path / "out.npz")
        for i, text in enumerate(TEXTS[:count]):
            here = run(text)
            np.testing.assert_allclose(got["last_hidden_state"][i, : len(here.vectors)], here.vectors, atol=3e-5)
        if "classification" in name:
            want = [[*answer["probabilities"].values()] for answer in run.predict(TEXTS[:count])]
            odds = np.exp(got["logits"]) / np.exp(got["logits"]).sum(-1, keepdims=True)
            np.testing.assert_allclose(np.sort(odds, -1)[:, ::-1], want, rtol=1e-4)
        else:
            assert got["logits"].shape[:2] == (count, length)


def test_a_recurrent_run_is_a_program_and_no_folder():
    model = EncoderConfig(vocab_size=64, layer="lstm", num_layers=1, embed_dim=30, position="none")
    config = RunConfig(objective="classification", pooling="mean", model=model)
    tokenizer, labels = train_wordpiece(TEXTS * 3, 60), ["first", "second"]
    run = LoadedRun(model_factory(config, labels)(), config, tokenizer, labels, 0)
    row, here = run.row(TEXTS[0]), run(TEXTS[0]).vectors
    made = as_function(run)(jnp.asarray(row["tokens"]), jnp.asarray(row["segment_ids"]))
    np.testing.assert_allclose(made["last_hidden_state"][0, : len(here)], here, rtol=1e-5, atol=1e-6)
    assert made["logits"].shape == (1, 2)
    with pytest.raises(ConfigError, match=r"no encoder of lstm layers.* `export runs/.* FILE --stablehlo` writes"):
        published_config(config, None, "classification")


def test_a_model_that_writes_is_refused(tmp_path, capsys):
    pytest.importorskip("flatbuffers", reason="pip install -e '.[stablehlo]'")
    folder = with_tokenizer("text_to_text/t5", tmp_path / "folder")
    with pytest.raises(SystemExit):
        main(["export", str(folder), str(tmp_path / "out"), "--stablehlo"])
    assert "this model is text_to_text" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_file_that_is_there_is_left_alone(tmp_path, capsys):
    pytest.importorskip("flatbuffers", reason="pip install -e '.[stablehlo]'")
    (tmp_path / "program").write_bytes(b"kept")
    with pytest.raises(SystemExit):
        main(["export", str(GOLDEN / "runs/classification"), str(tmp_path / "program"), "--stablehlo"])
    assert "is not there yet" in capsys.readouterr().err and (tmp_path / "program").read_bytes() == b"kept"
    assert [path.name for path in tmp_path.iterdir()] == ["program"]
