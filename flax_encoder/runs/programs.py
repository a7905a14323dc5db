"""The programs of a run: what is compiled of its stages."""

import dataclasses
from typing import Any, NamedTuple

import jax
import optax

from flax_encoder.config import RunConfig, Stage
from flax_encoder.nn.partition import abstract_model
from flax_encoder.runs.loaded import model_factory
from flax_encoder.training.step import Teacher, make_train_step


class Program(NamedTuple):
    """What is compiled of a stage, for each shape of its batches."""

    graphdef: Any
    """`nnx.merge(graphdef, params)` is the stage's model."""
    step_fn: Any
    """`step_fn(state, batch) -> (state, StepMetrics)`, jitted; the state given is donated."""


class Programs:
    """Stages have one program together unless a phase changes the model, its objective or its microbatches; the
    parameters are the same in all.

    Args:
      graphdef: of the model as the run's own settings have it.
      mask: which parameters are trained, as `training.parameters.trained` has it.
      teacher: whose outputs are learned from, if any.
    """

    def __init__(
        self, config: RunConfig, labels: list[str] | None, graphdef: Any, tx: optax.GradientTransformation,
        shardings: Any, mask: Any, teacher: Teacher | None = None,
    ):  # fmt: skip
        self._config, self._labels, self._timeline = config, labels, config.timeline
        self._tx, self._shardings, self._teacher = tx, shardings, teacher
        self._trained = None if all(m is True for m in jax.tree.leaves(mask)) else mask
        self._graphdefs: dict[Any, Any] = {(config.model.rope_theta, config.objective): graphdef}
        self._made: dict[Any, Program] = {}

    def of(self, stage: Stage) -> Program:
        key = stage.rope_theta, stage.objective, stage.num_microbatches
        if key not in self._made:
            graphdef = self._graphdef(stage, stage.objective)
            step_fn = make_train_step(
                graphdef, self._tx, seed=self._config.seed, num_microbatches=stage.num_microbatches,
                shardings=self._shardings, trained=self._trained, teacher=self._teacher,
            )  # fmt: skip
            self._made[key] = Program(graphdef, step_fn)
        return self._made[key]

    def model_after(self, step: int) -> Any:
        """The graphdef of the run's model, which evaluations ask, as it is after so many updates."""
        return self._graphdef(self._timeline.stage_of(step - 1), self._config.objective)

    def _graphdef(self, stage: Stage, objective: str) -> Any:
        key = stage.rope_theta, objective
        if key not in self._graphdefs:
            config = dataclasses.replace(self._config.after(stage.end_step), objective=objective, phases=())
            self._graphdefs[key], _ = abstract_model(model_factory(config, self._labels))
        return self._graphdefs[key]
