"""A model's scores on a source of documents with their right values."""

import dataclasses
import functools
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from flax_encoder.config import ConfigError, DataConfig
from flax_encoder.config.rules import counted
from flax_encoder.data.pipeline import cache_folder, open_stores
from flax_encoder.data.rows.batches import Batches, OneByOne
from flax_encoder.data.rows.documents import Documents, Frame
from flax_encoder.data.rows.targets import HOST_FIELDS, TargetInputs
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.opening import open_source
from flax_encoder.data.sources.records import DataError, Record, Say
from flax_encoder.data.store.encoding import text_key
from flax_encoder.runs.ask_file import check_golds, open_input, open_records
from flax_encoder.runs.ask_together import embed_together, predict_together
from flax_encoder.runs.embed import Embedder
from flax_encoder.runs.loaded import LoadedRun
from flax_encoder.runs.processes import blocks_of_all
from flax_encoder.runs.vector_settings import settings_of_run
from flax_encoder.tasks.loss import LossSum
from flax_encoder.tasks.task import Answer

_TOKENS = 4096  # of a batch
_BATCHES = 8  # that a process works on at a time


class Scored(NamedTuple):
    """What a model says of a source's documents, beside what is right; empty documents are left out."""

    scores: dict[str, float]
    answers: list[Answer]
    golds: list[Any]
    """Of the task's kind, in the model's labels."""
    records: list[Record]
    about: str
    """What was scored, for people."""


def score_source(
    run: LoadedRun, config: DataConfig, say: Say, corpus: str | None = None, tell: Say = lambda message: None
) -> tuple[dict[str, float], dict[str, Any], str]:
    """(scores, details, what was scored): every record of the source's test split, else its validation split, else
    all.

    Args:
      corpus: of a task that makes vectors, a source of texts among which the records' texts are to be found, besides
        those of the records.
      say, tell: hear how far the work is, and what the source has to say: columns that were guessed, rows left out.

    Raises:
      ConfigError: a corpus for another task.
      DataError: no records, or records without values. LabelError: labels that the model does not have.
    """
    task = run.task
    run.check_asked()
    if corpus is not None and task.vectors is None:
        raise ConfigError(f"a corpus is searched by vectors, which {run.config.objective} does not make: leave it out.")
    if task.answer is None or task.score is None:
        return _loss(run, config, say)
    found = score_answers(run, config, say, corpus=corpus, tell=tell)
    details = task.details(found.answers, found.golds, run.label_names) if task.details else {}
    return found.scores, details, found.about


def score_answers(
    run: LoadedRun, config: DataConfig, say: Say, split: str | None = None, corpus: str | None = None,
    tell: Say = lambda message: None,
) -> Scored:  # fmt: skip
    """The answers to every record of a split, or as `score_source` chooses it, and their scores; of a task that has
    answers.

    Raises:
      DataError, LabelError: as `score_source`.
    """
    task = run.task
    source = open_source(config.sources[0], config, task.reading.columns, cache_folder(config))
    split, found = open_records(source, split, tell)
    records: list[Record] = []

    def asked():
        for record in found:
            records.append(record)
            say(f"{len(records):,} documents")
            yield task.asked(record)

    answers = list(predict_together(run, asked()))
    if not records:
        raise DataError(f"evaluation needs at least one document: {config.sources[0]} has none.")
    if any(record.value is None for record in records) and not task.reading.columns.is_optional:
        raise DataError(f"evaluation needs the right value of every document: {records[0].where} has none.")
    golds = check_golds(run, records)
    keep = [i for i, answer in enumerate(answers) if "error" not in answer]
    empty = f", {len(records) - len(keep):,} of them empty and left out" if len(keep) < len(records) else ""
    about = f"{counted(len(records), 'document')} ({source.name}, {split}{empty})"
    answers, golds, records = ([some[i] for i in keep] for some in (answers, golds, records))
    if corpus is not None:
        more = list(corpus_answers(run, corpus, say))
        answers, golds = answers + more, golds + [None] * len(more)
        about += f", among {len(more):,} more texts"
    assert task.score is not None
    scores = task.score(answers, golds, run.label_names)
    if not scores:
        raise DataError(f"a score needs pairs of texts: {config.sources[0]} has single ones, which nothing belongs to.")
    return Scored(scores, answers, golds, records, about)


def corpus_answers(run: LoadedRun, corpus: str, say: Say) -> Iterator[Answer]:
    """The texts of a source as answers of one text each, with the prompt of what is searched."""
    settings = settings_of_run(run.config)
    assert settings is not None
    try:
        records = open_input(corpus, DataConfig(text_unit="line"), Columns())
    except DataError as error:
        raise DataError(f"a corpus is a line of a .txt file or a row with a column `text` each: {error}") from None
    texts = [text for record in records if (text := record.texts[0].strip())]
    limits = [run.tokenizer.max_tokens or run.row_length]
    limits += [run.config.model.max_length] if run.config.model.position == "learned" else []
    settings = dataclasses.replace(settings, max_tokens=min(limits))
    embedder = Embedder(run.model.encoder, run.tokenizer, settings)
    name = "document" if settings.prompts else None
    vectors, done = np.zeros((len(texts), embedder.embed_dim), np.float32), 0
    for some in embed_together(embedder, texts, prompt_name=name):
        vectors[some.numbers] = some.vectors
        done += len(some.numbers)
        say(f"{done:,} texts of {corpus}")
    keys = np.array([text_key(text) for text in texts], np.uint64).view(np.int32).reshape(-1, 1, 2)
    for vector, key in zip(vectors, keys, strict=True):
        yield {"vectors": vector[None], "text_keys": key}


def _loss(run: LoadedRun, config: DataConfig, say: Say) -> tuple[dict[str, float], dict[str, Any], str]:
    """Of a task without answers, such as masked_lm: its loss on every document."""
    reading = run.task.reading
    whole = dataclasses.replace(config, held_out_rate=0.0, validation=None, test=None)
    _, [store, *_], _ = open_stores(whole, reading.columns_of(run.config), tokenizer=run.tokenizer, progress=say)
    split = store.test if len(store.test) else store.train
    frame = Frame.of(run.tokenizer, run.config.model.position_offset)
    documents = Documents(split, reading.layout(run.config), frame, run.row_length)
    plan = documents.plan(run.row_length)
    order, batch_size = OneByOne([plan]), max(1, _TOKENS // run.row_length)
    inputs = TargetInputs(run.config, run.tokenizer, documents, run.row_length, plan.max_pieces_per_row, False)
    batches = Batches(
        [documents], order, reading.targets(inputs), row_length=run.row_length, batch_size=batch_size,
        seed=run.config.seed, num_batches=-(-len(order) // batch_size), stop_row=len(order),
        streams=reading.streams(run.config),
    )  # fmt: skip
    graphdef, params = nnx.split(run.model)
    loss = jax.jit(lambda params, batch: nnx.merge(graphdef, params).loss(batch))

    def losses(numbers: list[int]) -> list[LossSum]:
        totals = []
        for i in numbers:
            say(f"evaluating: {i:,} of {len(batches):,} batches")
            batch = {name: x for name, x in batches[i].items() if name not in HOST_FIELDS}
            totals.append(loss(params, batch))
        return jax.device_get(totals)

    totals = [total for _, some in blocks_of_all(range(len(batches)), losses, _BATCHES) for total in some]
    scores = run.task.report(functools.reduce(operator.add, totals))
    return scores, {}, f"{counted(len(split), 'document')} ({config.sources[0]})"
