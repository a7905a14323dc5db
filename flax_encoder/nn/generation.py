"""Writing text with an encoder-decoder: greedy, by beams, or drawn. One compiled loop, all shapes fixed.

Axes: B rows, W beams, T the longest target with the token that starts it, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flax_encoder.nn.cache import Cache
from flax_encoder.nn.decoder import EncoderDecoder
from flax_encoder.nn.logit_rules import LogitRules, apply_rules

_NO_RULES = LogitRules()
_NEVER = -1e9  # a score no text has; finite, so that differences of two stay numbers


@dataclasses.dataclass(frozen=True)
class Generation:
    """How text is written. Without `key`, the likeliest token each time, or with num_beams the likeliest text found.

    Raises:
      ValueError: settings that contradict each other, or that would not be read.
    """

    max_new_tokens: int = 128
    start_id: int = 0
    end_id: int | tuple[int, ...] | None = 1
    """One id, or several any of which ends a text; None never ends before max_new_tokens."""
    pad_id: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    """Beams: a text's score is its log-probability over its length to this power."""
    early_stopping: bool | Literal["never"] = False
    """Beams: stop at num_beams finished texts (True), once no better one is likely (False), or when sure ("never")."""
    temperature: float = 1.0
    """Drawn: logits are divided by it ..."""
    top_k: int | None = None
    """... of the likeliest top_k tokens alone ..."""
    top_p: float | None = None
    """... and of those the fewest that have this probability together (Holtzman et al., arXiv 1904.09751)."""
    is_drawn: bool = False
    """Draw tokens, by the key that `generate` is given."""
    rules: LogitRules = _NO_RULES
    """What texts may not go on with."""

    def __post_init__(self):
        rules = (
            (self.max_new_tokens > 0, "max_new_tokens must be above 0", self.max_new_tokens),
            (self.num_beams > 0, "num_beams must be above 0", self.num_beams),
            (self.temperature > 0, "temperature must be above 0", self.temperature),
            (self.top_k is None or self.top_k > 0, "top_k must be above 0 or None", self.top_k),
            (self.top_p is None or 0 < self.top_p <= 1, "top_p must be above 0 and at most 1, or None", self.top_p),
            (
                not self.is_drawn or self.num_beams == 1,
                "beams are not drawn: give num_beams=1, or do not draw (do_sample=False)",
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
                "temperature, top_k and top_p are of drawn text: set is_drawn and give a key",
                (self.temperature, self.top_k, self.top_p),
            ),
            (
                self.num_beams > 1 or (self.length_penalty, self.early_stopping) == (1.0, False),
                "length_penalty and early_stopping are of beams: set num_beams",
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
    tokens: Int[Array, "B M"],
    segment_ids: Int[Array, "B M"] | None = None,
    generation: Generation = Generation(),
    *,
    key: Array | None = None,
    draws: Int[Array, "B"] | None = None,
) -> Int[Array, "B T"]:
    """A target for each source row: start_id, then up to max_new_tokens, then pad_id after end_id.

    Args:
      segment_ids: 0 marks padding, on either side; one source a row.
      key: needed where the text is drawn; row i draws the same whatever rows stand beside it.
      draws: the number of each row by which it draws, in place of i.

    Raises:
      ValueError: a key without is_drawn, or the reverse.

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
    return _generate(graphdef, generation, params, tokens, segment_ids, key, draws)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(graphdef: Any, generation: Generation, params, tokens, segment_ids, key, draws):
    model = nnx.merge(graphdef, params)
    if generation.num_beams > 1:
        return beam_search(model, tokens, segment_ids, generation)
    cache = model.start(tokens, segment_ids, generation.max_new_tokens)
    B = tokens.shape[0]
    text = jnp.full((B, 1 + generation.max_new_tokens), generation.pad_id, jnp.int32).at[:, 0].set(generation.start_id)

    allow = _allowing(generation, tokens, segment_ids)

    def unfinished(state):
        step, _, is_done, _ = state
        return (step < generation.max_new_tokens) & ~is_done.all()

    def write(state):
        step, text, is_done, cache = state
        logits, cache = model.step(text[:, step], cache)
        logits = allow(logits.astype(jnp.float32), text, step + 1)
        own_keys = None if key is None else jax.vmap(lambda row: jax.random.fold_in(key, row))(draws)
        chosen = logits.argmax(-1) if key is None else draw(logits, own_keys, step, generation)
        chosen = jnp.where(is_done, generation.pad_id, chosen).astype(jnp.int32)
        return step + 1, text.at[:, step + 1].set(chosen), is_done | _ends(chosen, generation), cache

    return jax.lax.while_loop(unfinished, write, (jnp.zeros((), jnp.int32), text, jnp.zeros(B, bool), cache))[1]


def _ends(tokens: Int[Array, "..."], generation: Generation) -> Bool[Array, "..."]:
    return jnp.isin(tokens, jnp.asarray(generation.end_ids, jnp.int32))


def _allowing(
    generation: Generation, source: Int[Array, "B M"], segment_ids: Int[Array, "B M"]
) -> Callable[..., Array]:
    """The rules of `generation` as a function of scores, texts and their length; beams of a source stand together."""
    if generation.rules == _NO_RULES:
        return lambda scores, text, length: scores

    def allow(scores, text, length):
        beams = scores.shape[0] // source.shape[0]
        own_source, is_source = (jnp.repeat(x, beams, axis=0) for x in (source, segment_ids > 0))
        return apply_rules(generation.rules, scores, text, length, own_source, is_source, generation.end_ids)

    return allow


def draw(logits: Float[Array, "B V"], keys: Array, step: Int[Array, ""], generation: Generation) -> Int[Array, "B"]:
    """A token a row, by its own key and the step."""
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
    return jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))(keys, logits)


class _Beams(NamedTuple):
    step: Int[Array, ""]
    texts: Int[Array, "B W T"]
    scores: Float[Array, "B W"]
    """Sums of log-probabilities of the texts under way."""
    done_texts: Int[Array, "B W T"]
    done_scores: Float[Array, "B W"]
    """With the length penalty; `_NEVER` where there is none yet."""
    is_done: Bool[Array, "B W"]
    can_improve: Bool[Array, "B 1"]
    cache: Cache


def beam_search(
    model: EncoderDecoder, tokens: Int[Array, "B M"], segment_ids: Int[Array, "B M"], generation: Generation
) -> Int[Array, "B T"]:
    """The best finished text of each row, with transformers' rules for what counts as finished and when to stop.

    Each step extends every beam by every token and keeps the best K, 2 W where one token ends a text: of those, W that
    do not end go on, and among the best W those that end are finished. (Graves, arXiv 1211.3711; Wu et al., arXiv
    1609.08144, section 7.)
    """
    (B, _), W, limit = tokens.shape, generation.num_beams, generation.max_new_tokens
    cache = model.start(*(jnp.repeat(x, W, axis=0) for x in (tokens, segment_ids)), limit)
    texts = jnp.full((B, W, 1 + limit), generation.pad_id, jnp.int32).at[..., 0].set(generation.start_id)
    # All beams are alike at first: only one may be extended.
    scores = jnp.full((B, W), _NEVER).at[:, 0].set(0.0)
    never = jnp.full((B, W), _NEVER)
    allow = _allowing(generation, tokens, segment_ids)
    start = _Beams(
        jnp.zeros((), jnp.int32), texts, scores, texts, never, jnp.zeros((B, W), bool), jnp.ones((B, 1), bool), cache
    )

    def unfinished(beams: _Beams):
        all_done = beams.is_done.all() & (generation.early_stopping is True)
        return (beams.step < limit) & beams.can_improve.any() & ~all_done

    def extend(beams: _Beams) -> _Beams:
        step = beams.step + 1
        logits, cache = model.step(beams.texts[..., beams.step].reshape(-1), beams.cache)
        log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        log_probabilities = allow(log_probabilities, beams.texts.reshape(B * W, -1), step).reshape(B, W, -1)
        V = log_probabilities.shape[-1]
        K = min(max(2, 1 + len(generation.end_ids)) * W, W * V)  # enough for W that do not end
        scores, chosen = jax.lax.top_k((log_probabilities + beams.scores[..., None]).reshape(B, -1), K)
        origin = chosen // V
        texts = _pick(beams.texts, origin).at[:, :, step].set((chosen % V).astype(jnp.int32))
        ends = _ends(texts[:, :, step], generation) | (step == limit)

        going = scores + jnp.where(ends, _NEVER, 0.0)
        best = jax.lax.top_k(going, W)[1]
        rows = (jnp.arange(B)[:, None] * W + _pick(origin, best)).reshape(-1)
        cache = cache._replace(own=jax.tree.map(lambda a: a[:, rows], cache.own))

        just_done = ends & (jnp.arange(K) < W)
        is_full = beams.is_done.all(-1, keepdims=True) & (generation.early_stopping is True)
        counts = just_done & beams.can_improve & ~is_full
        finished = scores / step.astype(jnp.float32) ** generation.length_penalty + jnp.where(counts, 0.0, _NEVER)
        merged = jnp.concatenate([beams.done_scores, finished], axis=1)
        done_scores, kept = jax.lax.top_k(merged, W)
        done_texts = _pick(jnp.concatenate([beams.done_texts, texts], axis=1), kept)
        is_done = _pick(jnp.concatenate([beams.is_done, just_done], axis=1), kept)

        running = _pick(going, best)
        length = limit if generation.early_stopping == "never" and generation.length_penalty > 0 else step
        hoped = running[:, :1] / jnp.asarray(length, jnp.float32) ** generation.length_penalty
        worst = jnp.where(is_done, done_scores.min(1, keepdims=True), _NEVER)
        can_improve = beams.can_improve & (hoped > worst).any(-1, keepdims=True)
        return _Beams(step, _pick(texts, best), running, done_texts, done_scores, is_done, can_improve, cache)

    beams = jax.lax.while_loop(unfinished, extend, start)
    return beams.done_texts[:, 0]


def _pick(x: Array, index: Int[Array, "B W"]) -> Array:
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)
