"""Pages in a real browser: headless Chromium, driven by playwright."""

import shutil
from contextlib import contextmanager

import pytest


@contextmanager
def open_page(path, width, height=900):
    """(playwright's page, a list that fills with what the browser complains of); skips where there is no browser."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[browser]' gives playwright")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: playwright install chromium brings one ({str(error).splitlines()[0]})")
        page, errors = browser.new_page(viewport={"width": width, "height": height}), []
        page.on("console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else errors.append(r.url))
        page.goto(path.resolve().as_uri())
        try:
            yield page, errors
        finally:
            browser.close()
