"""The batches that a run would have, from its settings alone: made by its own data path, of documents that are made up.

A batch's shape follows from the settings for most tasks; for those with a target a document it follows from how many
documents a row holds. So documents of a stated length are made, and go the way of a run's from the tokenizer on.
"""

import dataclasses
import itertools
import pathlib
import random
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from flax_encoder.config import ConfigError, RunConfig
from flax_encoder.config.phases import in_shares
from flax_encoder.data.pipeline import open_data, settle_tokenizer
from flax_encoder.data.rows.documents import Batch
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.opening import Source
from flax_encoder.data.sources.records import Part, Record
from flax_encoder.data.store.prepare import prepare
from flax_encoder.data.store.tokenizing import HeldOut
from flax_encoder.data.tokens.tokenizer_files import read_tokenizer
from flax_encoder.runs.length import settle_length
from flax_encoder.runs.start import with_vocab_size
from flax_encoder.runs.teacher import OpenTeacher, open_teacher
from flax_encoder.tasks import find_task

_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
_WORDS = ["".join(pair) for pair in itertools.product(_SYLLABLES[:10], _SYLLABLES[10:20])]
_VOCABULARY = 1024  # holds all of them
_ROWS = 8  # that the documents fill, at least


class Sample(NamedTuple):
    """What a run's data decides, had it documents of the stated length."""

    config: RunConfig
    """With the steps of its epochs, the rows that hold its texts, and the vocabulary."""
    label_names: list[str] | None
    batches: list[Batch]
    """The first of each stage."""
    teacher: OpenTeacher | None = None


def sample_data(
    config: RunConfig, *, document_tokens: int | None = None, texts: int | None = None, unit: int = 1
) -> Sample:
    """The data of a run of these settings, made up.

    Args:
      document_tokens: of each document, as far as a row holds it; None fills a row, which attention takes longest for.
      texts: documents of the training text, which `epochs` counts.
      unit: rows of a batch are a multiple of it.

    Raises:
      ConfigError: epochs without texts.
    """
    task = find_task(config.objective)
    if config.epochs is not None and texts is None:
        raise ConfigError(
            "epochs count the training text, which a plan does not read: give --texts N, its documents, or --steps "
            "with --epochs None."
        )
    columns, names = task.reading.columns, list(config.data.label_names or ("first", "second"))
    if (teacher := open_teacher(config)) is not None:
        config, of_teacher, labels = teacher.settle(config, None, None, lambda message: None)
        names = labels or names
    longest = max(config.row_lengths)
    document_tokens = min(document_tokens or longest, longest - 4)
    count = max(64, -(-_ROWS * longest // document_tokens))

    def settle(config: RunConfig, rows: int, documents: int) -> RunConfig:
        scale = 1.0 if texts is None else texts / documents
        return settle_length(config, max(1, round(rows * scale)), max(1, round(documents * scale)), unit=unit)

    # What names or cuts the run's own text means nothing here. Of batches in buckets the longest is planned for.
    data = dataclasses.replace(
        config.data, weights=None, validation=None, test=None, tokenizer=None, word_vectors=None, text_column=None,
        text_pair_column=None, label_column=None, label_names=None, buckets=(), workers=0, verify=False,
    )  # fmt: skip
    size = config.data.vocab_size if config.data.tokenizer is None else read_tokenizer(config.data.tokenizer).vocab_size
    size = size if teacher is None else of_teacher.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        store = pathlib.Path(folder, "store")
        parts = [
            Part(split, 1, _Documents(columns, names, number, document_tokens))
            for split, number in (("train", count), ("validation", 8))
        ]
        source = Source(parts, fingerprint="made up", label_names=names, name="made up")
        data = dataclasses.replace(data, vocab_size=_VOCABULARY)
        tokenizer = settle_tokenizer(data, columns, [], [source], lambda message: None)
        prepare(source, tokenizer, store, columns, held_out=HeldOut(0.0), workers=1)
        config = dataclasses.replace(config, phases=in_shares(config.phases))
        phases = tuple(dataclasses.replace(phase, weights=None) for phase in config.phases)
        # What is made up has words alone; where a text is cut changes no shape.
        sentences = dataclasses.replace(config.sentences, unit="word")
        here = dataclasses.replace(
            config, data=dataclasses.replace(data, source=str(store)), phases=phases, sentences=sentences
        )
        reading_of = lambda objective: find_task(objective).reading  # noqa: E731
        made = open_data(here, task.reading, tokenizer=tokenizer, settle=settle, reading_of=reading_of)
        settled = task.settle(with_vocab_size(made.config, size), made)
        batches = [made.train[stage.start_step] for stage in settled.stages]
    settled = dataclasses.replace(settled, data=config.data, phases=config.phases, sentences=config.sentences)
    return Sample(settled, made.label_names, batches, teacher)


@dataclasses.dataclass(frozen=True)
class _Documents:
    columns: Columns
    names: list[str]
    count: int
    tokens: int

    def __call__(self) -> Iterator[Record]:
        draw = random.Random(self.count)
        texts = max(self.columns.min_texts, min(self.columns.max_texts, 2))
        each = max(1, self.tokens // (texts if self.columns.min_texts < 3 else 2))
        for i in range(self.count):
            words = [[draw.choice(_WORDS) for _ in range(each)] for _ in range(texts)]
            yield Record(tuple(" ".join(of_text) for of_text in words), self._value(i, words), f"document {i}")

    def _value(self, i: int, words: list[list[str]]) -> Any:
        name = self.names[i % len(self.names)]
        if self.columns.value == "text":
            return " ".join(words[0])
        kinds = {"none": None, "class": name, "classes": (name,), "number": float(i % 7)}
        if self.columns.value == "tags":
            ends = list(itertools.accumulate(len(word) + 1 for word in words[0]))
            return tuple((end - 1 - len(w), end - 1, name) for w, end in zip(words[0], ends, strict=True))
        if self.columns.value == "answers":
            return ((0, words[-1][0]),)
        return kinds[self.columns.value] if not self.columns.is_choice else str(i % (len(words) - 1))
