"""Damaged files, fed to every reader: a named error in bounded time, or a result; never another exception.

    python -m pytest -m faults -n 0 -s tests/test_fuzz.py

FUZZ_CASES says how many a reader (1,200), FAULT_SEED repeats a seed that was printed.
"""

import collections
import contextlib
import json
import logging
import os
import pathlib
import random
import shutil
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file

from flax_encoder.config import ConfigError
from flax_encoder.data.sources.opening import Source
from flax_encoder.data.sources.records import DataError, Part, Record
from flax_encoder.data.store.prepare import prepare
from flax_encoder.data.store.store import open_store
from flax_encoder.data.store.tokenizing import HeldOut
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from flax_encoder.data.tokens.tokenizer_files import read_tokenizer
from flax_encoder.data.tokens.word_vectors import read_word_vectors
from flax_encoder.families import find_family
from flax_encoder.families.mapping import read_config
from flax_encoder.published.folder import read_published_config
from flax_encoder.published.weights import WeightsError, read_weights
from flax_encoder.runs.record import read_record
from flax_encoder.training.checkpoint import CheckpointError
from flax_encoder.training.run_log import read_metrics
from tests.data.reading import CLASS, TEXT, jsonl, parquet, read
from tests.runs import ROOT, WORDS

pytestmark = pytest.mark.faults
CASES = int(os.environ.get("FUZZ_CASES", "1200"))
SEED = int(os.environ.get("FAULT_SEED") or random.SystemRandom().randrange(2**32))
SECONDS = 20  # for one input: readers of small files take milliseconds
NAMED = (ConfigError, DataError, WeightsError, CheckpointError, OSError)
"""What a command turns into one message."""
ROWS = [{"text": " ".join(WORDS[i % 9 : i % 9 + 5]), "label": "ab"[i % 2]} for i in range(12)]


class Reader(NamedTuple):
    make: Callable[[pathlib.Path], None]
    """Writes whole files into an empty folder."""
    read: Callable[[pathlib.Path], Any]
    files: str = "**/*"
    """Which of them are damaged."""


def _csv(folder: pathlib.Path) -> None:
    text = "text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in ROWS)
    (folder / "a.csv").write_text(text)


def _vectors(folder: pathlib.Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    lines = (f"{word} {' '.join(map(str, row))}" for word, row in zip(WORDS, vectors, strict=False))
    (folder / "vectors").write_text("\n".join(lines) + "\n")


def _binary_vectors(folder: pathlib.Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    rows = b"".join(f"{word} ".encode() + row.tobytes() + b"\n" for word, row in zip(WORDS, vectors, strict=False))
    (folder / "vectors").write_bytes(b"9 4\n" + rows)


def _safetensors(folder: pathlib.Path) -> None:
    tensors = {"a.weight": np.ones((3, 5), np.float32), "b": np.arange(4)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _pickle(folder: pathlib.Path) -> None:
    """As torch.save wrote tensors before 1.6: pickles in a row, then the storages."""
    shutil.copy(PICKLED / "pytorch_model.bin", folder)


def _store(folder: pathlib.Path) -> None:
    tokenizer = train_wordpiece([row["text"] for row in ROWS], 120)
    records = [Record((row["text"] + f" {i}",), None, f"row {i}") for i, row in enumerate(ROWS)]
    parts = [Part(split, 1, lambda: iter(records)) for split in ("train", "validation")]
    prepare(Source(parts, "fuzz"), tokenizer, folder / "store", TEXT, held_out=HeldOut(0.0), workers=1)


def _read_store(folder: pathlib.Path) -> Any:
    store = open_store(folder / "store")
    store.verify()
    return [store.train.document(i) for i in range(len(store.train))]


def _copy(*paths: str, to: str = "") -> Callable[[pathlib.Path], None]:
    def make(folder: pathlib.Path) -> None:
        for path in paths:
            source = ROOT / path
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, folder / source.name)

    return make


def _read_config(folder: pathlib.Path) -> Any:
    published = read_published_config(folder)
    return read_config(find_family(published), published)


RUN = "tests/golden/runs/masked_lm"
PICKLED = pathlib.Path("~/.cache/flax-encoder-assets/bert_tiny_mlm").expanduser()
READERS = {
    "csv": Reader(_csv, lambda folder: read(folder / "a.csv", folder, CLASS)),
    "tsv without values": Reader(
        lambda folder: (folder / "a.tsv").write_text("text\n" + "".join(f"{row['text']}\n" for row in ROWS)) and None,
        lambda folder: read(folder / "a.tsv", folder, TEXT),
    ),
    "jsonl": Reader(lambda folder: jsonl(folder / "a.jsonl", *ROWS) and None,
                    lambda folder: read(folder / "a.jsonl", folder, CLASS)),
    "json": Reader(lambda folder: (folder / "a.json").write_text(json.dumps(ROWS)) and None,
                   lambda folder: read(folder / "a.json", folder, CLASS)),
    "parquet": Reader(lambda folder: parquet(folder / "a.parquet", *ROWS) and None,
                      lambda folder: read(folder / "a.parquet", folder, CLASS)),
    "word vectors": Reader(_vectors, lambda folder: list(read_word_vectors(folder / "vectors"))),
    "binary word vectors": Reader(_binary_vectors, lambda folder: list(read_word_vectors(folder / "vectors"))),
    "safetensors": Reader(_safetensors, read_weights),
    "store": Reader(_store, _read_store),
    "tokenizer": Reader(_copy(f"{RUN}/tokenizer.json"), read_tokenizer),
    "config.json": Reader(_copy("tests/golden/bert-masked_lm/config.json"), _read_config),
    "config.json of ModernBERT": Reader(_copy("tests/golden/modernbert-masked_lm/config.json"), _read_config),
    "metrics.jsonl": Reader(_copy(f"{RUN}/metrics.jsonl"), read_metrics),
    "a run's record": Reader(
        _copy(RUN), lambda folder: read_record(folder / "masked_lm"), "masked_lm/checkpoints/**/run/*"
    ),
}  # fmt: skip


def damage(content: bytes, rng: random.Random) -> bytes:
    """Other bits, bytes, lengths and order; of JSON, other values too."""
    if rng.random() < 0.5:
        with contextlib.suppress(ValueError, UnicodeDecodeError):
            return _other_json(content, rng)
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        if not content:
            break
        at, size = rng.randrange(len(content)), rng.choice([1, 1, 2, 8, 64])
        kind = rng.randrange(6)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            del content[at : at + size]
        elif kind == 3:
            content[at:at] = content[at : at + size] * rng.choice([1, 3])
        elif kind == 4:
            del content[at:]
        else:
            content[at : at + size] = rng.choice([b"\x00", b"\xff", b"9", b"-", b"\n", b'"', b"[", b"}"]) * size
    return bytes(content)


ODD: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, -0.5, 1e308, float("nan"), float("inf"), "", "x", "\ud800", "../../x",
    [], [[]], [None], {}, {"": {}}, "9" * 50, [1, "a", None],
]  # fmt: skip


def _other_json(content: bytes, rng: random.Random) -> bytes:
    """One value of a JSON document, or of one of its lines, is another; or one key is gone, or new."""
    lines = content.decode().splitlines()
    whole = not all(line.strip()[:1] == "{" and line.strip()[-1:] == "}" for line in lines) or len(lines) == 1
    at = 0 if whole else rng.randrange(len(lines))
    document = json.loads(content if whole else lines[at])
    places = list(_places(document))
    if not places:
        raise ValueError("a scalar")
    holder, key = rng.choice(places)
    choice = rng.randrange(4)
    if choice == 0 and isinstance(holder, dict):
        del holder[key]
    elif choice == 1 and isinstance(holder, dict):
        holder[rng.choice(["x", "type", str(key) + "_"])] = holder.pop(key)
    else:
        holder[key] = rng.choice(ODD)
    text = json.dumps(document)
    if not whole:
        lines[at] = text
        text = "\n".join(lines) + "\n"
    return text.encode("utf-8", "surrogatepass")


def _places(node: Any):
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(inner):
        yield node, key
        yield from _places(value)


def _too_long(*_):
    raise TimeoutError("no answer in time")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_whatever_a_file_holds_its_reader_names_what_is_wrong_or_reads_it(name, tmp_path):
    reader, found = READERS[name], collections.Counter()
    whole = tmp_path / "whole"
    whole.mkdir()
    reader.make(whole)
    reader.read(whole)  # which can be read
    files = sorted(path for path in whole.glob(reader.files) if path.is_file() and path.suffix != ".lock")
    assert files
    failed = {}
    logging.disable(logging.ERROR)
    signal.signal(signal.SIGALRM, _too_long)
    for number in range(CASES):
        rng = random.Random(f"{SEED} {name} {number}")
        damaged = tmp_path / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(whole, damaged)
        path = damaged / rng.choice(files).relative_to(whole)
        path.write_bytes(damage(path.read_bytes(), rng))
        signal.alarm(SECONDS)
        try:
            reader.read(damaged)
            found["read"] += 1
        except NAMED as error:
            assert not isinstance(error, TimeoutError), (name, number)
            found[type(error).__name__] += 1
        except BaseException as error:  # a panic of Rust's is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            failed.setdefault(f"{type(error).__name__}: {error}"[:300], (number, _where(error)))
        finally:
            signal.alarm(0)
    logging.disable(logging.NOTSET)
    print(f"\n{name}: FAULT_SEED={SEED}, {CASES} damaged inputs: {dict(found)}")
    assert not failed, "\n".join(f"{n}: {what} at {where}" for what, (n, where) in failed.items())


def _where(error: BaseException) -> str:
    import traceback

    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "flax_encoder/" in frame.filename]
    return " < ".join(f"{pathlib.Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-3:]))
