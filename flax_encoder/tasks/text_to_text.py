"""A text for a text: translation, summaries, answers. An encoder reads the source, and a decoder writes the target.

(Sutskever et al., arXiv 1409.3215; Vaswani et al., arXiv 1706.03762; Raffel et al., arXiv 1910.10683.) Sources and
targets are packed together: what a document has in the encoder's row it has in the decoder's row beside it.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_encoder.config import DecoderConfig, EncoderConfig, HeadConfig, RunConfig
from flax_encoder.config.rules import require
from flax_encoder.data.reading import Reading
from flax_encoder.data.rows.documents import Layout, Written
from flax_encoder.data.rows.targets import TargetInputs, Targets, written_targets
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.records import Record
from flax_encoder.data.store.encoding import split_turns, turn_separator_ids
from flax_encoder.data.store.store import Split
from flax_encoder.data.tokens.tokenizer import TextTokenizer
from flax_encoder.nn.decoder import EncoderDecoder, check_decoder
from flax_encoder.nn.generation import READ_PER_WRITTEN, Generation, generate
from flax_encoder.nn.logit_rules import LogitRules
from flax_encoder.ops.mesh import is_spread
from flax_encoder.tasks.document_model import ask_file_commands, check_whole_documents
from flax_encoder.tasks.loss import LossSum
from flax_encoder.tasks.masked_lm import MaskedLM
from flax_encoder.tasks.metrics import rouge_scorer, sacrebleu
from flax_encoder.tasks.question_answering import sentences
from flax_encoder.tasks.task import Answer, Labels, Question, Task

_COUNTED_ANSWERS = 100_000  # of training, among which the most frequent is looked for
_LONGEST = 128  # tokens that are written where nothing else is said
_LEAST_SLOTS = 32  # sources that are written at a time: the weights are read once for all of them
_ROUGE = ("rouge1", "rouge2", "rougeL")


class TextToText(EncoderDecoder):
    """An encoder-decoder that learns targets by their next tokens, each given those before it, and writes them."""

    def __init__(
        self,
        config: EncoderConfig,
        decoder: DecoderConfig | None = None,
        generation: Generation | None = None,
        *,
        smoothing: float = 0.0,
        seed: int = 0,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, decoder, rngs=rngs)
        self.generation, self.smoothing, self.seed = generation or Generation(), smoothing, seed

    def __call__(self, batch: dict[str, Array], *, key: Array | None = None) -> Float[Array, "B S V"]:
        """Logits of each target's next token; `loss` says what the batch holds."""
        return self.logits(self._target_rows(batch, key))

    def loss(self, batch: dict[str, Array], *, key: Array | None = None) -> LossSum:
        """Of the batch's tokens, segment_ids and positions [B, T] and decoder_tokens, decoder_segment_ids,
        decoder_positions, targets and target_weights [B, S]; without the logits all at once where they are large."""
        weights = batch["target_weights"]
        rows = self.scaled(self._target_rows(batch, key))
        total, correct = self.head.cross_entropy(
            rows, self.encoder.embedding.token[...], batch["targets"], weights, self.smoothing
        )
        return LossSum(total, weights.sum(), {"correct": correct})

    def _target_rows(self, batch, key) -> Float[Array, "B S D"]:
        pairs = ((name, f"decoder_{name}") for name in ("tokens", "segment_ids", "positions"))
        return self.decode(*(batch[name] for pair in pairs for name in pair), key=key)

    def outputs(self, batch: dict[str, Array]) -> dict[str, Array]:
        """What is written for each row, which holds one source: ids [B, 1, max_new_tokens]."""
        return {"text": self.write(batch, self.generation)}

    def write(self, batch: dict[str, Array], generation: Generation) -> Int[Array, "B 1 S"]:
        tokens, segments = batch["tokens"], batch["segment_ids"]
        key = draws = None
        if generation.is_drawn:  # by the source, so that it draws the same wherever it stands
            place = jnp.arange(tokens.shape[1], dtype=jnp.uint32) * 2 + 1
            draws = ((tokens.astype(jnp.uint32) + 1) * place**3 * (segments > 0)).sum(1, dtype=jnp.uint32)
            draws = jax.lax.bitcast_convert_type(draws, jnp.int32)
            key = jax.random.key(self.seed)
        # On a mesh all at once: devices have rows of their own, and none would make room for another's.
        slots = None if is_spread() else max(_LEAST_SLOTS, len(tokens) // READ_PER_WRITTEN)
        is_source = (segments > 0).astype(jnp.int32)
        text = generate(self, tokens, is_source, generation, key=key, draws=draws, slots=slots)
        return text[:, None, 1:]


def generation_of(config: RunConfig) -> Generation:
    """How a run writes, as `config.generation` says.

    Raises:
      ConfigError: settings of writing that contradict each other, or would not be read.
    """
    config.generation.check()
    asked, decoder = config.generation, config.decoder
    limit = asked.max_new_tokens or config.data.target_length or _LONGEST
    rules = LogitRules(
        min_new_tokens=asked.min_new_tokens or 0, repetition_penalty=asked.repetition_penalty or 1.0,
        no_repeat_ngram_size=asked.no_repeat_ngram_size or 0,
    )  # fmt: skip
    options: dict[str, Any] = {}
    if asked.sample:
        options = {"temperature": asked.temperature or 1.0, "top_k": asked.top_k or None, "top_p": asked.top_p}
    elif (asked.num_beams or 1) > 1:
        penalty = asked.length_penalty
        options = {"num_beams": asked.num_beams, "early_stopping": asked.early_stopping or False}
        options["length_penalty"] = 1.0 if penalty is None else penalty
    start, end = decoder.start_id or 0, decoder.end_id
    return Generation(limit, start, end, is_drawn=bool(asked.sample), rules=rules, **options)


def make_model(
    config: RunConfig, labels: Labels, kind: type[TextToText] = TextToText
) -> Callable[[nnx.Rngs], TextToText]:
    generation = generation_of(config)
    return lambda rngs: kind(
        config.model, config.decoder, generation, smoothing=config.labels.smoothing, seed=config.generation.seed or 0,
        rngs=rngs,
    )  # fmt: skip


def with_ids(decoder: DecoderConfig, tokenizer: TextTokenizer) -> DecoderConfig:
    """The decoder's settings with the ids of the start and the end that they leave to the tokenizer.

    Raises:
      ConfigError: no token ends a text, or an id that the tokenizer has not. DataError: nothing starts one.
    """
    start, end = decoder.start_id, decoder.end_id
    if start is None:
        start = tokenizer.special("pad") if tokenizer.frame[0] is None else tokenizer.frame[0]
    end = tokenizer.frame[1] if end is None else end
    require(
        end is not None,
        "a target must end, so that a model learns to: the tokenizer has no token after a text, such as </s>. Give "
        "one's id as --decoder.end-id, or another --data.tokenizer; without it one is made that has an end.",
    )
    for name, value in (("start_id", start), ("end_id", end)):
        require(
            value < tokenizer.vocab_size,
            f"decoder.{name} must be a token's id: got {value}, the tokenizer has {tokenizer.vocab_size} tokens.",
        )
    return dataclasses.replace(decoder, start_id=start, end_id=end)


def settle_ids(config: RunConfig, data: Any) -> RunConfig:
    return dataclasses.replace(config, decoder=with_ids(config.decoder, data.tokenizer))


def _targets(inputs: TargetInputs) -> Targets:
    start = with_ids(inputs.config.decoder, inputs.tokenizer).start_id
    assert start is not None
    return written_targets(inputs, start)


def _layout(config: RunConfig) -> Layout:
    data = config.data
    length = data.target_length or data.row_length
    return Layout(written=Written(length, config.decoder.end_id, data.long_targets == "leave_out"))


def _prompts(config: RunConfig) -> tuple[str, ...]:
    return (config.data.prefix, "") if config.data.prefix else ()


def check_model(config: RunConfig) -> None:
    """The rules of a run whose model has a decoder.

    Raises:
      ConfigError: a model that can have none, settings of a head, or of writing that contradict each other.
    """
    check_decoder(config.model)
    require(
        config.head == HeadConfig(),
        f"{config.objective} has no head besides the logits: leave --head. at its defaults, and see --decoder. for the "
        f"logits'; got {config.head}.",
    )
    generation_of(config)


def _check(config: RunConfig) -> None:
    check_whole_documents(config)
    check_model(config)
    sacrebleu(), rouge_scorer()  # missing, it is said before training


def _answer(question: Question) -> Answer:
    """`text`, what was written."""
    assert question.written is not None
    ids = question.outputs[0]["text"][0]
    ends = np.flatnonzero(ids == question.config.decoder.end_id)
    return {"text": question.written(ids[: ends[0]] if len(ends) else ids).strip()}


class _Parts(NamedTuple):
    """A stored document's tokens."""

    history: np.ndarray | None
    """Turns with the separator after each; None: the source is no turn of a conversation."""
    source: np.ndarray
    target: np.ndarray


def _parts(split: Split, document: int) -> _Parts:
    lengths = split.values["text_lengths"][document]
    found = np.split(split.document(document), np.cumsum(lengths[:-1], dtype=np.int64))
    return _Parts(*found) if len(found) == 3 else _Parts(None, *found)


def _gold(split: Split, document: int, labels: Labels) -> np.ndarray:
    return np.asarray(_parts(split, document).target)


def score(answers: Sequence[Answer], golds: Sequence[str], labels: Labels) -> dict[str, float]:
    """BLEU and chrF of the whole (sacrebleu's defaults, from 0 to 100), and the means of ROUGE-1, -2 and -L (F1 of
    rouge-score, without a stemmer, from 0 to 1)."""
    bleu, scorer = sacrebleu(), rouge_scorer().RougeScorer(_ROUGE)
    texts, golds = [answer["text"] for answer in answers], [gold.strip() for gold in golds]
    scores = {
        "bleu": bleu.corpus_bleu(texts, [golds]).score,
        "chrf": bleu.corpus_chrf(texts, [golds]).score,
    }
    each = [scorer.score(gold, text) for gold, text in zip(golds, texts, strict=True)]
    return scores | {name: float(np.mean([s[name].fmeasure for s in each])) for name in _ROUGE}


def _baselines(run: Any, data: Any) -> dict[str, dict[str, float]]:
    split, decode = data.stores[0].validation, run.tokenizer.decode
    parts = [_parts(split, i) for i in range(len(split))]
    prefix, golds = run.config.data.prefix, [decode(own.target) for own in parts]
    sources = [decode(own.source).removeprefix(prefix.strip()).strip() for own in parts]
    if parts[0].history is not None:
        train = data.stores[0].train
        some = range(min(len(train), _COUNTED_ANSWERS))
        [(usual, _)] = collections.Counter(decode(_parts(train, i).target) for i in some).most_common(1)
        guesses = {"the newest turn itself": sources, "the most frequent answer": [usual] * len(sources)}
    else:
        first = [(sentences(source) or [source])[0] for source in sources]
        guesses = {"the source itself": sources, "its first sentence": first}
    return {name: score([{"text": text} for text in texts], golds, None) for name, texts in guesses.items()}


def _examples(run: Any, data: Any) -> list[str]:
    split, tokenizer = data.stores[0].validation, run.tokenizer
    some = np.linspace(0, len(split) - 1, min(3, len(split))).astype(int).tolist()
    asked = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, prefix=""))  # they have it
    parts = [_parts(split, i) for i in some]
    records = [_record(own, tokenizer, run.config.data.turn_separator) for own in parts]
    answers = dataclasses.replace(run, config=asked).predict(records)
    return [
        "\n" + "".join(f"{_shown(text)}\n" for text in (*(record.history or ()), *record.texts))
        + f"  the model writes {_shown(answer['text'])!r}; the data has {_shown(tokenizer.decode(own.target))!r}"
        for own, record, answer in zip(parts, records, answers, strict=True)
    ]  # fmt: skip


def _record(parts: _Parts, tokenizer: TextTokenizer, separator: str | None) -> Record:
    """A stored document as it is asked, the prefix included."""
    source = (tokenizer.decode(parts.source),)
    if parts.history is None:
        return Record(source)
    turns = split_turns(parts.history, turn_separator_ids(tokenizer, separator))
    return Record(source, history=tuple(map(tokenizer.decode, turns)))


def _shown(text: str) -> str:
    return text if len(text) < 200 else text[:197] + "..."


TASK = Task(
    reading=Reading(
        Columns("text", writes=True, has_turns=True), _targets, _layout, prompts=_prompts, asks_one_a_row=True
    ),
    make_model=make_model,
    report=MaskedLM.report,
    reads=(
        "decoder.", "generation.", "labels.smoothing", "data.prefix", "data.target_length", "data.long_targets",
        "data.text_pair_column", "data.history_column", "data.target_turns", "data.turn_separator",
    ),
    check=_check,
    settle=settle_ids,
    answer=_answer,
    gold=_gold,
    score=score,
    baselines=_baselines,
    examples=_examples,
    commands=ask_file_commands,
    head="text_to_text",
)  # fmt: skip
