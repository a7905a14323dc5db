"""What Optax lacks: parameters that lie in one array updated each by itself, StableAdamW, Muon, SOAP, schedule-free,
averages.

`axes` is always the tree of logical axes of all parameters (training/sharding.py); a transformation may be given some
of them only, as within `optax.partition`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from flax_encoder.ops.linear import linear
from flax_encoder.ops.mesh import is_spread
from flax_encoder.ops.platform import platform
from flax_encoder.ops.sums import sum_over

Axes = tuple[str, ...]

# Along these axes of a layer's array lie parameters that only share its storage.
_SIDE_BY_SIDE = ("layers", "directions", "gates")


def _own_axes(names: Axes) -> tuple[int, ...]:
    """The axes within one parameter."""
    is_stacked = names[:1] == ("layers",)
    return tuple(i for i, name in enumerate(names) if not (is_stacked and name in _SIDE_BY_SIDE))


def matrix_axes(names: Axes) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The (input axes, output axes) of a layer's kernel, each layer's a matrix by itself; None for all else.

    A kernel maps `embed` to other axes, or other axes to `embed` or `features`. Embeddings, heads, norms and biases
    are no such map.
    """
    own = _own_axes(names)
    if names[:1] != ("layers",) or len(own) < 2:
        return None
    if names[own[0]] == "embed":
        return own[:1], own[1:]
    return (own[:-1], own[-1:]) if names[own[-1]] in ("embed", "features") else None


def _separate(names: Axes, x: Array) -> Array:
    """[S, ...]: the S parameters that an array holds, kernels as matrices [S, inputs, outputs]."""
    own = _own_axes(names)
    shape = [x.shape[i] for i in own]
    if (matrix := matrix_axes(names)) is not None:
        shape = [math.prod(x.shape[i] for i in axes) for axes in matrix]
    beside = [i for i in range(x.ndim) if i not in own]
    return x.transpose(*beside, *own).reshape(-1, *shape)


def _join(names: Axes, y: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_separate`, back to an array of this shape."""
    own = _own_axes(names)
    order = [i for i in range(len(shape)) if i not in own] + list(own)
    inverse = sorted(range(len(shape)), key=order.__getitem__)
    return y.reshape([shape[i] for i in order]).transpose(inverse)


def like(params: Any, values: Any) -> Any:
    """`values`, a tree like all parameters, at the paths that `params` has: a partition sees some of them only."""

    def at(path, _):
        value = values
        for key in path:
            value = value[key.key]
        return value

    return jax.tree_util.tree_map_with_path(at, params)


def _unzip(tree: Any, results: Any, count: int) -> tuple[Any, ...]:
    """A tree of tuples as a tuple of trees."""
    return tuple(jax.tree.map(lambda _, result, i=i: result[i], tree, results) for i in range(count))


def each_parameter(tx: optax.GradientTransformation, axes: Any) -> optax.GradientTransformation:
    """`tx` on each parameter by itself: a stacked array [L, ...] is updated as L separate ones would be.

    For what takes norms or factors of a whole array. Kernels come to `tx` as matrices [inputs, outputs].
    """

    def init(params):
        return jax.tree.map(lambda p, names: jax.vmap(tx.init)(_separate(names, p)), params, like(params, axes))

    def update(updates, state, params=None):
        def one(u, s, p, names):
            new, s = jax.vmap(tx.update)(_separate(names, u), s, _separate(names, p))
            return _join(names, new, u.shape), s

        return _unzip(updates, jax.tree.map(one, updates, state, params, like(updates, axes)), 2)

    return optax.GradientTransformation(init, update)


def global_norm(tree: Any) -> Float[Array, ""]:
    """The root of the sum of squares of all arrays, float32."""
    squares = (sum_over(jnp.square(x), tuple(range(x.ndim))).reshape(()) for x in jax.tree.leaves(tree))
    return jnp.sqrt(sum(squares, jnp.zeros(())))


def clip_by_global_norm(norm: float) -> optax.GradientTransformation:
    """Optax's, by the norm above, which the step reports too: it is computed once."""

    def update(updates, state, params=None):
        scale = jnp.minimum(1.0, norm / jnp.maximum(global_norm(updates), jnp.finfo(jnp.float32).tiny))
        return jax.tree.map(lambda u: u * scale, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def scale_by_trust_ratio(axes: Any) -> optax.GradientTransformation:
    """LAMB's last step (You et al., arXiv 1904.00962, algorithm 2): each parameter's update takes that one's norm.

    Where either norm is 0 the update stays as it is. (Optax's sums are slow on CPUs.)
    """

    def update(updates, state, params=None):
        def one(u, p, names):
            of_params, of_updates = (jnp.sqrt(sum_over(jnp.square(x), _own_axes(names))) for x in (p, u))
            is_zero = (of_params == 0) | (of_updates == 0)
            return u * jnp.where(is_zero, 1.0, of_params / jnp.where(is_zero, 1.0, of_updates))

        return jax.tree.map(one, updates, params, like(params, axes)), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def scale_by_stable_adam(
    b1: float, b2: float, eps: float, weight_decay: float, mask: Callable[[Any], Any], axes: Any
) -> optax.GradientTransformation:
    """StableAdamW's update (Wortsman et al., arXiv 2304.13013, algorithm 2), up to the learning rate.

    AdamW's, its decay too, divided for each parameter by max(1, RMS(g / max(sqrt(v), eps))), v the debiased second
    moment: a gradient that the second moment has not foreseen moves the parameter less.
    """
    adamw = optax.chain(optax.scale_by_adam(b1, b2, eps), optax.add_decayed_weights(weight_decay, mask))

    def update(grads, state, params=None):
        updates, state = adamw.update(grads, state, params)
        second = optax.tree.bias_correction(state[0].nu, b2, state[0].count)

        def clip(u, g, v, names):
            own = _own_axes(names)
            squares = sum_over(g**2 / jnp.maximum(v, eps**2), own) / math.prod(g.shape[i] for i in own)
            return u / jnp.maximum(1.0, jnp.sqrt(squares))

        return jax.tree.map(clip, updates, grads, second, like(updates, axes)), state

    return optax.GradientTransformation(adamw.init, update)


def scale_by_muon(beta: float, eps: float, dtype: str, axes: Any) -> optax.GradientTransformation:
    """Muon's update of matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon), up to the learning rate.

    Nesterov momentum, orthogonalised, times sqrt(max(1, outputs / inputs)). (Optax's debiases its momentum, which the
    authors' does not, and multiplies in float32.)
    """

    def update(grads, state, params=None):
        mu = optax.tree.update_moment(grads, state, beta, 1)

        def one(g, m, names):
            matrices = _separate(names, (1 - beta) * g + beta * m)
            _, inputs, outputs = matrices.shape
            return _join(names, orthogonalized(matrices, eps, dtype) * max(1.0, outputs / inputs) ** 0.5, g.shape)

        return jax.tree.map(one, grads, mu, like(grads, axes)), mu

    return optax.GradientTransformation(optax.tree.zeros_like, update)


_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a x + b x^3 + c x^5, which is done five times
_WIDE = 3  # columns a row, from where on products of Gram matrices are fewer


def orthogonalized(x: Float[Array, "S m n"], eps: float, dtype: str = "float32") -> Float[Array, "S m n"]:
    """Each matrix with its singular values brought near 1 (0.7 to 1.2) by five Newton-Schulz steps (Jordan et al.).

    Operands of the products are rounded to `dtype`; sums and result are float32. The authors' are bfloat16.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalized(x.mT, eps, dtype).mT
    is_wide = dtype == "float32" and x.shape[2] >= _WIDE * x.shape[1]

    def one(x):
        x = x / (jnp.linalg.norm(x) + eps)
        return _steps_on_gram(x) if is_wide else _steps(x, dtype)

    if platform() != "cpu" or is_spread():
        return jax.vmap(one)(x)
    # XLA:CPU takes its quick path for bfloat16 only with plain matrices (ops/linear.py), and what was transposed is
    # otherwise transposed again for each product.
    x = with_layout_constraint(x, Layout((0, 1, 2)))
    return jax.lax.scan(lambda _, matrix: (None, one(matrix)), None, x, unroll=min(len(x), 4))[1]


def _steps(x: Float[Array, "m n"], dtype: str) -> Float[Array, "m n"]:
    a, b, c = _NEWTON_SCHULZ
    for _ in range(5):
        gram = linear(x, x, contract_last=True, dtype=dtype)
        x = a * x + linear(b * gram + c * linear(gram, gram, dtype=dtype), x, dtype=dtype)
    return x


def _steps_on_gram(x: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """`_steps` in float32, with two products of m x n matrices instead of ten.

    A step multiplies x from the left by p(G), a polynomial of G = x x^T, and so makes p(G) G p(G) of G: all of these
    are m x m and commute. In bfloat16 G would not hold the small singular values, which are squared there.
    """
    a, b, c = _NEWTON_SCHULZ
    gram = linear(x, x, contract_last=True)
    factor = jnp.eye(len(x))
    for step in range(5):
        p = b * gram + c * linear(gram, gram)  # without its a I
        factor = a * factor + (linear(p, factor) if step else p)
        if step < 4:
            half = a * gram + linear(p, gram)
            gram = a * half + linear(half, p)
    return linear(factor, x)


class SoapState(NamedTuple):
    """`mu` is the mean gradient, `nu` the mean square in the eigenbases; the others are [S, inputs, inputs] and
    [S, outputs, outputs] for a kernel of S matrices."""

    count: Int[Array, ""]
    mu: Any
    nu: Any
    left: Any
    right: Any
    left_basis: Any
    right_basis: Any


def scale_by_soap(b1: float, b2: float, eps: float, every: int, axes: Any) -> optax.GradientTransformation:
    """SOAP's update of matrices (Vyas et al., arXiv 2409.11321, algorithm 3), up to the learning rate.

    Adam in the eigenbases of the mean G G^T and G^T G of each matrix. The first update finds the bases and moves
    nothing; each `every`-th goes one step of the power method and a QR decomposition on. Products are float32.
    """

    def product(spec, *operands):
        return jnp.einsum(spec, *operands, precision=jax.lax.Precision.HIGHEST)

    def init(params):
        def squares(side):
            def zeros(p, names):
                S, *sizes = jax.eval_shape(lambda: _separate(names, p)).shape
                return jnp.zeros((S, sizes[side], sizes[side]), p.dtype)

            return jax.tree.map(zeros, params, like(params, axes))

        zeros = optax.tree.zeros_like
        grams = squares(0), squares(1)
        return SoapState(jnp.zeros((), jnp.int32), zeros(params), zeros(params), *grams, *map(zeros, grams))

    def update(grads, state, params=None):
        is_first = state.count == 0
        names = like(grads, axes)
        separate = lambda tree: jax.tree.map(lambda x, n: _separate(n, x), tree, names)  # noqa: E731
        join = lambda tree: jax.tree.map(lambda y, g, n: _join(n, y, g.shape), tree, grads, names)  # noqa: E731
        turn = lambda x, a, b: product("sim,sij,sjn->smn", a, x, b)  # noqa: E731
        turn_back = lambda x, a, b: product("smi,sij,snj->smn", a, x, b)  # noqa: E731
        bases = state.left_basis, state.right_basis

        matrices = separate(grads)
        turned = jax.tree.map(turn, matrices, *bases)
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment(join(turned), state.nu, b2, 2)
        mu, nu = (jax.tree.map(lambda x: jnp.where(is_first, 0.0, x), moment) for moment in (mu, nu))
        t = jnp.maximum(state.count, 1)
        means = jax.tree.map(turn, separate(optax.tree.bias_correction(mu, b1, t)), *bases)
        squares = separate(optax.tree.bias_correction(nu, b2, t))
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), means, squares)
        updates = join(jax.tree.map(turn_back, updates, *bases))

        average = lambda mean, new: b2 * mean + (1 - b2) * new  # noqa: E731
        left = jax.tree.map(lambda c, g: average(c, product("smn,skn->smk", g, g)), state.left, matrices)
        right = jax.tree.map(lambda c, g: average(c, product("smn,smk->snk", g, g)), state.right, matrices)
        grams = left, right

        def refreshed(gram, basis):
            return jnp.linalg.qr(product("smk,skn->smn", gram, basis)).Q

        ways = [
            lambda: bases,
            lambda: jax.tree.map(refreshed, grams, bases),
            lambda: jax.tree.map(lambda gram: jnp.linalg.eigh(gram).eigenvectors, grams),
        ]
        which = jnp.where(is_first, 2, (state.count % every == 0).astype(jnp.int32))
        bases = jax.lax.switch(which, ways)
        return updates, SoapState(optax.safe_increment(state.count), mu, nu, *grams, *bases)

    return optax.GradientTransformation(init, update)


class ScheduleFreeState(NamedTuple):
    b1: Float[Array, ""]
    z: Any
    """The sequence that the updates move; the parameters are its weighted average."""
    weight_sum: Float[Array, ""]
    inner: Any


def schedule_free(tx: optax.GradientTransformation, learning_rate: Any, b1: float) -> optax.GradientTransformation:
    """Schedule-free learning (Defazio et al., arXiv 2405.15682, equations 9 to 11) around `tx`, without momentum.

    The parameters are the average x, what is evaluated and saved. Gradients must be taken at `gradient_point`. (Optax
    has parameters that are gradient points, and to recover x from them at each update costs exactness.) Averages are
    weighted by the learning rate squared.
    """

    def init(params):
        # Copies, or the step would donate the same arrays twice.
        z = jax.tree.map(jnp.copy, params)
        return ScheduleFreeState(jnp.float32(b1), z, jnp.zeros((), jnp.float32), tx.init(params))

    def update(grads, state, params=None):
        updates, inner = tx.update(grads, state.inner, _between(state, params))
        z = optax.apply_updates(state.z, updates)
        weight = jnp.square(jnp.asarray(learning_rate, jnp.float32))
        weight_sum = state.weight_sum + weight
        share = jnp.where(weight > 0, weight / jnp.where(weight > 0, weight_sum, 1.0), 0.0)
        moves = jax.tree.map(lambda x, z: share * (z - x), params, z)
        return moves, ScheduleFreeState(state.b1, z, weight_sum, inner)

    return optax.GradientTransformation(init, update)


class AverageState(NamedTuple):
    count: Int[Array, ""]
    z: Any
    """What the updates move, and where gradients are taken; the parameters are its average."""
    inner: Any


def averaged(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """An exponential average of what `tx` moves: the parameters are the average, what is evaluated and saved.

    Gradients must be taken at `gradient_point`. After update t, from 0, the average is d x + (1 - d) z with
    d = min(decay, (1 + t) / (10 + t)), so that where it started weighs little after a few updates.
    """

    def init(params):
        # Copies, or the step would donate the same arrays twice.
        z = jax.tree.map(jnp.copy, params)
        return AverageState(jnp.zeros((), jnp.int32), z, tx.init(params))

    def update(grads, state, params=None):
        updates, inner = tx.update(grads, state.inner, state.z)
        z = optax.apply_updates(state.z, updates)
        share = 1.0 - jnp.minimum(decay, (1.0 + state.count) / (10.0 + state.count))
        moves = jax.tree.map(lambda x, z: share * (z - x), params, z)
        return moves, AverageState(optax.safe_increment(state.count), z, inner)

    return optax.GradientTransformation(init, update)


def _is_left_out(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _between(state: ScheduleFreeState, params: Any) -> Any:
    between = lambda z, x: x if _is_left_out(z) else state.b1 * x + (1 - state.b1) * z  # noqa: E731
    return jax.tree.map(between, state.z, params, is_leaf=_is_left_out)


def gradient_point(opt_state: Any, params: Any) -> Any:
    """The point at which to take the next gradient: the parameters, except with schedule_free and with averages.

    Example:
      >>> config = OptimizerConfig(name="schedule_free", schedule="constant")
      >>> tx = make_optimizer(config, steps=10, axes={"kernel": ("embed", "mlp")})
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> gradient_point(tx.init(params), params)["kernel"].shape
      (2, 3)
    """
    is_own = lambda s: isinstance(s, (ScheduleFreeState, AverageState))  # noqa: E731
    states = [s for s in jax.tree.leaves(opt_state, is_leaf=is_own) if is_own(s)]
    if not states:
        return params
    if isinstance(states[0], ScheduleFreeState):
        return _between(states[0], params)
    return jax.tree.map(lambda z, x: x if _is_left_out(z) else z, states[0].z, params, is_leaf=_is_left_out)
