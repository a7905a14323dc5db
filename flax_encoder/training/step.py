"""The training step: loss sums over microbatches, one mean, one update, the old state donated."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from flax_encoder.nn.lora import assembled
from flax_encoder.nn.partition import abstract_model
from flax_encoder.tasks.loss import LossSum
from flax_encoder.tasks.task import CoupledObjective
from flax_encoder.training.parameters import filled, join, split
from flax_encoder.training.sharding import BATCH_SPEC, logical_axes, sharding_tree, spread
from flax_encoder.training.transformations import global_norm, gradient_point

Batch = dict[str, Array]


class TrainState(NamedTuple):
    """All that an update reads and writes. `step` is the number of updates made; parameters are float32."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any


class StepMetrics(NamedTuple):
    loss: LossSum
    grad_norm: Float[Array, ""]
    progress: Float[Array, ""] | None = None
    stop: Float[Array, ""] | None = None
    """The most that any process's batch said, the same on all."""
    is_skipped: Bool[Array, ""] | None = None
    """Whether the state was left as it was; None where nothing says when it is to be."""


class Teacher(NamedTuple):
    """A model that is learned from and not trained."""

    graphdef: Any
    params: Any
    """On the mesh of the state, or as shapes."""


class Taught(NamedTuple):
    """A step that is given its teacher's parameters: as it is jitted, lowered or compiled."""

    stage: Any
    params: Any

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        return self.stage(state, batch, self.params)

    def lower(self, state: TrainState, batch: Batch) -> "Taught":
        return self._replace(stage=self.stage.lower(state, batch, self.params))

    def compile(self, *options: Any) -> "Taught":
        return self._replace(stage=self.stage.compile(*options))

    def as_text(self) -> str:
        return self.stage.as_text()

    def memory_analysis(self) -> Any:
        return self.stage.memory_analysis()


def init_train_state(
    make_model: Callable[[], nnx.Module], tx: optax.GradientTransformation, mesh: Mesh | None = None
) -> tuple[Any, TrainState, Any]:
    """Make parameters and optimizer state, sharded on `mesh` from the start.

    Returns:
      (graphdef, state, shardings): `nnx.merge(graphdef, state.params)` is the model; shardings is None without a mesh.

    Example:
      >>> config = EncoderConfig(vocab_size=128, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32)
      >>> make_model = lambda: MaskedLM(config, rngs=nnx.Rngs(0))
      >>> tx = make_optimizer(OptimizerConfig(), steps=10, axes=logical_axes(make_model))
      >>> graphdef, state, shardings = init_train_state(make_model, tx)
      >>> int(state.step)
      0
    """
    graphdef, _, shardings = abstract_train_state(make_model, tx, mesh)
    return graphdef, jax.jit(partial(_init, make_model, tx), out_shardings=shardings)(), shardings


def abstract_train_state(
    make_model: Callable[[], nnx.Module], tx: optax.GradientTransformation, mesh: Mesh | None = None
) -> tuple[Any, TrainState, Any]:
    """`init_train_state` with shapes for arrays, which know where they lie on `mesh`: nothing is allocated."""
    graphdef, _ = abstract_model(make_model)
    state = jax.eval_shape(partial(_init, make_model, tx))
    if mesh is None:
        return graphdef, state, None
    shardings = state_shardings(make_model, tx, mesh, state)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    return graphdef, state, shardings


def _init(make_model: Callable[[], nnx.Module], tx: optax.GradientTransformation) -> TrainState:
    params = nnx.to_pure_dict(nnx.split(make_model(), nnx.Param)[1])
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def with_params(
    state: TrainState, params: Any, tx: optax.GradientTransformation, shardings: TrainState | None = None
) -> TrainState:
    """A state at its beginning with other parameters. The optimizer's state, which may copy them, is made again."""
    out = None if shardings is None else shardings.opt_state
    return state._replace(params=params, opt_state=jax.jit(tx.init, out_shardings=out)(params))


def state_shardings(make_model, tx: optax.GradientTransformation, mesh: Mesh, abstract: TrainState) -> TrainState:
    """The shardings of a state. Optimizer state of a parameter's shape is sharded like the parameter; state of another
    shape, such as Adafactor's rows and columns and SOAP's bases, is spread over all devices; state that belongs to no
    parameter is copied."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = sharding_tree(mesh, logical_axes(make_model), abstract.params)
    by_path = dict(jax.tree_util.tree_flatten_with_path(params)[0])
    shapes = {path: leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(abstract.params)[0]}

    def like_its_parameter(path, leaf):
        # Optimizers keep their state in trees like the parameters, whose paths lie within those of the state.
        parts = (path[i:j] for i in range(len(path)) for j in range(i + 1, len(path) + 1))
        own = next((part for part in parts if part in by_path), None)
        if own is None:
            return everywhere
        return by_path[own] if shapes[own] == leaf.shape else spread(mesh, leaf.shape)

    opt_state = jax.tree_util.tree_map_with_path(like_its_parameter, abstract.opt_state)
    return TrainState(everywhere, params, opt_state)


def make_train_step(
    graphdef: Any,
    tx: optax.GradientTransformation,
    *,
    seed: int = 0,
    num_microbatches: int = 1,
    shardings: TrainState | None = None,
    trained: Any = None,
    teacher: Teacher | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """A jitted `step(state, batch) -> (state, metrics)`. The state passed in is donated: use the one returned.

    The model's `loss(batch, key=)` gives sums, so any split into microbatches or over devices makes the same update up
    to float32 rounding; for a loss that couples rows `coupled_gradient` ensures this. The dropout key depends on (seed,
    step).

    A batch may have three more fields, each [B, 1]. `progress` is the share of the run's time that is used up; the
    optimizer gets the largest. `stop` is returned, its largest value, so that processes can agree to stop. With
    `max_norm`, a step whose gradient norm is above it, or whose loss or norm is not finite, changes only the
    step count.

    Args:
      graphdef, shardings: from `init_train_state`.
      num_microbatches: must divide the batch's rows; gradients are summed over them in float32.
      trained: marks the parameters to train (training/parameters.py); the others get no gradients. None trains all.
      teacher: passed to `loss(batch, key=, teacher=)`. It is an argument of the jitted step beside the state, so it
        gets no gradient, and no optimizer or checkpoint holds it.

    Example:
      >>> config = EncoderConfig(vocab_size=128, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32)
      >>> make_model = lambda: MaskedLM(config, rngs=nnx.Rngs(0))
      >>> tx = make_optimizer(OptimizerConfig(), steps=10, axes=logical_axes(make_model))
      >>> graphdef, state, _ = init_train_state(make_model, tx)
      >>> rows = jnp.ones((2, 8), jnp.int32)
      >>> masked = {"target_positions": rows[:, :1], "targets": rows[:, :1], "target_weights": jnp.ones((2, 1))}
      >>> batch = {"tokens": rows, "segment_ids": rows, "positions": jnp.arange(8) * rows} | masked
      >>> state, metrics = make_train_step(graphdef, tx)(state, batch)
      >>> int(state.step), float(metrics.loss.count)
      (1, 2.0)
    """

    def model_of(own, rest):
        return assembled(graphdef, own if trained is None else join(own, rest, trained))

    def step(state: TrainState, batch: Batch, teacher_params: Any = None) -> tuple[TrainState, StepMetrics]:
        def loss_fn(own, rest, batch, key):
            given = {} if teacher is None else {"teacher": nnx.merge(teacher.graphdef, teacher_params)}
            loss = model_of(own, rest).loss(batch, key=key, **given)
            return loss.sum, loss

        grad_fn = jax.grad(loss_fn, has_aux=True)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        told = {name: batch[name].max() for name in ("progress", "stop", "max_norm") if name in batch}
        batch = {name: rows for name, rows in batch.items() if name not in told}
        params = gradient_point(state.opt_state, state.params)
        own, rest = (params, None) if trained is None else split(params, trained)
        if num_microbatches == 1:
            grads, loss = grad_fn(own, rest, batch, key)
        elif isinstance(model_of(own, rest), CoupledObjective):
            grads, loss = coupled_gradient(model_of, own, rest, batch, key, num_microbatches)
        else:
            parts, part_keys = dealt(batch, num_microbatches), jax.random.split(key, num_microbatches)
            grads, loss = summed(lambda *xs: grad_fn(own, rest, *xs), parts, part_keys)
        grads = jax.tree.map(lambda g: g / jnp.maximum(loss.count, 1.0), grads)
        measured = {name: most for name, most in told.items() if name == "progress"}
        whole = grads if trained is None else filled(grads, params)
        updates, opt_state = tx.update(whole, state.opt_state, state.params, **measured)
        params = optax.apply_updates(state.params, updates)
        if trained is not None:  # not even 0 is added to what is frozen
            params = jax.tree.map(lambda new, old, m: new if np.any(m) else old, params, state.params, trained)
        new_state, norm = TrainState(state.step + 1, params, opt_state), global_norm(grads)
        if "max_norm" in told:
            is_good = jnp.isfinite(loss.sum) & jnp.isfinite(norm) & (norm <= told.pop("max_norm"))
            kept = jax.tree.map(partial(jnp.where, is_good), new_state, state)
            new_state, told["is_skipped"] = kept._replace(step=new_state.step), ~is_good
        return new_state, StepMetrics(loss, norm, **told)

    jit = partial(jax.jit, donate_argnums=0)
    if shardings is not None:
        everywhere = shardings.step
        theirs = () if teacher is None else (jax.tree.map(lambda x: x.sharding, teacher.params),)
        jit = partial(
            jit, in_shardings=(shardings, _rows(everywhere.mesh), *theirs), out_shardings=(shardings, everywhere)
        )
    return jit(step) if teacher is None else Taught(jit(step), teacher.params)


def dealt(batch: Any, parts: int) -> Any:
    """[B, ...] to [parts, B / parts, ...]: rows are dealt out, not cut into runs, so that each microbatch still lies
    evenly on all devices."""
    return jax.tree.map(lambda x: rearrange(x, "(B parts) ... -> parts B ...", parts=parts), batch)


def summed(of: Callable[..., Any], *xs: Any) -> Any:
    """The sum of what `of` gives for each entry of the first axis of `xs`, one after the other."""
    shapes = jax.eval_shape(of, *jax.tree.map(lambda x: x[0], xs))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(lambda total, one: (jax.tree.map(jnp.add, total, of(*one)), None), zeros, xs)[0]


def coupled_gradient(
    model_of: Callable[[Any, Any], CoupledObjective], own: Any, rest: Any, batch: Batch, key: Array,
    num_microbatches: int,
) -> tuple[Any, LossSum]:  # fmt: skip
    """(gradients, loss) of a loss that couples all rows of a batch, with the activations of a microbatch at a time (Gao
    et al., arXiv 2101.06983): the representations of all rows, the loss's gradient by them, and then, with the same
    dropout, each microbatch's part of the gradient by the parameters.

    Args:
      model_of: of (trained, frozen) parameters.
    """
    parts, part_keys = dealt(batch, num_microbatches), jax.random.split(key, num_microbatches)

    def represent(own, part, part_key):
        return model_of(own, rest).represent(part, key=part_key)

    def loss_of(own, representations):
        whole = jax.tree.map(lambda x: rearrange(x, "parts B ... -> (B parts) ..."), representations)
        loss = model_of(own, rest).coupled_loss(whole, batch)
        return loss.sum, loss

    def part_gradient(part, part_key, cotangents):
        return jax.vjp(lambda own: represent(own, part, part_key), own)[1](cotangents)[0]

    _, representations = jax.lax.scan(lambda _, xs: (None, represent(own, *xs)), None, (parts, part_keys))
    (direct, cotangents), loss = jax.grad(loss_of, (0, 1), has_aux=True)(own, representations)
    through = summed(part_gradient, parts, part_keys, cotangents)
    return jax.tree.map(jnp.add, direct, through), loss


def make_eval_step(graphdef: Any, shardings: TrainState | None = None) -> Callable[[Any, Batch], LossSum]:
    """A jitted `eval_step(params, batch) -> LossSum`, without dropout.

    Example:
      >>> config = EncoderConfig(vocab_size=128, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32)
      >>> graphdef, params = nnx.split(MaskedLM(config, rngs=nnx.Rngs(0)))
      >>> rows = jnp.ones((2, 8), jnp.int32)
      >>> masked = {"target_positions": rows[:, :1], "targets": rows[:, :1], "target_weights": jnp.ones((2, 1))}
      >>> batch = {"tokens": rows, "segment_ids": rows, "positions": jnp.arange(8) * rows} | masked
      >>> float(make_eval_step(graphdef)(nnx.to_pure_dict(params), batch).count)
      2.0
    """
    return _without_dropout(lambda model, batch: model.loss(batch), graphdef, shardings)


def make_answer_step(
    graphdef: Any, shardings: TrainState | None = None
) -> Callable[[Any, Batch], tuple[LossSum, dict[str, Array]]]:
    """A jitted `answer_step(params, batch) -> (LossSum, outputs)`, without dropout; outputs [B, M, ...] are whole on
    every process."""
    return _without_dropout(lambda model, batch: (model.loss(batch), model.outputs(batch)), graphdef, shardings)


def make_outputs_step(graphdef: Any, shardings: TrainState | None = None) -> Callable[[Any, Batch], dict[str, Array]]:
    """A jitted `outputs_step(params, batch) -> outputs`, without dropout; [B, M, ...], whole on every process."""
    return _without_dropout(lambda model, batch: model.outputs(batch), graphdef, shardings)


def _without_dropout(evaluate: Callable[[Any, Batch], Any], graphdef: Any, shardings: TrainState | None):
    def step(params, batch):
        return evaluate(assembled(graphdef, params), batch)

    if shardings is None:
        return jax.jit(step)
    everywhere = shardings.step
    return jax.jit(step, in_shardings=(shardings.params, _rows(everywhere.mesh)), out_shardings=everywhere)


def _rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH_SPEC)
