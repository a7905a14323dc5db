"""The package as a stranger installs it: an environment of its own, with no checkout near."""

import csv
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from packaging.version import Version

from flax_encoder.commands import recipe
from tests.browser import open_page

ROOT = pathlib.Path(__file__).parents[1]
OWN = f"{sys.version_info[0]}.{sys.version_info[1]}"
WORDS = ["the", "list", "returns", "a", "value", "of", "each", "item", "in", "order", "and", "then", "calls"]
TINY = ["--model.num-layers", "1", "--model.embed-dim", "32", "--model.num-heads", "2", "--model.mlp-dim", "32",
        "--steps", "3", "--log-every", "1"]  # fmt: skip
# What the quickstart's model has otherwise than BERT, which transformers opens.
BERT = [
    "--model.position", "learned", "--model.window", "None", "--model.global-every", "1", "--model.norm", "layer_norm",
    "--model.embedding-norm", "True", "--model.norm-placement", "post", "--model.no-gated", "--model.use-bias",
    "--model.activation", "gelu",
]  # fmt: skip
TRANSFORMERS = """
import sys, torch, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
for text in sys.argv[2:]:
    with torch.no_grad():
        p = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
    print(model.config.id2label[int(p.argmax())], float(p.max()))
"""


def run(*arguments, cwd, **variables):
    """What a command prints, in a folder that is a home too; nothing of this checkout or environment leads there."""
    names = ("SLURM_", "PYTHONPATH", "VIRTUAL_ENV", "PYENV_")
    own = {name: value for name, value in os.environ.items() if not name.startswith(names)} | {
        "JAX_PLATFORMS": "cpu", "NO_COLOR": "1", "FLAX_ENCODER_CACHE": str(cwd / "cache"), "HOME": str(cwd),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }  # fmt: skip
    done = subprocess.run(
        list(map(str, arguments)), cwd=cwd, env=own | variables, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel that was built from an sdist, which was built from this checkout."""
    folder = tmp_path_factory.mktemp("parcel")
    [backend] = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    pip = [sys.executable, "-m", "pip"]
    got = subprocess.run([*pip, "install", "-q", "--target", str(folder / "backend"), backend], capture_output=True)
    if got.returncode:
        pytest.skip(f"no wheel can be built here: {got.stderr.decode().strip().splitlines()[-1:]}")
    path = os.environ | {"PYTHONPATH": str(folder / "backend")}
    code = f"from hatchling.build import build_sdist; build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=path, check=True, capture_output=True)
    [sdist] = folder.glob("*.tar.gz")
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(sdist)],
                   cwd=folder, env=path, check=True, capture_output=True)  # fmt: skip
    [made] = folder.glob("*.whl")
    return made


def walk(programs: pathlib.Path, home: pathlib.Path) -> None:
    """A stranger's way with the program of an environment: train, teach, ask, look, hand on."""
    program = programs / "flax-encoder"
    where = run(programs / "python", "-c", "import flax_encoder; print(flax_encoder.__file__)", cwd=home).strip()
    assert pathlib.Path(where).is_relative_to(programs.parent)
    lines = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 12)) for i in range(1, 300)]
    (home / "lines.txt").write_text("\n".join(lines))
    with (home / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((line, "ab"[i % 2]) for i, line in enumerate(lines))])
    with (home / "ask.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text",), *((line,) for line in lines[:5])])

    said = run(program, "train", "--config", "quickstart", "--run-dir", "runs/a", "--data.source", "lines.txt",
               "--data.text-unit", "line", "--data.vocab-size", "128", "--data.held-out-rate", "0.1",
               *BERT, *TINY, cwd=home)  # fmt: skip
    assert "\x1b[" not in said and "runs/a/report.html" in said
    summary = json.loads((home / "runs/a/report.json").read_text())
    assert summary["step"] == 3 and summary["machine"]["flax-encoder"]
    run(program, "report", "runs/a", "--out", "page.html", cwd=home)
    assert "Throughput" in (home / "page.html").read_text("utf-8")
    assert len(json.loads(run(program, "fill-mask", "runs/a", "the list [MASK] a value", "--json", cwd=home))) == 5
    run(program, "attention", "runs/a", "the list returns", "--out", "attention.html", cwd=home)
    run(program, "train", "--config", "classify", "--init-from", "runs/a", "--run-dir", "runs/b", "--data.source",
        "train.csv", "--epochs", "None", *TINY[-4:], cwd=home)  # fmt: skip
    run(program, "predict", "runs/b", "--input", "ask.csv", "--output", "answers.csv", cwd=home)
    with (home / "answers.csv").open(newline="") as file:
        answers = list(csv.DictReader(file))
    assert len(answers) == 5 and {answer["label"] for answer in answers} <= {"a", "b"}
    run(program, "export", "runs/b", "published", cwd=home)
    run(program, "train", "--help", cwd=home)


def installed(python: str, folder: pathlib.Path, *requirements: str) -> pathlib.Path:
    """The programs of a fresh environment with these packages and all that they depend on, from the index."""
    subprocess.run([python, "-m", "venv", "--without-pip", str(folder)], check=True)
    # This environment's pip: one more would have to be unpacked there.
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "-q", "--disable-pip-version-check"]
    # What is imported is compiled then; to compile all that is installed takes a third of the time.
    install = [*pip, "install", "--no-compile", "--prefer-binary", *requirements]
    got = subprocess.run(install, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr[-3000:]
    subprocess.run([*pip, "check"], check=True)
    return folder / "bin"


@pytest.fixture(scope="module")
def stranger(wheel, tmp_path_factory):
    """(programs, home) of who has gone the way with this Python and the newest versions of all that the wheel needs."""
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "home").mkdir()
    programs = installed(sys.executable, folder / "environment", str(wheel))
    walk(programs, folder / "home")
    return programs, folder / "home"


@pytest.mark.slow
def test_a_wheel_trains_reports_answers_and_exports_without_the_checkout(stranger):
    _, home = stranger
    assert not (home / "flax_encoder").exists() and (home / "published/config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["runs/a/report.html", "runs/b/report.html", "attention.html"])
def test_a_strangers_pages_open_in_a_browser(stranger, name):
    with open_page(stranger[1] / name, 400) as (page, errors):
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert page.locator("h1").count() == 1 and errors == []


@pytest.mark.slow
def test_transformers_opens_a_strangers_export_and_gives_the_same_answers(stranger):
    if (python := os.environ.get("TORCH_PYTHON")) is None:
        pytest.skip("opens the folder in transformers: set TORCH_PYTHON to a Python that has torch and transformers")
    _, home = stranger
    with (home / "ask.csv").open(newline="") as asked, (home / "answers.csv").open(newline="") as answered:
        texts = [row["text"] for row in csv.DictReader(asked)]
        answers = [(row["label"], float(row["probability"])) for row in csv.DictReader(answered)]
    said = run(python, "-c", TRANSFORMERS, home / "published", *texts, cwd=home, HF_HUB_OFFLINE="1")
    found = [line.rsplit(" ", 1) for line in said.splitlines() if line.startswith(("a ", "b "))]
    assert [label for label, _ in found] == [label for label, _ in answers]
    assert [float(p) for _, p in found] == pytest.approx([p for _, p in answers], abs=0.02)  # of bfloat16


def pythons() -> dict[str, str]:
    """Programs of the Pythons that the project names, where found: on the path, or among pyenv's."""
    found = {OWN: sys.executable}
    homes = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv")) / "versions"
    for version in ("3.11", "3.12", "3.13"):
        candidates = [shutil.which(f"python{version}"), *sorted(map(str, homes.glob(f"{version}.*/bin/python")))]
        for python in filter(None, candidates):
            # pyenv has programs that lead nowhere, and systems a Python without venv.
            code = "import sys, venv; print(sys.version_info[:2])"
            said = subprocess.run([python, "-c", code], capture_output=True, text=True)
            if said.stdout.strip() == repr(tuple(map(int, version.split(".")))):
                found.setdefault(version, python)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("version", sorted({"3.11", "3.12", "3.13"} - {OWN}))
def test_a_stranger_with_another_python_goes_the_same_way(wheel, tmp_path, version):
    if version not in pythons():
        pytest.skip(f"no Python {version} is found, on the path or among pyenv's")
    programs = installed(pythons()[version], tmp_path / "environment", str(wheel))
    (tmp_path / "home").mkdir()
    walk(programs, tmp_path / "home")


def lowest() -> dict[str, str]:
    """The least version of each dependency, by its name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = [re.match(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", text) for text in project["dependencies"]]
    assert all(bounds), "every dependency has a lower bound, which is tested"
    return {bound[1]: bound[2] for bound in bounds}


def test_dependencies_have_lower_bounds_and_no_upper_ones():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    assert lowest() and not [text for text in [*project["dependencies"], *extras] if "<" in text or "~" in text]
    exact = [text for text in [*project["dependencies"], *extras] if re.search(r"(?<![!<>~=])==", text)]
    assert exact == ["torch==2.13.0"]  # a bare torch brings gigabytes for GPUs


@pytest.mark.slow
def test_the_lowest_versions_of_all_dependencies_serve_together(wheel, tmp_path):
    """By an environment of exactly them, on the oldest Python."""
    python = pythons().get("3.11")
    if python is None:
        pytest.skip("no Python 3.11 is found, on the path or among pyenv's")
    exactly = [f"{name}=={version}" for name, version in lowest().items()]
    programs = installed(python, tmp_path / "environment", str(wheel), *exactly)
    code = "import importlib.metadata as m, json; print(json.dumps([(d.name, d.version) for d in m.distributions()]))"
    found = json.loads(run(programs / "python", "-c", code, cwd=tmp_path))
    versions = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}
    for name, version in lowest().items():
        got = versions[re.sub(r"[-_.]+", "-", name).lower()]
        assert Version(got) == Version(version), f"{name} {got}"
    (tmp_path / "home").mkdir()
    walk(programs, tmp_path / "home")


def test_recipes_are_found_in_a_checkout_and_beside_the_package_alike():
    assert (recipe.HOME / "configs/quickstart.py").is_file()
    assert recipe.find_recipe("quickstart").samefile(recipe.find_recipe("configs/quickstart.py"))


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "flax_encoder/py.typed").is_file()
