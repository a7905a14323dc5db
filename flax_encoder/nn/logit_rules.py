"""Rules of generation that change the scores of the next token, for any model.

Axes: B texts under way, T the longest text with the token that starts it, V vocabulary, M source.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Ids = tuple[int, ...]


class LogitRules(NamedTuple):
    """Rules in the order in which they are applied, as transformers' generate has them; each default changes nothing.

    The tokens "so far" include the one that starts the text.
    """

    repetition_penalty: float = 1.0
    """Scores of tokens so far are divided by it where above 0, else multiplied (Keskar et al., arXiv 1909.05858)."""
    no_repeat_ngram_size: int = 0
    """So many tokens in a row stand only once in a text; 0 lets them repeat."""
    encoder_no_repeat_ngram_size: int = 0
    """So many tokens in a row are not those of the source."""
    bad_words_ids: tuple[Ids, ...] = ()
    """Tokens in a row that no text has."""
    min_new_tokens: int = 0
    """No end before so many."""
    forced_bos_id: int | None = None
    """The first token after the one that starts the text."""
    forced_eos_ids: Ids = ()
    """One of them is the last of max_new_tokens."""
    suppress_ids: Ids = ()
    """Tokens that no text has."""
    begin_suppress_ids: Ids = ()
    """Tokens that are not the first, or after forced_bos_id not the second."""


def apply_rules(
    rules: LogitRules,
    scores: Float[Array, "B V"],
    text: Int[Array, "B T"],
    length: Int[Array, "B"],
    source: Int[Array, "B M"],
    is_source: Bool[Array, "B M"],
    end_ids: Ids,
) -> Float[Array, "B V"]:
    """Scores of the token at `length`, which is how many of a text are written; T - 1 tokens follow the first."""
    never, length = -jnp.inf, length[:, None]

    def ban(scores, ids: Ids, when=True):
        ids = [i for i in ids if i < scores.shape[1]]
        return jnp.where(when, scores.at[:, jnp.asarray(ids, jnp.int32)].set(never), scores) if ids else scores

    def force(scores, ids: Ids, when):
        forced = jnp.full_like(scores, never).at[:, jnp.asarray(ids, jnp.int32)].set(0.0)
        return jnp.where(when, forced, scores)

    B, T = text.shape
    rows = jnp.arange(B)[:, None]
    is_written = jnp.arange(T) < length
    if rules.repetition_penalty != 1.0:
        seen = jnp.zeros(scores.shape, bool).at[rows, text].max(is_written)
        penalised = jnp.where(scores < 0, scores * rules.repetition_penalty, scores / rules.repetition_penalty)
        scores = jnp.where(seen, penalised, scores)
    for size, tokens, is_real in (
        (rules.no_repeat_ngram_size, text, is_written),
        (rules.encoder_no_repeat_ngram_size, source, is_source),
    ):
        if 0 < size <= tokens.shape[1]:
            last = _last(text, length, size - 1)
            count = tokens.shape[1] - size + 1
            repeats = is_real[:, size - 1 :] & is_real[:, :count] & (length >= size - 1)
            for k in range(size - 1):
                repeats &= tokens[:, k : k + count] == last[:, k : k + 1]
            banned = jnp.zeros(scores.shape, bool).at[rows, tokens[:, size - 1 :]].max(repeats)
            scores = jnp.where(banned, never, scores)
    for word in rules.bad_words_ids:
        if len(word) > T or word in [(i,) for i in end_ids]:
            continue
        follows = length >= len(word) - 1
        if len(word) > 1:
            follows &= (_last(text, length, len(word) - 1) == jnp.asarray(word[:-1])).all(1, keepdims=True)
        scores = ban(scores, word[-1:], follows)
    if rules.min_new_tokens:
        scores = ban(scores, end_ids, length <= rules.min_new_tokens)
    if rules.forced_bos_id is not None:
        scores = force(scores, (rules.forced_bos_id,), length == 1)
    if rules.forced_eos_ids:
        scores = force(scores, rules.forced_eos_ids, length == T - 1)
    scores = ban(scores, rules.suppress_ids)
    return ban(scores, rules.begin_suppress_ids, length == (1 if rules.forced_bos_id is None else 2))


def _last(text: Int[Array, "B T"], length: Int[Array, "B 1"], count: int) -> Int[Array, "B count"]:
    """The last tokens written; of a text of fewer what means nothing."""
    return jnp.take_along_axis(text, jnp.maximum(length - count + jnp.arange(count), 0), axis=1, mode="clip")
