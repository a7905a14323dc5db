"""Attention a tile at a time: online softmax over blocks of keys, and again in its own backward pass.

Memory is linear in length, and with a static window so is the cost: blocks of queries meet the keys that they can
see and no others. Nor do they meet blocks in which there is no document of theirs. (Rabe and Staats, arXiv 2112.05682;
Dao et al., arXiv 2205.14135, algorithm 4.)

Inside, b and h are the batch rows and key/value heads of a tile, Q the queries of a block and S its keys. Backward,
logits are made transposed, [b h S (G Q)], so that no product contracts the leading axis of a matrix: on CPUs those
run at a fifth of the others' speed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from flax_encoder.ops.attention.mesh import over_mesh
from flax_encoder.ops.attention.problem import MASKED, Problem, kept, visible
from flax_encoder.ops.platform import platform, precision

QUERY_BLOCK = 512
KEY_BLOCK = 512
FEWEST_QUERIES = 128  # with a narrow window: with fewer, products are too small
# Logits at once: 4 MB, which stay in a CPU's cache; on GPUs 1 GB, as each tile is some ten kernels to launch.
TILE = {"cpu": 2**20, "tpu": 2**20, "gpu": 2**28}


def refusal(problem: Problem) -> None:
    """Serves everything."""


class _Plan(NamedTuple):
    """How a problem is cut, and what of it is known as the program is traced."""

    scale: float
    dropout_rate: float
    window: tuple[int, int] | None
    lengths: tuple[int, int]
    row_places: tuple[int, int]
    """Of the whole problem, as `Problem` has them."""
    query_block: int
    key_block: int
    num_key_blocks: int
    """That a block of queries may see."""
    before: int
    """Keys of padding in front, so that a block of queries with a window reads from its own index on."""
    tile: tuple[int, int]

    @property
    def padded_lengths(self) -> tuple[int, int]:
        num_query_blocks = -(-self.lengths[0] // self.query_block)
        reach = self.num_key_blocks * self.key_block
        return num_query_blocks * self.query_block, self.stride * (num_query_blocks - 1) + reach

    @property
    def stride(self) -> int:
        """From the first key of one block of queries to the next's."""
        return 0 if self.window is None else self.query_block


def _plan(problem: Problem) -> _Plan:
    (B, T, N, _), (S, K) = problem.query.shape, problem.key.shape[1:3]
    window = problem.static_window
    # As many queries as a window is wide: with more most logits would be masked.
    query_block = min(T, QUERY_BLOCK if window is None else max(FEWEST_QUERIES, min(QUERY_BLOCK, sum(window))))
    reach = S if window is None else query_block + window[0] + window[1]
    if T != S or reach >= S:
        window, reach = None, S
    num_key_blocks = -(-reach // KEY_BLOCK)
    key_block = -(-reach // num_key_blocks)
    room = max(1, TILE[platform()] // (query_block * key_block * (N // K)))
    h = max(d for d in range(1, K + 1) if K % d == 0 and d <= room)
    # Rows that lie in one tile visit each other's blocks of keys.
    most_rows = 1 if num_key_blocks > 1 else max(1, room // K)
    b = max(d for d in range(1, B + 1) if B % d == 0 and d <= most_rows)
    before = 0 if window is None else window[0]
    return _Plan(
        problem.scale,
        problem.dropout_rate,
        window,
        (T, S),
        problem.row_places,
        query_block,
        key_block,
        num_key_blocks,
        before,
        (b, h),
    )


@over_mesh
def attend(problem: Problem) -> Float[Array, "B T N H"]:
    plan = _plan(problem)
    B, T, N, H = problem.query.shape
    K = problem.key.shape[2]
    query = jnp.moveaxis(problem.query.reshape(B, T, K, N // K, H), 1, 3)
    key, value = (jnp.moveaxis(x, 1, 2) for x in (problem.key, problem.value))
    bias = problem.bias
    if bias is not None:
        bias = bias.reshape(bias.shape[0], *((K, N // K) if bias.shape[1] == N else (1, 1)), *bias.shape[2:])
    window = None if plan.window or problem.window is None else tuple(jnp.asarray(w) for w in problem.window)
    context = _Context(
        problem.query_segments,
        problem.key_segments,
        window,
        problem.dropout_words,
        problem.first_row,
        problem.first_head,
        problem.first_query,
    )
    out = _chunked(query, key, value, bias, context, plan)
    return jnp.moveaxis(out, 3, 1).reshape(B, T, N, H)


class _Context(NamedTuple):
    """What has no gradient."""

    query_segments: Array | None
    key_segments: Array | None
    traced_window: tuple[Array, Array] | None
    dropout_words: Array | None
    first_row: Array | int
    first_head: Array | int
    first_query: Array | int


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _chunked(query, key, value, bias, context, plan):
    # Without gradients a document has the same bits in whatever column it begins. In bfloat16 it had not: AMX adds up
    # tiles of 32 keys, so that a document which crosses a tile's edge elsewhere is summed in another order.
    value = value.astype(jnp.float32) if platform() == "cpu" else value
    return _forward(query, key, value, bias, context, plan)[0]


def _forward(query, key, value, bias, context, plan: _Plan):
    tiles, bias_padded = _tiles(query, key, value, bias, context, plan)

    def tile(_, xs):
        where, query, key, value = xs
        at = _Place(plan, context, query.shape, where, bias_padded)
        H = query.shape[4]

        def query_block(_, i):
            q = _cut(query, i * plan.query_block, plan.query_block, 3)
            flat = q.reshape(*q.shape[:2], -1, H)

            def key_block(j, carry):
                out, top, total = carry
                k, v = (_cut(x, i * plan.stride + j * plan.key_block, plan.key_block, 2) for x in (key, value))
                logits = at.masked(_dot(flat, k, (3, 3)).reshape(*q.shape[:4], -1), i, j)
                # A query that sees nothing stays below this, and its weights vanish.
                new_top = jnp.maximum(jnp.maximum(top, logits.max(-1)), MASKED / 2)
                weights = jnp.exp(logits - new_top[..., None])
                shrink = jnp.exp(top - new_top)
                total = total * shrink + weights.sum(-1)
                weights = at.dropped(weights, i, j).astype(v.dtype)
                out = out * shrink[..., None] + _dot(weights.reshape(*flat.shape[:3], -1), v, (3, 2)).reshape(q.shape)
                return out, new_top, total

            carry = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:4], MASKED), jnp.zeros(q.shape[:4])
            out, top, total = _over_keys(key_block, carry, i, plan, where)
            total = jnp.maximum(total, 1e-30)
            out = out / (total * (1.0 - plan.dropout_rate))[..., None]
            return None, (out, top + jnp.log(total))

        _, (out, log_total) = _over(query_block, None, query.shape[3] // plan.query_block)
        return None, (_uncut(out), _uncut(log_total))

    _, (out, log_total) = _over(tile, None, tiles)
    T = query.shape[3]
    out = out.reshape(*query.shape[:3], -1, query.shape[4])[:, :, :, :T].astype(query.dtype)
    return out, (query, key, value, bias, context, out, log_total)


def _backward(plan: _Plan, residuals, d_out):
    query, key, value, bias, context, out, log_total = residuals
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    d_out = (d_out.astype(jnp.float32) / (1.0 - plan.dropout_rate)).astype(query.dtype)
    tiles, bias_padded = _tiles(query, key, value, bias, context, plan)
    d_out, delta = (_fold(_pad(x, 3, 0, plan.padded_lengths[0]), plan) for x in (d_out, delta))

    def tile(d_bias, xs):
        (where, query, key, value), d_out, delta, log_total = xs
        at = _Place(plan, context, query.shape, where, bias_padded, is_transposed=True)
        key_transposed = _row_major(jnp.swapaxes(key, 2, 3))
        b, h, G, _, H = query.shape

        def query_block(carry, i):
            q, d_o, d, log = (
                _cut(x, i * plan.query_block, plan.query_block, 3) for x in (query, d_out, delta, log_total)
            )
            shape = b, h, -1, G, plan.query_block
            flat_q, flat_d = (x.reshape(b, h, -1, H) for x in (q, d_o))

            def key_block(j, carry):
                d_query, d_key, d_value, d_bias = carry
                start = i * plan.stride + j * plan.key_block
                k, v = (_cut(x, start, plan.key_block, 2) for x in (key, value))
                k_transposed = _cut(key_transposed, start, plan.key_block, 3)
                weights = jnp.exp(at.masked(_dot(k, flat_q, (3, 3)).reshape(shape), i, j) - log[:, :, None])
                d_weights = at.dropped(_dot(v, flat_d, (3, 3)).reshape(shape), i, j)
                d_logits = weights * (d_weights - d[:, :, None])
                d_bias = None if bias is None else at.add_to_bias(d_bias, d_logits, i, j)
                weights = at.dropped(weights, i, j).astype(v.dtype).reshape(b, h, plan.key_block, -1)
                d_logits = d_logits.astype(k.dtype).reshape(weights.shape)
                d_query = d_query + _dot(k_transposed, d_logits, (3, 2))
                d_key = _add(d_key, _dot(d_logits, flat_q, (3, 2)), start, 2)
                d_value = _add(d_value, _dot(weights, flat_d, (3, 2)), start, 2)
                return d_query, d_key, d_value, d_bias

            d_query = jnp.zeros((b, h, H, G * plan.query_block), jnp.float32)
            d_query, *carry = _over_keys(key_block, (d_query, *carry), i, plan, where)
            d_query = plan.scale * jnp.swapaxes(d_query, 2, 3)
            return tuple(carry), d_query.reshape(q.shape)

        zeros = jnp.zeros(key.shape, jnp.float32)
        carry, d_query = _over(query_block, (zeros, zeros, d_bias), query.shape[3] // plan.query_block)
        d_key, d_value, d_bias = carry
        return d_bias, (_uncut(d_query), plan.scale * d_key, d_value)

    d_bias = None if bias is None else jnp.zeros(bias_padded.shape, jnp.float32)
    d_bias, (d_query, d_key, d_value) = _over(tile, d_bias, (tiles, d_out, delta, log_total))
    T, S = plan.lengths
    d_query = d_query.reshape(*query.shape[:3], -1, query.shape[4])[:, :, :, :T].astype(query.dtype)
    d_key, d_value = (
        x.reshape(*key.shape[:2], -1, key.shape[3])[:, :, plan.before : plan.before + S].astype(key.dtype)
        for x in (d_key, d_value)
    )
    if bias is not None:
        d_bias = d_bias[..., :T, plan.before : plan.before + S].astype(bias.dtype)
    return d_query, d_key, d_value, d_bias, None


_chunked.defvjp(_forward, _backward)


class _Where(NamedTuple):
    """A tile's first batch row and key/value head, and its rows' segments."""

    row: Array
    head: Array
    query_segments: Array | None
    key_segments: Array | None
    key_blocks: Array | None
    """First and last of those that each block of queries sees, [blocks of queries, 2]."""


class _Place:
    """What the logits of one tile take from where they are in the problem."""

    def __init__(self, plan: _Plan, context: _Context, shape, where: _Where, bias, is_transposed: bool = False):
        self.plan, self.context, self.bias, self.is_transposed = plan, context, bias, is_transposed
        self.where = where
        self.shape = shape[:3]

    def _as_query(self, x):
        """[b h G Q] beside the logits."""
        return x[:, :, None] if self.is_transposed else x[..., None]

    def _as_key(self, x):
        """[b S] beside the logits."""
        return x[:, None, :, None, None] if self.is_transposed else x[:, None, None, None]

    def _indices(self, i, j):
        """Of queries and keys in their rows, negative for padding."""
        plan = self.plan
        query_index = i * plan.query_block + jnp.arange(plan.query_block)
        key_index = i * plan.stride + j * plan.key_block - plan.before + jnp.arange(plan.key_block)
        return self._as_query(query_index[None, None, None]), self._as_key(key_index[None])

    def _bias_start(self, i, j):
        plan = self.plan
        first = self.where.row, self.where.head, 0
        start = [0 if size == 1 else f for size, f in zip(self.bias.shape, first, strict=False)]
        return *start, i * plan.query_block, i * plan.stride + j * plan.key_block

    def _bias_sizes(self):
        sizes = [1 if size == 1 else n for size, n in zip(self.bias.shape, self.shape, strict=False)]
        return *sizes, self.plan.query_block, self.plan.key_block

    def masked(self, products, i, j):
        """Logits."""
        plan, context = self.plan, self.context
        logits = plan.scale * products
        if self.bias is not None:
            bias = jax.lax.dynamic_slice(self.bias, self._bias_start(i, j), self._bias_sizes()).astype(jnp.float32)
            logits = logits + (jnp.moveaxis(bias, 4, 2) if self.is_transposed else bias)
        query_index, key_index = self._indices(i, j)
        segments = None, None
        if context.query_segments is not None:
            queries = _cut(self.where.query_segments, i * plan.query_block, plan.query_block, 1)
            keys = _cut(self.where.key_segments, i * plan.stride + j * plan.key_block, plan.key_block, 1)
            segments = self._as_query(queries[:, None, None]), self._as_key(keys)
        window = plan.window if context.traced_window is None else context.traced_window
        mask = visible(*segments, window, query_index, key_index)
        if segments[0] is None and plan.padded_lengths[1] != plan.lengths[1]:
            is_key = (key_index >= 0) & (key_index < plan.lengths[1])
            mask = is_key if mask is None else mask & is_key
        return logits if mask is None else jnp.where(mask, logits, MASKED)

    def dropped(self, x, i, j):
        """x where dropout keeps it, and else 0."""
        plan, (b, h, G) = self.plan, self.shape
        if self.context.dropout_words is None:
            return x
        batch = (self.context.first_row + self.where.row + jnp.arange(b))[:, None, None, None]
        head = self.context.first_head + (self.where.head + jnp.arange(h))[:, None] * G + jnp.arange(G)
        head = head[None, :, :, None]
        query_index, key_index = self._indices(i, j)
        places = self._as_query(batch), self._as_query(head), self.context.first_query + query_index, key_index
        keep = kept(self.context.dropout_words, plan.dropout_rate, plan.row_places, *places)
        return jnp.where(keep, x, 0.0)

    def add_to_bias(self, d_bias, d_logits, i, j):
        if self.is_transposed:
            d_logits = jnp.moveaxis(d_logits, 2, 4)
        axes = tuple(a for a in range(3) if self.bias.shape[a] == 1)
        start = self._bias_start(i, j)
        before = jax.lax.dynamic_slice(d_bias, start, self._bias_sizes())
        return jax.lax.dynamic_update_slice(d_bias, before + d_logits.sum(axes, keepdims=True), start)


def _tiles(query, key, value, bias, context: _Context, plan: _Plan):
    """(where each tile is, and its arrays, the leading axis that of tiles; the padded bias)."""
    T, S = plan.padded_lengths
    (B, K), (b, h) = key.shape[:2], plan.tile
    query = _fold(_pad(query, 3, 0, T), plan)
    key, value = (_fold(_pad(x, 2, plan.before, S), plan) for x in (key, value))
    if bias is not None:
        bias = _pad(_pad(bias, 3, 0, T), 4, plan.before, S)
    row, head = (x.reshape(-1) for x in jnp.meshgrid(jnp.arange(0, B, b), jnp.arange(0, K, h), indexing="ij"))
    segments = None, None, None
    if context.query_segments is not None:
        padded = _pad(context.query_segments, 1, 0, T), _pad(context.key_segments, 1, plan.before, S)
        padded = [x.reshape(-1, b, x.shape[1]) for x in padded]
        # Before the loop over tiles: found in it, they would be found for every logit.
        segments = (jnp.repeat(x, K // h, axis=0) for x in (*padded, _key_blocks(*padded, plan)))
    return (_Where(row, head, *segments), query, key, value), bias


def _key_blocks(query_segments, key_segments, plan: _Plan):
    """Of segments [R b T] and [R b S]: where the blocks of keys begin and end that blocks of queries see, [R blocks 2].

    Blocks without a document in common are not visited, which leaves every sum as it is, to the bit.
    """
    num_query_blocks = query_segments.shape[2] // plan.query_block
    starts = jnp.arange(num_query_blocks if plan.stride else 1)[:, None] * plan.stride
    index = (starts + jnp.arange(plan.num_key_blocks) * plan.key_block)[..., None] + jnp.arange(plan.key_block)
    queries = query_segments.reshape(*query_segments.shape[:2], num_query_blocks, 1, plan.query_block)
    (query_least, query_most), (key_least, key_most) = (_range(x) for x in (queries, key_segments[:, :, index]))
    is_seen = (query_least <= key_most) & (key_least <= query_most)
    first, behind = is_seen.argmax(-1), is_seen[..., ::-1].argmax(-1)
    return jnp.stack([first, jnp.where(is_seen.any(-1), plan.num_key_blocks - behind, first)], -1).astype(jnp.int32)


def _range(segments):
    """Least and most document of [R b blocks blocks tokens], over b and tokens."""
    is_token = segments > 0
    return jnp.where(is_token, segments, 2**30).min((1, 4)), jnp.where(is_token, segments, 0).max((1, 4))


def _fold(x, plan: _Plan):
    # b is 1 or h is all heads, so that a tile is contiguous.
    b, h = plan.tile
    return x.reshape(-1, b, h, *x.shape[2:])


def _uncut(blocks):
    """[blocks b h G Q ...] to [b h G T ...]."""
    blocks = jnp.moveaxis(blocks, 0, 3)
    return blocks.reshape(*blocks.shape[:3], -1, *blocks.shape[5:])


def _over(body, carry, xs):
    """lax.scan over arrays or a number of indices, without a loop where there is one."""
    xs = jnp.arange(xs) if isinstance(xs, int) else xs
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.scan(body, carry, xs)
    carry, y = body(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda x: x[None], y)


def _over_keys(body, carry, i, plan: _Plan, where: _Where):
    """`body` over the blocks of keys before a block of queries, but for those that it does not see."""
    if plan.num_key_blocks == 1:
        return body(0, carry)
    if where.key_blocks is not None:
        return jax.lax.fori_loop(where.key_blocks[i, 0], where.key_blocks[i, 1], body, carry)
    first = jnp.maximum(0, (plan.before - i * plan.stride) // plan.key_block)
    last = jnp.minimum(plan.num_key_blocks, -((i * plan.stride - plan.before - plan.lengths[1]) // plan.key_block))
    return jax.lax.fori_loop(first, last, body, carry)


def _cut(x, start, size: int, axis: int):
    return x if x.shape[axis] == size else jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _add(total, x, start, axis: int):
    if total.shape == x.shape:
        return total + x
    before = jax.lax.dynamic_slice_in_dim(total, start, x.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(total, before + x, start, axis)


def _pad(x, axis: int, before: int, length: int):
    widths = [(0, 0)] * x.ndim
    widths[axis] = before, length - before - x.shape[axis]
    return x if widths[axis] == (0, 0) else jnp.pad(x, widths)


def _dot(a, b, contract: tuple[int, int]):
    """[b h M K] by [b h K N] or [b h N K], float32."""
    batch = a.shape[:2]
    a, b = (_row_major(x.reshape(-1, *x.shape[2:])) for x in (a, b))
    dims = (contract[0] - 1,), (contract[1] - 1,)
    out = jax.lax.dot_general(a, b, (dims, ((0,), (0,))), precision=precision(a, b), preferred_element_type=jnp.float32)
    return _row_major(out).reshape(*batch, *out.shape[1:])


def _row_major(x):
    return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if platform() == "cpu" else x
