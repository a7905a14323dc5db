"""Vectors of texts in the plane: the projection, its page and its picture."""

import pathlib
from collections.abc import Sequence

import numpy as np

from flax_encoder.config import ConfigError
from flax_encoder.pages.attention import pyplot
from flax_encoder.pages.frame import escape, page

MOST_POINTS = 20_000  # of a page
_LETTERS = 400  # of a text


def principal_components(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the two directions in which vectors [N, D] differ most as coordinates [N, 2], their shares of the variance [2]).

    A direction's sign is such that its largest weight is above 0. Vectors of one feature, or all alike, have 0 for
    what is missing.
    """
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    values, directions = np.linalg.eigh(centred.T @ centred)
    values, directions = np.maximum(values[::-1][:2], 0), directions[:, ::-1][:, :2]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(0)[None], 0)
    points = centred @ (directions * np.where(largest < 0, -1, 1))
    total = np.square(centred).sum()
    missing = 2 - points.shape[1]
    shares = values / total if total > 0 else np.zeros_like(values)
    return np.pad(points, ((0, 0), (0, missing))), np.pad(shares, (0, missing))


def project(vectors: np.ndarray, method: str) -> tuple[np.ndarray, tuple[str, str]]:
    """(coordinates [N, 2], what the axes are) by `pca` or `umap` (McInnes et al., arXiv 1802.03426).

    Raises:
      ConfigError: umap-learn is not installed, or too few texts.
    """
    if len(vectors) < 3:
        raise ConfigError(f"a map needs at least 3 texts: got {len(vectors)}.")
    if method == "pca":
        points, shares = principal_components(vectors)
        first, second = (f"component {i + 1}, {share:.0%} of the variance" for i, share in enumerate(shares))
        return points, (first, second)
    try:
        import umap
    except ImportError:
        raise ConfigError("--method umap needs umap-learn: pip install umap-learn, or leave --method pca.") from None
    neighbours = min(15, len(vectors) - 1)
    made = umap.UMAP(n_neighbors=neighbours, metric="cosine", random_state=0, n_jobs=1).fit_transform(vectors)
    return np.asarray(made), ("UMAP 1", "UMAP 2")


def map_page(
    points: np.ndarray,
    texts: Sequence[str],
    labels: Sequence[str] | None,
    axes: tuple[str, str],
    title: str,
    about: str,
) -> str:
    """An interactive page of points [N, 2]; `labels` colour them.

    Raises:
      ConfigError: more than `MOST_POINTS` texts.
    """
    if len(points) > MOST_POINTS:
        raise ConfigError(
            f"a page holds a map of {MOST_POINTS:,} texts: got {len(points):,}. Give --limit {MOST_POINTS}, or a "
            f"picture: --out map.png."
        )
    names, numbers = _numbered(labels, len(points))
    counts = np.bincount(numbers, minlength=len(names))
    legend = "".join(
        f'<label><input type="checkbox" data-label="{i}" checked><span class="swatch round"></span>{escape(name)} '
        f"({counts[i]:,})</label>"
        for i, name in enumerate(names)
    )
    body = (
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(about)}</p></header>'
        f'<div class="controls" style="margin-top:16px">{legend}</div>'
        f'<figure class="card"><div id="map"></div></figure>'
        f'<p id="readout" class="sticky readout" aria-live="polite">Point at a text to read it.</p>'
    )
    places = zip(points.tolist(), numbers.tolist(), strict=True)
    data = {
        "points": [[float(f"{x:.5g}"), float(f"{y:.5g}"), n] for (x, y), n in places],
        "texts": [t if len(t) <= _LETTERS else t[: _LETTERS - 1] + "…" for t in texts], "labels": names,
        "axes": list(axes),
    }  # fmt: skip
    return page(title, body, scripts=["map.js"], data=data)


def draw_map(
    points: np.ndarray, labels: Sequence[str] | None, axes: tuple[str, str], title: str, out: pathlib.Path
) -> None:
    """Draw points [N, 2], coloured by label, as a picture.

    Raises:
      ConfigError: matplotlib is not installed.
    """
    plt = pyplot("maps")
    names, numbers = _numbered(labels, len(points))
    figure, axis = plt.subplots(figsize=(9, 6.2), layout="constrained")
    colors = plt.get_cmap("tab10" if len(names) <= 10 else "gist_rainbow", max(len(names), 1))
    for i, name in enumerate(names or [None]):
        own = points[numbers == i]
        shown = None if name is None else f"{name} ({len(own):,})".replace("$", r"\$")
        axis.scatter(*own.T, s=14, alpha=0.75, linewidths=0, color=colors(i), label=shown)
    axis.set(xlabel=axes[0], ylabel=axes[1], xticks=[], yticks=[])
    axis.set_title(title.replace("$", r"\$"), loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    if names:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8, ncols=1 + len(names) // 28)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def _numbered(labels: Sequence[str] | None, count: int) -> tuple[list[str], np.ndarray]:
    """(the labels that occur, the most frequent first, each text's number among them)."""
    if labels is None:
        return [], np.zeros(count, int)
    names, numbers, counts = np.unique(np.array(labels, object).astype(str), return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return names[order].tolist(), np.argsort(order)[numbers]
