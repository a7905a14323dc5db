"""A run opened for its next step: settings settled, data ready, model and optimizer born on the mesh."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from flax_encoder.config import ConfigError, RunConfig, to_dict
from flax_encoder.config.mesh import check_context
from flax_encoder.data.pipeline import RunData, open_data
from flax_encoder.data.sources.records import LabelError, Say
from flax_encoder.runs.goodput import Goodput
from flax_encoder.runs.length import settle_length
from flax_encoder.runs.loaded import model_factory
from flax_encoder.runs.programs import Programs
from flax_encoder.runs.record import RunRecord
from flax_encoder.runs.report import describe_data, describe_mesh, describe_parameters, describe_stages
from flax_encoder.runs.start import settle, start_from, with_vocab_size, with_word_vectors
from flax_encoder.runs.teacher import open_teacher
from flax_encoder.tasks import Task, find_task
from flax_encoder.training.checkpoint import Checkpoints
from flax_encoder.training.optimizer import make_optimizer
from flax_encoder.training.parameters import count_trained, trained
from flax_encoder.training.run_log import write_atomically
from flax_encoder.training.sharding import check_batch, logical_axes, rows_of_process
from flax_encoder.training.step import TrainState, init_train_state, with_params


@dataclasses.dataclass
class OpenedRun:
    """All that the training loop needs of a run."""

    config: RunConfig
    """As settled: what the run's data, its checkpoint or the run it begins from decided is filled in."""
    task: Task
    data: RunData
    record: RunRecord
    """What a checkpoint holds beside the state, as of the start."""
    state: TrainState
    shardings: Any
    programs: Programs


def open_run(
    config: RunConfig, start: int, run_dir: pathlib.Path, checkpoints: Checkpoints, say: Say, mesh: Mesh,
    goodput: Goodput,
) -> OpenedRun:  # fmt: skip
    """Open a run at step `start`: at 0 from nothing or its origin, else from its checkpoint of that step.

    Args:
      say: what to do with the lines that tell of its data, its phases and its model.

    Raises:
      ConfigError: settings that cannot be, or that differ from those of the checkpoint.
      DataError: the data cannot be read, or is not what the task learns from.
      DamagedCheckpoint: the checkpoint cannot be restored.
    """
    config, resumed, tokenizer, labels = settle(config, run_dir, start, say)
    teacher = open_teacher(config)
    if teacher is not None:
        before = resumed and resumed.config.distillation.teacher_hash
        config, tokenizer, labels = teacher.settle(config, tokenizer, labels, say, before)
    task, process = find_task(config.objective), rows_of_process(mesh)
    options: dict[str, Any] = {
        "tokenizer": tokenizer, "progress": say, "process": process,
        "reading_of": lambda objective: find_task(objective).reading,
    }  # fmt: skip
    if not start:
        unit = mesh.shape["data"] * mesh.shape["fsdp"] * config.num_microbatches
        options["settle"] = functools.partial(settle_length, unit=unit, say=say)
    try:
        data = open_data(config, task.reading, label_names=labels, **options)
    except LabelError:
        if start or labels is None or teacher is not None:
            raise
        data = open_data(config, task.reading, **options)  # init_from was made for other labels
    task.check_labels(data.label_names)
    if teacher is not None:
        teacher.check_data(config, data)
    config = task.settle(with_vocab_size(data.config, data.tokenizer.vocab_size), data)
    check_batches(config, mesh)
    say(describe_data(data))
    if len(config.timeline.stages) > 1:
        say(describe_stages(config))
    if resumed is not None and resumed.data_hash not in (None, data.hash):
        raise ConfigError(
            f"a run resumes on the text it began with: {config.data.source} has prepared contents {data.hash}, and "
            f"{run_dir} began with {resumed.data_hash}. Bring that text back, or give another --run-dir."
        )
    spent_seconds = resumed.spent_seconds if resumed else 0.0
    record = RunRecord(
        config, data.tokenizer, data.label_names, step=start, spent_seconds=spent_seconds, data_hash=data.hash,
        skipped_steps=resumed.skipped_steps if resumed else (), grad_norms=resumed.grad_norms if resumed else (),
    )  # fmt: skip
    if jax.process_index() == 0:
        write_atomically(run_dir / "tokenizer.json", data.tokenizer.json)
        write_atomically(run_dir / "config.json", json.dumps(to_dict(config), indent=1) + "\n")

    make_model, tx = make_learner(config, data.label_names)
    graphdef, state, shardings = init_train_state(make_model, tx, mesh)
    if start:
        with goodput.during("restore"):
            state = checkpoints.restore(start, state)
        say(f"resuming {run_dir} from step {start}")
    elif config.init_from:
        params = start_from(config, data.label_names, state.params, say)
        state = with_params(state, params, tx, shardings)
    elif teacher is not None and config.distillation.initial_layers is not None:
        params = teacher.initial_params(config, state.params, say)
        state = with_params(state, params, tx, shardings)
    elif config.data.word_vectors:
        params = with_word_vectors(config.data.word_vectors, data.tokenizer, state.params, say)
        state = with_params(state, params, tx, shardings)
    mask = trained(config.trained_by, state.params)
    say(f"model: {describe_parameters(*count_trained(mask, state.params))} on {describe_mesh(mesh)}")
    of_mesh = teacher and teacher.on_mesh(config, mesh)
    programs = Programs(config, data.label_names, graphdef, tx, shardings, mask, of_mesh)
    return OpenedRun(config, task, data, record, state, shardings, programs)


def make_learner(
    config: RunConfig, label_names: list[str] | None
) -> tuple[Callable[[], nnx.Module], optax.GradientTransformation]:
    """(makes the run's model, its optimizer)."""
    make_model = model_factory(config, label_names)
    return make_model, make_optimizer(
        config.trained_by, config.steps, logical_axes(make_model), config.schedule_began,
        config.timeline.learning_rates,
    )  # fmt: skip


def check_batches(config: RunConfig, mesh: Mesh) -> None:
    """Raise ConfigError for a batch or rows that the mesh or the microbatches cannot split."""
    data = config.data
    check_context(mesh.shape["context"], config.model, (*config.row_lengths, *data.buckets), data.target_length)
    for stage in config.timeline.stages:
        check_batch(stage.batch_size, stage.num_microbatches, mesh)
