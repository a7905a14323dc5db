"""Train a text encoder: python train.py [--config configs/NAME.py] [--any.setting VALUE ...]

A run, top to bottom: settings, data, model, loop, evaluation, report. The same command again resumes it.
"""

import collections
import contextlib
import functools
import json
import math
import operator
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before JAX is imported; training/runtime.py says why

import jax
import numpy as np
from filelock import FileLock, Timeout

from flax_encoder.commands.recipe import parse_run_config
from flax_encoder.commands.screen import failing_clearly
from flax_encoder.config import ConfigError, RunConfig, to_dict
from flax_encoder.data.pipeline import RunData, open_data
from flax_encoder.data.sources.records import LabelError
from flax_encoder.data.store.prepare import unhurried
from flax_encoder.data.tokens.tokenizer import TextTokenizer
from flax_encoder.runs.loaded import model_factory
from flax_encoder.runs.report import show_report
from flax_encoder.runs.start import settle, start_from, with_vocab_size, with_word_vectors
from flax_encoder.tasks import OBJECTIVES
from flax_encoder.training.checkpoint import Checkpoints, read_run
from flax_encoder.training.optimizer import make_optimizer
from flax_encoder.training.run_log import Clock, RunLog, read_metrics, write_atomically
from flax_encoder.training.runtime import StopSignals, cache_hits, free_temporaries, join_processes, set_up_runtime
from flax_encoder.training.schedule import share_of_peak
from flax_encoder.training.sharding import check_batch, logical_axes, make_mesh, put_batch
from flax_encoder.training.step import StepMetrics, init_train_state, make_eval_step, make_train_step

STEPS_IN_FLIGHT = 2  # how far the host runs ahead of the device: enough to keep it busy, little enough to stop soon


class Diverged(RuntimeError):
    """The loss or the gradient is no finite number any more."""


def train(config: RunConfig) -> dict[str, float] | None:
    """Train, or go on training, to the last step or the end of the budget.

    Returns:
      the final held-out metrics, or None if a signal stopped it.
    """
    join_processes(config.mesh.num_processes)
    set_up_runtime()
    mesh = make_mesh(config.mesh)
    for stage in config.stages:
        check_batch(stage.batch_size, config.num_microbatches, mesh)
    run_dir = pathlib.Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with alone_in(run_dir), Checkpoints(run_dir, config.keep_checkpoints) as checkpoints:
        latest = checkpoints.latest_step()
        if latest == 0:
            raise ConfigError(
                f"a run begins in a folder of its own: {run_dir} holds an imported model. Give another --run-dir; "
                f"--init-from {run_dir} starts from that model."
            )
        start = latest or 0
        is_finished = start > 0 and is_over(config, start, read_run(run_dir)["spent_seconds"])
        is_main = jax.process_index() == 0
        with RunLog(run_dir, steps=config.steps, resume_step=start, is_finished=is_finished, is_main=is_main) as log:
            config, settled = settle(config, run_dir, start, log)
            with jax.set_mesh(mesh):
                return run(config, settled, start, run_dir, checkpoints, log, mesh)


def run(config, settled, start: int, run_dir: pathlib.Path, checkpoints: Checkpoints, log: RunLog, mesh):
    """The run itself, from step `start`, with everything open and settled."""
    # Data. What is settled already (tokenizer, order of labels) stays so.
    open_own = functools.partial(
        open_data,
        config,
        tokenizer=TextTokenizer(settled["tokenizer"]) if "tokenizer" in settled else None,
        progress=log.say,
        process=(jax.process_index(), jax.process_count()),
    )
    try:
        data = open_own(label_names=settled.get("label_names"))
    except LabelError:
        if start:
            raise
        data = open_own()  # init_from was made for other labels
    config = with_vocab_size(config, data.tokenizer.vocab_size)
    log.say(describe(data))
    if len(config.stages) > 1:
        log.say(describe_stages(config))
    settings = {"config": to_dict(config), "tokenizer": data.tokenizer.json, "label_names": data.label_names}
    settings["data"] = data.hash
    if settled.get("data", data.hash) != data.hash:
        raise ConfigError(
            f"a run resumes on the text it began with: {config.data.source} has prepared contents {data.hash}, and "
            f"{run_dir} began with {settled['data']}. Bring that text back, or give another --run-dir."
        )
    if jax.process_index() == 0:
        write_atomically(run_dir / "tokenizer.json", data.tokenizer.json)
        write_atomically(run_dir / "config.json", json.dumps(settings["config"], indent=1) + "\n")

    # Model, optimizer and state, born on the mesh.
    make_model = model_factory(config, data.label_names)
    tx = make_optimizer(config.optimizer, config.steps, logical_axes(make_model))
    report = OBJECTIVES[config.objective].report
    graphdef, state, shardings = init_train_state(make_model, tx, mesh)
    if start:
        state = checkpoints.restore(start, state)
        log.say(f"resuming {run_dir} from step {start}")
    elif config.init_from:
        state = state._replace(params=start_from(config, data.label_names, state.params, log))
    elif config.data.word_vectors:
        state = state._replace(params=with_word_vectors(config.data.word_vectors, data.tokenizer, state.params, log))
    log.say(f"model: {sum(x.size for x in jax.tree.leaves(state.params)):,} parameters on {describe_mesh(mesh)}")
    step_fn = make_train_step(
        graphdef, tx, seed=config.seed, num_microbatches=config.num_microbatches, shardings=shardings
    )
    eval_fn = make_eval_step(graphdef, shardings)

    def evaluate(step: int, stop=None) -> dict[str, float] | None:
        """Held-out metrics; None if a signal asked to stop meanwhile."""
        parts, say = [], unhurried(log.say)
        for i in range(len(data.evaluation)):
            parts.append(eval_fn(state.params, put_batch(data.evaluation[i], mesh)))
            if i >= STEPS_IN_FLIGHT:
                jax.block_until_ready(parts[i - STEPS_IN_FLIGHT])
                say(f"evaluating: {i - 1:,} of {len(data.evaluation):,} batches")
            if stop is not None and stop.requested and jax.process_count() == 1:
                return None
        total = functools.reduce(operator.add, parts)
        metrics = {f"eval/{name}": value for name, value in report(jax.device_get(total)).items()}
        log.write(step, metrics)
        return metrics

    # The loop. Metrics are fetched one log interval late, so that the device never waits for the host.
    clock, budget = Clock(settled.get("spent_seconds", 0.0)), budget_seconds(config)
    step, last_step = start, start if is_over(config, start, clock.spent_seconds) else config.steps
    unlogged: collections.deque[tuple[int, StepMetrics]] = collections.deque()
    in_flight: collections.deque[StepMetrics] = collections.deque()
    finite_step = start  # the last that is known to have been

    def fetch(step: int, metrics: StepMetrics) -> dict[str, float]:
        nonlocal finite_step
        values = report(jax.device_get(metrics.loss)) | {"grad_norm": float(metrics.grad_norm)}
        stop_if_diverged(values, step, finite_step, run_dir, checkpoints)
        finite_step = step
        return values

    def tell(latest: int) -> None:
        """Log what waits, but for so many of the last steps."""
        throughput = None
        while len(unlogged) > latest:
            at, metrics = unlogged.popleft()
            throughput = throughput or clock.read()
            values = fetch(at, metrics)
            progress = max((at - 1) / config.steps, float(metrics.progress or 0.0))
            rate = config.optimizer.learning_rate * float(share_of_peak(config.optimizer, progress))
            values |= {"learning_rate": rate} | throughput
            log.write(at, values)
            seconds_left = min(clock.seconds_per_step * (config.steps - at), budget - clock.spent_seconds)
            log.progress(at, values, seconds_left=max(seconds_left, 0.0))

    def say_stopped(step: int) -> None:
        why = stop.requested or "another process's signal"
        log.say(f"stopped by {why} after step {step}, which is saved. The same command resumes.")

    compiled: dict[Any, Any] = {}
    with StopSignals() as stop, contextlib.closing(data.train.iterate(start, config.data.workers)) as batches:
        if start < last_step and is_evaluation_due(config, start) and not is_evaluated(run_dir, start):
            with clock.paused():  # what the signal that ended the run left out
                if evaluate(start, stop) is None:
                    return say_stopped(start)
        for step in range(start + 1, last_step + 1):
            with clock.waiting():
                rows = next(batches)
            B, T = rows["tokens"].shape
            shape = tuple(sorted((name, x.shape) for name, x in rows.items()))
            # Processes' clocks differ, and so does when a signal comes: the step takes the largest, and all of them
            # end by what it says.
            told = {} if budget == math.inf else {"progress": clock.spent_seconds / budget}
            if jax.process_count() > 1:
                told["stop"] = float(stop.requested is not None)
            told_rows = {name: np.full((B, 1), value, np.float32) for name, value in told.items()}
            batch = put_batch(rows | told_rows, mesh)  # while the device has the last steps to do
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
            tell(0 if is_saved else 1)  # all before a save, so that a resumed run's log is whole
            if is_evaluation_due(config, step) and not is_last:
                with clock.paused():
                    metrics = evaluate(step, stop)
                if metrics is None:
                    is_last = is_saved = True
                    tell(0)
                else:
                    log.say("  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
            if is_saved:
                if finite_step < step:  # nothing is saved that has diverged, logged or not
                    fetch(step, step_metrics)
                spent_seconds = max(clock.spent_seconds, budget if is_spent else 0.0)
                checkpoints.save(state, step, settings | {"spent_seconds": spent_seconds})
            if is_end:
                break
            if is_last:
                checkpoints.wait()
                return say_stopped(step)
    checkpoints.wait()
    log.end_progress()
    return evaluate(step)


@contextlib.contextmanager
def alone_in(run_dir: pathlib.Path) -> Iterator[None]:
    """Hold the folder's lock, for all processes of this run; it goes with the process, however that ends."""
    lock = FileLock(run_dir / "lock")
    try:
        if jax.process_index() == 0:
            lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"one process trains in a folder at a time: another is at work in {run_dir}. Give another --run-dir, or "
            f"--mesh.num-processes for several that train together."
        ) from None
    except (NotImplementedError, OSError):  # a file system without locks
        pass
    try:
        yield
    finally:
        lock.release()


def is_evaluation_due(config: RunConfig, step: int) -> bool:
    return config.eval_every is not None and step > 0 and step % config.eval_every == 0


def is_evaluated(run_dir: pathlib.Path, step: int) -> bool:
    return any(line["step"] == step and "eval/loss" in line for line in read_metrics(run_dir))


def budget_seconds(config: RunConfig) -> float:
    return math.inf if config.budget_minutes is None else 60 * config.budget_minutes


def is_over(config: RunConfig, step: int, spent_seconds: float) -> bool:
    return step == config.steps or spent_seconds >= budget_seconds(config)


def stop_if_diverged(values: dict[str, float], step: int, finite_step: int, run_dir, checkpoints: Checkpoints) -> None:
    if not np.isfinite(values["loss"]) or not np.isfinite(values["grad_norm"]):
        saved = checkpoints.latest_step()
        way_out = f"{run_dir} holds step {saved}, from before" if saved else "no checkpoint was made yet"
        raise Diverged(
            f"the loss must stay finite: it is {values['loss']} and the gradient norm {values['grad_norm']} at step "
            f"{step}; it broke after step {finite_step}. {way_out}. A lower learning rate, a longer "
            f"warm-up or a smaller optimizer.clip_norm often helps."
        )


def describe(data: RunData) -> str:
    manifests = [store.manifest for store in data.stores]
    train, test = (
        {what: sum(m["splits"][split][what] for m in manifests) for what in ("documents", "tokens")}
        for split in ("train", "test")
    )
    counts = {kind: sum(m["dropped"][kind] for m in manifests) for kind in manifests[0]["dropped"]}
    dropped = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    rows = sum(plan.rows_per_epoch for plan in data.train_plans)
    fill = sum(plan.rows_per_epoch * plan.fill_rate for plan in data.train_plans) / rows
    return (
        f"data: {train['documents']:,} documents, {train['tokens']:,} tokens; held out {test['documents']:,} and "
        f"{test['tokens']:,}{'; dropped ' + dropped if dropped else ''}; vocabulary {data.tokenizer.vocab_size:,}; "
        f"{rows:,} rows an epoch, {fill:.1%} full"
    )


def describe_stages(config: RunConfig) -> str:
    shapes = {
        (s.batch_size, T, s.row_length) for s in config.stages for T in (*config.data.buckets, s.row_length)
    }
    parts = [f"{s.batch_size} rows of {s.row_length} up to step {s.end_step}" for s in config.stages]
    return f"batches: {', '.join(parts)}; the step is compiled for {len(shapes)} shapes, each when it comes"


def describe_mesh(mesh) -> str:
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} {jax.devices()[0].device_kind} device{'s' * (mesh.size > 1)}{': ' + axes if axes else ''}"


def main() -> None:
    with failing_clearly(Diverged):
        config = parse_run_config(sys.argv[1:], default="configs/quickstart.py")
        metrics = train(config)
        if metrics is not None and jax.process_count() == 1:
            show_report(config, metrics, train)
        elif metrics is not None and jax.process_index() == 0:
            print("held-out text:", ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


if __name__ == "__main__":
    main()
