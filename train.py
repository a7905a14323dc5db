"""Train a text encoder: python train.py [--config configs/NAME.py] [--any.setting VALUE ...]

A run, top to bottom: settings, data, model, loop, evaluation, report. The same command again resumes it.
"""

import collections
import contextlib
import functools
import json
import math
import os
import pathlib
import signal
import sys
import time
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends imports at once; failing_clearly answers it afterwards
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before JAX is imported; training/runtime.py says why

import jax
import numpy as np

from flax_encoder.commands.recipe import parse_run_config
from flax_encoder.commands.screen import failing_clearly
from flax_encoder.config import ConfigError, RunConfig, to_dict
from flax_encoder.data.pipeline import open_data
from flax_encoder.data.sources.records import LabelError
from flax_encoder.runs.best import best_evaluation, check_metric, read_evaluations
from flax_encoder.runs.evaluate import evaluate
from flax_encoder.runs.length import epochs_after, is_evaluation_due, settle_length
from flax_encoder.runs.loaded import model_factory
from flax_encoder.runs.record import RunRecord
from flax_encoder.runs.report import describe_data, describe_mesh, describe_parameters, describe_stages, show_report
from flax_encoder.runs.seeds import train_seeds
from flax_encoder.runs.start import settle, start_from, with_vocab_size, with_word_vectors
from flax_encoder.tasks import check_task, find_task
from flax_encoder.training.checkpoint import Checkpoints, DamagedCheckpoint, checkpoint_steps, read_params
from flax_encoder.training.host import run_folder, run_lock
from flax_encoder.training.optimizer import make_optimizer
from flax_encoder.training.parameters import count_trained, trained
from flax_encoder.training.run_log import Clock, NotFinite, RunLog, write_atomically
from flax_encoder.training.runtime import StopSignals, cache_hits, free_temporaries, join_processes, set_up_runtime
from flax_encoder.training.schedule import share_of_update
from flax_encoder.training.sharding import check_batch, logical_axes, make_mesh, put_batch
from flax_encoder.training.step import (
    StepMetrics,
    init_train_state,
    make_answer_step,
    make_eval_step,
    make_train_step,
    with_params,
)

STEPS_IN_FLIGHT = 2  # how far the host runs ahead of the device: enough to keep it busy, little enough to stop soon


class Diverged(RuntimeError):
    """The loss or the gradient is no finite number any more."""


def train(config: RunConfig) -> dict[str, float] | None:
    """Train, or go on training, to the last step or the end of the budget.

    Returns:
      the final held-out metrics, or None if a signal stopped it.
    """
    check_task(config)
    join_processes(config.mesh.num_processes)
    set_up_runtime()
    mesh = make_mesh(config.mesh)
    if config.batch_texts is None:  # or else it is made to fit
        check_batches(config, mesh)
    run_dir = pathlib.Path(config.run_dir)
    say = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda message: None
    with run_folder(run_dir), run_lock(run_dir), Checkpoints(run_dir, config.keep_checkpoints) as checkpoints:
        while True:
            try:
                return go_on(config, checkpoints.resumable_step(say), run_dir, checkpoints, mesh)
            except DamagedCheckpoint as damage:  # found as its largest files were read; there may be an older one
                checkpoints.set_aside(damage, say)


def go_on(config: RunConfig, latest: int | None, run_dir: pathlib.Path, checkpoints: Checkpoints, mesh):
    """The run from its checkpoint at step `latest`, or from its beginning."""
    if latest == 0:
        raise ConfigError(
            f"a run begins in a folder of its own: {run_dir} holds an imported model. Give another --run-dir; "
            f"--init-from {run_dir} starts from that model."
        )
    start = latest or 0
    is_main = jax.process_index() == 0
    with (
        RunLog(run_dir, steps=config.steps, resume_step=start, is_main=is_main) as log,
        jax.set_mesh(mesh),
    ):
        return run(config, start, run_dir, checkpoints, log, mesh)


def run(config: RunConfig, start: int, run_dir: pathlib.Path, checkpoints: Checkpoints, log: RunLog, mesh):
    """The run itself, from step `start`, with everything open."""
    config, resumed, tokenizer, labels = settle(config, run_dir, start, log)
    task, process = find_task(config.objective), (jax.process_index(), jax.process_count())
    open_options: dict[str, Any] = {"tokenizer": tokenizer, "progress": log.say, "process": process}
    if not start:
        unit = mesh.shape["data"] * mesh.shape["fsdp"] * config.num_microbatches
        open_options["settle"] = functools.partial(settle_length, unit=unit, say=log.say)
    try:
        data = open_data(config, task.reading, label_names=labels, **open_options)
    except LabelError:
        if start or labels is None:
            raise
        data = open_data(config, task.reading, **open_options)  # init_from was made for other labels
    task.check_labels(data.label_names)
    config = task.settle(with_vocab_size(data.config, data.tokenizer.vocab_size), data)
    check_batches(config, mesh)
    log.say(describe_data(data))
    if len(config.stages) > 1:
        log.say(describe_stages(config))
    if resumed is not None and resumed.data_hash not in (None, data.hash):
        raise ConfigError(
            f"a run resumes on the text it began with: {config.data.source} has prepared contents {data.hash}, and "
            f"{run_dir} began with {resumed.data_hash}. Bring that text back, or give another --run-dir."
        )
    record = RunRecord(config, data.tokenizer, data.label_names, data_hash=data.hash)
    if jax.process_index() == 0:
        write_atomically(run_dir / "tokenizer.json", data.tokenizer.json)
        write_atomically(run_dir / "config.json", json.dumps(to_dict(config), indent=1) + "\n")

    # Model, optimizer and state, born on the mesh.
    make_model = model_factory(config, data.label_names)
    optimizer = config.trained_by
    tx = make_optimizer(optimizer, config.steps, logical_axes(make_model), config.schedule_began)
    graphdef, state, shardings = init_train_state(make_model, tx, mesh)
    if start:
        state = checkpoints.restore(start, state)
        log.say(f"resuming {run_dir} from step {start}")
    elif config.init_from:
        params = start_from(config, data.label_names, state.params, log)
        state = with_params(state, params, tx, shardings)
    elif config.data.word_vectors:
        params = with_word_vectors(config.data.word_vectors, data.tokenizer, state.params, log)
        state = with_params(state, params, tx, shardings)
    mask = trained(optimizer, state.params)
    log.say(f"model: {describe_parameters(*count_trained(mask, state.params))} on {describe_mesh(mesh)}")
    step_fn = make_train_step(
        graphdef, tx, seed=config.seed, num_microbatches=config.num_microbatches, shardings=shardings,
        trained=None if all(m is True for m in jax.tree.leaves(mask)) else mask,
    )  # fmt: skip
    if task.answer is None:
        loss_step = make_eval_step(graphdef, shardings)
        eval_step = lambda params, batch: (loss_step(params, batch), {})  # noqa: E731
    else:
        eval_step = make_answer_step(graphdef, shardings)

    evaluations = read_evaluations(run_dir, start)
    evaluated_step = None  # the last one of which this start has made the evaluation

    def held_out(step: int, stop=None, name: str = "eval", most: int | None = None) -> dict[str, float] | None:
        """Metrics of the held-out documents, written to the log; None if a signal asked to stop meanwhile. Those of
        some batches only, `most`, are not written."""
        nonlocal evaluated_step
        batches = data.evaluation if name == "eval" else data.test
        metrics = evaluate(
            task, batches, lambda batch: eval_step(state.params, put_batch(batch, mesh)), config,
            data.label_names, data.tokenizer, say=log.say,
            is_stopped=lambda: stop is not None and stop.requested and jax.process_count() == 1, most=most,
        )  # fmt: skip
        if metrics is not None:
            metrics = {f"{name}/{key}": value for key, value in metrics.items()}
        if metrics is not None and most is None:
            log.write(step, metrics)
            if name == "eval":
                evaluations[step], evaluated_step = metrics, step
        return metrics

    if config.keep_best is not None and not evaluations:  # a name that is none is heard of now, not after an epoch
        check_metric(config.keep_best, held_out(start, most=1))

    # The loop. Metrics are fetched one log interval late, so that the device never waits for the host.
    clock, budget = Clock(resumed.spent_seconds if resumed else 0.0), budget_seconds(config)
    step, rows_per_epoch = start, data.rows_per_epoch
    log.steps, log.is_finished = config.steps, start > 0 and is_over(config, start, clock.spent_seconds, evaluations)
    unlogged: collections.deque[tuple[int, StepMetrics]] = collections.deque()
    in_flight: collections.deque[StepMetrics] = collections.deque()
    finite_step = start  # the last that is known to have been

    def fetch(step: int, metrics: StepMetrics) -> dict[str, float]:
        nonlocal finite_step
        values = task.report(jax.device_get(metrics.loss)) | {"grad_norm": float(metrics.grad_norm)}
        stop_if_diverged(values, step, finite_step, run_dir, checkpoints)
        finite_step = step
        return values

    def write_waiting(latest: int) -> None:
        """Log what waits, but for so many of the last steps."""
        throughput = None
        while len(unlogged) > latest:
            at, metrics = unlogged.popleft()
            throughput = throughput or clock.read()
            values = fetch(at, metrics)
            began = config.schedule_began
            progress = float(metrics.progress or 0.0)
            share = share_of_update(config.optimizer, at - 1 - began, config.steps - began, progress)
            rate = config.optimizer.learning_rate * float(share)
            values |= {"learning_rate": rate, "epoch": epochs_after(config, rows_per_epoch, at)} | throughput
            log.write(at, values)
            seconds_left = min(clock.seconds_per_step * (config.steps - at), budget - clock.spent_seconds)
            log.progress(at, values, task.headline, seconds_left=max(seconds_left, 0.0))

    def say_stopped(step: int) -> None:
        why = stop.requested or "another process's signal"
        log.say(f"stopped by {why} after step {step}, which is saved. The same command resumes.")

    compiled: dict[Any, Any] = {}
    with StopSignals() as stop, contextlib.closing(data.train.iterate(start, config.data.workers)) as batches:
        is_left = not log.is_finished and is_evaluation_due(config, rows_per_epoch, start)
        if is_left and start not in evaluations:
            with clock.paused():  # what the signal that ended the run left out
                if held_out(start, stop) is None:
                    return say_stopped(start)
        last_step = start if is_over(config, start, clock.spent_seconds, evaluations) else config.steps
        for step in range(start + 1, last_step + 1):
            with clock.waiting():
                rows = next(batches)
            B, T = rows["tokens"].shape
            shape = tuple(sorted((name, x.shape) for name, x in rows.items()))
            # Processes' clocks differ, and so does when a signal comes: the step takes the largest of these marks, and
            # all processes end by what it says.
            marks = {} if budget == math.inf else {"progress": clock.spent_seconds / budget}
            if jax.process_count() > 1:
                marks["stop"] = float(stop.requested is not None)
            marked = rows | {name: np.full((B, 1), value, np.float32) for name, value in marks.items()}
            batch = put_batch(marked, mesh)  # while the device has the last steps to do
            clock.count(rows, jax.process_count())
            if shape not in compiled:  # a few times in a run at most
                with clock.paused(), cache_hits() as hits:
                    began = time.monotonic()
                    compiled[shape] = step_fn.lower(state, batch).compile()
                    how, seconds = "loaded" if hits else "compiled", time.monotonic() - began
                    log.say(f"{how} the step for {B} rows of {T} tokens in {seconds:.1f} s")
            if in_flight:
                free_temporaries(in_flight[-1])
            state, step_metrics = compiled[shape](state, batch)
            clock.steps += 1
            in_flight.append(step_metrics)
            is_spent, is_asked = False, jax.process_count() == 1 and stop.requested is not None
            if len(in_flight) > STEPS_IN_FLIGHT:
                done = jax.block_until_ready(in_flight.popleft())
                is_spent = done.progress is not None and float(done.progress) >= 1
                is_asked |= done.stop is not None and float(done.stop) > 0

            is_end = is_spent or step == config.steps
            if step % config.log_every == 0 or is_end:
                unlogged.append((step, step_metrics))
            is_last = is_asked or is_end
            is_saved = is_last or step % config.checkpoint_every == 0
            write_waiting(0 if is_saved else 1)  # all before a save, so that a resumed run's log is whole
            if is_evaluation_due(config, rows_per_epoch, step) and not is_last:
                with clock.paused():
                    metrics = held_out(step, stop)
                if metrics is None:
                    is_last = is_saved = True
                    write_waiting(0)
                else:
                    log.say("  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
                    best = best_evaluation(evaluations, config.keep_best)
                    is_end = best is not None and best.since == config.patience
                    is_saved |= is_end or (best is not None and best.step == step)
                    write_waiting(0 if is_saved else 1)
            if is_saved:
                if finite_step < step:  # nothing is saved that has diverged, logged or not
                    fetch(step, step_metrics)
                spent_seconds = max(clock.spent_seconds, budget if is_spent else 0.0)
                best = best_evaluation(evaluations, config.keep_best)
                now = record.replace(step=step, spent_seconds=spent_seconds)
                checkpoints.save(state, step, now.to_json(), best=best and best.step)
            if is_end:
                break
            if is_last:
                checkpoints.wait()
                return say_stopped(step)
    checkpoints.wait()
    log.end_progress()

    # What the run ends with: its last parameters, or the best by what it was to keep. The test chose neither.
    metrics = evaluations[step] if evaluated_step == step else held_out(step)
    kept = {at: found for at, found in evaluations.items() if at in checkpoint_steps(run_dir)}
    best = best_evaluation(kept, config.keep_best)
    if best is not None:
        of_all = f"of {len(evaluations)} evaluations"
        log.say(f"{config.keep_best} was best after step {best.step}, {of_all}: {best.value:.4f}")
        if best.step != step:
            params = read_params(run_dir / "checkpoints" / str(best.step), state.params)
            state, metrics = state._replace(params=params), evaluations[best.step]
    return (metrics or {}) | (held_out(step, name="test") or {} if data.test else {})


def budget_seconds(config: RunConfig) -> float:
    return math.inf if config.budget_minutes is None else 60 * config.budget_minutes


def is_over(config: RunConfig, step: int, spent_seconds: float, evaluations: dict[int, dict[str, float]]) -> bool:
    best = best_evaluation(evaluations, config.keep_best)
    is_out_of_patience = best is not None and config.patience is not None and best.since >= config.patience
    return step == config.steps or spent_seconds >= budget_seconds(config) or is_out_of_patience


def check_batches(config: RunConfig, mesh) -> None:
    for stage in config.stages:
        check_batch(stage.batch_size, config.num_microbatches, mesh)


def stop_if_diverged(values: dict[str, float], step: int, finite_step: int, run_dir, checkpoints: Checkpoints) -> None:
    if not np.isfinite(values["loss"]) or not np.isfinite(values["grad_norm"]):
        saved = checkpoints.latest_step()
        way_out = f"{run_dir} holds step {saved}, from before" if saved else "no checkpoint was made yet"
        raise Diverged(
            f"the loss must stay finite: it is {values['loss']} and the gradient norm {values['grad_norm']} at step "
            f"{step}; it broke after step {finite_step}. {way_out}. A lower learning rate, a longer "
            f"warm-up or a smaller optimizer.clip_norm often helps."
        )


def main() -> None:
    with failing_clearly(Diverged, NotFinite):
        config = parse_run_config(sys.argv[1:], default="configs/quickstart.py")
        if config.seeds > 1:
            train_seeds(config, train)
            return
        metrics = train(config)
        if metrics is not None and jax.process_count() == 1:
            show_report(config, metrics, train)
        elif metrics is not None and jax.process_index() == 0:
            print("held-out text:", ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


if __name__ == "__main__":
    main()
