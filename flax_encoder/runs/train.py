"""A training run, top to bottom: open it, step, log, evaluate, save, end.

The data's way: `OpenedRun.data` gives packed rows, `put_batch` lays them on the mesh, a program makes one update of the
state, and its metrics are fetched one log interval late (`StepLog`). The same config again resumes the run.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flax_encoder.config import ConfigError, RunConfig, to_dict
from flax_encoder.config.phases import describe_phase, turn_of, with_ended
from flax_encoder.config.rules import counted
from flax_encoder.data.sources.records import Say
from flax_encoder.data.sources.remote import is_remote
from flax_encoder.runs.best import best_evaluation, check_metric
from flax_encoder.runs.evaluate import Evaluations
from flax_encoder.runs.goodput import Goodput
from flax_encoder.runs.length import budget_seconds, is_evaluation_due, is_over
from flax_encoder.runs.opened import check_batches, open_run
from flax_encoder.runs.skipping import Skipping
from flax_encoder.runs.step_log import StepLog
from flax_encoder.runs.watch import Profile, Watchdog
from flax_encoder.tasks import check_task
from flax_encoder.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    DamagedCheckpoint,
    checkpoint_steps,
    read_params,
)
from flax_encoder.training.host import run_folder, run_lock
from flax_encoder.training.run_log import Clock, RunLog, read_metrics
from flax_encoder.training.runtime import StopSignals, cache_hits, free_temporaries, join_processes, set_up_runtime
from flax_encoder.training.sharding import make_mesh, put_batch, rows_left_whole, rows_of_process
from flax_encoder.training.step import StepMetrics
from flax_encoder.training.trackers import Tracker, make_trackers

STEPS_IN_FLIGHT = 2  # how far the host runs ahead of the device: enough to keep it busy, little enough to stop soon


def train(config: RunConfig, trackers: Sequence[Tracker] = ()) -> dict[str, float] | None:
    """Train, or go on training, to the last step or the end of the budget.

    Args:
      trackers: more of them than `config.trackers` names.

    Returns:
      the final held-out metrics, `eval/...`, and those of a test, `test/...`; None if a signal stopped it.

    Raises:
      ConfigError: settings that cannot be, or not on this run's folder or mesh.
      DataError: data that cannot be read or learnt from.
      Diverged: a loss or gradient that is not finite; the checkpoints from before it are whole.
    """
    check_task(config)
    if is_remote(config.run_dir):
        raise ConfigError(f"a run lies in a local folder: got {config.run_dir}. The command `train` copies it there.")
    trackers = [*make_trackers(config.trackers), *trackers]
    join_processes(config.mesh.num_processes)
    set_up_runtime()
    mesh = make_mesh(config.mesh)
    if config.batch_texts is None:  # or else it is made to fit
        check_batches(config, mesh)
    run_dir = pathlib.Path(config.run_dir)
    say = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda message: None
    kept = config.keep_checkpoints, config.keep_every
    with run_folder(run_dir), run_lock(run_dir), Checkpoints(run_dir, *kept) as checkpoints:
        while True:
            try:
                return _train_from(config, checkpoints.resumable_step(say), run_dir, checkpoints, mesh, trackers)
            except DamagedCheckpoint as damage:  # found as its largest files were read; there may be an older one
                checkpoints.set_aside(damage, say)


def _train_from(
    config: RunConfig, latest: int | None, run_dir: pathlib.Path, checkpoints: Checkpoints, mesh: Mesh,
    trackers: Sequence[Tracker],
) -> dict[str, float] | None:
    """The run from its checkpoint at step `latest`, or from its beginning."""
    if latest == 0:
        raise ConfigError(
            f"a run begins in a folder of its own: {run_dir} holds an imported model. Give another --run-dir; "
            f"--init-from {run_dir} starts from that model."
        )
    start, is_main = latest or 0, jax.process_index() == 0
    told, goodput = {"trackers": trackers, "config": to_dict(config)}, Goodput()
    with RunLog(run_dir, steps=config.steps, resume_step=start, is_main=is_main, **told) as log, jax.set_mesh(mesh):
        say: Say = log.say
        while True:
            try:
                return _steps(config, start, run_dir, checkpoints, log, say, mesh, goodput)
            except PhaseEnded as ended:
                start, say = ended.step, lambda message: None  # data and model are those that were told of


class PhaseEnded(Exception):
    """The clock ended a phase with update `step`, whose checkpoint says where the next phase begins."""

    def __init__(self, step: int):
        self.step = step


def _steps(
    config: RunConfig, start: int, run_dir: pathlib.Path, checkpoints: Checkpoints, log: RunLog, say: Say, mesh: Mesh,
    goodput: Goodput,
) -> dict[str, float] | None:  # fmt: skip
    """The steps after `start`, with the folder, the log and the mesh open.

    Args:
      say: what to do with the lines that tell what is opened.

    Raises:
      PhaseEnded: the clock ended a phase, and the run goes on with the next.
    """
    made_before = max((line["step"] for line in read_metrics(run_dir)), default=0)
    run = open_run(config, start, run_dir, checkpoints, say, mesh, goodput)
    config, task, data, state = run.config, run.task, run.data, run.state
    rows_per_epoch = data.rows_per_epoch
    held_out = Evaluations(task, data, config, run.programs, run.shardings, log, mesh, start)
    if config.keep_best is not None and not held_out.by_step:  # a wrong name is heard of now, not after an epoch
        check_metric(config.keep_best, held_out.evaluate(state.params, start, most=1))

    def best():
        return best_evaluation(held_out.by_step, config.keep_best)

    clock, budget = Clock(run.record.spent_seconds), budget_seconds(config)
    is_finished = start > 0 and is_over(config, start, clock.spent_seconds, best())
    log.steps, log.is_finished = config.steps, is_finished
    skipping = Skipping(config, run.record, STEPS_IN_FLIGHT, log.say)
    logged = StepLog(task, config, rows_per_epoch, log, clock, checkpoints, start, skipping, data.train)
    in_flight: collections.deque[tuple[int, StepMetrics]] = collections.deque()
    compiled: dict[Any, Any] = {}
    timeline, step, turn = config.timeline, start, turn_of(config.phases) or math.inf
    begins = {at + 1: number for number, at in enumerate((0, *timeline.phase_ends[:-1])) if config.phases}

    def say_stopped(step: int) -> None:
        why = stop.requested or "another process's signal"
        log.say(f"stopped by {why} after step {step}, which is saved. The same command resumes.")
        log.say(f"time went {goodput}")

    def count_skipped() -> None:
        while skipping.is_possible and in_flight:
            skipping.ended(*in_flight.popleft())
        logged.check_skipped()

    with (
        StopSignals() as stop,
        contextlib.closing(data.train.iterate(start, config.data.workers)) as batches,
        Watchdog(config.stall_seconds, goodput),
        Profile(config.profile, run_dir) as profile,
    ):
        if not is_finished and is_evaluation_due(config, rows_per_epoch, start) and start not in held_out.by_step:
            with clock.paused(), goodput.during("evaluation"):  # what the signal that ended the run left out
                if held_out.evaluate(state.params, start, stop=stop) is None:
                    return say_stopped(start)
        last_step = start if is_over(config, start, clock.spent_seconds, best()) else config.steps
        for step in range(start + 1, last_step + 1):
            if step in begins:
                log.say(f"begins {describe_phase(config.phases, timeline, begins[step])}")
            program = run.programs.of(timeline.stage_of(step - 1))
            goodput.enter("step" if step > made_before else "lost_work")
            with clock.waiting(), goodput.during("data_wait"):
                rows = next(batches)
            progress = None if budget == math.inf else clock.spent_seconds / budget
            marks = _marks(rows, progress, stop.requested is not None, skipping.marks(step))
            batch = put_batch(rows | marks, mesh)  # while the device has the last steps to do
            clock.count(rows, rows_of_process(mesh)[1])
            shape = (id(program), *sorted((name, x.shape) for name, x in rows.items()))
            if shape not in compiled:  # a few times in a run at most
                if whole := rows_left_whole(rows, mesh):
                    log.say(whole)
                with clock.paused(), goodput.during("compile"):
                    compiled[shape] = _compile(program.step_fn, state, batch, rows["tokens"].shape, log)
            if in_flight:
                free_temporaries(in_flight[-1][1])
            profile.before(step)
            state, step_metrics = compiled[shape](state, batch)
            profile.after(step, step_metrics)
            goodput.made(step)
            clock.steps += 1
            in_flight.append((step, step_metrics))
            is_spent = is_turn = False
            is_asked = jax.process_count() == 1 and stop.requested is not None
            if len(in_flight) > STEPS_IN_FLIGHT:
                done_step, done = jax.block_until_ready(in_flight.popleft())
                skipping.ended(done_step, done)
                logged.check_skipped()
                spent = 0.0 if done.progress is None else float(done.progress)
                is_spent, is_turn = spent >= 1, spent >= turn
                is_asked |= done.stop is not None and float(done.stop) > 0

            is_end = is_spent or step == config.steps
            if step % config.log_every == 0 or is_end:
                logged.add(step, step_metrics)
            is_last = is_asked or is_end or is_turn
            is_saved = is_last or step % config.checkpoint_every == 0
            if is_saved or step % config.log_every == 0:
                count_skipped()
            logged.write(keep=0 if is_saved else 1)  # all before a save, so that a resumed run's log is whole
            if is_evaluation_due(config, rows_per_epoch, step) and not is_last:
                with clock.paused(), goodput.during("evaluation"):
                    metrics = held_out.evaluate(state.params, step, stop=stop)
                if metrics is None:
                    is_last = is_saved = True
                else:
                    log.say("  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
                    now_best = best()
                    is_end = now_best is not None and now_best.since == config.patience
                    is_saved |= is_end or (now_best is not None and now_best.step == step)
                logged.write(keep=0 if is_saved else 1)
            if is_saved:
                count_skipped()
                logged.check(step, step_metrics)
                spent_seconds = max(clock.spent_seconds, budget if is_spent else 0.0)
                record, now_best = run.record.replace(step=step, spent_seconds=spent_seconds), best()
                record = skipping.in_record(record, step)
                if is_turn:
                    phases = with_ended(config.phases, step)
                    record = record.replace(config=dataclasses.replace(config, phases=phases))
                with goodput.during("save"):
                    save = functools.partial(
                        checkpoints.save, state, step, record.to_json(), best=now_best and now_best.step
                    )
                    _do_or_say(checkpoints.wait, log)  # the one before
                    save() if is_last or is_end else _do_or_say(save, log)
            if is_end:
                break
            if is_last:
                with goodput.during("save"):
                    checkpoints.wait()
                if is_turn and not is_asked:
                    raise PhaseEnded(step)
                return say_stopped(step)
    with goodput.during("save"):
        checkpoints.wait()
    log.end_progress()

    # What the run ends with: its last parameters, or the best by what it was to keep. The test chose neither.
    params = state.params
    goodput.enter("evaluation")
    metrics = held_out.by_step[step] if held_out.made_at == step else held_out.evaluate(params, step)
    kept = {at: found for at, found in held_out.by_step.items() if at in checkpoint_steps(run_dir)}
    chosen = best_evaluation(kept, config.keep_best)
    if chosen is not None:
        of_all = f"of {counted(len(held_out.by_step), 'evaluation')}"
        log.say(f"{config.keep_best} was best after step {chosen.step}, {of_all}: {chosen.value:.4f}")
        if chosen.step != step:
            params = read_params(run_dir / "checkpoints" / str(chosen.step), params)
            metrics = held_out.by_step[chosen.step]
    made_after = step if chosen is None else chosen.step
    tested = held_out.evaluate(params, step, name="test", made_after=made_after) if data.test else None
    if last_step > start:  # a finished run that only reports again has spent nothing
        log.write(step, {f"goodput/{name}": share for name, share in goodput.shares().items()})
        log.say(f"time went {goodput}")
    return (metrics or {}) | (tested or {})


def _do_or_say(act: Callable[[], None], log: RunLog) -> None:
    """Where a checkpoint cannot be written, training goes on, and the next is tried when its time has come; but of
    several processes, which must know the same of each save."""
    try:
        act()
    except CheckpointError as error:
        if jax.process_count() > 1:
            raise
        log.say(f"{error}\ntraining goes on; the run tries again when the next checkpoint is due")


def _marks(
    rows: dict[str, np.ndarray], progress: float | None, is_asked: bool, more: dict[str, float]
) -> dict[str, np.ndarray]:
    """What a batch tells the step of this process: the share of the budget that is spent, whether a signal came, and
    what may be skipped.

    Processes' clocks differ, and so does when a signal comes: the step takes the largest, and all end by what it says.
    """
    marks = more if progress is None else more | {"progress": progress}
    if jax.process_count() > 1:
        marks = marks | {"stop": float(is_asked)}
    return {name: np.full((len(rows["tokens"]), 1), value, np.float32) for name, value in marks.items()}


def _compile(step_fn: Any, state: Any, batch: Any, shape: tuple[int, ...], log: RunLog) -> Any:
    with cache_hits() as hits:
        began = time.monotonic()
        compiled = step_fn.lower(state, batch).compile()
        how, seconds = "loaded" if hits else "compiled", time.monotonic() - began
    log.say(f"{how} the step for {counted(shape[0], 'row')} of {shape[1]} tokens in {seconds:.1f} s")
    return compiled
