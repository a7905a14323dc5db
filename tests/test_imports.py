"""Imports point one way, so that each part can be read, and used, without what stands on it."""

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest

import flax_encoder
from flax_encoder.moved import MOVED

PACKAGE = pathlib.Path(flax_encoder.__file__).parent
# Each part may import itself and those before it; data stands beside them and sees config alone.
ORDER = [
    "config", "ops", "nn", "families", "tasks", "training", "pages", "published", "runs", "plan", "commands",
]  # fmt: skip
TOP = ("__init__", "__main__", "moved")
FILES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}


def imports(path):
    """Dotted names of everything a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts_of_package(path):
    return {name.split(".")[1] for name in imports(path) if name.startswith("flax_encoder.")}


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_one_way(module):
    part = module.split(".")[0]
    if part in TOP:
        return
    allowed = {"config", "data"} if part == "data" else {*ORDER[: ORDER.index(part) + 1], "data"}
    if part in ("config", "ops", "nn"):
        allowed -= {"data"}
    assert parts_of_package(FILES[module]) <= allowed


def test_every_part_has_a_place_in_the_order():
    assert {module.split(".")[0] for module in FILES} == {*ORDER, *TOP, "data"}


@pytest.mark.parametrize("module", sorted(m for m in FILES if m.split(".")[0] in ("data", "config")))
def test_data_and_config_import_no_jax(module):
    libraries = {name.split(".")[0] for name in imports(FILES[module])}
    assert not libraries & {"jax", "jaxlib", "flax", "optax", "orbax", "tensorflow", "torch"}


def test_data_is_opened_without_jax_and_what_imports_it():
    code = "import sys, flax_encoder.data.pipeline; print(*{'grain', 'jax', 'orbax', 'pyarrow'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.parametrize("module", sorted(m for m in FILES if m.split(".")[0] == "config"))
def test_config_imports_the_standard_library_alone(module):
    assert {name.split(".")[0] for name in imports(FILES[module])} <= {*sys.stdlib_module_names, "flax_encoder"}


@pytest.mark.parametrize("module", sorted(FILES))
def test_nothing_imports_the_trainer_or_the_tests(module):
    assert not {name.split(".")[0] for name in imports(FILES[module])} & {"train", "tests", "configs", "benchmarks"}


def test_the_table_of_contents_is_complete():
    assert sorted(flax_encoder.__all__) == flax_encoder.__all__
    assert all(hasattr(flax_encoder, name) for name in flax_encoder.__all__)


@pytest.mark.parametrize("old", sorted(MOVED))
def test_a_module_is_found_by_its_old_name_too(old):
    new = importlib.import_module(f"flax_encoder.{MOVED[old]}")
    assert importlib.import_module(f"flax_encoder.{old}") is new
    assert new.__spec__.name == new.__name__ == f"flax_encoder.{MOVED[old]}"
