"""The page of what tokens attend to, and the same as a picture."""

import base64
import pathlib
from collections.abc import Sequence

import numpy as np

from flax_encoder.config import ConfigError
from flax_encoder.pages.frame import escape, page, section

MOST_TOKENS = 256  # of a page, whose weights are one byte each


def attention_page(tokens: Sequence[str], weights: np.ndarray, segments: Sequence[int], title: str, about: str) -> str:
    """An interactive page: an overview of layers and heads, of one head the matrix, and lines between tokens.

    Args:
      tokens: T of them, as the tokenizer spells them.
      weights: float [L, N, T, T]; shown to 1/255.
      segments: each token's document in the row, from 1, by which lines are coloured.
      about: a line under the title.

    Raises:
      ConfigError: more than `MOST_TOKENS` tokens.
    """
    if len(tokens) > MOST_TOKENS:
        raise ConfigError(
            f"a page of attention holds {MOST_TOKENS} tokens: got {len(tokens)}. Give a shorter text, or a picture: "
            f"--out attention.png."
        )
    L, N = weights.shape[:2]
    levels = np.rint(np.clip(weights, 0, 1) * 255).astype(np.uint8)
    body = (
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(about)}</p></header>'
        + section(
            "Layers and heads", '<div id="overview" role="group" aria-label="layers and heads"></div>',
            note="Rows are layers, columns are heads. Press one, or move with the arrow keys.",
        )
        + '<section><h2 id="which"></h2><div class="pair"><figure class="card"><figcaption><h3>Matrix</h3>'
        '<span class="unit">a row attends, a column is attended to; rows add up to 1</span></figcaption>'
        '<div id="matrix"></div></figure><figure class="card"><figcaption><h3>Lines</h3><span class="unit">from 2% on; '
        'point at a token or move with the arrow keys</span></figcaption><div id="lines"></div></figure></div>'
        '<p id="readout" class="sticky readout" aria-live="polite"></p></section>'
    )  # fmt: skip
    data = {
        "tokens": list(tokens), "segments": list(map(int, segments)), "layers": L, "heads": N,
        "weights": base64.b64encode(levels.tobytes()).decode(),
    }  # fmt: skip
    return page(title, body, scripts=["attention.js"], data=data)


def draw_attention(tokens: Sequence[str], weights: np.ndarray, out: pathlib.Path, title: str) -> None:
    """Draw every layer and head as one picture, with the tokens where there is room, or the only one large.

    Args:
      weights: float [L, N, T, T].

    Raises:
      ConfigError: matplotlib is not installed.
    """
    plt = pyplot("pictures of attention")
    L, N, T = weights.shape[:3]
    is_one = L == N == 1
    size = (max(4.0, 1.8 + 0.24 * T),) * 2 if is_one else (0.5 + 1.1 * N, 0.9 + 1.1 * L)
    labels = [token.replace("$", r"\$") for token in tokens]
    font = 8.0 if is_one else min(6.0, 60 / T)
    has_room = font >= 4
    if has_room and not is_one:
        size = (size[0] + 0.5, size[1] + 0.5)
    figure, axes = plt.subplots(L, N, figsize=size, layout="compressed", squeeze=False)
    for layer in range(L):
        for head in range(N):
            axis = axes[layer, head]
            axis.imshow(np.sqrt(weights[layer, head]), cmap="Blues", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.tick_params(length=1, pad=1)
            if has_room and head == 0:
                axis.set_yticks(range(T), labels, fontsize=font)
            if has_room and layer == L - 1:
                axis.set_xticks(range(T), labels, rotation=90, fontsize=font)
            if layer == 0 and not is_one:
                axis.set_title(f"head {head + 1}", fontsize=8)
            if head == 0 and not is_one:
                axis.set_ylabel(f"layer {layer + 1}", fontsize=8)
    if is_one:
        axes[0, 0].set(xlabel="is attended to", ylabel="attends")
    figure.suptitle(title.replace("$", r"\$"), fontsize=10, wrap=True)
    figure.savefig(out, dpi=150, bbox_inches="tight")
    plt.close(figure)


def pyplot(what: str):
    """matplotlib's pyplot, without a screen.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(f"{what} need matplotlib: pip install 'flax-encoder[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
