"""What can be had without a model: guesses from counts, to hold a model's held-out numbers against."""

from collections.abc import Sequence

import numpy as np

from flax_encoder.data.rows.batches import Batches
from flax_encoder.data.rows.documents import Batch, Documents, Frame, Layout, assemble

_COUNTED_TOKENS = 2**22  # of a larger corpus a random part is counted


class NeighbourCounts:
    """The most frequent token between two given neighbours; else after the left, else before the right, else of all.

    Counted on training rows without masks, special tokens as neighbours included. A masked neighbour tells nothing,
    so the guess falls back to the other.
    """

    def __init__(self, splits, tokenizer, row_length: int):
        tokens, segments = _training_rows(splits, tokenizer, row_length)
        left, middle, right = tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]
        inside = (segments[:, :-2] == segments[:, 2:]) & (segments[:, 1:-1] > 0)
        left, middle, right = left[inside], middle[inside], right[inside]
        self._vocab_size = V = tokenizer.vocab_size
        self._mask = tokenizer.special("mask")
        self._tables = [_best(context, middle, V) for context in (left * V + right, left, right)]
        ordinary = np.bincount(middle, minlength=V)
        ordinary[tokenizer.special_ids] = 0
        self._frequency = (ordinary + 1) / (ordinary + 1).sum()

    def score(self, batches: Batches) -> dict[str, dict[str, float]]:
        """Accuracy of both guesses on the batches' targets, and the loss of always giving the tokens' frequencies."""
        hits, best, nats, count = 0.0, 0.0, 0.0, 0.0
        likeliest = int(self._frequency.argmax())
        for i in range(len(batches)):
            batch = batches[i]
            weights, targets = batch["target_weights"], batch["targets"]
            best += float((weights * (targets == likeliest)).sum())
            hits += float((weights * (self._guess(batch) == targets)).sum())
            nats -= float((weights * np.log(self._frequency[targets])).sum())
            count += float(weights.sum())
        return {
            "most_frequent": {
                "accuracy": best / count,
                "loss": nats / count,
                "perplexity": float(np.exp(nats / count)),
            },
            "neighbours": {"accuracy": hits / count},
        }

    def _guess(self, batch: Batch) -> np.ndarray:
        tokens = np.pad(batch["tokens"].astype(np.int64), ((0, 0), (1, 1)))
        left = np.take_along_axis(tokens, batch["target_positions"], 1)
        right = np.take_along_axis(tokens, batch["target_positions"] + 2, 1)
        knows_left, knows_right = left != self._mask, right != self._mask
        asked = ((left * self._vocab_size + right, knows_left & knows_right), (left, knows_left), (right, knows_right))
        guess = np.full(left.shape, int(self._frequency.argmax()))
        for (keys, values), (wanted, known) in zip(reversed(self._tables), reversed(asked), strict=True):
            at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            guess = np.where(known & (keys[at] == wanted), values[at], guess)
        return guess


class PreviousCounts:
    """The most frequent token after the one before, else of all.

    Args:
      before, after: tokens [N] and what stands after each.
    """

    def __init__(self, before: np.ndarray, after: np.ndarray, vocab_size: int):
        self._followers = _best(before, after, vocab_size)
        counts = np.bincount(after, minlength=vocab_size)
        self._frequency = (counts + 1) / (counts + 1).sum()

    @classmethod
    def of_texts(cls, splits, tokenizer, row_length: int) -> "PreviousCounts":
        """Counted on training rows, special tokens included."""
        tokens, segments = _training_rows(splits, tokenizer, row_length)
        inside = (segments[:, :-1] == segments[:, 1:]) & (segments[:, :-1] > 0)
        return cls(tokens[:, :-1][inside], tokens[:, 1:][inside], tokenizer.vocab_size)

    @classmethod
    def of_batches(cls, batches: Sequence[Batch], vocab_size: int, given: str) -> "PreviousCounts":
        """Counted on what the field `given` of training batches and their targets have: targets that are made of a
        text, such as the spans that are cut out of it, follow one another as no text does."""
        is_target = [batch["target_weights"] > 0 for batch in batches]
        pairs = [
            np.concatenate([batch[name][where] for batch, where in zip(batches, is_target, strict=True)])
            for name in (given, "targets")
        ]
        return cls(*(tokens.astype(np.int64) for tokens in pairs), vocab_size)

    def score(self, batches: Batches | Sequence[Batch], given: str = "tokens") -> dict[str, dict[str, float]]:
        """Of targets that follow each token of the batches: the accuracy of both guesses, and the loss of always giving
        the tokens' frequencies.

        Args:
          given: the field of the tokens that the targets follow.
        """
        hits, best, nats, count = 0.0, 0.0, 0.0, 0.0
        likeliest, (known, followers) = int(self._frequency.argmax()), self._followers
        for i in range(len(batches)):
            batch = batches[i]
            is_target = batch["target_weights"] > 0
            before, targets = batch[given][is_target].astype(np.int64), batch["targets"][is_target]
            at = np.minimum(np.searchsorted(known, before), len(known) - 1)
            guess = np.where(known[at] == before, followers[at], likeliest)
            best += float((targets == likeliest).sum())
            hits += float((targets == guess).sum())
            nats -= float(np.log(self._frequency[targets]).sum())
            count += float(is_target.sum())
        perplexity = float(np.exp(nats / count))
        return {
            "most_frequent": {"accuracy": best / count, "loss": nats / count, "perplexity": perplexity},
            "previous": {"accuracy": hits / count},
        }


def _training_rows(splits, tokenizer, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int64 [B, T], segments) of training rows, of a large corpus a part."""
    frame = Frame.of(tokenizer)
    parts = []
    for split in splits:
        documents = Documents(split, Layout(long="split"), frame, row_length)
        plan = documents.plan(row_length)
        numbers = np.arange(min(plan.rows_per_epoch, _COUNTED_TOKENS // row_length // len(splits)))
        parts.append(frame.empty(len(numbers), row_length))
        assemble(documents, plan.rows(numbers, 0), parts[-1], numbers)
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return rows["tokens"].astype(np.int64), rows["segment_ids"]


def _best(context: np.ndarray, token: np.ndarray, V: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct contexts, and the most frequent token in each."""
    pairs, counts = np.unique(context * V + token, return_counts=True)
    order = np.lexsort((counts, pairs // V))
    contexts, tokens = np.divmod(pairs[order], V)
    last = np.flatnonzero(np.diff(contexts, append=-1))
    return contexts[last], tokens[last]
