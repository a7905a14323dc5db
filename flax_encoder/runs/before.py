"""The scores of a run's model before training: a baseline for tasks without an untrained head."""

import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

from flax_encoder.data.pipeline import RunData
from flax_encoder.data.rows.targets import HOST_FIELDS
from flax_encoder.runs.evaluate import evaluate
from flax_encoder.runs.loaded import LoadedRun, model_factory
from flax_encoder.runs.start import start_from, with_word_vectors
from flax_encoder.training.step import make_answer_step


def scores_before_training(run: LoadedRun, data: RunData) -> dict[str, float] | None:
    """Metrics of the held-out documents by the parameters that the run began with; None where what it began from
    (init_from) is not there any more."""
    config, silent = run.config, lambda message: None
    if config.init_from is not None and not pathlib.Path(config.init_from).exists():
        return None
    graphdef, params = nnx.split(model_factory(config, run.label_names)())
    params = jax.tree.map(jnp.asarray, nnx.to_pure_dict(params))
    if config.init_from is not None:
        params = start_from(config, run.label_names, params, silent)
    elif config.data.word_vectors is not None:
        params = with_word_vectors(config.data.word_vectors, run.tokenizer, params, silent)
    step = make_answer_step(graphdef)

    def of(batch):
        return step(params, {name: rows for name, rows in batch.items() if name not in HOST_FIELDS})

    return evaluate(run.task, data.evaluation, of, config, run.label_names, run.tokenizer)
