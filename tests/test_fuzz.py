"""Damaged files, fed to every reader: a named error in bounded time and memory, or a result; never another exception.

    python -m pytest -m fuzz -n 0 -s

FUZZ_CASES says how many inputs a reader gets (700), FAULT_SEED repeats a seed that was printed. Without -m fuzz each
reader gets a few, of a seed that is always the same, and those that once found a fault.
"""

import collections
import contextlib
import json
import logging
import os
import pathlib
import random
import resource
import shutil
import signal
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flax_encoder.data.tokens.word_vectors import read_word_vectors
from flax_encoder.published.weights import read_weights
from tests.damaged_files import NAMED, READERS, damage
from tests.data.reading import CLASS, TEXT, read

pytestmark = pytest.mark.fuzz
CASES = int(os.environ.get("FUZZ_CASES", "700"))
FEW = 8  # without -m fuzz
SECONDS = 20  # for one input: readers of small files take milliseconds
ROOM_BYTES = 2**31  # of addresses, besides what the process has: files have some kilobytes
KEPT = {
    "parquet": ("307298566 parquet 689",),  # a column's name that is not UTF-8
    "published folder": ("99918635 published folder 0",),  # a size past 2**63
    "answers of an interrupted predict": ("1133028522 answers of an interrupted predict 451",),  # an infinite count
    "store elsewhere": ("3545571146 store elsewhere 16", "3545571146 store elsewhere 167"),  # odd counts in a manifest
    "store of tags, as runs read it": ("486924778 store of tags, as runs read it 11",),  # a manifest of another shape
}
"""Seeds of inputs that found a fault, by reader."""


def _too_long(*_):
    raise TimeoutError("no answer in time")


@contextlib.contextmanager
def bounded():
    """An alarm after SECONDS, and MemoryError where more than ROOM_BYTES are asked for."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM_BYTES, limits[1]))
    previous = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_whatever_a_file_holds_its_reader_names_what_is_wrong_or_reads_it(name, tmp_path, request):
    reader, found, failed = READERS[name], collections.Counter(), {}
    is_whole = "fuzz" in (request.config.option.markexpr or "")
    chosen = os.environ.get("FAULT_SEED") or (random.SystemRandom().randrange(2**32) if is_whole else 0)
    count = -(-(CASES if is_whole else FEW) // reader.cost)
    seeds = [*KEPT.get(name, ()), *(f"{chosen} {name} {number}" for number in range(count))]
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    whole.mkdir()
    reader.make(whole)
    files = sorted(path for path in whole.glob(reader.files) if path.is_file() and path.suffix != ".lock")
    assert files
    shutil.copytree(whole, damaged)
    reader.read(damaged)  # which can be read
    logging.disable(logging.ERROR)
    for seed in seeds:
        rng = random.Random(seed)
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(whole, damaged)
        path = damaged / rng.choice(files).relative_to(whole)
        path.write_bytes(damage(path.read_bytes(), rng))
        try:
            with bounded():
                reader.read(damaged)
            found["read"] += 1
        except NAMED as error:
            found[type(error).__name__] += 1
            if isinstance(error, TimeoutError):
                failed.setdefault("TimeoutError", (seed, _where(error)))
        except BaseException as error:  # a panic of Rust's is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            failed.setdefault(f"{type(error).__name__}: {error}"[:300], (seed, _where(error)))
    logging.disable(logging.NOTSET)
    print(f"\n{name}: FAULT_SEED={chosen}, {len(seeds)} damaged inputs: {dict(found)}")
    assert not failed, "\n".join(f"{seed!r}: {what} at {where}" for what, (seed, where) in failed.items())


def _where(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "flax_encoder/" in frame.filename]
    return " < ".join(f"{pathlib.Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-3:]))


def _with(path: str, change: Callable[[dict], Any]) -> Callable[[pathlib.Path], None]:
    def make(folder: pathlib.Path) -> None:
        content = json.loads((folder / path).read_text())
        change(content)
        (folder / path).write_text(json.dumps(content))

    return make


@pytest.mark.parametrize(("name", "change", "said"), [
    ("config.json of ModernBERT", _with("config.json", lambda c: c.update(num_hidden_layers=10**30)), "below 10,000"),
    ("config.json", _with("config.json", lambda c: c.update(vocab_size=2**63)), "below 2,147,483,648"),
    ("tokenizer", _with("tokenizer.json", lambda c: c["model"]["vocab"].update(a=2**31)), "below 10,000,000"),
    ("tokenizer", _with("tokenizer.json", lambda c: c["added_tokens"][0].update(id=2**31)), "below 10,000,000"),
    ("tokenizer files of RoBERTa", _with("vocab.json", lambda c: c.update(abc=2**31)), "below 10,000,000"),
    ("tokenizer files of T5", _with("tokenizer_config.json", lambda c: c.update(extra_ids=2**31)), "below 100,000"),
])  # fmt: skip
def test_a_number_that_asks_for_work_or_memory_without_end_is_refused(name, change, said, tmp_path):
    READERS[name].make(tmp_path)
    change(tmp_path)
    with pytest.raises(NAMED, match=said), bounded():
        READERS[name].read(tmp_path)


ANY_FILES = {
    "a.txt": lambda path, folder: read(path, folder, TEXT),
    "a.csv": lambda path, folder: read(path, folder, CLASS),
    "a.tsv": lambda path, folder: read(path, folder, TEXT),
    "a.jsonl": lambda path, folder: read(path, folder, CLASS),
    "a.json": lambda path, folder: read(path, folder, TEXT),
    "a.parquet": lambda path, folder: read(path, folder, TEXT),
    "a.txt.gz": lambda path, folder: read(path, folder, TEXT),
    "a.conll": lambda path, folder: read(path, folder, TEXT),
    "vectors": lambda path, folder: list(read_word_vectors(path)),
    "model.safetensors": lambda path, folder: read_weights(folder),
    "pytorch_model.bin": lambda path, folder: read_weights(folder),
}
BYTES = st.one_of(
    st.binary(max_size=200), st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.text("\"',;\t\r\n\\{}[]:01aN-", max_size=60).map(str.encode),
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ANY_FILES)
def test_any_bytes_are_read_or_named(name, tmp_path):
    @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(content=BYTES)
    def check(content):
        (tmp_path / name).write_bytes(content)
        with bounded():
            try:
                ANY_FILES[name](tmp_path / name, tmp_path)
            except NAMED as error:
                assert not isinstance(error, TimeoutError)

    check()
