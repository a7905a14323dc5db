"""Guesses from counts against a dictionary and arithmetic by hand."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from flax_encoder.config import MaskingConfig
from flax_encoder.data.baselines import NeighbourCounts, PreviousCounts
from flax_encoder.data.rows.batches import Batches, OneByOne
from flax_encoder.data.rows.documents import Documents, Frame, Layout
from flax_encoder.data.rows.packing import PackingPlan
from flax_encoder.data.rows.targets import masked_lm_targets
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from tests.data import toy_split

T = 23


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(["a b c d e f g"] * 2, 41)


def split_of(tokenizer, lengths, seed):
    """Documents in which the next token mostly follows from the last one."""
    rng = np.random.default_rng(seed)
    ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.special_ids)
    tokens = np.cumsum(rng.choice([1, 2, 5], sum(lengths), p=[0.7, 0.2, 0.1])) % 11
    return toy_split.split_of(np.split(ordinary[tokens], np.cumsum(lengths)[:-1]))


def training_pieces(split, tokenizer):
    """Every piece with its frame, cut as rows of T cut it."""
    room = T - 2
    for a, b in zip(split.offsets[:-1], split.offsets[1:], strict=True):
        for start in range(a, b, room):
            piece = split.tokens[0][start : min(start + room, b)].tolist()
            yield [tokenizer.special("first"), *piece, tokenizer.special("last")]


def slow_score(split, batches, tokenizer):
    both, after, before = (defaultdict(Counter) for _ in range(3))
    totals = Counter()
    for piece in training_pieces(split, tokenizer):
        for left, token, right in zip(piece, piece[1:], piece[2:], strict=False):
            both[left, right][token] += 1
            after[left][token] += 1
            before[right][token] += 1
            totals[token] += 1
    special = set(tokenizer.special_ids.tolist())
    smoothed = {t: 1 + (0 if t in special else totals[t]) for t in range(tokenizer.vocab_size)}

    def best(counter):
        return max(counter, key=lambda t: (counter[t], t))

    mask, likeliest = tokenizer.special("mask"), max(smoothed, key=smoothed.get)
    hits, likeliest_hits, nats = [], [], []
    for batch in batches:
        for row, positions, targets, weights in zip(
            *(batch[k].tolist() for k in ("tokens", "target_positions", "targets", "target_weights")), strict=True
        ):
            for at, target, weight in zip(positions, targets, weights, strict=True):
                if not weight:
                    continue
                left, right = row[at - 1], row[at + 1]
                if mask not in (left, right) and (left, right) in both:
                    guess = best(both[left, right])
                elif left != mask and left in after:
                    guess = best(after[left])
                elif right != mask and right in before:
                    guess = best(before[right])
                else:
                    guess = likeliest
                hits.append(guess == target)
                likeliest_hits.append(likeliest == target)
                nats.append(-math.log(smoothed[target] / sum(smoothed.values())))
    return np.mean(hits), np.mean(likeliest_hits), np.mean(nats)


@pytest.mark.parametrize("rate", [0.15, 0.6])
def test_neighbour_counts_equal_a_slow_reference(tokenizer, rate):
    rng = np.random.default_rng(0)
    train, test = (split_of(tokenizer, rng.integers(1, 53, n).tolist(), n) for n in (29, 41))
    order = OneByOne([PackingPlan(test.offsets, T)])
    targets = masked_lm_targets(tokenizer, MaskingConfig(), (rate, rate), T, 1, 3)
    batches = Batches(
        [Documents(test, Layout(long="split"), Frame.of(tokenizer), T)], order, targets, row_length=T, batch_size=7,
        seed=3,
        num_batches=-(-len(order) // 7), stop_row=len(order),
    )  # fmt: skip
    score = NeighbourCounts([train], tokenizer, T).score(batches)
    hits, likeliest_hits, nats = slow_score(train, [batches[i] for i in range(len(batches))], tokenizer)
    assert score["neighbours"]["accuracy"] == pytest.approx(hits, rel=1e-12)
    assert score["most_frequent"]["accuracy"] == pytest.approx(likeliest_hits, rel=1e-12)
    assert score["most_frequent"]["loss"] == pytest.approx(nats, rel=1e-12)
    assert score["most_frequent"]["perplexity"] == pytest.approx(math.exp(nats), rel=1e-12)
    assert hits > likeliest_hits


def test_guesses_from_the_token_before_are_counted_on_what_is_written():
    """Of batches, as a decoder is given them: what follows a token there, and nothing at slots of weight 0."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(3):
        before, targets = rng.integers(0, 5, (7, 11)), rng.integers(0, 5, (7, 11))
        batches.append({"given": before, "targets": targets, "target_weights": (rng.random((7, 11)) < 0.5) * 1.0})
    followers, totals = defaultdict(Counter), Counter()
    for batch in batches:
        real = batch["target_weights"] > 0
        for a, b in zip(batch["given"][real].tolist(), batch["targets"][real].tolist(), strict=True):
            followers[a][b] += 1
            totals[b] += 1
    hits = sum(max(counts.values()) for counts in followers.values())
    score = PreviousCounts.of_batches(batches, 5, "given").score(batches, given="given")
    assert score["previous"]["accuracy"] == pytest.approx(hits / sum(totals.values()))
    assert score["most_frequent"]["accuracy"] == pytest.approx(max(totals.values()) / sum(totals.values()))
