"""Answers that stand in a passage: the tokens where one begins and ends (Devlin et al., arXiv 1810.04805, section 4.2).

A question and its passage are one segment of a row. A passage that is longer than a row is read in windows that
overlap, each with the whole question before it, and the best answer of all windows is given.
"""

import collections
import dataclasses
import functools
import re
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from flax_encoder.config import EncoderConfig, HeadConfig, RunConfig
from flax_encoder.data.reading import Reading
from flax_encoder.data.rows.documents import Batch, Documents, Layout
from flax_encoder.data.rows.targets import Rows, TargetInputs, Targets, document_targets
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.records import Record
from flax_encoder.data.store.encoding import NO_ANSWER
from flax_encoder.data.store.store import Split
from flax_encoder.nn.encoder import Encoder, short_repr
from flax_encoder.nn.heads import ClassificationHead
from flax_encoder.tasks.document_model import ask_file_commands, check_whole_documents
from flax_encoder.tasks.loss import LossSum, accuracy_report
from flax_encoder.tasks.task import Answer, Labels, Question, Task

_FAR = -1e30  # stands for minus infinity, whose differences would be no numbers
_MOST_SPANS = 20  # kept of each window
_OVERLAP = 128  # tokens, as in the published recipes


class QuestionAnswering(nnx.Module):
    """Encoder, and two logits a token: how well an answer begins and ends there.

    Of each window of a batch (a segment of a row): `target_positions` [B, M] is its first token; `passages` [B, M, 2]
    the first column of its part of the passage, and the one past its end; `targets` [B, M, 2] where the answer begins
    and ends, counted from the first token, which itself stands for "no answer here".

    Args:
      longest_answer: tokens of the longest span that `outputs` looks at.
    """

    __repr__ = short_repr

    def __init__(
        self, config: EncoderConfig, head: HeadConfig | None = None, *, longest_answer: int = 30, rngs: nnx.Rngs
    ):
        self.encoder = Encoder(config, rngs=rngs)
        self.head = ClassificationHead(config, 2, head, transform=False, rngs=rngs)
        self.longest_answer = longest_answer

    def __call__(self, batch: dict[str, Array], *, key: Array | None = None) -> Float[Array, "B T 2"]:
        """The logits of every token, as the start and as the end of an answer."""
        encoder_key, head_key = (None, None) if key is None else jax.random.split(key)
        rows = (batch["tokens"], batch["segment_ids"], batch["positions"], batch.get("token_types"))
        return self.head(self.encoder(*rows, key=encoder_key), key=head_key)

    def loss(self, batch: dict[str, Array], *, key: Array | None = None) -> LossSum:
        """The mean of the cross-entropies of start and end, each over all tokens of the window's segment.

        That is transformers' loss of a row without padding. Its softmax runs over padding too, by which a row's loss
        depends on the rows beside it; here it does not.
        """
        logits, weights = self(batch, key=key), batch["target_weights"]
        segments = jnp.take_along_axis(batch["segment_ids"], batch["target_positions"], axis=1)
        own = batch["segment_ids"][:, None, :] == segments[:, :, None]
        of_window = jnp.where(own[..., None], logits[:, None], _FAR)  # [B, M, T, 2]
        at = batch["target_positions"][..., None] + batch["targets"]
        right = jnp.take_along_axis(logits, at, axis=1)  # [B, M, 2]
        losses = (jax.nn.logsumexp(of_window, axis=2) - right).mean(-1)
        correct = (right >= of_window.max(2)).all(-1)
        return LossSum((losses * weights).sum(), weights.sum(), {"correct": (correct * weights).sum()})

    def outputs(self, batch: dict[str, Array]) -> dict[str, Array]:
        """The likeliest spans of each window.

        `starts` and `ends`, int32 [B, M, n]: their first and last tokens, counted in the window's part of the passage.
        `scores`, float32 [B, M, n]: their log-probabilities, likeliest first; below -1e29 is no span. `null`, float32
        [B, M]: that of no answer. Probabilities are over the passage's tokens and the window's first, which stands for
        no answer; the question's tokens are none.
        """
        logits, T = self(batch), batch["tokens"].shape[1]
        columns, first, passages = jnp.arange(T), batch["target_positions"], batch["passages"]
        inside = (columns >= passages[..., :1]) & (columns < passages[..., 1:])  # [B, M, T]
        allowed = inside | (columns == first[..., None])
        log_probabilities = jax.nn.log_softmax(jnp.where(allowed[..., None], logits[:, None], _FAR), axis=2)
        at_first = jnp.take_along_axis(log_probabilities, first[..., None, None], axis=2)
        starts, ends, scores = best_spans(log_probabilities, inside, self.longest_answer)
        begins = passages[..., :1]
        return {
            "starts": starts - begins, "ends": ends - begins, "scores": scores, "null": at_first[:, :, 0].sum(-1),
        }  # fmt: skip


def best_spans(
    log_probabilities: Float[Array, "B M T 2"], inside: Bool[Array, "B M T"], longest: int
) -> tuple[Array, Array, Array]:
    """(starts, ends, scores), each [B, M, n]: the n spans of at most `longest` tokens, all of them inside, whose start
    and end are likeliest together, in that order; n is 20, or T if a row is shorter."""
    T = inside.shape[-1]
    longest, n = min(longest, T), min(_MOST_SPANS, T)
    start, end = (jnp.where(inside, log_probabilities[..., i], _FAR) for i in (0, 1))
    # The n best spans begin at the n starts whose best span is best, so only these are looked at in full.
    best_end = jax.lax.reduce_window(
        end, -jnp.inf, jax.lax.max, (1, 1, longest), (1, 1, 1), ((0, 0), (0, 0), (0, longest - 1))
    )
    _, starts = jax.lax.top_k(start + best_end, n)
    reach = starts[..., None] + jnp.arange(longest)  # [B, M, n, longest]
    end = jnp.pad(end, ((0, 0), (0, 0), (0, longest - 1)), constant_values=_FAR)
    ends = jnp.take_along_axis(end[:, :, None], reach, axis=3)
    spans = jnp.take_along_axis(start, starts, axis=2)[..., None] + ends
    scores, which = jax.lax.top_k(spans.reshape(*spans.shape[:2], -1), n)
    starts = jnp.take_along_axis(starts, which // longest, axis=2)
    return starts, starts + which % longest, scores


def _make_model(config: RunConfig, labels: Labels) -> Callable[[nnx.Rngs], QuestionAnswering]:
    longest = config.labels.longest_answer
    return lambda rngs: QuestionAnswering(config.model, config.head, longest_answer=longest, rngs=rngs)


def _layout(config: RunConfig) -> Layout:
    shortest = min(config.row_lengths)
    overlap = config.data.window_overlap
    return Layout(long="windows", overlap=min(_OVERLAP, shortest // 3) if overlap is None else overlap)


def _targets(inputs: TargetInputs) -> Targets:
    answers = inputs.documents.split.values.get("answers")
    if answers is None:  # they are to be predicted
        answers = np.full((len(inputs.documents.split), 2), NO_ANSWER, np.int32)
    return functools.partial(_spans, document_targets(inputs, "answers"), inputs.documents, answers)


def _spans(of_documents: Targets, documents: Documents, answers: np.ndarray, rows: Rows) -> Batch:
    """An answer that does not lie in a window whole is none of it."""
    batch = of_documents(rows)
    row, slot = np.nonzero(batch["target_weights"])
    *before, last = documents.runs
    lengths = documents.texts(rows.pieces)[1]
    begins = lengths[:, :-1].sum(1) + sum(len(run.before) + len(run.after) for run in before) + len(last.before)
    spans = answers[documents.documents(rows.pieces)] - documents.window_start[rows.pieces.document][:, None]
    is_inside = (spans[:, 0] >= 0) & (spans[:, 1] < lengths[:, -1])
    shape = (*batch["target_weights"].shape, 2)
    batch["targets"], batch["passages"] = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    batch["targets"][row, slot] = np.where(is_inside[:, None], begins[:, None] + spans, 0)
    ends = begins + lengths[:, -1]
    batch["passages"][row, slot] = batch["target_positions"][row, slot][:, None] + np.stack([begins, ends], 1)
    return batch


def _settle(config: RunConfig, data: Any) -> RunConfig:
    """A run that learns from questions without an answer can give none."""
    answers = data.stores[0].train.values["answers"]
    if config.labels.null_threshold is not None or not (answers[:, 0] == NO_ANSWER).any():
        return config
    return dataclasses.replace(config, labels=dataclasses.replace(config.labels, null_threshold=0.0))


def _answer(question: Question) -> Answer:
    """`answer`, where it starts and ends in the passage, in characters, and its `score`, a probability; "" and None for
    no answer. With labels.num_candidates the likeliest ones in the same form, as `candidates`.

    Of a stored document, whose characters are not kept, the answer's tokens decoded, and not where they stand.
    """
    own = question.config.labels
    found: dict[tuple[int, int], float] = {}
    for out, begin in zip(question.outputs, question.window_starts, strict=True):
        for start, end, score in zip(out["starts"][0], out["ends"][0], out["scores"][0], strict=True):
            if score > _FAR / 10:
                span = (begin + int(start), begin + int(end))
                found[span] = max(found.get(span, -np.inf), float(score))
    ranked = [(score, score, span) for span, score in found.items()]
    if own.null_threshold is not None or not ranked:
        # Where any window is sure of an answer there is one.
        null = min(float(out["null"][0]) for out in question.outputs)
        ranked.append((null - (own.null_threshold or 0.0), null, None))
    ranked.sort(key=lambda entry: -entry[0])
    answers = [_as_answer(question, span, score) for _, score, span in ranked[: max(1, own.num_candidates)]]
    return answers[0] | ({"candidates": answers} if own.num_candidates else {})


def _as_answer(question: Question, span: tuple[int, int] | None, score: float) -> Answer:
    probability, num_tokens = float(np.exp(score)), int(question.text_lengths[-1])  # type: ignore[index]
    if span is None:
        return {"answer": "", "start": None, "end": None, "score": probability}
    if question.record is None:
        tokens = question.tokens[-num_tokens:][span[0] : span[1] + 1]  # type: ignore[index]
        return {"answer": question.decode(tokens), "score": probability}  # type: ignore[misc]
    passage, offsets = question.record.texts[-1], question.offsets[-num_tokens:]  # type: ignore[index]
    start, end = int(offsets[span[0], 0]), int(offsets[span[1], 1])
    text = passage[start:end]
    start += len(text) - len(text.lstrip())  # of tokens that begin with the blank before a word
    return {"answer": text.strip(), "start": start, "end": start + len(text.strip()), "score": probability}


def _gold(split: Split, document: int, labels: Labels) -> tuple[tuple[int, np.ndarray], ...]:
    """The answer's first token in the passage, and its tokens."""
    first, last = split.values["answers"][document].tolist()
    if first == NO_ANSWER:
        return ()
    return ((first, _passage(split, document)[first : last + 1]),)


def _passage(split: Split, document: int) -> np.ndarray:
    return split.document(document)[int(split.values["text_lengths"][document, 0]) :]


def normalize_answer(text: str) -> str:
    """A text as SQuAD's evaluation compares it (Rajpurkar et al., arXiv 1606.05250, section 6.1): in lower case, words
    one blank apart, without punctuation and the articles a, an and the."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(answer: str, right: str) -> float:
    """F1 of the words of two texts as bags of them, after `normalize_answer`; of two empty texts 1."""
    given, wanted = normalize_answer(answer).split(), normalize_answer(right).split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((collections.Counter(given) & collections.Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def score(
    answers: Sequence[Answer], golds: Sequence[Sequence[tuple[int, str]]], labels: Labels = None
) -> dict[str, float]:
    """`exact_match` and `f1` by the rules of SQuAD's evaluation, as shares of 1: each answer is held against the right
    one that it is nearest to. Where some questions have no answer, both also over those that have one
    (`has_answer_...`) and those that have none (`no_answer_...`).

    Args:
      golds: the right answers of each question, (start, text); none, or only such as are empty when normalized, means
        that "" is right.
    """
    wanted = [[text for _, text in gold if normalize_answer(text)] or [""] for gold in golds]
    exact = np.array([
        max(normalize_answer(a["answer"]) == normalize_answer(text) for text in texts)
        for a, texts in zip(answers, wanted, strict=True)
    ], float)  # fmt: skip
    f1 = np.array([
        max(token_f1(a["answer"], text) for text in texts) for a, texts in zip(answers, wanted, strict=True)
    ])  # fmt: skip
    has_answer = np.array([texts != [""] for texts in wanted], bool)
    parts = {"": np.ones(len(wanted), bool)}
    if not has_answer.all():
        parts |= {"has_answer_": has_answer, "no_answer_": ~has_answer}
    return {
        f"{part}{name}": float(values[which].mean())
        for part, which in parts.items() if which.any()
        for name, values in (("exact_match", exact), ("f1", f1))
    }  # fmt: skip


def sentences(text: str) -> list[str]:
    """A text cut after full stops, question and exclamation marks."""
    return [part for part in re.split(r"(?<=[.?!])\s+", text.strip()) if part]


def _baselines(run: Any, data: Any) -> dict[str, dict[str, float]]:
    split, decode = data.stores[0].validation, run.tokenizer.decode
    golds = [tuple((at, decode(ids)) for at, ids in _gold(split, i, None)) for i in range(len(split))]
    passages = [sentences(decode(_passage(split, i))) for i in range(len(split))]
    questions = [decode(_question(split, i)) for i in range(len(split))]
    nearest = [
        max(own, key=lambda s, q=question: token_f1(s, q), default="")
        for own, question in zip(passages, questions, strict=True)
    ]
    return {
        "no answer": _score_texts([""] * len(split), golds),
        "first sentence": _score_texts([own[0] if own else "" for own in passages], golds),
        "sentence most like the question": _score_texts(nearest, golds),
    }


def _question(split: Split, document: int) -> np.ndarray:
    return split.document(document)[: int(split.values["text_lengths"][document, 0])]


def _score_texts(texts: Iterable[str], golds) -> dict[str, float]:
    return score([{"answer": text} for text in texts], golds)


def _examples(run: Any, data: Any) -> list[str]:
    split, decode = data.stores[0].validation, run.tokenizer.decode
    some = range(min(3, len(split)))
    records = [Record((decode(_question(split, i)), decode(_passage(split, i)))) for i in some]
    lines = []
    for i, record, answer in zip(some, records, run.predict(records), strict=True):
        right = "; ".join(decode(ids) for _, ids in _gold(split, i, None))
        lines.append(f"{record.texts[0]}\n  {answer['answer'] or '(no answer)'}   right: {right or '(no answer)'}")
    return lines


TASK = Task(
    reading=Reading(Columns("answers", 2, 2), _targets, _layout),
    make_model=_make_model,
    report=accuracy_report,
    reads=(
        "data.label_column", "data.text_pair_column", "data.window_overlap", "labels.longest_answer",
        "labels.null_threshold", "labels.num_candidates",
    ),
    check=check_whole_documents,
    settle=_settle,
    answer=_answer,
    gold=_gold,
    score=score,
    baselines=_baselines,
    examples=_examples,
    commands=ask_file_commands,
    head="question_answering",
    answers_for="tokens",
    needs_offsets=True,
)  # fmt: skip
