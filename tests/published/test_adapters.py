"""Adapters as PEFT's folders: added to their base, they are the model that is exported with them in it."""

import json
import os
import pathlib
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from flax_encoder.commands import main
from flax_encoder.config import ConfigError, DataConfig, LoraConfig, RunConfig
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from flax_encoder.families import find_family
from flax_encoder.families.configs import read_head
from flax_encoder.nn.partition import abstract_model, flatten, unflatten
from flax_encoder.published.load import load_pretrained, read_json
from flax_encoder.published.weights import read_weights
from flax_encoder.runs.adapter import export_adapter
from flax_encoder.runs.exchange import export_run
from flax_encoder.runs.load import load_run
from flax_encoder.runs.loaded import model_factory
from flax_encoder.runs.record import RunRecord
from flax_encoder.training.checkpoint import Checkpoints
from flax_encoder.training.step import TrainState

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TEXTS = ["the list of a value", "a value in the list", "of each item"]


def make_run(base: pathlib.Path, run_dir: pathlib.Path, lora: LoraConfig) -> RunConfig:
    """A classification run as if trained from `base`: adapters and head are drawn at random."""
    loaded = load_pretrained(base, allow_unused=True)
    published = read_json(base / "config.json")
    head, pooling = read_head(find_family(published), "classification", published)
    config = RunConfig(
        objective="classification", model=loaded.config, head=head, pooling=pooling, lora=lora, init_from=str(base),
        run_dir=str(run_dir), data=DataConfig(row_length=11),
    )  # fmt: skip
    names = ["no", "yes", "maybe"]
    _, abstract = abstract_model(model_factory(config, names))
    generator = np.random.default_rng(0)
    theirs = flatten(nnx.to_pure_dict(nnx.split(loaded.model)[1]))
    params = {
        path: theirs[path] if path.startswith("encoder.") else 0.3 * generator.standard_normal(x.shape, np.float32)
        for path, x in flatten(nnx.to_pure_dict(abstract)).items()
    }
    record = RunRecord(config, loaded.tokenizer, names)
    with Checkpoints(run_dir, keep=1) as checkpoints:
        state = TrainState(jnp.ones((), jnp.int32), jax.tree.map(jnp.asarray, unflatten(params)), {})
        checkpoints.save(state, 1, record.to_json())
    return config


def with_tokenizer(name: str, folder: pathlib.Path) -> pathlib.Path:
    shutil.copytree(GOLDEN / name, folder)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    (folder / "tokenizer.json").write_text(train_wordpiece(TEXTS * 3, size).json)
    return folder


# Linear maps apart, several in one, some of them with an adapter, rotated.
CASES = [("bert-masked_lm", ("query", "out")), ("modernbert-masked_lm", ("query", "value")),
         ("modernbert-masked_lm", ("*",)), ("deberta-v2-classification", ("*",)), ("eurobert-masked_lm", ("*",))]


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_an_adapter_added_to_its_base_is_the_merged_export(tmp_path, name, targets):
    base = with_tokenizer(name, tmp_path / "base")
    lora = LoraConfig(rank=2, alpha=5.0, targets=targets)
    make_run(base, tmp_path / "run", lora)
    count = export_adapter(tmp_path / "run", tmp_path / "adapter")
    export_run(tmp_path / "run", tmp_path / "merged")
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    tensors = {name.removeprefix("base_model.model."): x for name, x in load_file(
        tmp_path / "adapter/adapter_model.safetensors").items()}  # fmt: skip
    merged = read_weights(tmp_path / "merged")
    plain = {n.removeprefix(f"{json.loads((base / 'config.json').read_text())['model_type'].split('-')[0]}."): x
             for n, x in read_weights(base).items()}  # fmt: skip
    seen = set()
    for module in settings["target_modules"]:
        a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
        rank = settings["rank_pattern"].get(module, settings["r"])
        scale = settings["alpha_pattern"].get(module, settings["lora_alpha"]) / rank
        assert a.shape[0] == b.shape[1] == rank
        want = merged[f"{module}.weight"]
        before = next(x for n, x in plain.items() if f"{module}.weight".endswith(n))
        np.testing.assert_allclose(before + scale * np.float64(b) @ a, want, rtol=0, atol=1e-5, err_msg=module)
        assert np.abs(want - before).max() > 1e-3
        seen |= {f"{module}.lora_A.weight", f"{module}.lora_B.weight"}
    assert count == len(settings["target_modules"]) == len(seen) / 2 > 0
    for name, x in tensors.items():  # the head, whole
        if name not in seen:
            np.testing.assert_array_equal(x, merged[name], err_msg=name)
            assert any(name.startswith(f"{module}.") for module in settings["modules_to_save"])


def test_what_is_no_adapter_is_refused_with_a_way_out(tmp_path, capsys):
    base = with_tokenizer("bert-masked_lm", tmp_path / "base")
    make_run(base, tmp_path / "run", LoraConfig(rank=2))
    make_run(base, tmp_path / "plain", LoraConfig())
    with pytest.raises(ConfigError, match=r"has none\. Leave it out"):
        export_adapter(tmp_path / "plain", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"python -m flax_encoder export .* FOLDER\), and give --base FOLDER"):
        export_adapter(tmp_path / "run", tmp_path / "out", tmp_path / "run")
    other = with_tokenizer("bert-classification", tmp_path / "other")
    with pytest.raises(ConfigError, match="is another in"):
        export_adapter(tmp_path / "run", tmp_path / "out", other)
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--base", str(base)])
    assert "--base needs --adapter" in capsys.readouterr().err
    main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--adapter"])
    assert "linear maps, for PEFT" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="must be empty or new"):
        export_adapter(tmp_path / "run", tmp_path / "out")


@pytest.mark.parity
@pytest.mark.parametrize("name", ["bert-masked_lm", "modernbert-masked_lm"])
def test_peft_opens_the_folder_and_answers_the_same(tmp_path, name):
    python = os.environ.get("TORCH_PYTHON")
    if python is None:
        pytest.skip("compares with peft on torch: set TORCH_PYTHON to a Python that has torch, transformers and peft")
    base = with_tokenizer(name, tmp_path / "base")
    make_run(base, tmp_path / "run", LoraConfig(rank=2, alpha=5.0, targets=("*",)))
    export_adapter(tmp_path / "run", tmp_path / "adapter")
    run = load_run(tmp_path / "run")
    rows = [run.row(text) for text in TEXTS]
    np.savez(tmp_path / "rows.npz", tokens=np.concatenate([r["tokens"] for r in rows]),
             mask=np.concatenate([r["segment_ids"] > 0 for r in rows]))  # fmt: skip
    script = pathlib.Path(__file__).parents[1] / "parity_training.py"
    done = subprocess.run(
        [python, str(script), "adapter", str(base), str(tmp_path / "adapter"), str(tmp_path / "rows.npz"),
         str(tmp_path / "logits.npy")], capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    logits = np.load(tmp_path / "logits.npy").astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for row, answer in zip(probabilities, run.predict(TEXTS), strict=True):
        np.testing.assert_allclose([answer["probabilities"][n] for n in run.label_names], row, rtol=1e-4)
