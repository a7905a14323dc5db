"""Pages of what tokens attend to and of where texts lie: their numbers, what they must not run, a browser."""

import base64
import json
import pathlib

import numpy as np
import pytest

from flax_encoder.commands import main
from flax_encoder.config import ConfigError
from flax_encoder.pages.attention import MOST_TOKENS, attention_page
from flax_encoder.pages.map import MOST_POINTS, map_page, principal_components, project
from flax_encoder.runs.load import load
from tests.browser import open_page

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/runs/classification"
NASTY = '</script><script>document.title = "taken"</script>'
TOKENS = ["[CLS]", "the", NASTY, "##ing", "[SEP]"]


def draw_weights(L=2, N=3, T=5):
    logits = np.random.default_rng(0).normal(size=(L, N, T, T))
    weights = np.exp(2 * logits)
    return weights / weights.sum(-1, keepdims=True)


def data_of(page):
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


def test_a_page_of_attention_holds_every_weight_to_a_byte():
    weights = draw_weights()
    page = attention_page(TOKENS, weights, [1] * 5, NASTY, "a model")
    data = data_of(page)
    got = np.frombuffer(base64.b64decode(data["weights"]), np.uint8).reshape(weights.shape) / 255
    np.testing.assert_allclose(got, weights, rtol=0, atol=0.5 / 255 + 1e-9)
    assert data["tokens"] == TOKENS and (data["layers"], data["heads"]) == (2, 3)
    assert page.count("<script>") == 2 and '<script type="application/json"' in page


def test_a_page_has_a_limit_that_it_says():
    many = MOST_TOKENS + 1
    with pytest.raises(ConfigError, match=str(MOST_TOKENS)):
        attention_page(["a"] * many, np.zeros((1, 1, many, many)), [1] * many, "", "")
    with pytest.raises(ConfigError, match="--limit"):
        map_page(np.zeros((MOST_POINTS + 1, 2)), [""] * (MOST_POINTS + 1), None, ("", ""), "", "")


def test_principal_components_are_those_of_the_singular_vectors():
    vectors = np.random.default_rng(0).normal(size=(31, 7)) * np.arange(1, 8)
    points, shares = principal_components(vectors.astype(np.float32))
    centred = vectors - vectors.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(points), np.abs(u[:, :2] * s[:2]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(shares, s[:2] ** 2 / (s**2).sum(), rtol=1e-5)
    again, _ = principal_components(vectors[::-1].astype(np.float32))
    np.testing.assert_allclose(again[::-1], points, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vectors", [np.ones((5, 3)), np.arange(5.0)[:, None], np.zeros((4, 2))])
def test_vectors_that_do_not_differ_have_a_map_too(vectors):
    points, axes = project(vectors.astype(np.float32), "pca")
    assert points.shape == (len(vectors), 2) and np.isfinite(points).all() and "nan" not in "".join(axes)


def test_a_map_numbers_labels_by_how_frequent_they_are():
    page = map_page(np.zeros((4, 2)), ["a", "b", NASTY, "d"], ["y", NASTY, "x", NASTY], ("1", "2"), "t", "u")
    data = data_of(page)
    assert data["labels"] == [NASTY, "x", "y"] and [p[2] for p in data["points"]] == [2, 0, 1, 0]
    assert page.count("<script>") == 2 and data["texts"][2] == NASTY


@pytest.fixture(scope="module")
def run():
    return load(GOLDEN)


def test_a_loaded_run_gives_vectors_and_attentions(run):
    found = run("the list returns", output_attentions=True)
    config = run.config.model
    T = len(found.tokens)
    assert found.vectors.shape == (T, config.embed_dim) and T >= 5
    assert found.attentions.shape == (config.num_layers, config.num_heads, T, T)
    np.testing.assert_allclose(found.attentions.sum(-1), 1, rtol=0, atol=1e-5)
    assert run("the list returns").attentions is None
    pair = run("the list", "returns", output_attentions=True)
    assert pair.tokens.count("[SEP]") == 2 and (pair.attentions > 0).all()


def test_packed_texts_are_blind_to_each_other(run):
    first, second = "the list returns", "a value"
    row = run.packed_row([first, second])
    found = run.token_vectors(row, output_attentions=True)
    alone = [run(text, output_attentions=True) for text in (first, second)]
    n = len(alone[0].tokens)
    assert found.tokens == alone[0].tokens + alone[1].tokens
    assert (found.attentions[..., :n, n:] == 0).all() and (found.attentions[..., n:, :n] == 0).all()
    np.testing.assert_allclose(found.attentions[..., n:, n:], alone[1].attentions, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.vectors[:n], alone[0].vectors, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [["--out", "x.html"], ["--out", "x.png", "--layer", "1", "--head", "2"]])
def test_the_command_attention_writes_a_page_or_a_picture(tmp_path, options, capsys):
    if options[1].endswith(".png"):
        pytest.importorskip("matplotlib", reason="pip install -e '.[plot]'")
    out = tmp_path / options[1]
    main(["attention", str(GOLDEN), "the $list", "returns", "--packed", "--out", str(out), *options[2:]])
    assert out.stat().st_size > 4000 and out.name in capsys.readouterr().out


@pytest.mark.parametrize("options, says", [
    (["--layer", "99"], "from 1 to"), (["--out", "x.txt"], ".html"), (["--packed"], "two texts"),
])  # fmt: skip
def test_the_command_attention_says_what_it_takes(options, says, capsys):
    with pytest.raises(SystemExit):
        main(["attention", str(GOLDEN), "the list", *options])
    assert says in capsys.readouterr().err


def test_the_command_map_reads_labels_where_there_are_some(tmp_path, capsys):
    labelled, plain = tmp_path / "a.csv", tmp_path / "b.txt"
    texts = ["the list", "a value", "each item", "in order", "then calls"]
    labelled.write_text("text,label\n" + "".join(f"{t},{'xy'[i % 2]}\n" for i, t in enumerate(texts)))
    plain.write_text("\n".join(texts))
    for source, labels in ((labelled, ["x", "y"]), (plain, [])):
        main(["map", str(GOLDEN), "--input", str(source), "--out", str(tmp_path / "m.html"), "--limit", "4"])
        data = data_of((tmp_path / "m.html").read_text("utf-8"))
        assert data["labels"] == labels and len(data["points"]) == 4
        assert [t for t in texts if t in data["texts"]] == data["texts"]  # in the file's order
    with pytest.raises(SystemExit):
        main(["map", str(GOLDEN), "--input", str(plain), "--out", str(tmp_path / "m.html"), "--limit", "2"])
    assert "at least 3" in capsys.readouterr().err


@pytest.mark.parametrize("width", [400, 1600])
def test_a_browser_shows_attention(tmp_path, width):
    segments = [1, 1, 1, 2, 2]
    (tmp_path / "page.html").write_text(attention_page(TOKENS, draw_weights(), segments, NASTY, "a model"), "utf-8")
    with open_page(tmp_path / "page.html", width) as (browser, errors):
        assert browser.title() == NASTY
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        buttons = browser.locator("#overview button")
        assert buttons.count() == 6
        buttons.first.focus()
        browser.keyboard.press("ArrowDown")
        browser.keyboard.press("ArrowRight")
        assert browser.locator("#which").text_content() == "Layer 2, head 2"
        browser.locator("#lines g.token").first.focus()
        browser.keyboard.press("ArrowDown")
        best = int(draw_weights()[1, 1, 1].argmax())
        assert browser.locator("#readout").text_content().startswith(f"the → {TOKENS[best]} ")
        assert errors == []


@pytest.mark.parametrize("width", [400, 1600])
def test_a_browser_shows_a_map(tmp_path, width):
    points = np.random.default_rng(0).normal(size=(40, 2))
    texts = [f"text {i}" for i in range(39)] + [NASTY]
    page = map_page(points, texts, ["a", "b"] * 20, ("one", "two"), "a map", "40 texts")
    (tmp_path / "page.html").write_text(page, "utf-8")
    with open_page(tmp_path / "page.html", width) as (browser, errors):
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.locator("#map circle").count() == 40
        browser.locator("#map svg").focus()
        browser.keyboard.press("ArrowRight")
        assert browser.locator("#readout").text_content().endswith(texts[int(points[:, 0].argmin())])
        browser.locator("input[data-label='0']").uncheck()
        assert browser.locator("#map circle").count() == 20
        assert browser.title() == "a map" and errors == []
