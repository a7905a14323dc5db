"""The package as a stranger installs it: a wheel, in an environment of its own, with no checkout near."""

import json
import os
import pathlib
import subprocess
import sys
import sysconfig

import pytest

from flax_encoder.commands import recipe

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of programs of an environment that has the wheel, and this one's dependencies."""
    folder = tmp_path_factory.mktemp("parcel")
    python, own = sys.executable, folder / "environment"
    built = subprocess.run(
        [python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)], capture_output=True, text=True
    )
    if built.returncode:
        pytest.skip(f"no wheel can be built here: {built.stderr.strip().splitlines()[-1:]}")
    [wheel] = folder.glob("*.whl")
    subprocess.run([python, "-m", "venv", "--without-pip", str(own)], check=True)
    [packages] = own.glob("lib/python*/site-packages")
    # By its path alone, so that an editable installation there, a .pth file, is not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "--python", str(own / "bin/python"), "install", "-q", "--no-deps",
                    "--no-index", str(wheel)], check=True)  # fmt: skip
    return own / "bin"


@pytest.mark.slow
def test_a_wheel_trains_reports_and_answers_without_the_checkout(installed, tmp_path):
    names = ("SLURM_", "PYTHONPATH", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(names)} | {
        "JAX_PLATFORMS": "cpu", "NO_COLOR": "1", "FLAX_ENCODER_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path),
    }  # fmt: skip

    def run(*arguments):
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    where = run(installed / "python", "-c", "import flax_encoder; print(flax_encoder.__file__)").strip()
    assert pathlib.Path(where).is_relative_to(installed.parent)
    words = ["the", "list", "returns", "a", "value", "of", "each", "item", "in", "order", "and", "then", "calls"]
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 12)) for i in range(1, 300)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    program = installed / "flax-encoder"
    said = run(program, "train", "--config", "quickstart", "--run-dir", "runs/a", "--data.source", "lines.txt",
               "--data.text-unit", "line", "--data.vocab-size", "128", "--steps", "3", "--log-every", "1",
               "--model.num-layers", "1", "--model.embed-dim", "32", "--model.num-heads", "2",
               "--model.mlp-dim", "32", "--data.held-out-rate", "0.1")  # fmt: skip
    assert "\x1b[" not in said and "runs/a/report.html" in said
    summary = json.loads((tmp_path / "runs/a/report.json").read_text())
    assert summary["step"] == 3 and summary["machine"]["flax-encoder"]
    run(program, "report", "runs/a", "--out", "page.html")
    assert "Throughput" in (tmp_path / "page.html").read_text("utf-8")
    answers = json.loads(run(program, "fill-mask", "runs/a", "the list [MASK] a value", "--json"))
    assert len(answers) == 5
    run(program, "attention", "runs/a", "the list returns", "--out", "attention.html")
    run(program, "train", "--help")


def test_recipes_are_found_in_a_checkout_and_beside_the_package_alike():
    assert (recipe.HOME / "configs/quickstart.py").is_file()
    assert recipe.find_recipe("quickstart").samefile(recipe.find_recipe("configs/quickstart.py"))


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "flax_encoder/py.typed").is_file()
