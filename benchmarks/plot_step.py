"""Draw real tokens a second against row length, ours and the peer's, from what bench_step.py --json printed.

    python benchmarks/plot_step.py RESULT.json ... --out tokens.png        # needs pip install -e '.[plot]'
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", default="tokens.png")
    asked = parser.parse_args()
    results = sorted((json.loads(p.read_text()) for p in asked.results), key=lambda r: r["header"]["length"])
    lengths = [r["header"]["length"] for r in results]
    about = results[0]["header"]

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    sides = [("ours", "packed rows, ours", "o-"), ("peer", f"padded to the longest, {about['peer']}", "s--")]
    for side, label, style in sides:
        rates = [r[side]["tokens_per_second"] for r in results]
        axes.plot(lengths, rates, style, label=label)
        for x, y in zip(lengths, rates, strict=True):
            axes.annotate(f"{y:,.0f}", (x, y), textcoords="offset points", xytext=(0, 7), ha="center")
    axes.set(
        xlabel="row length, or the length documents are cut to (tokens)",
        ylabel="real tokens a second",
        title=f"{about['model']}, {about['dtype']}, {about['cores']} cores of {about['device']}",
        xscale="log",
        ylim=(0, 1.15 * max(r[side]["tokens_per_second"] for r in results for side, *_ in sides)),
    )
    axes.set_xticks(lengths, [str(length) for length in lengths], minor=False)
    axes.minorticks_off()
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(asked.out, dpi=150)
    print(f"wrote {asked.out}")


if __name__ == "__main__":
    main()
