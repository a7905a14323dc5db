"""How devices become a mesh, and which rows of a batch a process has."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from flax_encoder.config import ConfigError, MeshConfig
from flax_encoder.training.sharding import make_mesh, rows_left_whole, rows_of_process, slices_along

AXES = ("data", "fsdp", "tensor", "context")


@dataclasses.dataclass(frozen=True)
class Device:
    """What of a device a layout reads."""

    id: int
    slice_index: int = 0
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "made up"


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(1, -1, 2), (1, 4, 2, 1)),
        (MeshConfig(2, 1, -1, 2), (2, 1, 2, 2)),
        (MeshConfig(1, 2, 1, -1), (1, 2, 1, 4)),
    ],
)
def test_one_axis_takes_the_devices_that_the_others_leave(config, sizes):
    assert tuple(make_mesh(config).shape.values()) == sizes


@pytest.mark.parametrize(
    ("sizes", "num_slices", "across"),
    [
        ((8, 1, 1, 1), 2, (2, 1, 1, 1)),
        ((2, 8, 2, 1), 4, (2, 2, 1, 1)),
        ((1, 16, 1, 2), 4, (1, 4, 1, 1)),
        ((6, 1, 1, 4), 3, (3, 1, 1, 1)),
        ((4, 2, 1, 1), 1, (1, 1, 1, 1)),
    ],
)
def test_rows_and_no_other_axis_lie_across_slices(sizes, num_slices, across):
    assert tuple(slices_along(dict(zip(AXES, sizes, strict=True)), num_slices).values()) == across


def test_slices_that_would_share_rows_are_refused():
    with pytest.raises(ConfigError, match=r"got data 1 x fsdp 2 for 4 slices. Give --mesh.data 4"):
        slices_along({"data": 1, "fsdp": 2, "tensor": 4, "context": 1}, 4)


@pytest.mark.parametrize(("length", "said"), [(24, None), (20, "rows of 20 tokens .* --data.target-length 24 would")])
def test_a_decoders_rows_that_context_does_not_divide_are_said_to_stay_whole(length, said):
    batch = {"segment_ids": np.zeros((8, 16)), "decoder_segment_ids": np.zeros((8, length)), "targets": np.zeros(8)}
    line = rows_left_whole(batch, make_mesh(MeshConfig(context=8)))
    assert line is None if said is None else re.search(said, line)


def test_devices_of_one_slice_are_neighbours_in_the_mesh():
    """Though they are listed in any order: a row's devices are of one slice, and so are those of `fsdp` here."""
    devices = [Device(i, slice_index=i % 2) for i in range(16)]
    mesh = make_mesh(MeshConfig(data=4, fsdp=2, context=2), devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices == np.repeat([0, 1], 2)[:, None, None, None]).all()
    assert len({device.id for device in mesh.devices.flat}) == 16


@pytest.mark.parametrize(
    ("shape", "devices_a_process", "rows"),
    [
        ((4, 2, 1, 1), 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((2, 1, 4, 1), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((1, 1, 2, 4), 4, [(0, 1), (0, 1)]),
        ((2, 2, 1, 2), 4, [(0, 2), (1, 2)]),
    ],
)
def test_a_process_has_the_rows_of_its_devices(shape, devices_a_process, rows, monkeypatch):
    devices = [Device(i, process_index=i // devices_a_process) for i in range(8)]
    mesh = Mesh(np.array(devices, object).reshape(shape), AXES)
    for process, want in enumerate(rows):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert rows_of_process(mesh) == want


def test_a_process_with_rows_from_several_places_is_refused():
    devices = [Device(i, process_index=i % 2) for i in range(8)]
    with pytest.raises(ConfigError, match=r"got parts 0, 2, 4, 6 of 8 for process 0"):
        rows_of_process(Mesh(np.array(devices, object).reshape(8, 1, 1, 1), AXES))
