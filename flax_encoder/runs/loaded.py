"""A trained model with its config, tokenizer and labels, ready to be queried; `load` opens folders that hold one."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from flax_encoder.config import ConfigError, GenerationConfig, RunConfig
from flax_encoder.data.pipeline import few_lengths
from flax_encoder.data.rows.batches import Batches, OneByOne
from flax_encoder.data.rows.documents import Batch, Documents, Frame, Layout, assemble
from flax_encoder.data.rows.targets import HOST_FIELDS, TargetInputs
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.records import DataError, Record
from flax_encoder.data.store.encoding import Encoded, encode_records
from flax_encoder.data.store.store import Split
from flax_encoder.data.store.tokenizing import token_dtype
from flax_encoder.data.tokens.texts import check_texts
from flax_encoder.data.tokens.tokenizer import TextTokenizer, UnknownCount
from flax_encoder.nn.encoder import layers_said, num_parameters
from flax_encoder.nn.generation import READ_PER_WRITTEN
from flax_encoder.nn.lora import with_adapters
from flax_encoder.nn.partition import abstract_model
from flax_encoder.runs.asked import FEW_TOKENS, AskedModel
from flax_encoder.tasks import Task, find_task, is_setting_read
from flax_encoder.tasks.task import Answer, Question

logger = logging.getLogger(__name__)

_TEXTS = ("text", "text_pair")  # of a record, by the names that are guessed where they are read
_BLOCK = 2048  # records that are packed together: what is held in memory at a time
_TOKENS = 4096  # of a batch of rows
_LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # of rows, so that few shapes are compiled


def model_factory(config: RunConfig, label_names: list[str] | None) -> Callable[[], nnx.Module]:
    """Makes the run's model, its parameters drawn from the run's seed; with its adapters, if it has any."""
    make = find_task(config.objective).make_model(config, label_names)
    return with_adapters(lambda: make(nnx.Rngs(config.seed)), config.lora, config.seed)


class TokenVectors(NamedTuple):
    """What a model makes of one text or pair: T tokens with the special ones, L layers, N heads, vectors of D."""

    tokens: list[str]
    vectors: np.ndarray
    """float32 [T, D]: the encoder's last hidden states."""
    attentions: np.ndarray | None = None
    """float32 [L, N, T, T]: how each token, of the third axis, weighs the tokens of the fourth; sums are 1."""


@dataclass(frozen=True)
class LoadedRun:
    """A trained model with its config, tokenizer and labels, ready to be queried; `load` opens one."""

    model: Any
    """The task's module (`MaskedLM`, `Classifier`, ...); `model.encoder` is the `Encoder`."""
    config: RunConfig
    tokenizer: TextTokenizer
    label_names: list[str] | None
    step: int
    fresh: tuple[str, ...] = ()
    """Parameters of the head that the folder lacks. With any, the model gives vectors but no answers."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Results of the run's evaluation after this step, such as eval/accuracy; empty if its folder has none."""
    is_best: bool = False
    """Whether no evaluation of the run was better by its keep_best."""

    def __repr__(self) -> str:
        """In a line; the score is keep_best's, or else the task's headline metric."""
        labels = f" of {len(self.label_names)} labels" if len(self.label_names or ()) > 1 else ""
        size = f"{layers_said(self.config.model)}, {num_parameters(self.model):,} parameters"
        metrics = (self.config.keep_best, f"eval/{self.task.headline}", "eval/loss")
        metric = next((name for name in metrics if name in self.scores), None)
        score = "" if metric is None else f", held-out {metric.removeprefix('eval/')} {self.scores[metric]:.4f}"
        what = f"{self.config.objective}{labels}, {size}, step {self.step}{score}"
        return f"LoadedRun({what}{', the best' * self.is_best})"

    @property
    def task(self) -> Task:
        return find_task(self.config.objective)

    @property
    def can_be_exported(self) -> bool:
        """Whether a published family can express the model, with its head."""
        from flax_encoder.runs.as_published import published_config

        try:
            published_config(self.config, None, self.task.head)
        except ConfigError:
            return False
        return True

    def part(self, name: str | None = None) -> "LoadedRun":
        """One model of a run that trains several, as a run of its own. None is the run's main model; for a run with one
        model that is the run itself.

        Raises:
          ConfigError: there is no part of this name.
        """
        parts = self.task.parts
        if name is None and not parts:
            return self
        if name is not None and name not in parts:
            raise ConfigError(
                f"no part {name!r}: a run of {self.config.objective} has {', '.join(parts) or 'one model; name none'}."
            )
        config, model = parts[next(iter(parts)) if name is None else name](self)
        return dataclasses.replace(self, config=config, model=model, scores={}, is_best=False)

    @property
    def row_length(self) -> int:
        """Tokens of the rows that it was trained on last, which the longest document fits."""
        return self.config.row_lengths[-1]

    @functools.cached_property
    def _asked(self) -> AskedModel:
        return AskedModel(self.model, lambda: self._graphdef(self._with_model(scan_layers=False)))

    def _of_batch(self, function: Callable[..., Any]) -> Callable[[Batch], Any]:
        """`function(model, batch)`, compiled; a text that is written is of few tokens at a time."""
        compiled, always_few = self._asked.function(function), self.task.reading.asks_one_a_row

        def call(batch: Batch) -> Any:
            read = {name: x for name, x in batch.items() if name not in HOST_FIELDS}
            return compiled(always_few or batch["tokens"].size <= FEW_TOKENS, read)

        return call

    @functools.cached_property
    def apply(self) -> Callable[[Batch], dict[str, jax.Array]]:
        """The model's outputs of a batch, compiled once for each shape."""
        return self._of_batch(lambda model, batch: model.outputs(batch))

    @functools.cached_property
    def _logits(self) -> Callable[[Batch], jax.Array]:
        return self._of_batch(lambda model, batch: model(batch))

    @property
    def params(self) -> Any:
        """The model's parameters, a pytree of arrays."""
        return nnx.to_pure_dict(self._asked.split[1])

    @functools.cached_property
    def loss_and_outputs(self) -> Callable[[Batch], tuple[Any, dict[str, jax.Array]]]:
        """The loss of a batch with targets, and the model's outputs; compiled once for each shape."""
        return self._of_batch(lambda model, batch: (model.loss(batch), model.outputs(batch)))

    def with_settings(self, generation: GenerationConfig | None = None, prefix: str | None = None) -> "LoadedRun":
        """This run with other settings of generation (those of `generation` that are not None) and another
        `data.prefix`.

        Raises:
          ConfigError: the task reads no such setting, or settings contradict each other.
        """
        given = generation or GenerationConfig()
        if (given != GenerationConfig() or prefix is not None) and not is_setting_read(
            self.config.objective, "generation."
        ):
            raise ConfigError(f"generation and prefix need a model that writes: this one is {self.config.objective}.")
        data = self.config.data if prefix is None else dataclasses.replace(self.config.data, prefix=prefix)
        config = dataclasses.replace(self.config, data=data, generation=given.over(self.config.generation))
        return self._as(config)

    def with_dtype(self, dtype: Literal["float32", "bfloat16"] | None) -> "LoadedRun":
        """This run with the operands of its matrix products in another dtype; None leaves the model's own. Parameters,
        sums and norms stay float32."""
        return self if dtype is None else self.with_model_settings(dtype=dtype, product_dtype=None)

    def with_model_settings(self, **settings: Any) -> "LoadedRun":
        """This run with other values of settings of `config.model` that its parameters do not depend on."""
        config = self._with_model(**settings)
        return self if config == self.config else self._as(config)

    def _with_model(self, **settings: Any) -> RunConfig:
        return dataclasses.replace(self.config, model=dataclasses.replace(self.config.model, **settings))

    def _as(self, config: RunConfig) -> "LoadedRun":
        model = nnx.merge(self._graphdef(config), self._asked.split[1])
        return dataclasses.replace(self, config=config, model=model)

    def _graphdef(self, config: RunConfig) -> Any:
        make = self.task.make_model(config, self.label_names)
        return abstract_model(lambda: make(nnx.Rngs(0)))[0]

    def check_asked(self) -> None:
        """
        Raises:
          DataError: no weights were found for the head, so that nothing can be asked.
        """
        if self.fresh:
            raise DataError(
                f"a model is asked by the head that it was trained with: the folder has no {', '.join(self.fresh)}. It "
                f"gives vectors (embed), and --init-from starts from it."
            )

    def predict(
        self, records: Iterable[Record | str | tuple[str, ...]] | Any, *, with_texts: bool = False
    ) -> Iterator[Answer]:
        """One answer per record, in order: what the task's `answer` makes of the model's outputs.

        A record may be a `Record`, a text, or a tuple of texts. Some thousands are packed into rows at a time, and no
        more are in memory. The right value of a record is ignored, but its words are kept. If a record has a name, its
        answer has it as `id`. The answer to a record without a token is {"error": ...}.

        Args:
          with_texts: answers begin with what was asked: under `text`, of pairs `text_pair` too, of more texts `texts`,
            and `source` where the model writes `text`.

        Raises:
          DataError: the task has no answers, `records` is no list of records, or a record has another number of texts
            than the task reads.
        """
        self.check_asked()
        if self.task.answer is None:
            raise DataError(f"objective {self.config.objective} has no answers to give for a file of texts.")
        block: list[Record] = []
        named = functools.partial(_named, with_texts)
        seen = _Seen(UnknownCount(self.tokenizer))
        if isinstance(records, (str, bytes, Mapping)) or not isinstance(records, Iterable):
            check_texts(records)  # which says what is wrong
        for number, record in enumerate(records):
            block.append(_as_record(record, number))
            if len(block) == _BLOCK:
                yield from map(named, block, self._answers(block, seen))
                block = []
        if block:
            yield from map(named, block, self._answers(block, seen))
        _warn_of(seen.unknown)
        if seen.num_cut:
            logger.warning(
                f"{seen.num_cut:,} of {seen.num_texts:,} texts were longer than the model's rows of {self.row_length} "
                f"tokens, and cut"
            )

    def _answers(self, records: list[Record], seen: "_Seen") -> Iterator[Answer]:
        task = self.task
        columns = task.reading.columns_of(self.config)
        wanted = range(columns.min_texts, columns.max_texts + 1)
        if other := next((r for r in records if len(r.texts) not in wanted), None):
            count = f"{wanted[0]}{f' to {wanted[-1]}' * (len(wanted) > 1)}"
            raise DataError(
                f"{self.config.objective} reads {count} texts a record: {other.where or 'one'} has {len(other.texts)}."
            )
        dtype = token_dtype(self.tokenizer)
        if columns.value == "text":
            records = [record._replace(value=None) for record in records]
        encoded = encode_records(records, self.tokenizer, columns, {}, dtype, with_offsets=task.needs_offsets)
        is_empty = encoded.is_empty
        if any(columns.prompts):  # which are no texts by themselves
            is_empty = is_empty | [not "".join(record.texts).strip() for record in records]
        if is_empty.any():
            filled = [record for record, empty in zip(records, is_empty, strict=True) if not empty]
            kept = iter(self._answers(filled, seen) if filled else ())
            for empty in is_empty:
                yield {"error": "the text has no token"} if empty else next(kept)
            return
        seen.unknown.add([encoded.tokens])
        split = memory_split(encoded)
        documents, batches = self._rows_of(split)
        seen.num_texts, seen.num_cut = seen.num_texts + len(records), seen.num_cut + documents.num_cut
        found: list[list[Piece]] = [[] for _ in records]
        for i in range(len(batches)):
            batch = batches[i]
            outputs = {name: np.asarray(x) for name, x in self.apply(batch).items()}
            for piece in by_owner(batch, outputs):
                at = piece.document if documents.source is None else int(documents.source[piece.document])
                found[at].append(piece)
        ends = np.cumsum(encoded.lengths, dtype=np.int64)
        for i, (record, pieces) in enumerate(zip(records, found, strict=True)):
            outputs, starts = in_order(pieces, documents)
            own = slice(int(ends[i]) - int(encoded.lengths[i]), int(ends[i]))
            yield task.answer(Question(  # type: ignore[misc]
                outputs, self.label_names, self.config, record, starts,
                None if encoded.offsets is None else encoded.offsets[own], encoded.text_lengths[i], encoded.tokens[own],
                self.tokenizer.decode, self.tokenizer.written,
            ))  # fmt: skip

    def _rows_of(self, split: Split) -> tuple[Documents, Batches]:
        """The split's documents in rows of the least usual length that the longest fits, and the task's queries."""
        reading, frame = self.task.reading, Frame.of(self.tokenizer, self.config.model.position_offset)
        layout = reading.layout(self.config)
        most = self.row_length
        longest = int(split.lengths.max()) + sum(frame.specials)
        if "text_lengths" in split.values or layout.long == "windows" or layout.segments != "together":
            longest = most
        row_length = next((n for n in _LENGTHS if longest <= n < most), most)
        documents = Documents(split, layout, frame, row_length)
        plan = documents.plan(row_length, "one-per-row" if reading.asks_one_a_row else "best-fit")
        order = OneByOne([plan])
        buckets = few_lengths(row_length) if reading.asks_one_a_row else ()
        tokens = _TOKENS * (READ_PER_WRITTEN if reading.asks_one_a_row else 1)
        batch_size = min(2 ** int(np.ceil(np.log2(len(order)))), max(1, tokens // row_length))
        max_pieces = 2 ** int(np.ceil(np.log2(plan.max_pieces_per_row)))  # a power of two: few shapes are compiled
        inputs = TargetInputs(self.config, self.tokenizer, documents, row_length, max_pieces, False, True)
        batches = Batches(
            [documents], order, reading.targets(inputs), row_length=row_length, batch_size=batch_size, seed=0,
            num_batches=-(-len(order) // batch_size), stop_row=len(order), streams=reading.streams(self.config),
            with_types=self.config.model.num_token_types > 1, buckets=buckets,
        )  # fmt: skip
        return documents, batches

    def packed_row(self, texts: Iterable[str]) -> Batch:
        """Texts as documents of one row, [1, T], which do not see each other; T is as long as they are together."""
        parts = []
        for number, text in enumerate(texts, 1):
            row = self.row(text)
            length = int(np.count_nonzero(row["segment_ids"]))
            own = {name: x[:, :length] for name, x in row.items()}
            parts.append(own | {"segment_ids": own["segment_ids"] * number})
        return {name: np.concatenate([part[name] for part in parts], 1) for name in parts[0]}

    def fill_mask(self, text: str | Any, top: int = 5) -> list[list[dict[str, Any]]]:
        """For each mask of a text the `top` likeliest tokens, likeliest first, as [{"token", "probability"}, ...].

        Raises:
          DataError: `text` is no text, has no mask or is longer than the model takes, or the run has no masked-LM head.
        """
        if not self.task.fills_masks:
            raise DataError(f"fill-mask needs a masked_lm run: this one is {self.config.objective}.")
        self.check_asked()
        mask_id = self.tokenizer.special("mask")
        batch = self.row(text)
        positions = np.flatnonzero(batch["tokens"][0] == mask_id).astype(np.int32)
        if not len(positions):
            raise DataError(f"the text must have at least one {self.tokenizer.token(mask_id)}: got {text!r}.")
        batch["target_positions"] = positions[None]
        probabilities = np.asarray(jax.nn.softmax(self._logits(batch)))[0]
        # Ids past the tokenizer's are padding of the embedding table; special tokens are no words.
        probabilities = probabilities[:, : self.tokenizer.vocab_size].copy()
        probabilities[:, self.tokenizer.special_ids] = 0.0
        return [
            [{"token": self.tokenizer.token(i), "probability": float(p[i])} for i in np.argsort(-p)[:top]]
            for p in probabilities
        ]

    def __call__(self, text: str, text_pair: str | None = None, *, output_attentions: bool = False) -> TokenVectors:
        """The vector of each token of a text, or of a pair of texts, and how the tokens attend to each other.

        Args:
          output_attentions: also give `attentions`, of every layer and head, by the plain implementation of attention.

        Raises:
          DataError: a text has no token, or is longer than the model takes.
          ValueError: the model is recurrent and has no attention.
        """
        return self.token_vectors(self.row(text, text_pair), output_attentions)

    def token_vectors(self, row: Batch, output_attentions: bool = False) -> TokenVectors:
        """The token vectors of a row [1, T] that `row` made, without the padding at its end."""
        length = int(np.count_nonzero(row["segment_ids"]))
        vectors = np.asarray(self._encode(row))[0, :length]
        tokens = [self.tokenizer.token(i) for i in row["tokens"][0, :length].tolist()]
        if not output_attentions:
            return TokenVectors(tokens, vectors)
        return TokenVectors(tokens, vectors, np.asarray(self._attend(row))[:, 0, :, :length, :length])

    @functools.cached_property
    def _encode(self) -> Callable[[Batch], jax.Array]:
        return self._of_encoder(lambda encoder, *rows: encoder(*rows))

    @functools.cached_property
    def _attend(self) -> Callable[[Batch], jax.Array]:
        return self._of_encoder(lambda encoder, *rows: encoder.attention_weights(*rows))

    def _of_encoder(self, function: Callable[..., jax.Array]) -> Callable[[Batch], jax.Array]:
        run = self._asked.function(lambda model, *rows: function(model.encoder, *rows))
        names = ("tokens", "segment_ids", "positions", "token_types")
        return lambda row: run(row["tokens"].size <= FEW_TOKENS, *(row.get(name) for name in names))

    def row(self, text: str | Any, text_pair: str | Any | None = None) -> Batch:
        """A text, or a pair of texts, as a row of its own, padded to the next usual length.

        Raises:
          DataError: a text has no token, or is longer than the model's learned positions reach.
        """
        frame = Frame.of(self.tokenizer, self.config.model.position_offset)
        texts = tuple(check_texts([text] if text_pair is None else [text, text_pair]))
        specials = sum(frame.specials) + len(frame.between) * (len(texts) - 1)
        encoded = encode_records([Record(texts)], self.tokenizer, Columns(), {}, token_dtype(self.tokenizer))
        if not len(encoded.tokens):
            raise DataError("a text must have at least one token: got an empty one.")
        unknown = UnknownCount(self.tokenizer)
        unknown.add([encoded.tokens])
        _warn_of(unknown)
        limit = self.config.model.max_length if self.config.model.position == "learned" else None
        length = len(encoded.tokens) + specials
        if limit is not None and length > limit:
            raise DataError(
                f"the model takes {limit} tokens, {specials} of them special: got a text of {length - specials}."
            )
        row_length = next((n for n in _LENGTHS if length <= n), length)
        row_length = row_length if limit is None else min(row_length, limit)
        layout = Layout(long="split" if text_pair is None else "cut")
        documents = Documents(memory_split(encoded), layout, frame, row_length)
        has_types = text_pair is not None and self.config.model.num_token_types > 1
        batch = frame.empty(1, row_length, *["token_types"] * has_types)
        first = np.zeros(1, np.int64)
        assemble(documents, documents.plan(row_length).rows(first, 0), batch, first)
        return batch

    def classify(self, text: str | tuple[str, str]) -> list[dict[str, Any]]:
        """The probability of every label, likeliest first, as [{"label", "probability"}, ...]. A text that is longer
        than the rows of training is cut, as in training.

        Raises:
          DataError: the run has no classification head.
        """
        if self.config.objective != "classification" or self.label_names is None:
            raise DataError(f"classify needs a classification run: this one is {self.config.objective}.")
        [answer] = self.predict([text])
        if "error" in answer:
            raise DataError(f"a text must have at least one token: got {text!r}.")
        return [{"label": label, "probability": p} for label, p in answer["probabilities"].items()]


@dataclass
class _Seen:
    """What is to be said of the texts that were asked about, at their end."""

    unknown: UnknownCount
    num_texts: int = 0
    num_cut: int = 0


def _warn_of(unknown: UnknownCount) -> None:
    if unknown.warning:
        logger.warning("%s", unknown.warning)


def _named(with_texts: bool, record: Record, answer: Answer) -> Answer:
    name = {} if record.id is None else {"id": record.id}
    return name | (_texts_beside(answer, record.texts) if with_texts else {}) | answer


def _texts_beside(answer: Answer, texts: tuple[str, ...]) -> dict[str, Any]:
    if len(texts) > len(_TEXTS):
        return {"texts": list(texts)}
    names = ("source",) if "text" in answer else _TEXTS  # what is written for a text is the answer's `text`
    return dict(zip(names, texts, strict=False))


def _as_record(record: Any, number: int) -> Record:
    if not isinstance(record, Record):
        record = Record(tuple(record) if isinstance(record, (tuple, list)) else (record,))
    for text in record.texts:
        check_texts([text], number)
    return record


def memory_split(encoded: Encoded) -> Split:
    """Tokenized records as a split that is in memory alone."""
    offsets = np.concatenate([[0], np.cumsum(encoded.lengths, dtype=np.int64)])
    values = {"text_lengths": encoded.text_lengths} if encoded.text_lengths.shape[1] > 1 else {}
    values |= {"text_keys": encoded.text_keys} if encoded.text_keys is not None else {}
    tags = None if encoded.tags is None else [encoded.tags]
    return Split([encoded.tokens], [np.packbits(encoded.words, bitorder="little")], offsets, values, tags=tags)


class Piece(NamedTuple):
    """What a model puts out for a document, a window of one, or a piece of one."""

    document: int
    """Its number among the `Documents`, where each window is one."""
    start: int
    """Where the piece begins in the document, in tokens."""
    outputs: dict[str, np.ndarray]
    """[m, ...], an entry a target."""


def by_owner(batch: Batch, outputs: dict[str, np.ndarray]) -> Iterator[Piece]:
    """Each document or piece of one that has targets in a batch, with its outputs.

    Args:
      batch: has `owners` [B, M], the document of each target or -1, and `starts` if documents may be in pieces.
      outputs: [B, M, ...].
    """
    owners = batch["owners"]
    starts = batch.get("starts", np.zeros_like(owners))
    for row, of_row in enumerate(owners):
        whose = np.stack([of_row, starts[row]], 1)
        for document, start in np.unique(whose[of_row >= 0], axis=0).tolist():
            mine = np.flatnonzero((whose == (document, start)).all(1))
            yield Piece(document, start, {name: x[row, mine] for name, x in outputs.items()})


def in_order(pieces: list[Piece], documents: Documents) -> tuple[list[dict[str, np.ndarray]], list[int]]:
    """(outputs, where each begins in the document's last text) of all pieces or windows of a document."""
    pieces = sorted(pieces, key=lambda piece: piece[:2])
    windows = documents.window_start
    return [p.outputs for p in pieces], [p.start if windows is None else int(windows[p.document]) for p in pieces]
