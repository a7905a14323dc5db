"""Scores of ranked lists and of likenesses."""

import numpy as np
import pytest

from flax_encoder.tasks.contrastive import score
from flax_encoder.tasks.ranking import collection_of, rank_scores, ranks


def test_ranks_are_those_of_sorted_likeness_and_ndcg_is_scikit_learns():
    from sklearn.metrics import ndcg_score

    rng = np.random.default_rng(0)
    keys = rng.integers(0, 30, (25, 2, 1))
    keys = np.concatenate([keys, keys], -1)
    found = collection_of([*keys, *rng.integers(100, 110, (12, 1, 2))])
    assert len(found.queries) == len({*keys[:, 0, 0]}) and len(found.texts) >= 25 // 2
    likeness = rng.standard_normal((len(found.queries), len(found.texts)))
    got = list(ranks(found, lambda some: likeness[some]))
    gains = []
    for row, relevant, own, ours in zip(likeness, found.relevant, found.own, got, strict=True):
        row = row.copy()
        if own >= 0 and own not in relevant:
            row[own] = -9
        order = np.argsort(-row)
        np.testing.assert_array_equal(ours, sorted(int(np.flatnonzero(order == r)[0]) + 1 for r in relevant))
        truth = np.isin(np.arange(len(row)), relevant).astype(float)
        gains.append(ndcg_score(truth[None], row[None], k=10))
    np.testing.assert_allclose(rank_scores(got)["ndcg_at_10"], np.mean(gains), rtol=1e-9)


def test_scores_by_hand():
    """A query's positives are those of all documents with it; equal likeness is no success; its own text is not its."""
    scores = rank_scores([np.array([1, 12]), np.array([2])])
    assert scores == {
        "accuracy_at_1": 0.5, "mrr": 0.75, "recall_at_10": 0.75, "recall_at_100": 1.0,
        "ndcg_at_10": pytest.approx((1 / (1 + 1 / np.log2(3)) + 1 / np.log2(3)) / 2),
    }  # fmt: skip
    same = np.array([[1.0, 0], [1.0, 0]], np.float32)
    keys = np.arange(8, dtype=np.int32).reshape(2, 2, 2)
    answers = [{"score": 1.0, "vectors": same, "text_keys": own} for own in keys]
    assert score(answers, [None, None])["accuracy_at_1"] == 0.0
    assert score(answers[:1], [None])["accuracy_at_1"] == 1.0
    own = {"vectors": same[:1], "text_keys": keys[0, :1]}
    assert score([answers[0], own], [None, None])["accuracy_at_1"] == 1.0
    assert score([own], [None]) == {}
    numbers = score([{"score": s} for s in (0.1, 0.9, 0.4)], [1.0, 3.0, 2.0])
    assert numbers["spearman"] == 1.0 and 0.9 < numbers["pearson"] < 1.0
    margins = [{"score": 0.5, "vectors": np.array([[1, 0], [0.5, 0], [x, 0]], np.float32)} for x in (0.4, 0.0, 0.2)]
    assert score(margins, [1.0, 3.0, 2.0])["spearman"] == 1.0, "a number of three texts is of the lead of the second"
