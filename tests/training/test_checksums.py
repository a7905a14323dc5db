"""A folder with a manifest: any change of any file is told, and nothing else is."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_encoder.training import checksums
from flax_encoder.training.checksums import MANIFEST, Damaged, Verification, write_manifest

FILES = {"a": b"x" * 5000, "part/b": bytes(range(256)) * 8, "part/empty": b"", "other/c": b"\x00" * 33}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder)
    return folder


def verify(folder, parts=None):
    verification = Verification(folder, parts)
    verification.finish()
    return verification


def test_what_was_written_is_whole(folder):
    assert set(verify(folder).files) == set(FILES)
    assert verify(folder, ["part"]).num_bytes == 2048


@pytest.mark.parametrize("small_bytes", [0, 2**20])  # compared by threads, and at once
@settings(max_examples=60, deadline=None)
@given(st.sampled_from([name for name in [*FILES, MANIFEST] if FILES.get(name) != b""]), st.data())
def test_any_flipped_bit_is_told_and_the_file_named(folder, small_bytes, name, data):
    content = (folder / name).read_bytes()
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    (folder / name).write_bytes(changed)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checksums, "_SMALL_BYTES", small_bytes)
            if name == MANIFEST:  # where a blank is another blank, it says the same
                with contextlib.suppress(Damaged):
                    assert verify(folder).files == json.loads(content)["files"]
            else:
                with pytest.raises(Damaged, match=name):
                    verify(folder)
    finally:
        (folder / name).write_bytes(content)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([name for name in FILES if FILES[name]]), st.data())
def test_a_file_of_any_other_length_is_told_with_both(folder, name, data):
    content = FILES[name]
    length = data.draw(st.integers(0, len(content) + 9).filter(lambda n: n != len(content)))
    (folder / name).write_bytes((content + b"more bytes")[:length])
    try:
        with pytest.raises(Damaged, match=rf"{name} has {length:,} bytes, and {len(content):,} were written"):
            Verification(folder)
    finally:
        (folder / name).write_bytes(content)


def test_a_file_that_is_gone_is_told(folder, tmp_path):
    (folder / "part/b").rename(tmp_path / "b")
    try:
        with pytest.raises(Damaged, match=r"part/b cannot be found \(No such file or directory\): 2,048 bytes"):
            Verification(folder)
        assert verify(folder, ["other"]).num_bytes == 33, "what is not asked for is not looked at"
    finally:
        (tmp_path / "b").rename(folder / "part/b")


NO_MANIFESTS = ["", "[]", "{}", "\xff", '{"format": 1, "files": {}}', "[" * 9999, '{"format": 9, "files": {"a": {}}}']


@pytest.mark.parametrize("text", NO_MANIFESTS)
def test_a_manifest_that_is_none_is_damage(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text, "latin-1")
    with pytest.raises(Damaged, match=MANIFEST):
        Verification(tmp_path)


def test_a_folder_without_a_manifest_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        Verification(tmp_path)
