"""One tag per word: names, parts of speech, parts of addresses. Answers also give the entities that tags mark."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from flax_encoder.config import EncoderConfig, HeadConfig, RunConfig
from flax_encoder.config.rules import require
from flax_encoder.data.reading import Reading
from flax_encoder.data.rows.documents import Layout
from flax_encoder.data.rows.targets import TargetInputs, Targets, word_targets
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.records import DataError, Record
from flax_encoder.data.store.encoding import words_of_record, words_of_tokens
from flax_encoder.data.store.store import Split
from flax_encoder.nn.encoder import Encoder, short_repr
from flax_encoder.nn.heads import ClassificationHead, gather_rows
from flax_encoder.tasks.document_model import ask_file_commands, check_whole_documents
from flax_encoder.tasks.loss import LossSum, accuracy_report, target_loss
from flax_encoder.tasks.metrics import seqeval_metrics, sklearn_metrics
from flax_encoder.tasks.task import Answer, Labels, Question, Task

OUTSIDE = "O"
_ENTITY_TAG = re.compile(r"O|[BIESLUM](-.+)?", re.DOTALL)
_AS_BIOES = {"L": "E", "U": "S", "M": "I"}  # of BILOU and BMES
_COUNTED_TOKENS = 2**22  # of a larger corpus the first are counted, for the baseline
_EXAMPLES = 2  # right and wrong ones


class TokenClassifier(nnx.Module):
    """Encoder and a head at every target position, the first token of a word; its target is the word's tag."""

    __repr__ = short_repr

    def __init__(
        self,
        config: EncoderConfig,
        num_tags: int,
        head: HeadConfig | None = None,
        *,
        smoothing: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.smoothing = smoothing
        self.encoder = Encoder(config, rngs=rngs)
        self.head = ClassificationHead(config, num_tags, head, transform=False, rngs=rngs)

    def __call__(self, batch: dict[str, Array], *, key: Array | None = None) -> Float[Array, "B M C"]:
        """Logits of the words at `target_positions` [B, M]."""
        encoder_key, head_key = (None, None) if key is None else jax.random.split(key)
        rows = (batch["tokens"], batch["segment_ids"], batch["positions"], batch.get("token_types"))
        hidden = self.encoder(*rows, key=encoder_key)
        return self.head(gather_rows(hidden, batch["target_positions"]), key=head_key)

    def loss(self, batch: dict[str, Array], *, key: Array | None = None) -> LossSum:
        logits = self(batch, key=key)
        return target_loss(logits, batch["targets"], batch["target_weights"], self.smoothing)

    def outputs(self, batch: dict[str, Array]) -> dict[str, Array]:
        """The likeliest tag of each word and its probability, [B, M]."""
        probabilities = jax.nn.softmax(self(batch))
        return {"tag": probabilities.argmax(-1), "probability": probabilities.max(-1)}


def marks_entities(labels: Labels) -> bool:
    """Whether tags are of a scheme that marks entities (BIO, IOB1, BIOES, BILOU, BMES), rather than parts of speech."""
    names = labels or []
    return all(_ENTITY_TAG.fullmatch(name) for name in names) and any(name != OUTSIDE for name in names)


def entities_of_tags(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(label, first word, last word) of each entity that tags mark, as conlleval and seqeval's default mode find them.

    They ask for no scheme: an I- after another label, or after O, begins an entity as B- does.
    """
    found, begin, before, label_before = [], 0, OUTSIDE, ""
    for i, tag in enumerate([*tags, OUTSIDE]):
        mark, label = _AS_BIOES.get(tag[0], tag[0]), tag[1:].split("-", 1)[-1] or "_"
        is_other = label != label_before
        if before in "ES" or (before in "BI" and mark in "BSO") or (before != OUTSIDE and is_other):
            found.append((label_before, begin, i - 1))
        if mark in "BS" or (before in "ESO" and mark in "EI") or (mark != OUTSIDE and is_other):
            begin = i
        before, label_before = mark, label
    return found


def _make_model(config: RunConfig, labels: Labels) -> Callable[[nnx.Rngs], TokenClassifier]:
    num_tags, smoothing = len(labels or []), config.labels.smoothing
    return lambda rngs: TokenClassifier(config.model, num_tags, config.head, smoothing=smoothing, rngs=rngs)


def _targets(inputs: TargetInputs) -> Targets:
    return word_targets(inputs, all_pieces=inputs.is_training and inputs.config.labels.all_pieces)


def _layout(config: RunConfig) -> Layout:
    return Layout(long="split")  # no word of a long text is lost, neither in training nor in answers


def _streams(config: RunConfig) -> tuple[str, ...]:
    return ("tags",)


def _check(config: RunConfig) -> None:
    check_whole_documents(config)
    head = config.head
    require(
        bool(head.transform) or (head.activation, head.norm, head.dense_bias) == (None, None, None),
        f"activation, norm and dense_bias are the transform's, which {config.objective} has with head.transform alone: "
        f"got {head.activation}, {head.norm} and {head.dense_bias}.",
    )


def _check_labels(labels: Labels) -> None:
    if labels is None or len(labels) < 2:
        raise DataError(
            f"token classification needs at least two tags: the data has {len(labels or [])}"
            f"{', ' + repr(labels[0]) if labels else ''}. Is --data.label-column the column of tags?"
        )
    _ = seqeval_metrics() if marks_entities(labels) else sklearn_metrics()  # missing, it is said before training


def _answer(question: Question) -> Answer:
    """`words`, `tags` and `entities` (start and end in characters, label, text, score) of a record; of a stored
    document `tags` alone, of the words that have tokens.

    A word that the tokenizer gives no token has the tag O. An entity's score is its words' mean probability of their
    tags.
    """
    names = question.labels or []
    tags = [names[i] for output in question.outputs for i in output["tag"].tolist()]
    if question.record is None:
        return {"tags": tags}
    assert question.offsets is not None
    text, words = question.record.texts[0], words_of_record(question.record)
    word = words_of_tokens(question.offsets, words)
    read = np.unique(word[word >= 0]).tolist()
    of_words, probability = [OUTSIDE] * len(words), np.zeros(len(words))
    for i, tag in zip(read, tags, strict=True):
        of_words[i] = tag
    probability[read] = [p for output in question.outputs for p in output["probability"].tolist()]
    entities = []
    for label, first, last in entities_of_tags(of_words) if marks_entities(names) else []:
        start, end = words[first][0], words[last][1]
        score = float(probability[first : last + 1].mean())
        entities.append({"start": start, "end": end, "label": label, "text": text[start:end], "score": score})
    return {"words": [text[start:end] for start, end in words], "tags": of_words, "entities": entities}


def _without_tags(record: Record) -> Record:
    return record._replace(value=record.value and tuple((start, end, None) for start, end, _ in record.value))


def _gold(split: Split, document: int, labels: Labels) -> list[str]:
    tags = split.document_tags(document)
    return [(labels or [])[tag - 1] for tag in tags[tags > 0].tolist()]


def score(answers: Sequence[Answer], golds: Sequence[Sequence[str]], labels: Labels) -> dict[str, float]:
    """Accuracy of words; and precision, recall and F1, of entities by seqeval, or where tags mark none, the means over
    tags by scikit-learn.

    Args:
      golds: the tags of each document's words.
    """
    actual, predicted = [list(gold) for gold in golds], [answer["tags"] for answer in answers]
    flat = [[tag for tags in documents for tag in tags] for documents in (actual, predicted)]
    accuracy = np.mean([a == p for a, p in zip(*flat, strict=True)]) if flat[0] else 0.0
    if marks_entities(labels):
        metrics, options = seqeval_metrics(), {"zero_division": 0}
        sides = [[[_AS_BIOES.get(t[0], t[0]) + t[1:] for t in tags] for tags in side] for side in (actual, predicted)]
    else:
        metrics, options, sides = sklearn_metrics(), {"zero_division": 0, "average": "macro"}, flat
    names = ("precision", "recall", "f1") if flat[0] else ()
    return {"accuracy": float(accuracy)} | {n: float(getattr(metrics, f"{n}_score")(*sides, **options)) for n in names}


def _words(tokens: np.ndarray, tags: np.ndarray) -> list[tuple[bytes, int]]:
    """(its tokens, its tag's number) of each word."""
    starts = np.flatnonzero(tags > 0)
    bounds = np.append(np.flatnonzero(tags >= 0), len(tags))
    ends = bounds[np.searchsorted(bounds, starts, side="right")]
    spans = zip(starts.tolist(), ends.tolist(), (tags[starts] - 1).tolist(), strict=True)
    return [(tokens[start:end].tobytes(), tag) for start, end, tag in spans]


def _baselines(run: Any, data: Any) -> dict[str, dict[str, float]]:
    """The tag that each word has most often in training, words that are new having the most frequent of all; and one
    tag everywhere."""
    train, held_out, names = data.stores[0].train, data.stores[0].validation, run.label_names
    counts: dict[bytes, Counter[int]] = defaultdict(Counter)
    for word, tag in _words(train.tokens[0][:_COUNTED_TOKENS], train.tags[0][:_COUNTED_TOKENS]):
        counts[word][tag] += 1
    best = {word: tags.most_common(1)[0][0] for word, tags in counts.items()}
    frequent = sum(counts.values(), Counter()).most_common(1)[0][0]
    everywhere = OUTSIDE if OUTSIDE in names else names[frequent]
    golds, guesses = [], []
    for i in range(len(held_out)):
        words = _words(held_out.document(i), held_out.document_tags(i))
        golds.append([names[tag] for _, tag in words])
        guesses.append([names[best.get(word, frequent)] for word, _ in words])
    constant = [[everywhere] * len(gold) for gold in golds]
    return {
        name: score([{"tags": tags} for tags in answers], golds, names)
        for name, answers in {f"all {everywhere}": constant, "most frequent tag of each word": guesses}.items()
    }


def _examples(run: Any, data: Any) -> list[str]:
    """Short held-out texts, spelled as the tokenizer reads them: some that are tagged rightly and some that are not."""
    held_out, golds, records = data.stores[0].validation, [], []
    for i in np.flatnonzero((held_out.lengths >= 4) & (held_out.lengths <= 32))[:200].tolist():
        ids, tags, gold = held_out.document(i), held_out.document_tags(i), _gold(held_out, i, run.label_names)
        starts = np.flatnonzero(tags > 0)
        if not len(starts) or set(gold) == {OUTSIDE}:
            continue
        words = [run.tokenizer.decode(part[part_tags != 0]).strip() for part, part_tags in zip(
            np.split(ids, starts)[1:], np.split(tags, starts)[1:], strict=True)]  # fmt: skip
        ends = np.cumsum([len(word) + 1 for word in words]).tolist()
        value = tuple((end - 1 - len(word), end - 1, None) for word, end in zip(words, ends, strict=True))
        records.append(Record((" ".join(words),), value))
        golds.append(gold)
    lines: dict[bool, list[str]] = {True: [], False: []}
    for answer, gold in zip(run.predict(records), golds, strict=True):
        said, truth = (_spelled(answer["words"], tags, run.label_names) for tags in (answer["tags"], gold))
        ending = ", which is right" if said == truth else f"; right is {truth}"
        lines[said == truth].append(f"\n{' '.join(answer['words'])}\n  the model says {said}{ending}")
    return [*lines[True][:_EXAMPLES], *lines[False][:_EXAMPLES]]


def _spelled(words: Sequence[str], tags: Sequence[str], labels: Labels) -> str:
    if not marks_entities(labels):
        return " ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=True))
    return ", ".join(f"{' '.join(words[i : j + 1])} ({label})" for label, i, j in entities_of_tags(tags)) or "nothing"


def _commands(run: Any, data: Any) -> list[str]:
    return ask_file_commands(run, data, scored="test.jsonl")


TASK = Task(
    reading=Reading(Columns("tags"), _targets, layout=_layout, streams=_streams),
    make_model=_make_model,
    report=accuracy_report,
    reads=("labels.smoothing", "labels.all_pieces", "data.label_column"),
    check=_check,
    check_labels=_check_labels,
    answer=_answer,
    asked=_without_tags,
    gold=_gold,
    score=score,
    baselines=_baselines,
    examples=_examples,
    commands=_commands,
    head="token_classification",
    answers_for="tokens",
    needs_offsets=True,
)
