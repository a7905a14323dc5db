"""Checkpoints through Orbax. Each stands alone: parameters, optimizer state, and the run's settings as JSON.

RUN_DIR/checkpoints/STEP/params       float32 parameters, by path
RUN_DIR/checkpoints/STEP/optimizer    step and optimizer state
RUN_DIR/checkpoints/STEP/run          {config, tokenizer, label_names, step, spent_seconds}, which locates the data too
"""

import json
import logging
import pathlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from flax_encoder.training.step import TrainState


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. The message names it, the reason and a way out."""


@contextmanager
def _explained(doing: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever Orbax, TensorStore or the disk raises, the user needs the same to go on
        raise CheckpointError(f"{doing}: {type(error).__name__}: {error}") from error


class Checkpoints:
    """The checkpoints of one run, the last `keep` of them. A save is atomic: killed half-way, it never was.

    A checkpoint that is not wanted any more is deleted only after a newer one is whole.
    """

    def __init__(self, run_dir: pathlib.Path, keep: int):
        self._folder = (run_dir / "checkpoints").resolve()
        # Orbax reports saves and errors at length through this logger; ours says what a person needs.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        # Made in the background, a folder that cannot be made leaves threads that wait for it for minutes.
        context = ocp.Context(async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False))
        # Orbax tidies up in a thread for which it waits at the first save: in a program that ends before that, as one
        # that is refused, the thread fails, at length. So only where an interrupted save left something.
        has_debris = any(not p.name.isdigit() for p in self._folder.glob("*"))
        self._orbax = ocp.training.Checkpointer(
            self._folder,
            context=context,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=has_debris,
        )
        self._saving: int | None = None

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's; Orbax itself counts those that are under way or have failed."""
        return max((int(p.name) for p in _whole_checkpoints(self._folder)), default=None)

    def save(self, state: TrainState, step: int, run: dict[str, Any]) -> None:
        """Write in the background, once the previous save is whole; its error is raised here."""
        items = {
            "params": state.params,
            "optimizer": {"step": state.step, "opt_state": state.opt_state},
            "run": {"json": json.dumps(run | {"step": step})},
        }
        self.wait()
        if step == self.latest_step():
            return
        self._saving = step
        with self._saving_explained():
            self._orbax.save_checkpointables_async(step, items, force=True)

    @contextmanager
    def _saving_explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            latest = self.latest_step()
            raise CheckpointError(
                f"checkpoint {self._folder / str(self._saving)} could not be written, "
                f"{'there is none before it' if latest is None else f'the last whole one is step {latest}'}; free some "
                f"space and run the same command again: {type(error).__name__}: {error}"
            ) from error

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a step, on the shardings of `like`, which may be another mesh than it was saved from."""
        optimizer = {"step": like.step, "opt_state": like.opt_state}
        with _explained(f"checkpoint {self._folder / str(step)} could not be read"):
            found = self._orbax.load_checkpointables(step, {"params": like.params, "optimizer": optimizer})
        return TrainState(found["optimizer"]["step"], found["params"], found["optimizer"]["opt_state"])

    def wait(self) -> None:
        """Return when the last save is whole; its error is raised here."""
        with self._saving_explained():
            self._orbax.wait()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *exc_info: object) -> None:
        try:
            self.wait()
        except CheckpointError:
            if kind is None:  # or else the first error is the one to hear of
                raise
        finally:
            self._orbax.close()


def _whole_checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    # Saves under way have other names; only whole checkpoints are plain numbers.
    return [p for p in folder.glob("*") if p.name.isdigit() and (p / "params").is_dir()]


def _checkpoint_folder(path: pathlib.Path) -> pathlib.Path:
    """A checkpoint, or the newest one of a run folder.

    Raises:
      CheckpointError: there is none.
    """
    if (path / "params").is_dir():
        return path.resolve()
    steps = _whole_checkpoints(path / "checkpoints")
    if not steps:
        raise CheckpointError(
            f"no checkpoint in {path}. Give a run folder (it has a folder `checkpoints`) or one checkpoint in it."
        )
    return max(steps, key=lambda p: int(p.name)).resolve()


def read_run(path: pathlib.Path) -> dict[str, Any]:
    """What a checkpoint, or a run's newest one, says of its run: {config, tokenizer, label_names, step, ...}."""
    folder = _checkpoint_folder(path)
    with _explained(f"checkpoint {folder} could not be read"):
        return json.loads(ocp.load_checkpointables(folder, {"run": None})["run"]["json"])


def read_params(path: pathlib.Path, like: Any | None = None) -> Any:
    """The parameters, on the shardings of `like`; without it as they were saved, on one device."""
    folder = _checkpoint_folder(path)
    with _explained(f"checkpoint {folder} could not be read"):
        if like is None:
            metadata = ocp.checkpointables_metadata(folder).metadata["params"]
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), metadata)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ocp.load_checkpointables(folder, {"params": like})["params"]
