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


def predict_together(run: LoadedRun, records: Iterable[Record]) -> Iterator[Answer]:
    """`run.predict` by all processes; each gets all answers, in order."""
    if jax.process_count() == 1:
        yield from run.predict(records)
        return
    for _, answers in blocks_of_all(records, lambda some: list(run.predict(some)), _RECORDS):
        yield from answers


def embed_together(
    embedder: Embedder, texts: Iterable[str], batch_size: int | None = None, *, prompt_name: str | None = None
) -> Iterator[Vectors]:
    """`embedder.stream` by all processes; each gets all vectors."""
    if jax.process_count() == 1:
        yield from embedder.stream(texts, batch_size, prompt_name=prompt_name)
        return
    num_cut = 0
    shared = blocks_of_all(texts, lambda some: embedder.embed(some, batch_size, prompt_name=prompt_name), _TEXTS)
    for first, (vectors, num_more) in shared:
        num_cut += num_more
        yield Vectors(np.arange(first, first + len(vectors)), vectors, num_cut)
