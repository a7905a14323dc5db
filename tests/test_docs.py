"""What README and the pages of docs/ show as code runs, and the commands they show are commands."""

import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from flax import nnx

from flax_encoder import EncoderConfig
from flax_encoder.commands import make_parser
from flax_encoder.commands.evaluate import EvaluateArguments
from flax_encoder.commands.recipe import parse_run_config
from flax_encoder.tasks import check_task

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: pathlib.Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.S)


def commands(page: pathlib.Path) -> list[list[str]]:
    """Of each command of the program, its name and what follows."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for words in re.split(r"&&|\||>>", line.split(" #")[0]):
                match = re.search(r"python train\.py(.*)|(?:python -m flax_encoder|flax-encoder) (.*)", words)
                if match and (rest := match[1] if match[1] is not None else match[2]) is not None:
                    found.append((["train"] if match[1] is not None else []) + shlex.split(rest))
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands_are_commands(page, monkeypatch):
    """Every option that a page names is one, with a value that it can have, and that the objective reads."""
    monkeypatch.chdir(ROOT)
    own = {
        "train": lambda words: check_task(parse_run_config(words, default="configs/quickstart.py")),
        "evaluate": lambda words: tyro.cli(EvaluateArguments, args=words),
    }
    parser = make_parser()
    for name, *words in commands(page):
        arguments, rest = parser.parse_known_args([name, *words])
        if name in own:
            own[name](words)
        elif not arguments.has_own_parser:
            assert not rest, f"{name} has no {rest}"


def test_a_model_and_an_objective_of_ones_own():
    """The library's page, top to bottom: the loss of its example falls."""
    jax.config.update("jax_disable_most_optimizations", True)  # conftest.py undoes it
    names: dict = {}
    for block in blocks(ROOT / "docs/library.md", "python"):
        exec(block, names)
    assert names["vectors"].shape == (2, 12, 64)
    assert np.mean(names["errors"][-5:]) < 0.2 * np.mean(names["errors"][:5])


def test_python_examples_run(monkeypatch):
    import flax_encoder

    jax.config.update("jax_disable_most_optimizations", True)  # conftest.py undoes it
    tokens = jnp.arange(28).reshape(4, 7)
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 2, 0]] * 4)
    q = k = v = jax.random.normal(jax.random.key(0), (4, 7, 3, 5))
    config = EncoderConfig(vocab_size=101, num_layers=2, embed_dim=12, num_heads=3, mlp_dim=11)
    targets = {"target_positions": tokens[:, :2] % 7, "targets": tokens[:, :2], "target_weights": jnp.ones((4, 2))}
    batch = {"tokens": tokens, "segment_ids": segment_ids, "positions": tokens % 7} | targets
    untrained = flax_encoder.MaskedLM(config, rngs=nnx.Rngs(0))
    monkeypatch.setattr(flax_encoder, "load_run", lambda path: type("Run", (), {"model": untrained}))
    folder, load = ROOT / "tests/golden/text_to_text/t5", flax_encoder.load_pretrained
    monkeypatch.setattr(flax_encoder, "load_pretrained", lambda path: load(folder))
    classifier = flax_encoder.load(ROOT / "tests/golden/runs/classification")
    monkeypatch.setattr(flax_encoder, "load", lambda path: classifier)
    ids = np.array([[3, 4, 5], [6, 7, 0]])
    names = {"tokens": tokens, "segment_ids": segment_ids, "q": q, "k": k, "v": v, "config": config, "batch": batch}
    names |= {"ids": ids, "mask": ids > 0, "target": ids[:, :2]}
    for page in ("README.md", "docs/vectors.md"):
        for block in blocks(ROOT / page, "python"):
            exec(block, names)
    assert names["vectors"].shape == (4, 7, 12) and names["mixed"].shape == q.shape
    assert int(names["state"].step) == 1
    assert [set(answer) for answer in names["answers"]] == [{"label", "probability", "probabilities"}] * 2
    assert names["logits"].shape[:2] == (2, 2) and names["text"].shape[0] == 2


def test_pages_point_at_files_that_are_there():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
