"""Scores of ranked lists: how well texts are found by their similarity to a query, for any similarity."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

_QUERIES_AT_ONCE = 256


class Collection(NamedTuple):
    """Queries, the texts among which they are to find theirs, and which are theirs; equal texts are there once."""

    queries: list[tuple[int, int]]
    """(answer, text of it) of each."""
    texts: list[tuple[int, int]]
    relevant: list[np.ndarray]
    """The places among `texts` of each query's positives, of all documents that have this query."""
    own: list[int]
    """The place among `texts` of the query's own text, which it is not to find; -1 where it is not there."""


def collection_of(keys: Sequence[np.ndarray]) -> Collection:
    """Each document's first text is a query, its second what the query is to find, and all but the first are what it is
    to be found among; the text of a document of one is there to be found by none.

    Args:
      keys: hashes of each document's texts, [n, 2].
    """
    places: dict[bytes, int] = {}
    texts: list[tuple[int, int]] = []
    queries: dict[bytes, tuple[int, int]] = {}
    positives: dict[bytes, set[int]] = {}
    for i, own in enumerate(keys):
        names = [key.tobytes() for key in own]
        for k in range(min(1, len(names) - 1), len(names)):
            if names[k] not in places:
                places[names[k]] = len(texts)
                texts.append((i, k))
        if len(names) > 1:
            queries.setdefault(names[0], (i, 0))
            positives.setdefault(names[0], set()).add(places[names[1]])
    relevant = [np.array(sorted(positives[name])) for name in queries]
    return Collection(list(queries.values()), texts, relevant, [places.get(name, -1) for name in queries])


def ranks(found: Collection, likeness: Callable[[slice], Float[np.ndarray, "Q C"]]) -> Iterator[np.ndarray]:
    """The ranks of each query's positives, from 1, best first. A text that is as like as a positive goes before it.

    Args:
      likeness: of some queries to all texts.
    """
    for start in range(0, len(found.queries), _QUERIES_AT_ONCE):
        some = slice(start, start + _QUERIES_AT_ONCE)
        block = np.array(likeness(some))
        for row, relevant, own in zip(block, found.relevant[some], found.own[some], strict=True):
            values = np.sort(row[relevant])[::-1]
            row[relevant] = -np.inf
            if own >= 0 and own not in relevant:
                row[own] = -np.inf
            yield (row >= values[:, None]).sum(1) + 1 + np.arange(len(values))


def rank_scores(all_ranks: Sequence[np.ndarray]) -> dict[str, float]:
    """Means over queries: whether the first found is a positive (accuracy_at_1), one over the rank of the first
    positive (mrr), nDCG of the first ten (Järvelin and Kekäläinen 2002, gains of 0 and 1), and the share of positives
    among the first ten and hundred.

    Args:
      all_ranks: of each query's positives, from 1.
    """

    def mean(of: Callable[[np.ndarray], Any]) -> float:
        return float(np.mean([of(own) for own in all_ranks]))

    def gain(own: np.ndarray) -> float:
        return float((1 / np.log2(1 + own[own <= 10])).sum())

    return {
        "accuracy_at_1": mean(lambda own: own.min() == 1),
        "mrr": mean(lambda own: 1 / own.min()),
        "ndcg_at_10": mean(lambda own: gain(own) / gain(np.arange(1, len(own) + 1))),
        "recall_at_10": mean(lambda own: (own <= 10).mean()),
        "recall_at_100": mean(lambda own: (own <= 100).mean()),
    }


def neighbour_scores(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`rank_scores` by the cosines of vectors.

    Args:
      answers: each has `vectors` [n, E] of length 1 and `text_keys` [n, 2].
    """
    found = collection_of([answer["text_keys"] for answer in answers])
    queries = np.stack([answers[i]["vectors"][k] for i, k in found.queries])
    texts = np.stack([answers[i]["vectors"][k] for i, k in found.texts])
    return rank_scores(list(ranks(found, lambda some: queries[some] @ texts.T)))


def word_matrix(texts: Sequence[str], *, by_rarity: bool) -> Any:
    """Sparse rows [texts, words] of length 1: which words a text has, or with `by_rarity` how often, words that fewer
    texts have weighing more (TF-IDF, scikit-learn)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    pattern = r"(?u)\b\w+\b"
    return TfidfVectorizer(token_pattern=pattern, use_idf=by_rarity, binary=not by_rarity).fit_transform(texts)
