"""Documents in memory, as a store holds them."""

import numpy as np

from flax_encoder.data.store.store import Split


def split_of(documents, labels=None, word_starts=None, shards=1):
    """A split of token id lists, in `shards` files' worth of arrays; `word_starts` likewise, by default every token."""
    starts = word_starts or [np.ones(len(ids), bool) for ids in documents]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in documents])])
    groups = np.array_split(np.arange(len(documents)), shards)
    return Split(
        [np.concatenate([documents[i] for i in g]).astype(np.uint16) for g in groups],
        [np.packbits(np.concatenate([starts[i] for i in g]), bitorder="little") for g in groups],
        offsets,
        {} if labels is None else {"labels": labels},
    )
