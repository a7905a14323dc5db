"""The model of tasks whose documents have one value each: an encoder, a pooling and a head."""

import shlex
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from flax_encoder.config import EncoderConfig, HeadConfig, RunConfig
from flax_encoder.config.rules import require
from flax_encoder.data.sources.records import Record
from flax_encoder.nn.encoder import Encoder, short_repr
from flax_encoder.nn.heads import ClassificationHead, gather_rows, segment_mean
from flax_encoder.tasks.task import Answer


class DocumentModel(nnx.Module):
    """Encoder and head; a target position is the first token of a document, whose outputs the head gives."""

    __repr__ = short_repr

    def __init__(
        self,
        config: EncoderConfig,
        num_outputs: int,
        pooling: Literal["cls", "mean", "late"] = "cls",
        head: HeadConfig | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.encoder = Encoder(config, rngs=rngs)
        self.head = ClassificationHead(config, num_outputs, head, rngs=rngs)
        self.pooling = pooling

    def __call__(self, batch: dict[str, Array], *, key: Array | None = None) -> Float[Array, "B M C"]:
        """Outputs of the documents at `target_positions` [B, M]."""
        encoder_key, head_key = (None, None) if key is None else jax.random.split(key)
        rows = (batch["tokens"], batch["segment_ids"], batch["positions"], batch.get("token_types"))
        return self.logits(self.encoder(*rows, key=encoder_key), batch, key=head_key)

    def logits(
        self, hidden: Float[Array, "B T D"], batch: dict[str, Array], *, key: Array | None = None
    ) -> Float[Array, "B M C"]:
        """Those of the documents at `target_positions`, of the encoder's output."""
        if self.pooling == "late":
            return segment_mean(self.head(hidden, key=key), batch["segment_ids"], batch["target_positions"])
        if self.pooling == "mean":
            pooled = segment_mean(hidden, batch["segment_ids"], batch["target_positions"])
        else:
            pooled = gather_rows(hidden, batch["target_positions"])
        return self.head(pooled, key=key)


def check_whole_documents(config: RunConfig) -> None:
    """The rules of tasks whose documents have values: they are not cut into pieces, and come from one source.

    Raises:
      ConfigError: another packing, or several sources.
    """
    require(
        config.data.packing != "concatenate",
        "a document with a value stays whole: data.packing must be best-fit, mixed or one-per-row, got "
        "concatenate.",
    )
    require(
        len(config.data.sources) == 1,
        f"{config.objective} takes one source, whose values it learns: got {len(config.data.sources)}.",
    )


def ask_file_commands(run: Any, data: Any, scored: str = "test.csv") -> list[str]:
    """The commands that use a trained run on a file; of pairs of texts, which need columns, these are named."""
    run_dir, texts = shlex.quote(run.config.run_dir), "texts.txt"
    if has_pairs(data):
        texts, scored = f"pairs.jsonl{columns_said(run, data, '--', is_right_known=False)}", "test.jsonl"
    if run.task.reading.columns.writes:  # the last text
        texts = "texts.txt"
        if data.stores[0].train.values["text_lengths"].shape[1] > 2:  # after what was said before
            texts = f"conversations.jsonl{columns_said(run, data, '--', is_right_known=False)}"
    return [
        f"python -m flax_encoder predict {run_dir} --input {texts} --output answers.jsonl",
        f"python -m flax_encoder evaluate {run_dir} --data.source {scored}{columns_said(run, data)}",
    ]


def has_pairs(data: Any) -> bool:
    """Whether a run learned from documents of several texts."""
    return "text_lengths" in data.stores[0].train.values


def columns_said(run: Any, data: Any, prefix: str = "--data.", is_right_known: bool = True) -> str:
    """Options that name the columns of a file such as a run learned from: of two texts those that were read, of others
    what its settings name. Where the right answer is not known, neither a label nor a text to write has a column."""
    own, is_asked = run.config.data, not is_right_known
    text, pair = data.stores[0].pair or (own.text_column, own.text_pair_column)
    named = {
        "text-column": text,
        "text-pair-column": None if is_asked and run.task.reading.columns.writes else pair,
        "history-column": own.history_column,
        "label-column": None if is_asked else own.label_column,
    }
    columns = {name: (own,) if isinstance(own, str) else own for name, own in named.items() if own is not None}
    return "".join(f" {prefix}{name} {shlex.join(own)}" for name, own in columns.items())


def export_commands(run: Any, *outs: str) -> list[str]:
    """The commands that write a trained run as folders; none of a model that no published family has."""
    if not run.can_be_exported:
        return []
    return [f"python -m flax_encoder export {shlex.quote(run.config.run_dir)} {out}" for out in outs]


def held_out_answers(run: Any, data: Any, most: int = 40) -> list[tuple[Record, Answer, Any]]:
    """(texts as the tokenizer spells them, what the model says, what is right) of held-out documents, evenly spread."""
    split, found = data.stores[0].validation, []
    some = np.linspace(0, len(split) - 1, min(most, len(split))).astype(int).tolist()
    for i in some:
        ids = split.document(i)
        lengths = split.values["text_lengths"][i] if "text_lengths" in split.values else [len(ids)]
        texts = np.split(ids, np.cumsum(np.trim_zeros(lengths, "b"))[:-1])  # a document may have fewer than others
        found.append(Record(tuple(map(run.tokenizer.decode, texts))))
    golds = [run.task.gold(split, i, run.label_names) for i in some]
    answers = zip(found, run.predict(found), golds, strict=True)
    return [(record, answer, gold) for record, answer, gold in answers if "error" not in answer]


def spelled(record: Record) -> str:
    """A document in a line."""
    return " / ".join(text if len(text) < 100 else f"{text[:97]}..." for text in record.texts)


def right_and_wrong(
    is_right: Callable[[Answer, Any], bool], said: Callable[[Answer], str], truth: Callable[[Any], str], run: Any,
    data: Any,
) -> list[str]:  # fmt: skip
    """A few held-out documents that the model has right, and a few that it has wrong.

    Args:
      said, truth: an answer and a right value, in words.
    """
    lines: dict[bool, list[str]] = {True: [], False: []}
    for record, answer, gold in held_out_answers(run, data):
        own = is_right(answer, gold)
        ending = ", which is right" if own else f"; the data has {truth(gold)}"
        lines[own].append(f"\n{spelled(record)}\n  the model says {said(answer)}{ending}")
    return [*lines[True][:2], *lines[False][:2]]
