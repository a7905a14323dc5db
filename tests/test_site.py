"""The site, built as its readers have it."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None,
    reason="needs mkdocs: pip install -e '.[docs]'",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@needs_mkdocs
def test_every_page_is_in_the_site_and_reachable_from_its_menu(site):
    menu = (site / "index.html").read_text("utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        name = page.stem
        assert (site / name / "index.html").is_file() or name == "index", name
        assert name == "index" or f'href="{name}/"' in menu, f"{name} is in no menu"


@needs_mkdocs
def test_a_page_fetches_nothing_from_elsewhere(site):
    outside = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^\"'> ]+")
    for page in site.rglob("*.html"):
        assert not outside.findall(page.read_text("utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?(?:https?:)?//", sheet.read_text("utf-8")), sheet


@needs_mkdocs
def test_the_public_names_are_on_the_page_of_the_library(site):
    import flax_encoder

    page = (site / "api/index.html").read_text("utf-8")
    assert not [name for name in flax_encoder.__all__ if not re.search(rf"\b{name}\b", page)]
