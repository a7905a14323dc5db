"""The commits of docs/adding.md: their patches apply to this checkout, and the code beside them then runs."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def test_every_worked_commit_applies_and_works(tmp_path):
    page = (ROOT / "docs/adding.md").read_text("utf-8")
    patches, codes = (re.findall(rf"```{language}\n(.*?)```", page, re.S) for language in ("diff", "python"))
    assert len(patches) == len(codes) == page.count("\n## ") == 5
    if shutil.which("git") is None:
        pytest.skip("applies patches by git, which is not here")
    shutil.copytree(ROOT / "flax_encoder", tmp_path / "flax_encoder", ignore=shutil.ignore_patterns("__pycache__"))
    own = os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "GIT_DIR": "none"}
    own["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # it compiles in a third of the time
    for patch in patches:
        done = subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=patch, text=True, env=own,
                              capture_output=True)  # fmt: skip
        assert done.returncode == 0, f"{done.stderr}\n{patch}"
    command = [sys.executable, "-c", "\n".join(codes)]
    done = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
