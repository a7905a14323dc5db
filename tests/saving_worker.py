"""Saves checkpoints of made-up states without end, to be hurt meanwhile: a round for each line on standard input.

Importing takes seconds, and a round less than one: so each round is a fork of a process that has imported everything
and started nothing. A line is JSON {"run_dir", "log", "file_limit"}; what comes of it is written to the log, JSON too.
"""

import itertools
import json
import os
import pathlib
import resource
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from flax_encoder.training.checkpoint import CheckpointError, Checkpoints, DamagedCheckpoint
from flax_encoder.training.step import TrainState

RUN = {"config": {"steps": 7}, "tokenizer": "{}", "label_names": None}


def state_of(step: int) -> TrainState:
    """Known from its step; one file of it is large enough to be hashed by threads."""
    draw = np.random.default_rng(step)
    params = {"kernel": draw.standard_normal((640, 512), np.float32), "bias": draw.standard_normal(7, np.float32)}
    return jax.tree.map(jax.numpy.asarray, TrainState(np.int32(step), params, {"mean": params["bias"] + 1}))


def is_same(got: TrainState, want: TrainState) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), got, want))


def save_on(run_dir: pathlib.Path, log: pathlib.Path, file_limit: int | None) -> None:
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    said: list[str] = []

    def tell(**what) -> None:
        with log.open("a") as file:
            file.write(json.dumps(what) + "\n")

    try:
        with Checkpoints(run_dir, 3) as checkpoints:
            state = None
            while state is None:  # as training does
                start = checkpoints.resumable_step(said.append) or 0
                try:
                    state = checkpoints.restore(start, state_of(0)) if start else state_of(0)
                except DamagedCheckpoint as damage:
                    checkpoints.set_aside(damage, said.append)
            tell(start=start, is_right=is_same(state, state_of(start)), said=said)
            for step in itertools.count(start + 1):
                checkpoints.save(state_of(step), step, RUN)
                tell(saving=step)
    except CheckpointError as error:
        tell(error=str(error))


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if (child := os.fork()) == 0:
            save_on(pathlib.Path(asked["run_dir"]), pathlib.Path(asked["log"]), asked["file_limit"])
            os._exit(0)
        print(child, flush=True)
        os.waitpid(child, 0)
        print("ended", flush=True)
