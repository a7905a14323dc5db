"""attention: every implementation is the definition, forward and backward."""

import functools
import logging

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from flax_encoder.ops import attention as attention_module
from flax_encoder.ops.attention import attention, chunked
from flax_encoder.ops.position import apply_rope, rope_tables

B, K, G, T, S, H = 2, 3, 5, 13, 7, 17
N = K * G
KEY_BLOCK, QUERY_BLOCK = 4, 3  # divide neither T nor S
SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0], [1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]], np.int32)
MEMORY = np.array([[1, 1, 2, 2, 3, 3, 0], [0, 1, 1, 2, 2, 0, 0]], np.int32)  # of S keys; some queries see none


@pytest.fixture(params=["reference", "chunked", "chunked, many tiles"])
def implementation(request, monkeypatch):
    """Those that serve everything, on any platform; test_attention_kernels.py has the others."""
    monkeypatch.setattr(chunked, "KEY_BLOCK", KEY_BLOCK)
    if "tiles" in request.param:
        monkeypatch.setattr(chunked, "QUERY_BLOCK", QUERY_BLOCK)
        monkeypatch.setattr(chunked, "FEWEST_QUERIES", QUERY_BLOCK)
        monkeypatch.setitem(chunked.TILE, "cpu", 1)
    return request.param.split(",")[0]


def draw(*shapes, seed=0, dtype=np.float32):
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape).astype(dtype) for shape in shapes]


def visible_keys(T, S, segments=None, window=None, key_segments=None):
    """[B, T, S] of 0 and 1, one pair at a time."""
    grid = np.zeros((B, T, S))
    key_segments = segments if key_segments is None else key_segments
    segments = np.ones((B, T)) if segments is None else segments
    for b, t, s in np.ndindex(*grid.shape):
        same = key_segments is None or segments[b, t] == key_segments[b, s] != 0
        near = window is None or -window[0] <= s - t <= window[1]
        grid[b, t, s] = same and near
    return grid


def attention_and_gradients(query, key, value, d_out, visible, bias=None, scale=None):
    """The definition in float64: (out, d_query, d_key, d_value, d_bias)."""
    query, key, value, d_out = (np.asarray(x, np.float64) for x in (query, key, value, d_out))
    groups = query.shape[2] // key.shape[2]
    key, value = np.repeat(key, groups, axis=2), np.repeat(value, groups, axis=2)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * np.einsum("btnh,bsnh->bnts", query, key) + (0 if bias is None else bias)
    weights = np.exp(logits) * visible[:, None]
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    d_weights = np.einsum("btnh,bsnh->bnts", d_out, value)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))

    def shared(x):
        return x.reshape(*x.shape[:2], -1, groups, x.shape[-1]).sum(3)

    d_bias = None
    if bias is not None:
        d_bias = d_logits.sum(tuple(a for a in (0, 1) if bias.shape[a] == 1), keepdims=True)
    return (
        np.einsum("bnts,bsnh->btnh", weights, value),
        scale * np.einsum("bnts,bsnh->btnh", d_logits, key),
        shared(scale * np.einsum("bnts,btnh->bsnh", d_logits, query)),
        shared(np.einsum("bnts,btnh->bsnh", weights, d_out)),
        d_bias,
    )


def assert_close(got, want, dtype=np.float32, terms=64):
    """Rounding of `terms` additions of numbers as large as the largest."""
    want = np.asarray(want, np.float64)
    tolerance = float(jnp.finfo(dtype).eps) * terms**0.5 * max(1.0, np.abs(want).max())
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=tolerance)


CASES = {
    "plain heads, own scale": {"heads": (K, K), "scale": 0.3},
    "segments": {"segments": SEGMENTS},
    "asymmetric window": {"window": (3, 1)},
    "one-sided window": {"window": (T, 0)},
    "segments and window": {"segments": SEGMENTS, "window": (1, 2)},
    "one key head, one-sided window": {"heads": (K, 1), "window": (0, 4)},
    "fewer keys and window": {"lengths": (T, S), "window": (2, 1)},
    "more keys": {"lengths": (S, T)},
    "a memory's segments": {"lengths": (T, S), "segments": SEGMENTS, "key_segments": MEMORY},
    "a memory's segments alone": {"lengths": (T, S), "key_segments": MEMORY},
    "bias 1 1": {"bias": (1, 1), "segments": SEGMENTS},
    "bias B 1": {"bias": (B, 1), "lengths": (S, T)},
    "bias 1 N": {"bias": (1, N), "window": (3, 1)},
    "bias B N": {"bias": (B, N), "lengths": (T, S)},
}


@pytest.mark.parametrize("case", CASES)
def test_attention_and_gradients_equal_the_definition(implementation, case):
    case = CASES[case]
    (t, s), (n, k) = case.get("lengths", (T, T)), case.get("heads", (N, K))
    query, key, value, d_out = draw((B, t, n, H), (B, s, k, H), (B, s, k, H), (B, t, n, H))
    bias = draw((*case["bias"], t, s), seed=1)[0] if "bias" in case else None
    window, scale = case.get("window"), case.get("scale")
    options = {"window": window, "scale": scale, "implementation": implementation}

    @jax.jit
    def out_and_gradients(query, key, value, bias, d_out):
        call = lambda query, key, value, bias: attention(  # noqa: E731
            query, key, value, bias=bias, segment_ids=segments, key_segment_ids=key_segments, **options
        )
        out, vjp = jax.vjp(call, query, key, value, bias)
        return out, *vjp(d_out)

    segments, key_segments = (
        None if name not in case else jnp.asarray(case[name]) for name in ("segments", "key_segments")
    )
    got = out_and_gradients(query, key, value, bias, d_out)
    visible = visible_keys(t, s, case.get("segments"), window, case.get("key_segments"))
    want = attention_and_gradients(query, key, value, d_out, visible, bias, scale)
    for name, g, w in zip(("out", "d_query", "d_key", "d_value", "d_bias"), got, want, strict=True):
        if w is None:
            continue
        assert g.dtype == jnp.float32, name
        assert_close(g, w)


def test_lengths_are_one_document_a_row_and_then_padding(implementation):
    query, key, value = map(jnp.asarray, draw((B, T, N, H), (B, T, K, H), (B, T, K, H)))
    call = functools.partial(attention, query, key, value, implementation=implementation)
    segments = np.asarray([[1] * 9 + [0] * (T - 9), [0] * T], np.int32)
    got = call(lengths=jnp.asarray([9, 0], jnp.int32))
    assert_close(got, attention_and_gradients(query, key, value, query, visible_keys(T, T, segments))[0])
    assert (np.asarray(got)[segments == 0] == 0).all()
    with pytest.raises(ValueError, match="lengths stand for the segments of self-attention: got segments too"):
        call(lengths=jnp.asarray([9, 0], jnp.int32), segment_ids=jnp.asarray(segments))
    with pytest.raises(ValueError, match=f"or T {T}, S {S}"):
        attention(query, key[:, :S], value[:, :S], lengths=jnp.asarray([3, 3], jnp.int32))


def test_window_may_be_traced(implementation):
    query, key, value = draw((B, T, N, H), (B, T, K, H), (B, T, K, H))

    @jax.jit
    def windowed(left, right):
        return attention(query, key, value, window=(left, right), implementation=implementation)

    query, key, value = map(jnp.asarray, (query, key, value))
    for window in ((0, 0), (3, 1), (T, T)):
        want = attention_and_gradients(query, key, value, query, visible_keys(T, T, window=window))[0]
        assert_close(windowed(*map(jnp.int32, window)), want)
    assert windowed._cache_size() == 1


# Row 1 1 1 2 2 2 0; a query's row shows the keys it sees.
GRIDS = {
    None: [
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ],
    (1, 1): [
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ],
    (2, 0): [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ],
}


@pytest.mark.parametrize("window", GRIDS)
def test_a_query_sees_the_keys_of_the_grid(implementation, window):
    """With equal logits and one-hot values, the output is each query's visible keys over their number."""
    grid = np.array(GRIDS[window])
    length = len(grid)
    query = jnp.zeros((1, length, 1, length))
    value = jnp.eye(length)[None, :, None]
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 0]], jnp.int32)
    out = attention(query, query, value, segment_ids=segments, window=window, implementation=implementation)
    np.testing.assert_allclose(out[0, :, 0], grid / np.maximum(grid.sum(1, keepdims=True), 1), rtol=1e-6)


def out_and_gradients_function(implementation, segments, window=None):
    @jax.jit
    def function(query, key, value, d_out):
        call = lambda *qkv: attention(  # noqa: E731
            *qkv, segment_ids=jnp.asarray(segments), window=window, implementation=implementation
        )
        out, vjp = jax.vjp(call, query, key, value)
        return out, *vjp(d_out)

    return function


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_document_neither_changes_nor_moves_another(implementation, dtype):
    """Bitwise, outputs and gradients, when everything about the other documents of the row changes."""
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)
    arrays, others = draw(*shapes, dtype=dtype), draw(*shapes, seed=1, dtype=dtype)
    mine = (SEGMENTS == 2)[..., None, None]
    mixed = [np.where(mine, a, 1000 * o) for a, o in zip(arrays, others, strict=True)]
    function = out_and_gradients_function(implementation, SEGMENTS)
    for before, after in zip(function(*arrays), function(*mixed), strict=True):
        before, after = np.asarray(before), np.asarray(after)
        np.testing.assert_array_equal(before[SEGMENTS == 2], after[SEGMENTS == 2])
        assert not np.array_equal(before[SEGMENTS == 1], after[SEGMENTS == 1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_document_has_the_same_bits_in_another_place_of_its_row(dtype):
    """Of `chunked` on a CPU, without gradients: rows of answers are packed at multiples of 8."""
    mine, others = (draw(*[(16, T, 12, 64)] * 3, seed=T, dtype=dtype) for T in (40, 128))
    function = jax.jit(lambda qkv, segments: attention(*qkv, segment_ids=segments, implementation="chunked"))
    found = []
    for start in (0, 8, 24, 80):
        place = (slice(None), slice(start, start + 40))
        segments = np.ones((16, 128), np.int32)
        segments[place] = 2
        row = [jnp.asarray(other).at[place].set(x) for x, other in zip(mine, others, strict=True)]
        found.append(np.asarray(function(row, segments)[place]))
    for out in found[1:]:
        np.testing.assert_array_equal(out, found[0])


@pytest.mark.parametrize("window", [None, (1, 2)])
def test_padding_comes_out_as_zeros_with_zero_gradients(implementation, window):
    query, key, value, d_out = (1e3 * x for x in draw((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)))
    for x in out_and_gradients_function(implementation, SEGMENTS, window)(query, key, value, d_out):
        assert np.isfinite(x).all()
        assert (np.asarray(x)[SEGMENTS == 0] == 0).all()


def test_a_row_of_padding_is_zeros(implementation):
    query, key, value, d_out = draw((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H))
    for x in out_and_gradients_function(implementation, np.zeros((B, T), np.int32))(query, key, value, d_out):
        assert (np.asarray(x) == 0).all()


def test_bfloat16_is_float32_rounded(implementation):
    arrays = draw((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H), dtype=jnp.bfloat16)
    function = out_and_gradients_function(implementation, SEGMENTS)
    low = function(*arrays)
    high = function(*(x.astype(np.float32) for x in arrays))
    for got, want in zip(low, high, strict=True):
        assert got.dtype == jnp.bfloat16 and want.dtype == jnp.float32
        assert_close(got, want, jnp.bfloat16, terms=1)


def test_float32_logits_may_be_huge(implementation):
    """exp never overflows: the softmax of one dominant logit is that key's value."""
    query = 1e4 * jnp.eye(T)[None, :, None]
    value = jnp.arange(T, dtype=jnp.float32)[None, :, None, None] * jnp.ones((1, T, 1, T))
    out = attention(query, query, value, implementation=implementation)
    np.testing.assert_array_equal(out, value)


def test_dropout_keeps_the_mean():
    rate, draws = 0.3, 500
    query, key, value = map(jnp.asarray, draw((1, 5, 2, 3), (1, 5, 2, 3), (1, 5, 2, 3)))
    call = lambda key_: attention(query, key, value, dropout_rate=rate, dropout_key=key_)  # noqa: E731
    outs = np.asarray(jax.jit(jax.vmap(call))(jax.random.split(jax.random.key(0), draws)), np.float64)
    whole = attention(query, key, value, dropout_rate=rate)
    assert outs.std(0).min() > 0
    assert (np.abs(outs.mean(0) - np.asarray(whole)) < 5 * outs.std(0) / draws**0.5).all()


def test_dropout_is_the_same_on_every_implementation(implementation):
    """Which probabilities are dropped follows from the key alone, so that outputs and gradients agree."""
    arrays = draw((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H))
    options = {"segment_ids": jnp.asarray(SEGMENTS), "dropout_rate": 0.4}

    @functools.partial(jax.jit, static_argnums=0)
    def out_and_gradients(name, query, key, value, d_out, dropout_key):
        call = lambda *qkv: attention(*qkv, **options, dropout_key=dropout_key, implementation=name)  # noqa: E731
        out, vjp = jax.vjp(call, query, key, value)
        return out, *vjp(d_out)

    key, other = jax.random.split(jax.random.key(5))
    outs = [out_and_gradients(name, *arrays, key) for name in (implementation, "reference")]
    for got, want in zip(*outs, strict=True):
        assert_close(got, want)
    assert not np.allclose(out_and_gradients(implementation, *arrays, other)[0], outs[0][0], atol=1e-2)


def test_everything_dropped_is_zeros(implementation):
    query, key = map(jnp.asarray, draw((B, T, N, H), (B, T, K, H)))
    out = attention(query, key, key, dropout_rate=1.0, dropout_key=jax.random.key(0), implementation=implementation)
    assert not out.any()


def test_inputs_that_cannot_be_served_say_why():
    q, k, cross = jnp.zeros((B, T, N, H)), jnp.zeros((B, T, K, H)), jnp.zeros((B, S, K, H))
    with pytest.raises(ValueError, match=rf"must divide query heads: got {K} for {N - 1}"):
        attention(q[:, :, 1:], k, k)
    with pytest.raises(ValueError, match=r"unknown attention implementation 'fast'; known are reference, chunked"):
        attention(q, k, k, implementation="fast")
    with pytest.raises(ValueError, match=rf"need key_segment_ids beside segment_ids: got T {T}, S {S}"):
        attention(q, cross, cross, segment_ids=jnp.asarray(SEGMENTS))
    with pytest.raises(ValueError, match=r"reaches at least 0 tokens to the left and right: got -1 and 2"):
        attention(q, k, k, window=(-1, 2))
    tables = rope_tables(jnp.zeros((B, T), jnp.int32), H + 1)
    with pytest.raises(ValueError, match=rf"by the same positions: got T {T}, S {S}"):
        attention(*(jnp.pad(x, ((0, 0),) * 3 + ((0, 1),)) for x in (q, cross, cross)), rope=tables)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_rope_turns_queries_and_keys_first(implementation):
    query, key, value = map(jnp.asarray, draw((B, T, N, H + 1), (B, T, K, H + 1), (B, T, K, H + 1)))
    tables = rope_tables(jnp.asarray(np.random.default_rng(0).integers(0, 99, (B, T)), jnp.int32), H + 1)
    turned = attention(apply_rope(query, tables), apply_rope(key, tables), value, implementation=implementation)
    got = attention(query, key, value, rope=tables, implementation=implementation)
    np.testing.assert_array_equal(got, turned)
    assert np.abs(got - attention(query, key, value, implementation=implementation)).max() > 0.1


def test_one_block_and_many_give_the_same(monkeypatch):
    query, key, value = map(jnp.asarray, draw((B, T, N, H), (B, T, K, H), (B, T, K, H)))
    outs = []
    for block in (512, T, KEY_BLOCK, 1):
        monkeypatch.setattr(chunked, "KEY_BLOCK", block)
        outs.append(attention(query, key, value, implementation="chunked"))
    for out in outs[1:]:
        assert_close(out, outs[0])


def test_blocks_without_a_document_in_common_are_not_visited(monkeypatch):
    """What is not a number there would not be multiplied away."""
    monkeypatch.setattr(chunked, "KEY_BLOCK", 4)
    monkeypatch.setattr(chunked, "QUERY_BLOCK", 4)
    segments = jnp.repeat(jnp.asarray([[1, 2, 3, 3, 0], [1, 1, 1, 1, 2]]), 4, axis=1)
    arrays = [jnp.asarray(x).at[0, 4:8].set(jnp.nan) for x in draw(*3 * [(2, 20, 2, H)])]
    out, vjp = jax.vjp(lambda *x: attention(*x, segment_ids=segments, implementation="chunked"), *arrays)
    for x in (out, *vjp(jnp.where(jnp.isnan(out), 0.0, 1.0))):
        np.testing.assert_array_equal(jnp.isnan(x).any((2, 3)), jnp.zeros((2, 20), bool).at[0, 4:8].set(True))


def test_a_rate_without_a_key_is_deterministic_on_every_implementation(implementation):
    query, key, value = map(jnp.asarray, draw((B, T, N, H), (B, T, K, H), (B, T, K, H)))
    calls = [attention(query, key, value, dropout_rate=r, implementation=implementation) for r in (0.0, 0.5)]
    np.testing.assert_array_equal(*calls)


def test_the_choice_is_logged_once(caplog):
    attention_module._log_choice.cache_clear()
    query = key = jnp.ones((1, 1025, 1, 1))
    with caplog.at_level(logging.INFO, logger=attention_module.__name__):
        for _ in range(2):
            attention(query, key, key)
    assert [r.getMessage() for r in caplog.records] == ["attention over rows of 1025 uses the 'chunked' implementation"]


@pytest.mark.parametrize(("name", "least", "most"), [("chunked", 1.0, 5.5), ("reference", 10.0, 100.0)])
def test_only_chunked_memory_is_linear_in_length(name, least, most):
    """Temporaries of forward and backward as compiled, for four times the length."""

    def temporary_bytes(length):
        array = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)
        segments = jax.ShapeDtypeStruct((1, length), jnp.int32)
        loss = lambda q, k, v, s: attention(q, k, v, segment_ids=s, implementation=name).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(array, array, array, segments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert least < temporary_bytes(8192) / temporary_bytes(2048) < most


def test_cost_is_linear_in_length_within_a_static_window():
    """Operations of forward and backward as compiled, a loop's body counted once: those of one block of queries."""

    def operations(length, window):
        array = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)
        loss = lambda q, k, v: attention(q, k, v, window=window, implementation="chunked").sum()  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(array, array, array)
        return _dot_operations(jaxpr.jaxpr)

    assert operations(8192, (64, 64)) == pytest.approx(4 * operations(2048, (64, 64)), rel=0.01)
    assert operations(8192, (64, 64)) < operations(8192, None) / 25


def _dot_operations(jaxpr):
    """Multiplications in matrix products, loops by their length."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            out, a = equation.outvars[0].aval, equation.invars[0].aval
            total += out.size * np.prod([a.shape[d] for d in contracted])
        times = equation.params.get("length", 1)
        if equation.primitive.name == "while":
            times = 16  # 8192 over blocks of 512; the loop over blocks of keys is the one with its bounds in arrays
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            total += times * _dot_operations(inner)
    return total
