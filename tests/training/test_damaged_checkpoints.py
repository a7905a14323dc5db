"""A checkpoint that is not what was written is never read in silence, nor lost; and any folder will do for a run."""

import json
import os
import pathlib
import shutil

import pytest

from flax_encoder.commands import main
from flax_encoder.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    DamagedCheckpoint,
    read_params,
    read_run,
    verify_checkpoints,
)
from flax_encoder.training.checksums import MANIFEST, write_manifest
from tests.training.test_checkpoint import RUN, as_numpy, assert_same, make_state, restore, save, step_folders

PLACES = ["exp [1]", "a*b?", "back\\slash", "r\u00fcn \u6f22", os.fsdecode(b"not\xffutf8"), "[[", "plain"]


@pytest.mark.parametrize("name", PLACES)
def test_a_run_folder_of_any_name_is_saved_read_and_renamed(tmp_path, name):
    run_dir = tmp_path / name
    save(run_dir, 3, 5, 7, keep=2)
    assert step_folders(run_dir) == [5, 7]
    assert_same(restore(run_dir, 7, make_state(0)), as_numpy(make_state(7)))
    assert read_run(run_dir)["step"] == 7
    run_dir.rename(tmp_path / "renamed")
    assert_same(read_params(tmp_path / "renamed"), as_numpy(make_state(7).params))
    assert [result.num_bytes > 0 for _, result in verify_checkpoints(tmp_path / "renamed")] == [True, True]


def largest(checkpoint: pathlib.Path, item: str) -> pathlib.Path:
    return max((p for p in (checkpoint / item).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: pathlib.Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: pathlib.Path):
    path.write_bytes(path.read_bytes()[:100])


DAMAGES = {"flip": flip, "cut": cut, "delete": pathlib.Path.unlink}


@pytest.mark.parametrize(
    ("item", "damage", "is_large"),
    [(item, damage, False) for item in ("params", "optimizer", "run", MANIFEST) for damage in DAMAGES.values()]
    + [("params", flip, True), ("optimizer", flip, True)],
)
def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_the_damaged_are_kept(
    tmp_path, monkeypatch, item, damage, is_large
):
    if is_large:  # compared while it is read
        monkeypatch.setattr("flax_encoder.training.checksums._SMALL_BYTES", 0)
    save(tmp_path, 1, 2, 3, keep=9)
    path = tmp_path / "checkpoints" / "3" / item
    damage(path if item == MANIFEST else largest(path.parent, item))
    heard, found = [], None
    with Checkpoints(tmp_path, 9) as checkpoints:
        while found is None:
            step = checkpoints.resumable_step(heard.append)
            try:
                found = checkpoints.restore(step, make_state(0))
            except DamagedCheckpoint as error:
                checkpoints.set_aside(error, heard.append)
    assert step == 2 and read_run(tmp_path)["step"] == 2
    assert_same(found, as_numpy(make_state(2)))
    assert len(heard) == 1 and "\n" not in heard[0]
    assert "checkpoints/3 is damaged: " in heard[0] and "kept as 3.damaged" in heard[0]
    assert (tmp_path / "checkpoints" / "3.damaged").is_dir() and step_folders(tmp_path) == [1, 2]
    save(tmp_path, 3, keep=9)  # and again: both are kept
    damage(path if item == MANIFEST else largest(path.parent, item))
    with Checkpoints(tmp_path, 9) as checkpoints, pytest.raises(DamagedCheckpoint) as raised:
        checkpoints.restore(3, make_state(0))
    with Checkpoints(tmp_path, 9) as checkpoints:
        checkpoints.set_aside(raised.value)
    assert (tmp_path / "checkpoints" / "3.damaged-2").is_dir()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        cut(largest(tmp_path / "checkpoints" / str(step), "params"))
    for _ in range(2):
        with Checkpoints(tmp_path, 2) as checkpoints, pytest.raises(CheckpointError, match=r"1\.damaged, 2\.damaged"):
            checkpoints.resumable_step()


@pytest.mark.parametrize("read", [read_run, read_params])
def test_a_damaged_checkpoint_is_not_read_and_the_one_before_it_is_named(tmp_path, read):
    save(tmp_path, 1, 3)
    flip(largest(tmp_path / "checkpoints" / "3", "run" if read is read_run else "params"))
    with pytest.raises(DamagedCheckpoint, match=r"/3 could not be read: it is damaged: .*checkpoints/1 is the"):
        read(tmp_path)
    read(tmp_path / "checkpoints" / "1")


def as_before(checkpoint: pathlib.Path):
    """A checkpoint as earlier versions left it: no manifest, and no word of one."""
    (checkpoint / MANIFEST).unlink()
    metadata = json.loads((checkpoint / "_CHECKPOINT_METADATA").read_text())
    (checkpoint / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata | {"custom_metadata": {}}))


def test_a_checkpoint_from_before_manifests_is_read_and_its_damage_is_one_line(tmp_path):
    save(tmp_path, 1, 3)
    for step in ("1", "3"):
        as_before(tmp_path / "checkpoints" / step)
    assert_same(restore(tmp_path, 3, make_state(0)), as_numpy(make_state(3)))
    assert_same(read_params(tmp_path), as_numpy(make_state(3).params))
    assert [result for _, result in verify_checkpoints(tmp_path)] == [None, None]
    for path in (tmp_path / "checkpoints" / "3" / "params").rglob("d/*"):
        path.write_bytes(b"")
    with Checkpoints(tmp_path, 2) as checkpoints, pytest.raises(CheckpointError) as raised:
        checkpoints.restore(checkpoints.resumable_step(), make_state(0))
    assert "\n" not in str(raised.value) and "without checksums" in str(raised.value)
    assert "checkpoints/1 is the one before it" in str(raised.value)


def test_what_a_killed_save_or_deletion_left_is_no_checkpoint(tmp_path):
    save(tmp_path, 3)
    folder = tmp_path / "checkpoints"
    for name in ("7.saving", "7.saving.orbax-checkpoint-tmp", "9.deleting"):
        shutil.copytree(folder / "3", folder / name)
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.resumable_step() == checkpoints.latest_step() == 3
    assert [p.name for p in folder.iterdir()] == ["3"]


def test_the_first_save_is_read_back(tmp_path, monkeypatch):
    def spoil(saved):
        write_manifest(saved)
        flip(largest(saved, "params"))

    monkeypatch.setattr("flax_encoder.training.checkpoint.write_manifest", spoil)
    with Checkpoints(tmp_path, 2) as checkpoints, pytest.raises(CheckpointError, match=r"checkpoints/1 could not be"):
        checkpoints.save(make_state(1), 1, RUN)
        checkpoints.wait()


def test_verify_tells_which_checkpoints_are_whole(tmp_path, capsys):
    save(tmp_path, 1, 2, 3, keep=9)
    as_before(tmp_path / "checkpoints" / "1")
    main(["verify", str(tmp_path)])
    assert capsys.readouterr().out.count(": whole: ") == 2
    flip(largest(tmp_path / "checkpoints" / "3", "optimizer"))
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(tmp_path), "--json"])
    assert ended.value.code == 1
    states = [about["state"] for about in json.loads(capsys.readouterr().out)]
    assert states == ["no checksums", "whole", "damaged"]
