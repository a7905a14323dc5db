"""Writing text with an encoder-decoder: greedily, by beam search or by sampling, in one compiled loop of fixed shapes.

Axes: R sources, B sources whose targets are written at a time, W beams, T the longest target with its start token, V
vocabulary, M the longest source.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flax_encoder.nn.cache import Cache, Memory
from flax_encoder.nn.decoder import EncoderDecoder
from flax_encoder.nn.logit_rules import LogitRules, apply_rules

_NO_RULES = LogitRules()
READ_PER_WRITTEN = 4
"""Sources that are best read together for each that is written at a time, so that few slots stand empty at the end."""
_NEVER = -1e9  # a score no text has; finite, so that differences of two stay numbers


@dataclasses.dataclass(frozen=True)
class Generation:
    """How text is written: greedily, by beam search with num_beams above 1, or by sampling with is_drawn.

    Raises:
      ValueError: settings contradict each other, or one would not be read.
    """

    max_new_tokens: int = 128
    start_id: int = 0
    end_id: int | tuple[int, ...] | None = 1
    """The id that ends a text, or several ids, each of which does; None: a text ends only at max_new_tokens."""
    pad_id: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    """Beam search: a text's score is its log-probability divided by its length to this power."""
    early_stopping: bool | Literal["never"] = False
    """Beam search stops at num_beams finished texts (True), when a better text is unlikely (False), or when none is
    possible ("never")."""
    temperature: float = 1.0
    """Sampling: logits are divided by it."""
    top_k: int | None = None
    """Sampling: draw only from the likeliest top_k tokens."""
    top_p: float | None = None
    """Sampling: of those, draw only from the fewest tokens whose probabilities add up to this (Holtzman et al., arXiv
    1904.09751)."""
    is_drawn: bool = False
    """Sample each token, by the key that `generate` takes."""
    rules: LogitRules = _NO_RULES
    """Rules that change the scores of next tokens."""

    def __post_init__(self):
        rules = (
            (self.max_new_tokens > 0, "max_new_tokens must be above 0", self.max_new_tokens),
            (self.num_beams > 0, "num_beams must be above 0", self.num_beams),
            (self.temperature > 0, "temperature must be above 0", self.temperature),
            (self.top_k is None or self.top_k > 0, "top_k must be above 0 or None", self.top_k),
            (self.top_p is None or 0 < self.top_p <= 1, "top_p must be above 0 and at most 1, or None", self.top_p),
            (
                not self.is_drawn or self.num_beams == 1,
                "beam search does not sample: give num_beams=1, or do not sample (do_sample=False)",
                self.num_beams,
            ),
            (self.rules.repetition_penalty > 0, "repetition_penalty must be above 0", self.rules.repetition_penalty),
            (
                all(self.rules.bad_words_ids),
                "bad_words_ids must be words of at least one token",
                self.rules.bad_words_ids,
            ),
            (
                min(self.rules.min_new_tokens, self.rules.no_repeat_ngram_size, self.rules.encoder_no_repeat_ngram_size)
                >= 0,
                "min_new_tokens and sizes of n-grams must be at least 0",
                self.rules,
            ),
            (
                self.is_drawn or (self.temperature, self.top_k, self.top_p) == (1.0, None, None),
                "temperature, top_k and top_p are for sampling: set is_drawn and give a key",
                (self.temperature, self.top_k, self.top_p),
            ),
            (
                self.num_beams > 1 or (self.length_penalty, self.early_stopping) == (1.0, False),
                "length_penalty and early_stopping are for beam search: set num_beams above 1",
                (self.length_penalty, self.early_stopping),
            ),
        )
        for holds, rule, value in rules:
            if not holds:
                raise ValueError(f"{rule}: got {value}.")

    @property
    def end_ids(self) -> tuple[int, ...]:
        ids = () if self.end_id is None else self.end_id
        return (ids,) if isinstance(ids, int) else ids


def generate(
    model: EncoderDecoder,
    tokens: Int[Array, "R M"],
    segment_ids: Int[Array, "R M"] | None = None,
    generation: Generation = Generation(),
    *,
    key: Array | None = None,
    draws: Int[Array, "R"] | None = None,
    slots: int | None = None,
) -> Int[Array, "R T"]:
    """Write a target for each source row: start_id, up to max_new_tokens tokens, and pad_id after end_id.

    Args:
      segment_ids: one source per row; 0 marks padding, on either side. Nothing is written for a row of padding.
      key: needed for sampling. Row i draws the same tokens, whatever the other rows are.
      draws: for each row the number that decides its draws, in place of i.
      slots: number of sources whose targets are written at a time; None is all. When a text ends, the next source takes
        its place, long sources first, so that short texts do not wait for long ones.

    Raises:
      ValueError: there is a key without is_drawn, or the reverse.

    Example:
      >>> model = load_pretrained("t5").model
      >>> tokens = jnp.array([[5, 6, 7, 1]])
      >>> generate(model, tokens, generation=Generation(max_new_tokens=8, num_beams=2)).shape
      (1, 9)
    """
    if (key is not None) != generation.is_drawn:
        raise ValueError(f"a key is for drawn text: got is_drawn {generation.is_drawn} and key {key}.")
    segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    graphdef, params = nnx.split(model)
    draws = jnp.arange(tokens.shape[0]) if draws is None else draws
    slots = min(tokens.shape[0], slots or tokens.shape[0])
    return _generate(graphdef, generation, slots, params, tokens, segment_ids, key, draws)


class _Sources(NamedTuple):
    """What is read, R sources, or B of them that are at hand."""

    memory: Memory
    tokens: Int[Array, "R M"]
    draws: Int[Array, "R"]


class _Greedy(NamedTuple):
    """Texts under way, one of each source."""

    texts: Int[Array, "B 1 T"]
    is_over: Bool[Array, "B"]

    @property
    def best(self) -> Int[Array, "B T"]:
        return self.texts[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(graphdef: Any, generation: Generation, slots: int, params, tokens, segment_ids, key, draws):
    model = nnx.merge(graphdef, params)
    sources = _Sources(model.read(tokens, segment_ids), tokens, draws)
    return write(model, sources, generation, slots, key)


def write(model: EncoderDecoder, sources: _Sources, generation: Generation, slots: int, key) -> Int[Array, "R T"]:
    """Texts of all sources, `slots` of them at a time."""
    R, limit, W = sources.tokens.shape[0], generation.max_new_tokens, generation.num_beams
    decoder, is_search = model.decoder, W > 1
    extend = functools.partial(_extend_beams if is_search else _extend, model, generation, key)

    def go_on(sources: _Sources, texts, cache: Cache, waiting: Array | bool, enough: int):
        """Write until no text is under way, or, where others wait, enough of them are over."""

        def is_under_way(state):
            is_over = state[0].is_over
            return ~is_over.all() & ~(waiting & (is_over.sum() >= enough))

        return jax.lax.while_loop(is_under_way, lambda state: extend(sources, *state), (texts, cache))

    blank = (_no_beams if is_search else _no_text)(generation, slots)
    if slots == R:
        blank = blank._replace(is_over=_is_padding(sources))
        return go_on(sources, blank, decoder.start(sources.memory, limit, W), False, R)[0].best

    # Long sources first: their texts are long too, as a rule, and one begun last would be written alone.
    order = jnp.append(jnp.argsort(-(sources.memory.segments > 0).sum(1)), R)  # number R is no source

    def renew(state):
        number, rows, texts, cache, out = state
        out = out.at[order[jnp.where(texts.is_over, rows, R)]].set(texts.best)  # row R is nobody's
        begun = number + jnp.cumsum(texts.is_over) - 1
        rows = jnp.where(texts.is_over, jnp.minimum(begun, R), rows)
        own = jax.tree.map(lambda a: a[jnp.minimum(order[rows], R - 1)], sources)
        cache = decoder.begin(cache, own.memory, texts.is_over)
        fresh = jax.tree.map(lambda new, old: _where(texts.is_over, new, old), blank, texts)
        texts = fresh._replace(is_over=(rows == R) | _is_padding(own))
        number = jnp.minimum(number + (rows != state[1]).sum(), R)
        texts, cache = go_on(own, texts, cache, number < R, -(-slots // 8))
        return number, rows, texts, cache, out

    first = jax.tree.map(lambda a: a[:slots], sources)
    start = (
        jnp.zeros((), jnp.int32), jnp.full(slots, R), blank._replace(is_over=jnp.ones(slots, bool)),
        decoder.start(first.memory, limit, W), jnp.full((R + 1, 1 + limit), generation.pad_id, jnp.int32),
    )  # fmt: skip
    return jax.lax.while_loop(lambda state: (state[0] < R) | (state[1] < R).any(), renew, start)[-1][:R]


def _is_padding(sources: _Sources) -> Bool[Array, "R"]:
    return ~(sources.memory.segments > 0).any(1)


def _where(which: Bool[Array, "B"], new: Array, old: Array) -> Array:
    return jnp.where(which.reshape(-1, *(1,) * (old.ndim - 1)), new, old)


def _no_text(generation: Generation, B: int) -> _Greedy:
    texts = jnp.full((B, 1, 1 + generation.max_new_tokens), generation.pad_id, jnp.int32)
    return _Greedy(texts.at[..., 0].set(generation.start_id), jnp.zeros(B, bool))


def _extend(model, generation: Generation, key, sources: _Sources, greedy: _Greedy, cache: Cache):
    """A token more of each text that is under way."""
    texts, length = greedy.texts[:, 0], cache.length + 1  # with the token that starts it
    logits, cache = model.step(_last(greedy.texts, length), cache)
    logits = _allowed(generation, sources, logits[:, 0].astype(jnp.float32), texts, length)
    if key is None:
        chosen = logits.argmax(-1)
    else:
        own_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(sources.draws)
        chosen = draw(logits, own_keys, length - 1, generation)
    chosen = chosen.astype(jnp.int32)
    texts = _put(greedy.texts, chosen[:, None], jnp.where(greedy.is_over, texts.shape[1], length))
    is_over = greedy.is_over | _ends(chosen, generation) | (length >= generation.max_new_tokens)
    return _Greedy(texts, is_over), cache


def _last(texts: Int[Array, "B W T"], length: Int[Array, "B"]) -> Int[Array, "B W"]:
    """The last token of each text."""
    at = jnp.minimum(length, texts.shape[-1])[:, None, None] - 1
    return jnp.take_along_axis(texts, jnp.broadcast_to(at, (*texts.shape[:2], 1)), axis=-1)[..., 0]


def _put(texts: Int[Array, "B W T"], tokens: Int[Array, "B W"], at: Int[Array, "B"]) -> Int[Array, "B W T"]:
    """Texts with a token more; none where `at` lies behind the last place."""
    return texts.at[jnp.arange(len(texts)), :, at].set(tokens, mode="drop")


def _ends(tokens: Int[Array, "..."], generation: Generation) -> Bool[Array, "..."]:
    return jnp.isin(tokens, jnp.asarray(generation.end_ids, jnp.int32))


def _allowed(
    generation: Generation, sources: _Sources, scores: Float[Array, "Z V"], texts: Int[Array, "Z T"],
    length: Int[Array, "B"],
) -> Float[Array, "Z V"]:  # fmt: skip
    """Scores by the rules; Z = B W, the texts of a source stand together."""
    if generation.rules == _NO_RULES:
        return scores
    per_text = (length, sources.tokens, sources.memory.segments > 0)
    own_length, source, is_source = (jnp.repeat(x, len(texts) // len(length), axis=0) for x in per_text)
    return apply_rules(generation.rules, scores, texts, own_length, source, is_source, generation.end_ids)


def draw(
    logits: Float[Array, "B V"], keys: Array, steps: Int[Array, "B"], generation: Generation
) -> Int[Array, "B"]:
    """A token a row, by its own key and step."""
    logits = logits.astype(jnp.float32) / generation.temperature
    if generation.top_k is not None:
        least = jax.lax.top_k(logits, min(generation.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if generation.top_p is not None:
        ordered = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # A token stays if those before it do not reach top_p.
        stays = jnp.cumsum(probabilities, axis=-1) - probabilities < generation.top_p
        least = jnp.where(stays, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    pick = lambda key, step, row: jax.random.categorical(jax.random.fold_in(key, step), row)  # noqa: E731
    return jax.vmap(pick)(keys, steps, logits)


class _Beams(NamedTuple):
    """Texts under way, W of each source, and the best W that are finished."""

    texts: Int[Array, "B W T"]
    scores: Float[Array, "B W"]
    """Sums of log-probabilities of the texts under way."""
    done_texts: Int[Array, "B W T"]
    done_scores: Float[Array, "B W"]
    """With the length penalty; `_NEVER` where there is none yet."""
    is_done: Bool[Array, "B W"]
    is_over: Bool[Array, "B"]

    @property
    def best(self) -> Int[Array, "B T"]:
        return self.done_texts[:, 0]


def _no_beams(generation: Generation, B: int) -> _Beams:
    W = generation.num_beams
    texts = jnp.repeat(_no_text(generation, B).texts, W, axis=1)
    # All beams are alike at first: only one may be extended.
    scores, never = jnp.full((B, W), _NEVER).at[:, 0].set(0.0), jnp.full((B, W), _NEVER)
    return _Beams(texts, scores, texts, never, jnp.zeros((B, W), bool), jnp.zeros(B, bool))


def _extend_beams(model, generation: Generation, key, sources: _Sources, beams: _Beams, cache: Cache):
    """Each beam extended by every token, of which the best are kept, by transformers' rules for what is finished.

    Of the best K, 2 W where one token ends a text, W that do not end go on, and among the best W those that end are
    finished. A source is over when no better text is likely. (Graves, arXiv 1211.3711; Wu et al., arXiv 1609.08144,
    section 7.)
    """
    (B, W, T), limit = beams.texts.shape, generation.max_new_tokens
    is_eager = generation.early_stopping is True
    length = cache.length + 1  # with the token that starts the text
    logits, cache = model.step(_last(beams.texts, length), cache)
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    V = log_probabilities.shape[-1]
    log_probabilities = _allowed(
        generation, sources, log_probabilities.reshape(-1, V), beams.texts.reshape(-1, T), length
    ).reshape(B, W, V)
    K = min(max(2, 1 + len(generation.end_ids)) * W, W * V)  # enough for W that do not end
    scores, chosen = jax.lax.top_k((log_probabilities + beams.scores[..., None]).reshape(B, -1), K)
    origin, tokens = chosen // V, (chosen % V).astype(jnp.int32)
    texts = _put(_pick(beams.texts, origin), tokens, length)
    ends = _ends(tokens, generation) | (length >= limit)[:, None]

    going = scores + jnp.where(ends, _NEVER, 0.0)
    best = jax.lax.top_k(going, W)[1]
    cache = model.decoder.follow(cache, _pick(origin, best))

    just_done = ends & (jnp.arange(K) < W)
    written = length.astype(jnp.float32)[:, None]
    finished = scores / written**generation.length_penalty + jnp.where(just_done, 0.0, _NEVER)
    done_scores, kept = jax.lax.top_k(jnp.concatenate([beams.done_scores, finished], axis=1), W)
    done_texts = _pick(jnp.concatenate([beams.done_texts, texts], axis=1), kept)
    is_done = _pick(jnp.concatenate([beams.is_done, just_done], axis=1), kept)

    running = _pick(going, best)
    is_patient = generation.early_stopping == "never" and generation.length_penalty > 0
    hoped = running[:, :1] / (float(limit) if is_patient else written) ** generation.length_penalty
    worst = jnp.where(is_done, done_scores.min(1, keepdims=True), _NEVER)
    is_over = ~(hoped > worst).any(-1) | (length >= limit) | (is_done.all(-1) & is_eager)
    new = _Beams(_pick(texts, best), running, done_texts, done_scores, is_done, is_over)
    return jax.tree.map(functools.partial(_where, beams.is_over), beams, new), cache


def _pick(x: Array, index: Int[Array, "B W"]) -> Array:
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)
