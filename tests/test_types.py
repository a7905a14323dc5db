"""The public names as a user's type checker sees them, in strict mode."""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

import pytest

import flax_encoder

ROOT = pathlib.Path(__file__).parents[1]
TYPED = pathlib.Path(__file__).parent / "typed"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Lines with errors, by file: of a user's program, of one with mistakes, and of every public name taken once."""
    if importlib.util.find_spec("basedpyright") is None:
        pytest.skip("needs basedpyright: pip install basedpyright")
    folder = tmp_path_factory.mktemp("typed")
    for path in TYPED.glob("*.py"):
        shutil.copy(path, folder)
    taken = [f"taken_{name} = flax_encoder.{name}\n" for name in flax_encoder.__all__]
    (folder / "surface.py").write_text("import flax_encoder\n\n" + "".join(taken))
    settings = {"include": ["."], "typeCheckingMode": "strict", "extraPaths": [str(ROOT)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "-p", str(folder), "--outputjson"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=300).stdout)
    assert report["summary"]["filesAnalyzed"] == 3, report
    by_file = {"client.py": [], "mistakes.py": [], "surface.py": []}
    for error in report["generalDiagnostics"]:
        at = error["range"]["start"]["line"] + 1
        by_file[pathlib.Path(error["file"]).name].append((at, error["message"]))
    return by_file


def test_a_users_program_has_no_error(found):
    assert not found["client.py"]


def test_every_public_name_has_a_known_type(found):
    assert not found["surface.py"]


def test_mistakes_are_found(found):
    """So that the checks above can fail."""
    lines = (TYPED / "mistakes.py").read_text().splitlines()
    wrong = {number for number, line in enumerate(lines, 1) if "=" in line}
    assert wrong <= {number for number, _ in found["mistakes.py"]}
