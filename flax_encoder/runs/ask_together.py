"""Answers and vectors by one process, or by several that were started together."""

from collections.abc import Iterable, Iterator

import jax
import numpy as np

from flax_encoder.data.sources.records import Record
from flax_encoder.runs.embed import Embedder, Vectors
from flax_encoder.runs.loaded import LoadedRun
from flax_encoder.runs.processes import blocks_of_all
from flax_encoder.tasks.task import Answer

# What one of several processes works on at a time: as many records as `predict` packs together, and texts enough to
# fill the batches of every length.
_RECORDS, _TEXTS = 2048, 8192


def predict_together(run: LoadedRun, records: Iterable[Record], *, with_texts: bool = False) -> Iterator[Answer]:
    """`run.predict` by all processes; each gets all answers, in order."""
    if jax.process_count() == 1:
        yield from run.predict(records, with_texts=with_texts)
        return
    for _, answers in blocks_of_all(records, lambda some: list(run.predict(some, with_texts=with_texts)), _RECORDS):
        yield from answers


def embed_together(
    embedder: Embedder, texts: Iterable[str], batch_size: int | None = None, *, prompt_name: str | None = None
) -> Iterator[Vectors]:
    """`embedder.stream` by all processes; each gets all vectors."""
    if jax.process_count() == 1:
        yield from embedder.stream(texts, batch_size, prompt_name=prompt_name)
        return

    def embed(some: list[str]) -> tuple[np.ndarray, int]:
        """By `stream`, whose vectors do not depend on how many texts there are."""
        vectors, num_cut = np.zeros((len(some), embedder.embed_dim), np.float32), 0
        for part in embedder.stream(some, batch_size, prompt_name=prompt_name):
            vectors[part.numbers], num_cut = part.vectors, part.num_cut
        return vectors, num_cut

    num_cut = 0
    for first, (vectors, num_more) in blocks_of_all(texts, embed, _TEXTS):
        num_cut += num_more
        yield Vectors(np.arange(first, first + len(vectors)), vectors, num_cut)
