"""Encoder-decoders: what a target token sees, that the cache changes nothing, and how text is written."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import SMALL, B, V, assert_trees_close, random_tokens, split_model

from flax_encoder.config import ConfigError, DecoderConfig, EncoderConfig
from flax_encoder.nn.decoder import EncoderDecoder
from flax_encoder.nn.encoder import Encoder
from flax_encoder.nn.generation import Generation, draw, generate

M, T = 13, 7
T5 = dataclasses.replace(
    SMALL, norm_placement="pre", norm="rms_norm", position="none", relative_position="t5", relative_buckets=8,
    relative_max_distance=6, use_bias=False, attention_scale=1.0, attention_head_dim=4, activation="relu", num_layers=2,
)  # fmt: skip
VASWANI = dataclasses.replace(
    SMALL, position="sinusoidal", embedding_norm=False, embedding_scale=SMALL.embed_dim**0.5, activation="relu",
    num_kv_heads=1, num_layers=1,
)  # fmt: skip
LSTM = EncoderConfig(
    vocab_size=V, layer="lstm", bidirectional=True, embed_dim=SMALL.embed_dim, num_layers=1, position="none",
    norm_placement="pre",
)  # fmt: skip
MODELS = {
    "t5": (T5, DecoderConfig(num_layers=3, logit_scale=SMALL.embed_dim**-0.5)),
    "t5, own table": (dataclasses.replace(T5, gated=True), DecoderConfig(tied=False)),
    "original": (VASWANI, DecoderConfig()),
    "original, unrolled": (dataclasses.replace(VASWANI, scan_layers=False, remat="full"), DecoderConfig()),
    "original, remat": (dataclasses.replace(VASWANI, remat="feed_forward"), DecoderConfig()),
    "lstm": (LSTM, DecoderConfig(num_layers=2)),
}


def make(name, seed=0):
    config, decoder = MODELS[name]
    return split_model(lambda: EncoderDecoder(config, decoder, rngs=nnx.Rngs(0)), seed)


def begun(model, tokens, segments, length, num_texts=1):
    """A cache before the first token of each source."""
    return model.decoder.start(model.read(tokens, segments), length, num_texts)


@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_separate(name):
    """Two pairs in one row, with padding, give each pair's logits and gradients."""
    graphdef, params = make(name)
    source, target = random_tokens((2, M)), random_tokens((2, T), seed=1)
    weights = jax.random.normal(jax.random.key(1), (2, T, V))

    def logits_and_gradients(weights, *rows):
        def loss(params):
            logits = nnx.merge(graphdef, params)(*rows)
            return (logits * weights).sum(), logits

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    def packed(rows, length, filler):
        segments = jnp.array([[1] * length + [2] * length + [0] * 3], jnp.int32)
        positions = jnp.array([[*range(length)] * 2 + [0] * 3], jnp.int32)
        return jnp.concatenate([rows.reshape(1, -1), filler], axis=1), segments, positions

    want_gradients, want = logits_and_gradients(weights, source, target)
    filler = random_tokens((1, 3), seed=2)
    (tokens, segments, positions), (targets, target_segments, target_positions) = (
        packed(source, M, filler), packed(target, T, filler),
    )  # fmt: skip
    row_weights = jnp.pad(weights.reshape(1, 2 * T, V), [(0, 0), (0, 3), (0, 0)])
    gradients, got = logits_and_gradients(
        row_weights, tokens, targets, segments, target_segments, positions, target_positions
    )
    assert_trees_close(got[:, : 2 * T].reshape(want.shape), want)
    assert_trees_close(gradients, want_gradients)


@pytest.mark.parametrize("name", MODELS)
def test_written_token_by_token_equals_all_at_once(name):
    graphdef, params = make(name)
    source, target = random_tokens((B, M)), random_tokens((B, T), seed=1)
    segments = jnp.array([[1] * M, [0] * 3 + [1] * 8 + [0] * 2], jnp.int32)
    positions = jnp.array([range(M), [0] * 3 + list(range(M - 3))], jnp.int32)  # the source's begin behind its padding
    want = jax.jit(lambda p: nnx.merge(graphdef, p)(source, target, segments, None, positions))(params)
    step = jax.jit(lambda p, tokens, cache: nnx.merge(graphdef, p).step(tokens, cache))
    cache = jax.jit(lambda p: begun(nnx.merge(graphdef, p), source, segments, T + 4))(params)
    got = []
    for t in range(T):
        logits, cache = step(params, target[:, t : t + 1], cache)
        got.append(logits)
    assert_trees_close(jnp.concatenate(got, axis=1), want)


@pytest.mark.parametrize("name", ["t5", "original"])
def test_padding_on_either_side_begins_the_same_text(name):
    graphdef, params = make(name)
    source, padding = random_tokens((1, M)), jnp.zeros((1, 3), jnp.int32)

    def logits(*parts):
        segments = jnp.concatenate([jnp.full_like(part, part is source) for part in parts], axis=1)
        model = nnx.merge(graphdef, params)
        return model.step(jnp.zeros((1, 1), jnp.int32), begun(model, jnp.concatenate(parts, axis=1), segments, 2))[0]

    assert_trees_close(logits(padding, source), logits(source, padding))


def test_buckets_that_a_decoder_cannot_have_are_refused():
    config = dataclasses.replace(T5, relative_buckets=32, relative_max_distance=16)
    Encoder(config, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="above half of relative_buckets: got 16 and 32"):
        EncoderDecoder(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["t5", "original", "lstm"])
def test_a_target_token_sees_those_before_it_and_the_source_without_padding(name):
    graphdef, params = make(name)
    logits = jax.jit(lambda *rows: nnx.merge(graphdef, params)(*rows))
    source, target = random_tokens((1, M)), random_tokens((1, T), seed=1)
    segments = jnp.array([[1] * 9 + [0] * 4], jnp.int32)
    before = logits(source, target, segments)

    def felt(source, target):
        return np.flatnonzero(np.abs(np.asarray(logits(source, target, segments) - before)).max((0, 2)) > 1e-5).tolist()

    assert felt(source, target.at[0, 3].add(1)) == [3, 4, 5, 6]
    assert felt(source.at[0, 8].add(1), target) == [*range(T)]
    assert felt(source.at[0, 9].add(1), target) == []


def test_dropout_is_a_function_of_the_key():
    config = dataclasses.replace(T5, dropout_rate=0.1, attention_dropout_rate=0.1, num_layers=1)
    graphdef, params = split_model(lambda: EncoderDecoder(config, rngs=nnx.Rngs(0)))
    logits = jax.jit(lambda key: nnx.merge(graphdef, params)(random_tokens((B, M)), random_tokens((B, T)), key=key))
    one, other = jax.random.split(jax.random.key(0))
    np.testing.assert_array_equal(logits(one), logits(one))
    assert not np.allclose(logits(one), logits(other)) and not np.allclose(logits(one), logits(None))


@pytest.mark.parametrize(("values", "message"), [
    ({"position": "rope"}, "position to be none or sinusoidal: got rope"),
    ({"relative_position": "alibi"}, "relative_position to be none or t5: got alibi"),
    ({"window": 2}, "window to be None: got 2"),
])  # fmt: skip
def test_settings_that_make_no_decoder_are_named(values, message):
    config = dataclasses.replace(VASWANI, **values, embed_dim=30, attention_head_dim=6)
    with pytest.raises(ConfigError, match=message):
        EncoderDecoder(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("values", "message"), [
    ({"position": "learned"}, r"lstm layers needs model\.position to be none or sinusoidal: got learned"),
    ({"embedding_dim": 12}, r"model\.embedding_dim to be None or 30: got 12"),
])  # fmt: skip
def test_settings_that_make_no_recurrent_decoder_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        EncoderDecoder(dataclasses.replace(LSTM, **values), rngs=nnx.Rngs(0))


# Writing.


@pytest.fixture(scope="module")
def model():
    graphdef, params = make("t5")
    return nnx.merge(graphdef, jax.tree.map(lambda x: 3 * x, params))


SOURCE, SEGMENTS = random_tokens((3, M)), jnp.array([[1] * M, [1] * 5 + [0] * 8, [0] * 4 + [1] * 9], jnp.int32)


def test_greedy_takes_the_likeliest_token_each_time_and_pads_after_the_end(model):
    text = np.asarray(generate(model, SOURCE, SEGMENTS, Generation(max_new_tokens=9, end_id=None)))
    assert text.shape == (3, 10) and not text[:, 0].any()
    logits = jax.jit(lambda text: model(SOURCE, text, SEGMENTS))(jnp.asarray(text[:, :-1]))
    np.testing.assert_array_equal(text[:, 1:], np.asarray(logits).argmax(-1))
    end = int(text[0, 4])
    ended = np.asarray(generate(model, SOURCE, SEGMENTS, Generation(max_new_tokens=9, end_id=end, pad_id=36)))
    for row, whole in zip(ended, text, strict=True):
        ends = np.flatnonzero(whole[1:] == end)
        stop = ends[0] + 2 if len(ends) else 10
        np.testing.assert_array_equal(row, [*whole[:stop], *[36] * (10 - stop)])


@pytest.mark.parametrize("name", ["t5", "original", "lstm"])
def test_texts_that_go_on_from_one_another_have_the_logits_of_texts_alone(name):
    """Each of a source's texts goes on from another one in every step, some from the same."""
    graphdef, params = make(name)
    model = nnx.merge(graphdef, params)
    step = jax.jit(lambda tokens, cache: model.step(tokens, cache))
    whole = jax.jit(lambda source, texts, segments, positions: model(source, texts, segments, positions=positions))
    cache = begun(model, SOURCE, SEGMENTS, 6, 3)
    texts = np.zeros((3, 3, 0), np.int32)
    positions = jnp.maximum(jnp.cumsum(SEGMENTS, axis=1) - 1, 0)  # the source's begin behind its padding
    source = [jnp.repeat(x, 3, 0) for x in (SOURCE, SEGMENTS, positions)]
    for t in range(5):
        tokens = np.asarray(random_tokens((3, 3), seed=t))
        texts = np.concatenate([texts, tokens[..., None]], axis=-1)
        logits, cache = step(jnp.asarray(tokens), cache)
        padded = np.pad(texts.reshape(9, -1), [(0, 0), (0, 4 - t)])  # one shape; a text does not see what follows
        alone = whole(source[0], jnp.asarray(padded), *source[1:])
        assert_trees_close(logits.reshape(9, -1), alone[:, t])
        origin = np.random.default_rng(t).integers(0, 3, (3, 3))
        cache = model.decoder.follow(cache, jnp.asarray(origin))
        texts = np.take_along_axis(texts, origin[..., None], axis=1)


@pytest.mark.parametrize(("name", "settings"), [
    ("t5", {}), ("t5", {"num_beams": 3}), ("t5", {"is_drawn": True}), ("lstm", {"num_beams": 2}),
], ids=["greedy", "beams", "drawn", "lstm"])  # fmt: skip
def test_texts_that_make_room_for_others_are_those_of_all_at_once(name, settings):
    graphdef, params = make(name)
    model = nnx.merge(graphdef, jax.tree.map(lambda x: 3 * x, params))
    source = random_tokens((17, M), seed=5)
    segments = (jnp.arange(M) < jnp.arange(17)[:, None] % (M + 1)).astype(jnp.int32)  # two have no token
    key = jax.random.key(1) if "is_drawn" in settings else None
    plain = generate(model, source, segments, Generation(max_new_tokens=7, end_id=None, **settings), key=key)
    ends = tuple(np.unique(np.asarray(plain)[:, 2:5])[:4].tolist())  # so that texts end at several places
    generation = Generation(max_new_tokens=7, end_id=ends, pad_id=35, **settings)
    want = np.asarray(generate(model, source, segments, generation, key=key))
    assert len(np.unique((want == 35).sum(1))) > 2
    assert np.flatnonzero((want[:, 1:] == 35).all(1)).tolist() == [0, 14]
    for slots in (1, 4) if name == "t5" and not settings else (4,):
        np.testing.assert_array_equal(generate(model, source, segments, generation, key=key, slots=slots), want)


@pytest.mark.parametrize(("kind", "length_penalty"), [(T5, 0.0), (T5, 1.0), (LSTM, 1.0)], ids=["0", "1", "lstm"])
def test_enough_beams_find_the_likeliest_text(kind, length_penalty):
    config = dataclasses.replace(kind, vocab_size=4, num_layers=1)
    graphdef, params = split_model(lambda: EncoderDecoder(config, rngs=nnx.Rngs(0)))
    model = nnx.merge(graphdef, jax.tree.map(lambda x: 2 * x, params))
    source = SOURCE[:1] % 4
    end, limit = 1, 3
    texts = {
        tuple(t[: t.index(end) + 1] if end in t else t) for t in itertools.product(range(4), repeat=limit)
    }  # fmt: skip
    tokens = jnp.array([[0, *t, *[0] * (limit - len(t))] for t in texts], jnp.int32)
    logits = jax.jit(lambda tokens: jax.nn.log_softmax(model(jnp.repeat(source, len(texts), 0), tokens)))(tokens)
    scores = {
        t: sum(float(logits[i, j, token]) for j, token in enumerate(t)) / len(t) ** length_penalty
        for i, t in enumerate(texts)
    }
    best = max(scores, key=scores.get)
    generation = Generation(
        max_new_tokens=limit, num_beams=16, length_penalty=length_penalty, early_stopping="never", end_id=end
    )
    got = np.asarray(generate(model, source, None, generation))[0, 1:].tolist()
    assert got == [*best, *[0] * (limit - len(best))]


def test_rows_do_not_mix(model):
    for generation in (Generation(max_new_tokens=5), Generation(max_new_tokens=5, num_beams=3)):
        together = generate(model, SOURCE, SEGMENTS, generation)
        turned = generate(model, SOURCE[::-1], SEGMENTS[::-1], generation)
        np.testing.assert_array_equal(together, turned[::-1])
        alone = generate(model, SOURCE[1:2], SEGMENTS[1:2], generation)
        np.testing.assert_array_equal(together[1:2], alone)


def test_drawn_text_is_a_function_of_key_and_row(model):
    generation = Generation(max_new_tokens=8, is_drawn=True, temperature=2.0, end_id=None)
    one, other = jax.random.split(jax.random.key(0))
    text = generate(model, SOURCE, SEGMENTS, generation, key=one)
    np.testing.assert_array_equal(text, generate(model, SOURCE, SEGMENTS, generation, key=one))
    np.testing.assert_array_equal(text[:1], generate(model, SOURCE[:1], SEGMENTS[:1], generation, key=one))
    assert not np.array_equal(text, generate(model, SOURCE, SEGMENTS, generation, key=other))


@pytest.mark.parametrize(("settings", "kept"), [
    ({}, [0, 1, 2, 3, 4]),
    ({"top_k": 2}, [1, 3]),
    ({"top_k": 99}, [0, 1, 2, 3, 4]),
    ({"top_p": 0.5}, [3]),  # probabilities 0.05 0.25 0.1 0.5 0.1
    ({"top_p": 0.51}, [1, 3]),
    ({"top_p": 1e-9}, [3]),
    ({"top_k": 2, "top_p": 0.6}, [3]),  # 2/3 of what top_k leaves
    ({"temperature": 0.5, "top_p": 0.7}, [3]),  # squares: 0.25 of 0.335
])  # fmt: skip
def test_draws_follow_the_probabilities_of_what_is_kept(settings, kept):
    p = np.array([0.05, 0.25, 0.1, 0.5, 0.1])
    generation = Generation(is_drawn=True, **settings)
    rows = 4000
    keys = jax.random.split(jax.random.key(0), rows)
    tokens = draw(jnp.broadcast_to(jnp.log(jnp.asarray(p)), (rows, 5)), keys, jnp.full(rows, 3), generation)
    share = np.bincount(np.asarray(tokens), minlength=5) / rows
    want = np.where(np.isin(range(5), kept), p ** (1 / generation.temperature), 0)
    np.testing.assert_allclose(share, want / want.sum(), atol=0.03)
    assert np.flatnonzero(share).tolist() == kept


@pytest.mark.parametrize(("values", "message"), [
    ({"max_new_tokens": 0}, "max_new_tokens must be above 0: got 0"),
    ({"num_beams": 0}, "num_beams must be above 0"),
    ({"temperature": 0.5}, "are for sampling: set is_drawn and give a key: got"),
    ({"top_p": 1.5, "is_drawn": True}, "top_p must be above 0 and at most 1, or None: got 1.5"),
    ({"top_k": 0, "is_drawn": True}, "top_k must be above 0 or None: got 0"),
    ({"temperature": 0.0, "is_drawn": True}, "temperature must be above 0"),
    ({"num_beams": 2, "is_drawn": True}, "beam search does not sample: give num_beams=1, or do not sample .*: got 2"),
    ({"length_penalty": 2.0}, "are for beam search: set num_beams"),
])  # fmt: skip
def test_settings_that_contradict_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Generation(**values)


def test_a_key_and_drawing_go_together(model):
    with pytest.raises(ValueError, match="a key is for drawn text: got is_drawn False"):
        generate(model, SOURCE, SEGMENTS, key=jax.random.key(0))
    with pytest.raises(ValueError, match="got is_drawn True and key None"):
        generate(model, SOURCE, SEGMENTS, Generation(is_drawn=True))
