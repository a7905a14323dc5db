"""Weights on disk: both formats, shards, and files made to mislead."""

import json
import os
import pathlib
import pickle
import shutil
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from flax_encoder.published.weights import WeightsError, read_weights, write_weights

RNG = np.random.default_rng(0)
TENSORS = {
    "a.weight": RNG.standard_normal((5, 3)).astype(np.float32),
    "a.bias": RNG.standard_normal(7).astype(ml_dtypes.bfloat16),
    "b": RNG.standard_normal((2, 3, 5)).astype(np.float16),
    "ids": np.arange(11),
    "scalar": np.float32(3.5).reshape(()),
    "none": np.zeros((0, 3), np.float32),
}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype
        np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.parametrize(("limit", "num_shards"), [(1 << 30, 1), (100, 3), (1, 6)])
def test_what_is_written_is_read_whatever_the_shards(tmp_path, limit, num_shards):
    write_weights(tmp_path, TENSORS, max_shard_bytes=limit)
    assert len(list(tmp_path.glob("*.safetensors"))) == num_shards
    assert not list(tmp_path.glob("*.part"))
    assert_same(read_weights(tmp_path), TENSORS)


def test_memory_order_does_not_matter(tmp_path):
    write_weights(tmp_path, {"w": TENSORS["a.weight"].T})
    np.testing.assert_array_equal(read_weights(tmp_path)["w"], TENSORS["a.weight"].T)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_rounds_numbers_and_leaves_integers(tmp_path, dtype):
    write_weights(tmp_path, TENSORS, dtype=dtype)
    got = read_weights(tmp_path)
    assert got["ids"].dtype == np.int64
    assert {x.dtype.name for name, x in got.items() if name != "ids"} == {dtype}
    np.testing.assert_array_equal(got["a.weight"], TENSORS["a.weight"].astype(dtype))


def test_what_does_not_fit_a_dtype_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"big does not fit float16: it holds 70000\.0"):
        write_weights(tmp_path, {"big": np.float32([70_000, 1])}, dtype="float16")


def test_weights_are_not_written_over(tmp_path):
    write_weights(tmp_path, TENSORS)
    with pytest.raises(WeightsError, match=r"has weights already \(model.safetensors\)"):
        write_weights(tmp_path, TENSORS, max_shard_bytes=1)


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
    with pytest.raises(WeightsError, match=r"looked for model.safetensors, .*, pytorch_model.bin"):
        read_weights(tmp_path)


@pytest.mark.parametrize("damage", [
    lambda data: data[:-3], lambda data: data[:5], lambda data: b"", lambda data: data[:60], lambda data: data + b"x",
    lambda data: b"\xff" * 20, lambda data: data.replace(b'"F32"', b'"F99"'),
    lambda data: data.replace(b"[5,3]", b"[5,4]"),
])  # fmt: skip
def test_a_damaged_safetensors_file_is_named(tmp_path, damage):
    write_weights(tmp_path, TENSORS)
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(WeightsError, match=r"model.safetensors is truncated, corrupt or no safetensors file"):
        read_weights(tmp_path)


def _edit_index(folder, edit):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    edit(content["weight_map"])
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(("edit", "message"), [
    (lambda m: m.update(b="model-00009-of-00003.safetensors"), r"names model-00009.*, which is not there"),
    (lambda m: m.update(more=m["b"]), r"must hold more, says .*index.json: it does not"),
    (lambda m: m.pop("ids"), r"holds ids, which .* has nowhere"),
    (lambda m: m.update(b="model-00009-of-00003.safetensors", ids="more.safetensors"),
     r"names model-00009-of-00003.safetensors, more.safetensors, which are not there: .* Fetch all of it again"),
    (lambda m: m.update(b="../other.safetensors"), r"must name weight files beside it: got '\.\./other"),
    (lambda m: m.update(b="other.bin"), r"must name weight files beside it: got 'other.bin'"),
    (lambda m: m.update(b=3), r"must name weight files beside it: got '3'"),
])  # fmt: skip
def test_shards_must_fit_their_index(tmp_path, edit, message):
    write_weights(tmp_path, TENSORS, max_shard_bytes=100)
    _edit_index(tmp_path, edit)
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path)


@pytest.mark.parametrize("folder", ["/home/someone/model/", "C:\\Users\\someone\\model\\", "./", "file:///"])
def test_an_index_may_name_where_its_shards_lay_on_another_machine(tmp_path, folder):
    write_weights(tmp_path, TENSORS, max_shard_bytes=100)
    _edit_index(tmp_path, lambda m: m.update({name: folder + file for name, file in m.items()}))
    if folder.startswith("file"):
        with pytest.raises(WeightsError, match="must name weight files beside it: got 'file:///model-0"):
            read_weights(tmp_path)
        return
    assert_same(read_weights(tmp_path), TENSORS)


def test_a_tensor_in_two_shards_is_named(tmp_path):
    write_weights(tmp_path, {"a": TENSORS["a.weight"], "b": TENSORS["b"]}, max_shard_bytes=1)
    save_file({"a": TENSORS["a.weight"], "b": TENSORS["b"]}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(WeightsError, match=r"00002-of-00002.safetensors holds a, which .* has in model-00001-of-00002"):
        read_weights(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', "{", "[" * 100_000])
def test_what_is_no_index_is_named(tmp_path, content):
    (tmp_path / "pytorch_model.bin.index.json").write_text(content)
    with pytest.raises(WeightsError, match=r"pytorch_model.bin.index.json is no index of weights"):
        read_weights(tmp_path)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_name_that_the_metadata_calls_a_copy_is_there_as_the_tensor_itself(tmp_path, is_sharded):
    """As safetensors.torch.save_model writes tensors that share memory; `format` and the like are no tensors."""
    file = "model-00001-of-00001.safetensors" if is_sharded else "model.safetensors"
    metadata = {"format": "pt", "copy": "b", "other": "absent", "scalar": "b"}
    save_file({"b": TENSORS["b"], "scalar": np.asarray(TENSORS["scalar"])}, tmp_path / file, metadata)
    if is_sharded:
        weight_map = {"b": file, "scalar": file, "copy": file}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(read_weights(tmp_path), {"b": TENSORS["b"], "copy": TENSORS["b"], "scalar": TENSORS["scalar"]})


def test_files_that_safetensors_save_model_writes_are_read(tmp_path):
    torch = pytest.importorskip("torch", reason="torch writes the file")
    from safetensors.torch import save_model

    layers = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 5), "b": torch.nn.Linear(3, 5)})
    layers["b"].weight = layers["a"].weight
    save_model(layers, str(tmp_path / "model.safetensors"))
    got = read_weights(tmp_path)
    assert got.keys() == layers.state_dict().keys()
    np.testing.assert_array_equal(got["a.weight"], got["b.weight"])


def write_raw(folder, tensors):
    """A safetensors file by hand: {name: (dtype, shape, bytes)}."""
    header, data = {}, b""
    for key, (dtype, shape, raw) in tensors.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(("name", "dtype"), [
    ("F8_E4M3", ml_dtypes.float8_e4m3fn), ("F8_E5M2", ml_dtypes.float8_e5m2), ("F8_E8M0", ml_dtypes.float8_e8m0fnu),
])  # fmt: skip
def test_float8_is_read_as_the_numbers_it_stands_for(tmp_path, name, dtype):
    numbers = np.array([[0.5, 1.0, 2.0], [4.0, 8.0, 16.0]], dtype)
    write_raw(tmp_path, {"a": ("F32", [2], np.float32([1, 2]).tobytes()), "w": (name, [2, 3], numbers.tobytes())})
    got = read_weights(tmp_path)
    assert got["w"].dtype == dtype
    np.testing.assert_array_equal(got["w"].astype(np.float32), numbers.astype(np.float32))
    np.testing.assert_array_equal(got["a"], [1, 2])


def test_a_dtype_that_is_not_read_is_named_with_its_tensor(tmp_path):
    write_raw(tmp_path, {"w": ("F4", [4], b"ab")})
    with pytest.raises(WeightsError, match=r"tensor w has dtype F4, which is not read. Convert it in PyTorch"):
        read_weights(tmp_path)


@pytest.mark.parametrize(("file", "message"), [
    ("tf_model.h5", "tf_model.h5 is TensorFlow's; transformers below version 5 converts it: .*from_tf=True"),
    ("flax_model.msgpack", "flax_model.msgpack is Flax's; transformers below version 5 .*from_flax=True"),
    ("onnx/model.onnx", "onnx/model.onnx is a compiled graph"), ("bert.q8.gguf", "bert.q8.gguf is llama.cpp's"),
    ("adapter_model.safetensors", "adapter_model.safetensors is an adapter without the model"),
    ("rust_model.ot", "rust_model.ot is Rust's; take a folder with safetensors"),
    ("model-00001-of-00002.safetensors", "00002.safetensors is one of several shards, without the index of"),
    ("weights.safetensors", "weights.safetensors is safetensors under another name; rename it to model.safetensors"),
    ("best.ckpt", "best.ckpt is perhaps a trainer's pickled checkpoint; if so, rename it to pytorch_model.bin"),
])  # fmt: skip
def test_weights_of_another_kind_are_named_with_the_way_from_them(tmp_path, file, message):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(WeightsError, match=message) as error:
        read_weights(tmp_path)
    assert str(error.value).count(" is ") == 1


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_in_place_of_the_weights_is_named(tmp_path, file):
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(WeightsError, match=rf"{file} is Git LFS's pointer .* run `git lfs pull`"):
        read_weights(tmp_path)


# Pickles by hand: opcodes as PyTorch writes them, and as it never would.

STORAGE_NAMES = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "float16": "HalfStorage",
                 "int64": "LongStorage"}  # fmt: skip


def plain(value):
    return pickle.dumps(value, 2)[2:-1]


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def called(function, *arguments):
    return function + b"(" + b"".join(arguments) + b"tR"


def tensor(key, storage, count, offset, shape, strides, is_legacy=False):
    pid = b"(" + plain("storage") + name("torch", storage) + plain(key) + plain("cpu") + plain(count)
    pid += (plain(None) if is_legacy else b"") + b"tQ"
    hooks = called(name("collections", "OrderedDict"))
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return called(rebuild, pid, plain(offset), plain(shape), plain(strides), plain(False), hooks)


def state_dict(items):
    """An OrderedDict with `_metadata`, as Module.state_dict makes."""
    pairs = b"(" + b"".join(plain(key) + value for key, value in items.items()) + b"u"
    return b"\x80\x02" + called(name("collections", "OrderedDict")) + pairs + plain({"_metadata": {}}) + b"b."


def write_zip(path, data, storages, **extra):
    with zipfile.ZipFile(path, "w", **extra) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        for key, raw in storages.items():
            archive.writestr(f"archive/data/{key}", raw)
        archive.writestr("archive/version", "3\n")


def write_legacy(path, data, storages):
    heads = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    tail = b"".join(struct.pack("<q", x.size) + x.tobytes() for x in storages.values())
    path.write_bytes(b"".join(pickle.dumps(h, 2) for h in heads) + data + pickle.dumps(list(storages), 2) + tail)


def tensors_as_torch_saves(arrays, is_legacy=False):
    """Opcodes of each, a storage each; strides in elements."""
    return {
        key: tensor(key, STORAGE_NAMES[x.dtype.name], x.size, 0, x.shape, tuple(s // x.itemsize for s in x.strides),
                    is_legacy)
        for key, x in arrays.items()
    }  # fmt: skip


@pytest.mark.parametrize("is_legacy", [False, True])
def test_pickled_weights_are_read(tmp_path, is_legacy):
    items = tensors_as_torch_saves(TENSORS, is_legacy)
    items["parameter"] = called(name("torch._utils", "_rebuild_parameter"), items["b"], plain(True), plain(None))
    items["transposed"] = tensor("b", "HalfStorage", 30, 4, (5, 2), (1, 5), is_legacy)
    path = tmp_path / "pytorch_model.bin"
    if is_legacy:
        write_legacy(path, state_dict(items), TENSORS)
    else:
        write_zip(path, state_dict(items), {key: x.tobytes() for key, x in TENSORS.items()})
    flat = TENSORS["b"].reshape(-1)
    transposed = np.array([[flat[4 + i + 5 * j] for j in range(2)] for i in range(5)])
    assert_same(read_weights(tmp_path), TENSORS | {"parameter": TENSORS["b"], "transposed": transposed})


def test_pickled_shards_are_read(tmp_path):
    for i, key in enumerate(TENSORS):
        one = {key: TENSORS[key]}
        write_zip(tmp_path / f"part{i}.bin", state_dict(tensors_as_torch_saves(one)), {key: TENSORS[key].tobytes()})
    weight_map = {key: f"part{i}.bin" for i, key in enumerate(TENSORS)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(read_weights(tmp_path), TENSORS)


class Runs:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HOSTILE = {
    "posix.system": pickle.dumps(Runs(os.system, "touch {marker}"), 2),
    "posix.system.": pickle.dumps({"weight": [Runs(os.system, "touch {marker}")]}, 4),
    "builtins.eval": pickle.dumps(Runs(eval, "open('{marker}', 'w')")),
    "__builtin__.eval": pickle.dumps(Runs(eval, "open('{marker}', 'w')"), 0),
    "builtins.getattr": pickle.dumps(Runs(getattr, {}, "update"), 4),
    "builtins.exec": pickle.dumps(Runs(exec, "open('{marker}', 'w')"), 4),
    "builtins.open": state_dict({"w": called(name("builtins", "open"), plain("{marker}"), plain("w"))}),
    "torch.load": state_dict({"w": called(name("torch", "load"), plain("{marker}"))}),
    "torch.storage._load_from_bytes": state_dict({"w": called(name("torch.storage", "_load_from_bytes"), plain(b""))}),
    "collections.OrderedDict.fromkeys": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.",
    "flax_encoder.published.weights.os": state_dict({"w": name("flax_encoder.published.weights", "os")}),
    "posix.system ": b"(S'touch {marker}'\niposix\nsystem\n.",
}


@pytest.mark.parametrize("is_legacy", [False, True])
@pytest.mark.parametrize("refused", HOSTILE)
def test_nothing_in_a_pickle_is_run(tmp_path, monkeypatch, refused, is_legacy):
    """Any of these would leave a file named {marker} in the working folder."""
    monkeypatch.chdir(tmp_path)
    data = HOSTILE[refused]
    path = tmp_path / "pytorch_model.bin"
    write_legacy(path, data, {}) if is_legacy else write_zip(path, data, {})
    with pytest.raises(WeightsError) as error:
        read_weights(tmp_path)
    assert f"refuses {refused.strip(' .')}:" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["pytorch_model.bin"]


REBUILD = ("torch._utils", "_rebuild_tensor_v2")
OUTSIDE = [
    (0, (8,), (1,)), (7, (1,), (1,)), (8, (0,), (1,)), (0, (2, 2), (6, 1)), (0, (2,), (1 << 61,)),
    (0, (1 << 40,), (0,)), (0, (3, 3), (0, 0)), (1 << 61, (1,), (1,)),
]  # fmt: skip


@pytest.mark.parametrize(("offset", "shape", "strides"), OUTSIDE)
def test_no_tensor_reaches_outside_its_storage(tmp_path, offset, shape, strides):
    items = {"w": tensor("0", "FloatStorage", 7, offset, shape, strides)}
    write_zip(tmp_path / "pytorch_model.bin", state_dict(items), {"0": bytes(28)})
    with pytest.raises(WeightsError, match=r"pytorch_model.bin: w reaches outside its storage of 7"):
        read_weights(tmp_path)


@pytest.mark.parametrize(("data", "message"), [
    (state_dict({"w": tensor("0", "FloatStorage", 8, 0, (8,), (1,))}), "it has 28 bytes, not 32"),
    (state_dict({"w": tensor("0", "DoubleStorage", 7, 0, (7,), (1,))}), "it has 28 bytes, not 56"),
    (state_dict({"w": tensor("1", "FloatStorage", 7, 0, (7,), (1,))}), "storage 1, which is not there"),
    (state_dict({"w": tensor("0", "FloatStorage", 7, -1, (7,), (1,))}), "must be a storage and sizes"),
    (state_dict({"w": tensor("0", "FloatStorage", 7, 6, (2,), (-1,))}), "must be a storage and sizes"),
    (state_dict({"w": tensor("0", "FloatStorage", 7, 0, (True,), (1,))}), "must be a storage and sizes"),
    (state_dict({"w": tensor("0", "FloatStorage", 7, 0, (7,), ())}), "a stride an axis"),
    (state_dict({"w": called(name(*REBUILD), *map(plain, ("0", 0, (7,), (1,), False, None)))}), "must be a storage"),
    (state_dict({"w": plain(["tuple", 3])}), "w must be a tensor: it is a list"),
    (b"\x80\x02" + plain([1]) + b".", r"a dict of named tensors: got \[1\]"),
    (b"\x80\x02" + plain({3: 4}) + b".", r"a dict of named tensors: got \{3: 4\}"),
    (b"\x80\x02" + plain(("module", "x")) + b"Q.", "a persistent id must be a storage's"),
    (b"\x80\x02" + plain("0") + b"Q.", "a persistent id must be a storage's: got '0'"),
    (b"\x80\x02K\x00r\xff\xff\xff\xff.", "memo grows by one at a time: got entry 4294967295"),
    (b"\x80\x02K\x00p4294967295\n.", "memo grows by one at a time: got entry 4294967295"),
    (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0f.", "is truncated, corrupt or no weights"),
    (state_dict({})[:-3], "is truncated, corrupt or no weights"),
    (b"not a pickle", "is truncated, corrupt or no weights"),
    (b"", "is truncated, corrupt or no weights"),
    # Attributes set on what stands for an allowed name change nothing.
    (b"\x80\x02" + name(*REBUILD) + plain(({}, {"__code__": 3})) + b"b.", "is truncated, corrupt or no weights"),
    (b"\x80\x02" + name("torch", "FloatStorage") + plain({"size": 3}) + b"b.", "is truncated, corrupt or no weights"),
])  # fmt: skip
def test_pickles_that_mislead_are_explained(tmp_path, data, message):
    write_zip(tmp_path / "pytorch_model.bin", data, {"0": bytes(28)})
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path)


def test_archives_that_mislead_are_explained(tmp_path):
    good = state_dict({"w": tensor("0", "FloatStorage", 7, 0, (7,), (1,))})
    path = tmp_path / "pytorch_model.bin"

    def message():
        with pytest.raises(WeightsError) as error:
            read_weights(tmp_path)
        return str(error.value)

    write_zip(path, good, {"0": bytes(28)}, compression=zipfile.ZIP_DEFLATED)
    assert "a member is compressed" in message()
    write_zip(path, good, {"0": b"abcd" * 7})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"abcd" * 7, b"abcx" * 7))
    assert "CRC" in message()
    path.write_bytes(whole[:-30])
    assert "pytorch_model.bin" in message()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("elsewhere", "")
    assert "one NAME/data.pkl: got 0" in message()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", good)
        archive.writestr("a/byteorder", "big")
    assert "little-endian order: got 'big'" in message()


@pytest.mark.parametrize("size", [0, 3, 200, -5])
def test_a_truncated_legacy_file_is_named(tmp_path, size):
    path = tmp_path / "pytorch_model.bin"
    write_legacy(path, state_dict(tensors_as_torch_saves(TENSORS, is_legacy=True)), TENSORS)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(WeightsError, match=r"pytorch_model.bin.* truncated"):
        read_weights(tmp_path)


@pytest.mark.parametrize("is_legacy", [False, True])
def test_a_state_that_lies_under_a_key_is_read(tmp_path, is_legacy, caplog):
    """As trainers save it, beside a step and an optimizer's tensors; of two states none is chosen."""
    two = {key: TENSORS[key] for key in ("a.weight", "b")}
    items = tensors_as_torch_saves(two, is_legacy)
    state = b"}(" + b"".join(plain(key) + value for key, value in items.items()) + b"u"
    moment = b"](" + items["b"] + b"e"
    path = tmp_path / "pytorch_model.bin"

    def write(parts):
        data = state_dict({"epoch": plain(3), "optimizer": b"}(" + plain("m") + moment + b"u"} | parts)
        if is_legacy:
            return write_legacy(path, data, two)
        return write_zip(path, data, {key: x.tobytes() for key, x in two.items()})

    write({"model": state})
    assert_same(read_weights(tmp_path), two)
    assert "read only the tensors under the key model" in caplog.text
    write({"model": state, "ema": state})
    with pytest.raises(WeightsError, match=r"under each of model, ema. Choose one in PyTorch: torch.save\(.*'model'\]"):
        read_weights(tmp_path)


@pytest.mark.parametrize("is_legacy", [False, True])
def test_files_that_torch_writes_are_read(tmp_path, is_legacy):
    torch = pytest.importorskip("torch", reason="torch writes the file")
    layer = torch.nn.Linear(3, 5)
    values = {**layer.state_dict(), "parameter": layer.weight, "half": layer.weight.detach().half().T,
              "bfloat16": layer.weight.detach().bfloat16()[1:, ::2]}  # fmt: skip
    torch.save(values, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not is_legacy)
    got = read_weights(tmp_path)
    assert got.keys() == values.keys()
    for key, value in values.items():
        np.testing.assert_array_equal(got[key].astype(np.float32), value.detach().float().numpy())


ALBERT = pathlib.Path.home() / ".cache/flax-encoder-assets/albert_smiles"


@pytest.mark.skipif(not (ALBERT / ".done").exists(), reason="needs the asset albert_smiles")
def test_a_published_pickle_is_read():
    tensors = read_weights(ALBERT)
    assert tensors["albert.embeddings.word_embeddings.weight"].dtype == np.float32
    assert all(np.isfinite(x).all() for x in tensors.values())


@pytest.mark.skipif(not (ALBERT / ".done").exists(), reason="needs the asset albert_smiles")
def test_a_published_pickle_of_something_else_is_refused(tmp_path):
    """Its training_args.bin asks for an argparse.Namespace."""
    shutil.copy(ALBERT / "training_args.bin", tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model.bin: refuses argparse\.Namespace"):
        read_weights(tmp_path)
