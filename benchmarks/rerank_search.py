"""A cross-encoder on the results of a search by words: makes the pairs that it learns and orders, and scores its order.

python benchmarks/rerank_search.py make en.jsonl FOLDER      # FOLDER/train.jsonl and FOLDER/found.jsonl
python train.py --config configs/rerank.py --init-from MODEL --data.source FOLDER/train.jsonl --run-dir RUN
python -m flax_encoder predict RUN --input FOLDER/found.jsonl --output FOLDER/scores.jsonl --probabilities
python benchmarks/rerank_search.py score FOLDER/found.jsonl FOLDER/scores.jsonl

A line of en.jsonl is {"text": ..., "description": ...}. A description is a query, and the first 40 words of its text
are the passage to find; descriptions that several texts have are left out. A fifth of the texts is for the test. TF-IDF
searches among the passages of a query's own side. Training has each query's right passage, and --wrong others of the
first ten. The test has the first ten of each query, best first: no order of them finds a passage that is not there. The
table has the scores of `flax_encoder.tasks.ranking.rank_scores`.
"""

import argparse
import collections
import json
import pathlib
import random

import numpy as np

from flax_encoder.tasks.ranking import rank_scores, word_matrix

FOUND, WORDS, AT_ONCE = 10, 40, 256
SCORES = ("accuracy_at_1", "mrr", "ndcg_at_10", "recall_at_10")


def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows):,} pairs")


def search(queries, passages):
    """The places of the ten passages most like each query, best first."""
    words = word_matrix(queries + passages, by_rarity=True)
    asked, found = words[: len(queries)], words[len(queries) :]
    for start in range(0, len(queries), AT_ONCE):
        likeness = (asked[start : start + AT_ONCE] @ found.T).toarray()
        yield from np.argsort(-likeness, axis=1, kind="stable")[:, :FOUND]


def make(asked):
    rows = [row for row in read(asked.file) if row.get("description")]
    often = collections.Counter(row["description"] for row in rows)
    rows = [row for row in rows if often[row["description"]] == 1]
    asked.folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for name, side in (("train", [r for i, r in enumerate(rows) if i % 5]), ("found", rows[::5])):
        queries = [row["description"] for row in side]
        passages = [" ".join(row["text"].split()[:WORDS]) for row in side]
        pairs = []
        for own, places in enumerate(search(queries, passages)):
            if name == "train":
                places = [own, *rng.sample([place for place in places if place != own], asked.wrong)]
            pairs += [
                {"query": queries[own], "passage": passages[place], "label": "yes" if place == own else "no"}
                for place in places
            ]
        write(asked.folder / f"{name}.jsonl", pairs)


def score(asked):
    pairs, answers = read(asked.found), read(asked.scores)
    right = np.array([pair["label"] == "yes" for pair in pairs]).reshape(-1, FOUND)
    likely = np.array([answer["probabilities"]["yes"] for answer in answers]).reshape(right.shape)
    print(f"{len(right):,} queries, {FOUND} passages each{''.join(f'  {name}' for name in SCORES)}")
    for name, order in (("by words", np.zeros_like(likely)), ("by the model", -likely)):
        order = np.argsort(order, axis=1, kind="stable")
        ordered = np.take_along_axis(right, order, axis=1)
        ranks = [np.array([own.argmax() + 1 if own.any() else np.inf]) for own in ordered]
        scores = rank_scores(ranks)
        print(f"{name:14}{''.join(f'  {scores[metric]:.3f}' for metric in SCORES)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    making, scoring = commands.add_parser("make"), commands.add_parser("score")
    making.add_argument("file", help="texts with their descriptions")
    making.add_argument("folder", type=pathlib.Path, help="where the two files of pairs go")
    making.add_argument("--wrong", type=int, default=2, help="wrong passages of a query in training")
    making.set_defaults(run=make)
    scoring.add_argument("found", help="the pairs that were asked")
    scoring.add_argument("scores", help="what predict answered, with --probabilities")
    scoring.set_defaults(run=score)
    asked = parser.parse_args()
    asked.run(asked)


if __name__ == "__main__":
    main()
