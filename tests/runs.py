"""Runs of train.py for tests: a small config, the command for it, a process of it, and what it logged."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

from flax_encoder.commands.recipe import load_recipe
from flax_encoder.config import DataConfig, EncoderConfig, MeshConfig, OptimizerConfig, RunConfig, differences
from flax_encoder.training.run_log import read_metrics

ROOT = pathlib.Path(__file__).parents[1]
WORDS = [
    "the", "list", "returns", "a", "value", "of", "each", "item", "in", "order", "and", "then", "calls", "the", "given",
    "function", "once", "more",
]  # fmt: skip
TINY = RunConfig(
    steps=24,
    batch_size=8,
    log_every=3,
    checkpoint_every=6,
    mesh=MeshConfig(data=1),
    model=EncoderConfig(
        num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, position="rope", norm_placement="pre", norm_epsilon=1e-6
    ),
    data=DataConfig(vocab_size=256, row_length=32, held_out_rate=0.1, text_unit="line"),
    optimizer=OptimizerConfig(learning_rate=3e-3),
)


def with_fields(config: RunConfig, **fields) -> RunConfig:
    """`replace` that reaches into sections: model__dtype="bfloat16"."""
    for name, value in fields.items():
        section, _, inner = name.partition("__")
        value = dataclasses.replace(getattr(config, section), **{inner: value}) if inner else value
        config = dataclasses.replace(config, **{section: value})
    return config


def tiny(corpus: pathlib.Path, run_dir: pathlib.Path, **fields) -> RunConfig:
    return with_fields(TINY, run_dir=str(run_dir), data__source=str(corpus / "lines.txt"), **fields)


def losses(run_dir: pathlib.Path) -> dict[int, tuple[float, float]]:
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in read_metrics(run_dir) if "loss" in line}


def assert_same_losses(run_dir: pathlib.Path, other: pathlib.Path) -> None:
    """At the same steps, but for the order of float32 sums."""
    got, want = losses(run_dir), losses(other)
    assert got.keys() == want.keys()
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=2e-5)


def command(config: RunConfig, *extra: str) -> list[str]:
    """The command line that gives this config, from the quickstart recipe."""
    flags = []
    for name, (_, value) in differences(load_recipe(str(ROOT / "configs/quickstart.py")), config).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            head, _, tail = flag[2:].rpartition(".")
            flags.append(f"--{head}{'.' if head else ''}{'' if value else 'no-'}{tail}")
        else:
            flags += [flag, str(value)]
    return [sys.executable, str(ROOT / "train.py"), *flags, *extra]


def environment(devices: int = 1) -> dict[str, str]:
    """For a process of so many virtual devices, which no cluster has started."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "KUBERNETES_"))}
    flags = f"--xla_force_host_platform_device_count={devices}"
    return own | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "COLUMNS": "100"}


def run(arguments: list[str], devices: int = 1, status: int = 0) -> str:
    done = subprocess.run(arguments, cwd=ROOT, env=environment(devices), capture_output=True, text=True, timeout=500)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def start(config: RunConfig, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(command(config), cwd=ROOT, env=environment() | variables, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


def wait_for_step(process: subprocess.Popen, run_dir: pathlib.Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while not any(at >= step for at in losses(run_dir)):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
