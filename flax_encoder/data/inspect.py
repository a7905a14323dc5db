"""What is in a store, for people: counts, lengths, how full rows get, and rows as a model sees them."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.text import Text

from flax_encoder.config import UL2, MaskingConfig, SpansConfig
from flax_encoder.data.rows.batches import Batches, Mixture
from flax_encoder.data.rows.documents import Batch, Documents, Frame, Layout, Written, balanced_length
from flax_encoder.data.rows.masking import budget
from flax_encoder.data.rows.packing import PackingPlan, length_histogram
from flax_encoder.data.rows.targets import masked_lm_targets, shifted_targets, span_corruption_targets
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.store.store import Split, Store
from flax_encoder.data.tokens.tokenizer import TextTokenizer

ROW_LENGTHS = (128, 256, 512, 1024, 2048, 8192)
_BARS = 40
_SEGMENT_STYLES = ("cyan", "yellow", "bright_blue", "magenta", "white")


def summarize(store: Store, tokenizer: TextTokenizer, say: Callable[[str], None]) -> dict[str, Any]:
    """Counts, the histogram of training lengths, and what `PackingPlan` reaches at several row lengths."""
    specials = Frame.of(tokenizer).specials
    rows = []
    for row_length in ROW_LENGTHS:
        say(f"packing rows of {row_length}")
        plan = PackingPlan(store.train.offsets, row_length, specials, histogram=store.train.histogram)
        rows.append({"row_length": row_length, "rows_per_epoch": plan.rows_per_epoch, "fill_rate": plan.fill_rate})
    lengths, documents = length_counts(store.train)
    below = np.cumsum(documents)
    edges = 2 ** np.arange(int(lengths.max()).bit_length() + 1)
    counts, _ = np.histogram(lengths, edges, weights=documents)
    return {
        "hash": store.hash,
        "tokenizer": store.manifest["tokenizer"],
        "vocab_size": tokenizer.vocab_size,
        "splits": store.manifest["splits"],
        "dropped": store.manifest["dropped"],
        "label_names": store.label_names,
        "length_tokens": {
            "mean": float((lengths * documents).sum() / below[-1]),
            **{f"p{p}": int(lengths[np.searchsorted(below, p / 100 * below[-1])]) for p in (5, 50, 95, 99)},
            "max": int(lengths.max()),
        },
        "length_histogram": [
            {"from": int(a), "below": int(b), "documents": int(n)}
            for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
            if n
        ],
        "packing": rows,
    }


def length_counts(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The lengths that documents have, in order, and how many have each; from the store's histogram alone."""
    histogram = length_histogram(split.offsets) if split.histogram is None else split.histogram
    lengths, which = np.unique(histogram[1].astype(np.int64), return_inverse=True)
    return lengths, np.bincount(which, histogram[2]).astype(np.int64)


def histogram_lines(summary: dict[str, Any]) -> list[str]:
    """The lengths as bars of text."""
    bins = summary["length_histogram"]
    most = max(b["documents"] for b in bins)
    return [
        f"{b['from']:>9,} to {b['below'] - 1:<9,} {b['documents']:>12,} " + "█" * max(1, _BARS * b["documents"] // most)
        for b in bins
    ]


def plot(store: Store, summary: dict[str, Any], path: pathlib.Path) -> None:
    """Draw the histogram of lengths, and the fill rate over the row length.

    Raises:
      DataError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise DataError("plots need matplotlib: pip install -e '.[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lengths, documents = length_counts(store.train)
    left.hist(lengths, weights=documents, bins=np.geomspace(1, lengths.max() + 1, 60))
    left.set(xscale="log", xlabel="tokens in a document", ylabel="documents", title="Lengths of training documents")
    x = [row["row_length"] for row in summary["packing"]]
    y = [100 * row["fill_rate"] for row in summary["packing"]]
    right.plot(x, y, "o-")
    for a, b in zip(x, y, strict=True):
        right.annotate(f"{b:.1f}", (a, b), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
    right.set(xscale="log", xlabel="row length (tokens)", ylabel="filled (%)", title="Packed rows", xticks=x)
    right.set_xticklabels(map(str, x))
    right.minorticks_off()
    right.set_ylim(min(90, min(y) - 2), 101)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def sample_rows(
    split: Split, tokenizer: TextTokenizer, *, kind: str, rate: float, rows: int, row_length: int, seed: int
) -> Batch:
    """The first rows of an epoch, masked by `kind`: a `MaskingConfig`'s; t5; ul2, whose rates are its own; or written,
    sources with the targets beside them, of a store that has them."""
    frame = Frame.of(tokenizer)
    layout = Layout(long="split")
    if kind == "written":
        layout = Layout(written=Written(balanced_length(split, row_length, frame)))
    documents = Documents(split, layout, frame, row_length)
    if kind == "written":
        start = tokenizer.special("pad") if frame.first is None else frame.first
        targets = functools.partial(shifted_targets, start, False)
    elif kind in ("t5", "ul2"):
        denoisers, slots = (UL2, row_length) if kind == "ul2" else (SpansConfig(rate=rate).mixture, row_length // 2)
        targets = span_corruption_targets(tokenizer, denoisers, row_length, slots, seed)
    else:
        masking = MaskingConfig(kind=kind, rate=rate)  # type: ignore[arg-type]
        targets = masked_lm_targets(tokenizer, masking, (rate, rate), budget(kind, rate, row_length), 1, seed)  # type: ignore[arg-type]

    return Batches(
        [documents], Mixture([documents.plan(row_length)], [1.0]), targets, row_length=row_length, batch_size=rows,
        seed=seed, num_batches=1, streams=() if kind == "written" else ("word_starts",),
    )[0]  # fmt: skip


def draw_row(batch: Batch, row: int, tokenizer: TextTokenizer) -> Text:
    """A row as text: a colour a document, and where a token is predicted, what is shown and ⟨what is right⟩."""
    text = Text()
    answers = {}
    if "target_positions" in batch:
        used = batch["target_weights"][row] > 0
        positions = batch["target_positions"][row][used].tolist()
        answers = dict(zip(positions, batch["targets"][row][used].tolist(), strict=True))
    for column, (token, segment) in enumerate(zip(batch["tokens"][row], batch["segment_ids"][row], strict=True)):
        if not segment:
            break
        spelled = tokenizer.token(token)
        style = _SEGMENT_STYLES[(segment - 1) % len(_SEGMENT_STYLES)]
        if token in tokenizer.special_ids and column not in answers:
            style = "dim"
        text.append(("" if spelled.startswith("##") or not column else " ") + spelled.removeprefix("##"), style)
        if column in answers:
            text.append(f"⟨{tokenizer.token(answers[column])}⟩", "bold red")
    padding = int((batch["segment_ids"][row] == 0).sum())
    if padding:
        text.append(f" + {padding} of padding", "dim")
    if "decoder_tokens" in batch:
        targets = batch["targets"][row][batch["target_weights"][row] > 0]
        text.append("\n→ " + " ".join(tokenizer.token(t) for t in targets), "bold red")
    return text
