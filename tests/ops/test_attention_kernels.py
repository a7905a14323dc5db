"""attention's kernels: each is the reference where it serves, says why where it does not, and compiles for a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from benchmarks.cases import ATTENTION_CASES
from flax_encoder.ops.attention import CHOICES, IMPLEMENTATIONS, _choose, attention, cudnn, flash_kernel, rows_kernel
from flax_encoder.ops.attention.problem import Problem
from flax_encoder.ops.platform import platform_for_tracing
from flax_encoder.ops.position import rope_tables
from tests.ops.test_attention_op import assert_close, draw

B, T, N, H = 2, 256, 4, 64
SEGMENTS = np.repeat([[1, 2, 2, 0], [1, 1, 1, 3]], T // 4, axis=1).astype(np.int32)
SEGMENTS[0, 40:70] = 5

CASES = {
    "rows": {
        "segments": {},
        "one document a row": {"segment_ids": None},
        "window": {"window": (70, 3)},
        "one-sided window": {"window": (0, 20)},
        "rope": {"rope": True, "window": (33, 5)},
        "rope of narrow heads": {"rope": True, "heads": (8, 8, 32)},
        "rope of wide heads": {"rope": True, "heads": (1, 1, 256)},
        "rope in bfloat16": {"rope": True, "dtype": jnp.bfloat16},
        "dropout": {"dropout_rate": 0.3, "window": (9, 9)},
        "narrow heads": {"heads": (8, 8, 32), "dropout_rate": 0.3},
        "wide heads": {"heads": (2, 2, 128)},
        "bfloat16": {"dtype": jnp.bfloat16, "dropout_rate": 0.1},
    },
    "splash": {
        "segments": {},
        "one document a row": {"segment_ids": None},
        "window": {"window": (70, 3)},
        "grouped heads": {"heads": (4, 2, 64)},
        "rope": {"rope": True},
    },
    "flash": {
        "segments": {},
        "one document a row": {"segment_ids": None},
        "window": {"window": (70, 3)},
        "one-sided window": {"segment_ids": None, "window": (0, 20)},
        "traced window": {"window": (jnp.int32(33), jnp.int32(5))},
        "dropout": {"dropout_rate": 0.3, "window": (9, 9)},
        "grouped heads": {"heads": (4, 2, 64), "dropout_rate": 0.3},
        "narrow heads": {"heads": (2, 2, 16)},
        "wide heads": {"heads": (2, 1, 128), "dropout_rate": 0.1},
        "rope": {"rope": True},
        "float32": {"dtype": jnp.float32, "dropout_rate": 0.3},
        "float32, wide heads": {"dtype": jnp.float32, "heads": (2, 2, 128), "window": (70, 3)},
        "bias of heads": {"bias": (1, N), "window": (70, 3)},
        "bias of rows and grouped heads": {"bias": (B, 4), "heads": (4, 2, 64), "dtype": jnp.float32},
        "bias of all, and dropout": {"bias": (1, 1), "dropout_rate": 0.3, "segment_ids": None},
    },
}
PLATFORMS = {"rows": "tpu", "splash": "tpu", "flash": "gpu"}
EVERY = [(name, case) for name, cases in CASES.items() for case in cases]


def out_and_gradients(implementation, arrays, bias=None, **options):
    """Kernels run as plain XLA."""

    @jax.jit
    def function(query, key, value, d_out):
        def call(bias, *qkv):
            return attention(*qkv, bias=bias, implementation=implementation, **options)

        out, vjp = jax.vjp(call, bias, query, key, value)
        d_bias, *gradients = vjp(d_out)
        return out, *gradients, *jax.tree.leaves(d_bias)

    if implementation not in CASES:
        return function(*arrays)
    with platform_for_tracing(PLATFORMS[implementation], interpret_kernels=True):
        return function(*arrays)


def problem_of(case):
    options = {"segment_ids": jnp.asarray(SEGMENTS), "dropout_key": jax.random.key(4), **case}
    (n, k, h), dtype = options.pop("heads", (N, N, H)), options.pop("dtype", jnp.float32)
    if options.pop("rope", False):
        positions = np.random.default_rng(7).integers(0, 1000, (B, T))
        options["rope"] = rope_tables(jnp.asarray(positions, jnp.int32), h)
    if "bias" in options:
        options["bias"] = jnp.asarray(draw((*options["bias"], T, T), seed=5)[0])
    return draw((B, T, n, h), (B, T, k, h), (B, T, k, h), (B, T, n, h), dtype=dtype), dtype, options


@pytest.mark.parametrize(("implementation", "case"), EVERY)
def test_kernels_and_gradients_equal_the_reference(implementation, case):
    given = {"dtype": jnp.bfloat16} if implementation == "flash" else {}
    arrays, dtype, options = problem_of(given | CASES[implementation][case])
    got = out_and_gradients(implementation, arrays, **options)
    want = out_and_gradients("reference", [x.astype(np.float32) for x in arrays], **options)
    for name, g, w in zip(("out", "d_query", "d_key", "d_value", "d_bias")[: len(want)], got, want, strict=True):
        assert g.dtype == (jnp.float32 if name == "d_bias" else dtype), name
        # Probabilities and their gradients are rounded to the operands' dtype before the second products.
        assert_close(g, w, dtype, terms=T if dtype == jnp.float32 else 4)


def test_flash_takes_keys_of_their_own():
    """A decoder's, of another length, some of them of documents that no query is of, and queries that see none."""
    S = T // 2
    arrays = draw((B, T, 4, 32), (B, S, 2, 32), (B, S, 2, 32), (B, T, 4, 32), dtype=jnp.bfloat16)
    keys = np.repeat([[1, 5, 2, 0], [3, 4, 4, 4]], S // 4, axis=1).astype(np.int32)
    options = {"segment_ids": jnp.asarray(SEGMENTS), "key_segment_ids": jnp.asarray(keys)}
    got, want = (out_and_gradients(name, arrays, **options) for name in ("flash", "reference"))
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, jnp.bfloat16, terms=4)
    assert (np.asarray(got[0])[1, SEGMENTS[1] == 1] == 0).all()


CUDNN_CASES = {
    "one document a row": {"segment_ids": None},
    "segments": {},
    "lengths": {"segment_ids": None, "lengths": jnp.asarray([T // 2, T], jnp.int32)},
    "lengths and one-sided window": {"segment_ids": None, "lengths": jnp.asarray([0, 99], jnp.int32), "window": (9, 0)},
    "segments and window": {"window": (70, 3)},
    "segments and one-sided window": {"window": (20, 0)},
    "one-sided window": {"segment_ids": None, "window": (20, 0)},
    "window": {"segment_ids": None, "window": (0, 20)},
    "bias": {"segment_ids": None, "bias": (1, N)},
    "segments and bias": {"bias": (B, 1)},
    "grouped heads and rope": {"heads": (4, 2, 64), "rope": True},
}


@pytest.fixture
def plain_cudnn(monkeypatch):
    """JAX's own plain version of the same call; cuDNN itself needs a GPU."""
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("case", CUDNN_CASES)
def test_what_cudnn_is_asked_is_the_reference(case, plain_cudnn):
    arrays, _, options = problem_of({"dtype": jnp.bfloat16, **CUDNN_CASES[case]})
    bias = options.pop("bias", None)
    bias = None if bias is None else np.asarray(bias.astype(jnp.bfloat16))

    def passes(implementation, bias, *arrays):
        def call(bias, *qkv):
            return attention(*qkv, bias=bias, implementation=implementation, **options)

        out, vjp = jax.vjp(call, bias, *arrays[:3])
        return out, *jax.tree.leaves(vjp(arrays[3]))

    want = passes("reference", *jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (bias, *arrays)))
    with platform_for_tracing("gpu"):
        got = passes("cudnn", *jax.tree.map(jnp.asarray, (bias, *arrays)))
    for g, w in zip(got, want, strict=True):
        assert g.dtype == jnp.bfloat16
        assert_close(g, w, jnp.bfloat16, terms=4)


def test_documents_do_not_meet_in_what_cudnn_is_asked(plain_cudnn):
    arrays, _, options = problem_of({"dtype": jnp.bfloat16})
    mine = (SEGMENTS == 2)[..., None, None]
    mixed = [np.where(mine, a, 1000 * o) for a, o in zip(arrays, draw(*(x.shape for x in arrays), seed=1), strict=True)]
    with platform_for_tracing("gpu"):
        both = [out_and_gradients("cudnn", [x.astype(jnp.bfloat16) for x in a], **options) for a in (arrays, mixed)]
    for before, after in zip(*both, strict=True):
        np.testing.assert_array_equal(np.asarray(before)[SEGMENTS == 2], np.asarray(after)[SEGMENTS == 2])
        assert (np.asarray(after)[SEGMENTS == 0] == 0).all()


def in_stretches(monkeypatch):
    """Rows of T are cut as long ones are: into programs of 128 queries, which meet 128, 192 or 256 keys if packed."""
    for name, value in {"_MOST_LOGITS": 1, "_QUERIES": 128, "_SHORTEST": 128}.items():
        monkeypatch.setattr(rows_kernel, name, value)
    plan = rows_kernel.Plan(1.0, 0.0, None, N, H, True, True)
    assert rows_kernel._cut(plan, T) == (128, 128, T, 0, (128, 192, 256))


@pytest.mark.parametrize("case", CASES["rows"])
def test_a_row_in_several_programs_gives_the_same(case, monkeypatch):
    """But for the order of sums: blocks of queries are smaller, and meet other keys that a window or documents mask."""
    arrays, dtype, options = problem_of(CASES["rows"][case])
    whole = out_and_gradients("rows", arrays, **options)
    in_stretches(monkeypatch)
    for got, want in zip(out_and_gradients("rows", arrays, **options), whole, strict=True):
        assert_close(got, want, dtype, terms=T if dtype == jnp.float32 else 4)


@pytest.mark.parametrize("lengths", [(64,) * 16, (1, 300, 500, 90), (1024,), (0,), (129, 0, 700)])
def test_a_part_of_a_row_meets_the_shortest_stretch_of_keys_with_its_documents(lengths):
    queries, stretches, T = 128, (256, 512, 1024), 1024
    row = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)])
    row = np.pad(row, (0, T - len(row)))[None].astype(np.int32)
    start, which = np.moveaxis(np.asarray(rows_kernel.reach(row, row, queries, stretches)), 2, 0)
    sees = ((row[:, :, None] == row[:, None]) & (row > 0)[:, :, None]).reshape(1, -1, queries, T).any(2)
    for part in range(T // queries):
        places = np.flatnonzero(sees[0, part])
        first, size = start[0, part], stretches[which[0, part]]
        assert first % 128 == 0 and 0 <= first <= T - size
        if len(places):
            assert first <= places[0] and places[-1] < first + size
        whole = places[-1] + 1 - places[0] // 128 * 128 if len(places) else 0
        assert size == min(s for s in stretches if s >= whole)


@pytest.mark.parametrize("window", [None, (40, 9)])
@pytest.mark.parametrize("lengths", [(64,) * 16, (1, 300, 500, 90), (1024,), (0,), (129, 0, 700)])
def test_a_tile_meets_all_tiles_that_its_tokens_see_and_no_more_than_it_must(lengths, window):
    own, other, T = 128, 64, 1024
    row = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)])
    row = np.pad(row, (0, T - len(row)))[None].astype(np.int32)
    met = np.asarray(flash_kernel.tiles_met(row, row, window, own, other, (1, T, T)))[0]
    sees = (row[0, :, None] == row[0]) & (row[0] > 0)[:, None]
    if window is not None:
        offset = np.arange(T) - np.arange(T)[:, None]
        sees &= (offset >= -window[0]) & (offset <= window[1])
    sees = sees.reshape(T // own, own, T // other, other).any((1, 3))
    for (first, stop), tiles in zip(met, sees, strict=True):
        found = np.flatnonzero(tiles)
        if len(found):
            assert first <= found[0] and found[-1] < stop
        if window is None:  # and exactly these, where it is the segments that say
            assert stop - first == len(found) or (not len(found) and stop <= first)


SMALL = [name for name, case in ATTENTION_CASES.items() if case.is_small]


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name not in ("reference", "cudnn")])
@pytest.mark.parametrize("case", SMALL)
def test_named_shapes_equal_the_reference_or_are_refused(name, case):
    case = ATTENTION_CASES[case]
    heads = case.N, case.K, case.K, case.N
    arrays = draw(*((case.B, case.T, n, case.H) for n in heads))
    options = {"segment_ids": jnp.asarray(case.segment_ids()), "window": case.window}
    if case.bias:
        options["bias"] = jnp.asarray(draw((*case.bias, case.T, case.T))[0])
    if case.dropout_rate:
        options |= {"dropout_rate": case.dropout_rate, "dropout_key": jax.random.key(2)}
    try:
        got = out_and_gradients(name, arrays, **options)
    except ValueError as error:
        assert name in CASES and f"{name!r} cannot serve" in str(error)
        return
    want = out_and_gradients("reference", arrays, **options)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, g.dtype, terms=case.T if g.dtype == jnp.float32 else 4)


@pytest.mark.parametrize("implementation", [*CASES, "rows in stretches"])
def test_a_document_neither_changes_nor_moves_another(implementation, monkeypatch):
    if implementation == "rows in stretches":
        implementation = "rows"
        in_stretches(monkeypatch)
    arrays, _, options = problem_of({})
    others = draw(*(x.shape for x in arrays), seed=1)
    mine = (SEGMENTS == 2)[..., None, None]
    mixed = [np.where(mine, a, 1000 * o) for a, o in zip(arrays, others, strict=True)]
    for before, after in zip(*(out_and_gradients(implementation, a, **options) for a in (arrays, mixed)), strict=True):
        before, after = np.asarray(before), np.asarray(after)
        np.testing.assert_array_equal(before[SEGMENTS == 2], after[SEGMENTS == 2])
        assert not np.array_equal(before[SEGMENTS == 1], after[SEGMENTS == 1])


@pytest.mark.parametrize("implementation", CASES)
def test_padding_comes_out_as_zeros_with_zero_gradients(implementation):
    arrays, _, options = problem_of({"window": (100, 100)})
    for x in out_and_gradients(implementation, [1e3 * a for a in arrays], **options):
        assert np.isfinite(x).all()
        assert (np.asarray(x)[SEGMENTS == 0] == 0).all()


@pytest.mark.parametrize("implementation", [*CASES, "chunked"])
def test_sharded_equals_single_device(implementation):
    """Rows over data and fsdp, heads over tensor; with dropout, which follows from the place in the whole problem."""
    rate = 0.0 if implementation == "splash" else 0.2
    arrays, _, options = problem_of({"dropout_rate": rate, "heads": (4, 4, 64), "rope": True})
    arrays, segments = [np.concatenate([x, x[::-1]]) for x in arrays], np.concatenate([SEGMENTS, SEGMENTS[::-1]])
    options["segment_ids"] = jnp.asarray(segments)
    options["rope"] = tuple(jnp.concatenate([x, x[::-1]]) for x in options["rope"])
    want = out_and_gradients(implementation, arrays, **options)
    with jax.set_mesh(jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)):
        got = out_and_gradients(implementation, arrays, **options)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(g, np.float32), np.asarray(w, np.float32), rtol=0, atol=1e-6)


def test_the_choice_is_made_for_the_heads_of_one_device():
    """Twelve heads of 64 fill a TPU's lanes; three, as four devices have them, do not."""
    whole = problem(heads=(12, 12, 64))
    with platform_for_tracing("tpu", interpret_kernels=True):
        assert _choose(whole) == "rows"
        with jax.set_mesh(jax.make_mesh((4,), ("tensor",), (AxisType.Auto,))):
            assert "3 of 64 on a device" in str(IMPLEMENTATIONS["rows"].refusal(whole))
            assert _choose(whole) == "splash"
            assert jax.eval_shape(lambda x: attention(x, x, x), whole.query).shape == whole.query.shape


def test_lengths_are_split_over_a_mesh():
    arrays, _, options = problem_of({"segment_ids": None, "lengths": jnp.asarray([T, 70], jnp.int32)})
    want = out_and_gradients("chunked", arrays, **options)
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"), (AxisType.Auto,) * 2)):
        got = out_and_gradients("chunked", arrays, **options)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-6)


def problem(T=T, S=None, heads=(N, N, H), dtype=jnp.bfloat16, **options):
    """As `attention` makes it, of zeros."""
    n, k, h = heads
    query, key = jnp.zeros((1, T, n, h), dtype), jnp.zeros((1, S or T, k, h), dtype)
    whole = Problem(query, key, key, None, None, None, None, 1.0, 0.0, None, n)
    return whole._replace(**options)


ONES, TRACED = jnp.ones((1, T), jnp.int32), (jnp.int32(1), jnp.int32(1))
BIAS, WORDS = jnp.zeros((1, 1, T, T)), jnp.zeros(2, jnp.uint32)
REFUSALS = [
    ("rows", "tpu", {"bias": BIAS}, "adds no bias: got one of shape"),
    ("rows", "tpu", {"window": TRACED}, "must be two Python ints: got traced"),
    ("rows", "tpu", {"heads": (4, 2, 64)}, "needs a key/value head: got 2 for 4; 'splash'"),
    ("rows", "tpu", {"T": 16384}, "at most 8192: got 16384 and 16384"),
    ("rows", "tpu", {"T": 8192, "heads": (1, 1, 256)}, "at most 4096: got 8192"),
    ("rows", "tpu", {"T": 200}, "a multiple of 128 and at most 8192: got 200"),
    ("rows", "tpu", {"heads": (4, 4, 48)}, "must fill 128 lanes: got 4 of 48"),
    ("rows", "tpu", {"heads": (3, 3, 64)}, "must fill 128 lanes: got 3 of 64"),
    ("rows", "cpu", {}, "for TPUs: got cpu"),
    ("splash", "tpu", {"bias": BIAS}, "adds no bias"),
    ("splash", "tpu", {"dropout_words": WORDS, "dropout_rate": 0.1}, "no dropout: got 0.1"),
    ("splash", "tpu", {"window": TRACED}, "two Python ints"),
    ("splash", "tpu", {"S": 128}, "as many, a multiple of 128: got 256 and 128"),
    ("splash", "tpu", {"query_segments": ONES, "key_segments": ONES + 0}, "the queries' own tokens"),
    ("splash", "gpu", {}, "for TPUs: got gpu"),
    ("flash", "tpu", {}, "for GPUs: got tpu"),
    ("flash", "gpu", {"T": 200}, "a multiple of 16: got 200 and 200"),
    ("flash", "gpu", {"heads": (2, 2, 48)}, "a power of two from 16 to 128: got 48"),
    ("cudnn", "tpu", {}, "for NVIDIA GPUs: got tpu"),
    ("cudnn", "gpu", {"dtype": jnp.float32}, "bfloat16 or float16: got float32"),
    ("cudnn", "gpu", {"heads": (2, 2, 20)}, "multiple of 8 and at most 128: got 20"),
    ("cudnn", "gpu", {"T": 31, "window": (3, 1)}, "even lengths: got 31 and 31"),
    ("cudnn", "gpu", {"bias": BIAS}, "query's dtype: got float32 for bfloat16"),
    ("cudnn", "gpu", {"dropout_words": WORDS, "dropout_rate": 0.1}, "a mask of its own: got 0.1"),
]


@pytest.mark.parametrize(("name", "platform", "options", "reason"), REFUSALS)
def test_what_cannot_be_served_is_refused_with_the_reason(name, platform, options, reason):
    with platform_for_tracing(platform):
        refusal = IMPLEMENTATIONS[name].refusal(problem(**options))
    assert refusal is not None
    with pytest.raises(ValueError, match=reason):
        raise ValueError(str(refusal))


def test_a_refusal_names_the_implementation():
    query = jnp.zeros((1, T, N, H))
    with pytest.raises(ValueError, match=r"attention implementation 'rows' cannot serve: it is a kernel for TPUs: got"):
        attention(query, query, query, implementation="rows")


@pytest.mark.parametrize(
    ("platform", "options", "name"),
    [
        ("cpu", {}, "chunked"),
        ("tpu", {}, "rows"),
        ("tpu", {"dropout_words": WORDS, "dropout_rate": 0.1}, "rows"),
        ("tpu", {"heads": (4, 2, 64)}, "splash"),
        ("tpu", {"T": 8192}, "rows"),
        ("tpu", {"T": 16384}, "splash"),
        ("tpu", {"T": 16384, "dropout_words": WORDS, "dropout_rate": 0.1}, "chunked"),
        ("tpu", {"bias": BIAS}, "reference"),
        ("gpu", {}, "flash"),
        ("gpu", {"query_segments": ONES, "key_segments": ONES, "window": TRACED}, "flash"),
        ("gpu", {"dropout_words": WORDS, "dropout_rate": 0.1}, "flash"),
        ("gpu", {"bias": BIAS}, "flash"),
        ("gpu", {"T": 2048, "dtype": jnp.float32}, "flash"),
        ("gpu", {"heads": (2, 2, 48)}, "cudnn"),
        ("gpu", {"T": 200, "dropout_words": WORDS, "dropout_rate": 0.1}, "reference"),
        ("gpu", {"T": 2056, "dtype": jnp.float32}, "chunked"),
    ],
)
def test_the_choice_is_the_first_that_can_serve(platform, options, name):
    with platform_for_tracing(platform):
        assert _choose(problem(**options)) == name


def test_every_platform_has_a_choice_that_serves_everything():
    for choices in CHOICES.values():
        assert choices[-1] == ("chunked", float("inf"))


@pytest.mark.parametrize(
    ("implementation", "T", "options"),
    [
        ("rows", 128, {}),
        ("rows", 512, {"dropout_rate": 0.1}),
        ("rows", 1024, {"dropout_rate": 0.1, "window": (64, 64), "rope": True}),
        ("rows", 8192, {"rope": True}),
        ("splash", 8192, {"window": (64, 64)}),
    ],
)
def test_kernels_compile_for_a_tpu(implementation, T, options, monkeypatch):
    """And `rows` with no copy of a large array around it."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    array = jax.ShapeDtypeStruct((2, T, 12 * 64), jnp.bfloat16, sharding=place)
    segments = jax.ShapeDtypeStruct((2, T), jnp.int32, sharding=place)

    options = dict(options)
    has_rope = options.pop("rope", False)

    def loss(query, key, value, segments):
        rope = rope_tables(segments, 64) if has_rope else None
        heads = (x.reshape(*x.shape[:2], 12, 64) for x in (query, key, value))
        out = attention(
            *heads,
            segment_ids=segments,
            rope=rope,
            dropout_key=jax.random.key(0),
            implementation=implementation,
            **options,
        )
        return out.astype(jnp.float32).sum()

    with platform_for_tracing("tpu"):
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(array, array, array, segments).compile()
    text = compiled.as_text()
    assert "tpu_custom_call" in text
    if implementation == "rows":
        assert not [line for line in text.splitlines() if f"bf16[2,{T},768]" in line and " copy(" in line]
