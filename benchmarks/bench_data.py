"""The input path, measured: text to tokens, tokens to rows, rows to masked batches ready for the device.

    python benchmarks/bench_data.py [--source SOURCE] [--peer-python PYTHON] [--json]

The store is SOURCE's documents drawn again and again up to --tokens, read by memory map as any store is. The peer is
transformers' DataCollatorForLanguageModeling in the environment of --peer-python (torch and transformers), on rows
that are already packed: what it is timed for is masking alone. Medians of --repeats, with the spread.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from flax_encoder.config import DataConfig, MaskingConfig
from flax_encoder.data.pipeline import open_stores
from flax_encoder.data.rows.batches import Batches, Mixture
from flax_encoder.data.rows.documents import Documents, Frame, Layout
from flax_encoder.data.rows.masking import budget
from flax_encoder.data.rows.packing import PackingPlan, length_histogram
from flax_encoder.data.rows.targets import masked_lm_targets
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.opening import open_source
from flax_encoder.data.store.prepare import prepare
from flax_encoder.data.store.store import FORMAT, MANIFEST, Split, Store, open_store
from flax_encoder.data.store.tokenizing import HeldOut, num_cores
from flax_encoder.data.tokens.tokenizer import TextTokenizer, load_tokenizer

ROW_LENGTH, BATCH_SIZE, RATE, SEED = 512, 256, 0.15, 0
PLAN_DOCUMENTS = 100_000_000
START_TOKENS = 10_000_000_000


def timed(work, repeats: int) -> list[float]:
    """Seconds of each of `repeats` runs, after one that does not count."""
    work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return seconds


def grown(split: Split, tokens: int, folder: pathlib.Path) -> Split:
    """The split's documents in random order, again and again, up to so many tokens, in files."""
    rng = np.random.default_rng(SEED)
    every = np.unpackbits(np.concatenate(split.words), bitorder="little")[: int(split.offsets[-1])]
    lengths, count = [], 0
    with (folder / "tokens.bin").open("wb") as file, (folder / "words.bin").open("wb") as words:
        while count < tokens:
            order = rng.permutation(len(split))
            ids = [split.document(i) for i in order]
            np.concatenate(ids).tofile(file)
            np.concatenate([every[split.offsets[i] : split.offsets[i + 1]] for i in order]).tofile(words)
            lengths.append(split.lengths[order])
            count += int(split.offsets[-1])
    bits = np.packbits(np.fromfile(folder / "words.bin", np.uint8), bitorder="little")
    bits.tofile(folder / "words.bin")
    token_file = np.memmap(folder / "tokens.bin", split.tokens[0].dtype, "r")
    word_file = np.memmap(folder / "words.bin", np.uint8, "r")
    return Split([token_file], [word_file], np.concatenate([[0], np.cumsum(np.concatenate(lengths))]))


def batches_of(split: Split, tokenizer: TextTokenizer, kind: str) -> Batches:
    masking = MaskingConfig(kind=kind)  # type: ignore[arg-type]
    slots = budget(masking.kind, RATE, ROW_LENGTH)
    targets = masked_lm_targets(tokenizer, masking, (RATE, RATE), slots, 10**6, SEED)
    documents = Documents(split, Layout(long="split"), Frame.of(tokenizer), ROW_LENGTH)
    return Batches(
        [documents], Mixture([documents.plan(ROW_LENGTH)], [1.0]), targets, row_length=ROW_LENGTH,
        batch_size=BATCH_SIZE, seed=SEED, num_batches=10**6, streams=() if kind == "token" else ("word_starts",),
    )  # fmt: skip


def loading(split: Split, tokenizer: TextTokenizer, kind: str, repeats: int, count: int = 100) -> dict[str, float]:
    """Real tokens a second through Grain, as the training loop reads them."""
    iterator = batches_of(split, tokenizer, kind).iterate()
    rates = []
    for run in range(repeats + 1):
        tokens, began = 0, time.perf_counter()
        for _ in range(count):
            tokens += int(np.count_nonzero(next(iterator)["segment_ids"]))
        if run:
            rates.append(tokens / (time.perf_counter() - began))
    iterator.close()
    return {"median": statistics.median(rates), "least": min(rates), "most": max(rates)}


def preparing(source_name: str, tokenizer: TextTokenizer, folder: pathlib.Path, characters: int, repeats: int) -> dict:
    """Tokens a second of `prepare`, both ways of tokenizing the same text on the same cores, by turns."""
    config = DataConfig(source=source_name)
    source = open_source(source_name, config, Columns(), folder / "cache")
    texts, count = [], 0
    while count < characters:
        for record in source.records("train"):
            texts.append(f"{record.texts[0].strip()} {len(texts)}")  # numbered, or copies would be dropped
            count += len(texts[-1])
            if count >= characters:
                break
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = open_source(str(path), config, Columns(), folder)
    raw = tokenizer._tokenizer

    def alone() -> int:
        return sum(
            len(e.ids)
            for i in range(0, len(texts), 1000)
            for e in raw.encode_batch_fast(texts[i : i + 1000], add_special_tokens=False)
        )

    tokens, runs = alone(), {"encode_batch_fast": [], "prepare": []}
    for i in range(repeats):
        began = time.perf_counter()
        alone()
        runs["encode_batch_fast"].append(tokens / (time.perf_counter() - began))
        began = time.perf_counter()
        prepare(source, tokenizer, folder / f"prepared-{i}", Columns(), held_out=HeldOut(0.02))
        runs["prepare"].append(tokens / (time.perf_counter() - began))
    medians = {name: statistics.median(rates) for name, rates in runs.items()}
    return medians | {"ratio": medians["prepare"] / medians["encode_batch_fast"]}


def planning(offsets_path: str) -> None:
    """In a process of its own, on one core: plan 100 million documents; prints JSON."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    offsets = np.load(offsets_path, mmap_mode="r")
    before = time.perf_counter()
    plan = PackingPlan(offsets, ROW_LENGTH)
    counted = time.perf_counter()
    plan.rows(np.arange(BATCH_SIZE), SEED)
    first = time.perf_counter()
    # An epoch from its start to its end: every window is opened once.
    places = np.unique(np.linspace(0, plan.rows_per_epoch - 1, 50 * plan._num_windows).astype(np.int64))
    for some in np.array_split(places, 10 * plan._num_windows):
        plan.rows(some + plan.rows_per_epoch, SEED)
    end = time.perf_counter()
    print(json.dumps({
        "plan_documents_per_second": (len(offsets) - 1) / (counted - before + end - first),
        "open_seconds": counted - before,
        "epoch_start_seconds": first - counted,
        "plan_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "plan_fill_rate": plan.fill_rate,
    }))  # fmt: skip


def many_lengths(split: Split, documents: int, path: pathlib.Path) -> int:
    """Offsets of so many documents whose lengths are drawn from the split's; returns their tokens."""
    rng, lengths = np.random.default_rng(SEED), split.lengths
    offsets = np.lib.format.open_memmap(path, "w+", np.int64, (documents + 1,))
    offsets[0] = total = 0
    for begin in range(0, documents, 2**22):
        some = rng.choice(lengths, min(2**22, documents - begin))
        offsets[begin + 1 : begin + 1 + len(some)] = total + np.cumsum(some)
        total = int(offsets[begin + len(some)])
    offsets.flush()
    return total


def sparse_store(store: Store, folder: pathlib.Path) -> None:
    """A store of ten billion tokens whose offsets are real and whose tokens are holes in a file."""
    split = store.train
    documents = int(START_TOKENS / split.lengths.mean())
    for name in ("train", "test"):
        (folder / name).mkdir(parents=True)
    total = many_lengths(split, documents, folder / "train" / "offsets.npy")
    np.save(folder / "test" / "offsets.npy", np.zeros(1, np.int64))
    for name in ("train", "test"):
        offsets = np.load(folder / name / "offsets.npy", mmap_mode="r")
        np.save(folder / name / "histogram.npy", length_histogram(offsets))
    offsets = np.load(folder / "train" / "offsets.npy", mmap_mode="r")
    ends = offsets[np.searchsorted(offsets, np.arange(2**30, total, 2**30))].tolist()
    for i, size in enumerate(np.diff([0, *ends, total]).tolist()):
        for kind, count in (("tokens", 2 * size), ("words", -(-size // 8))):
            with (folder / "train" / f"{kind}-{i:05}.bin").open("wb") as f:
                f.truncate(count)
    shards = len(ends) + 1
    (folder / "tokenizer.json").write_text((store.folder / "tokenizer.json").read_text("utf-8"), "utf-8")
    files = {
        p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": ""} for p in folder.glob("*/*")
    }
    splits = {
        "train": {"documents": documents, "tokens": total, "shards": shards},
        "test": {"documents": 0, "tokens": 0, "shards": 0},
    }
    manifest = store.manifest | {"format": FORMAT, "splits": splits, "files": files, "dtype": "uint16"}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def starting(folder: pathlib.Path) -> None:
    """In a process of its own: a store's first batch."""
    store = open_store(folder)
    batches = batches_of(store.train, load_tokenizer(folder), "token")
    next(batches.iterate())
    print("ready", flush=True)
    os._exit(0)


def alone(*arguments: str) -> tuple[str, float]:
    """This file in a process of its own: (what it prints, seconds until it is done)."""
    began = time.perf_counter()
    run = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return run.stdout, time.perf_counter() - began


def peer(python: str, split: Split, tokenizer: TextTokenizer, folder: pathlib.Path, repeats: int) -> dict[str, float]:
    """Tokens a second of the peer's collators on the rows that ours makes, without masks."""
    batches = batches_of(split, tokenizer, "whole_word")
    batches._targets = lambda rows: {"words": rows.word_starts}
    rows = batches[0]
    np.savez(folder / "rows.npz", tokens=rows["tokens"], words=rows["words"], segments=rows["segment_ids"])
    (folder / "tokenizer.json").write_text(tokenizer.json, "utf-8")
    names = {role: tokenizer.token(tokenizer.special(role)) for role in ("pad", "unknown", "first", "last", "mask")}
    script = pathlib.Path(__file__).with_name("peer_collator.py")
    run = subprocess.run(
        [python, str(script), str(folder), str(repeats), json.dumps(names)], capture_output=True, text=True
    )
    if run.returncode:
        raise SystemExit(f"the peer failed in {python}:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] in ("planning", "starting"):
        return {"planning": planning, "starting": lambda f: starting(pathlib.Path(f))}[sys.argv[1]](sys.argv[2])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="tfds:python_docs", help="text, as --data.source takes it")
    parser.add_argument("--text-unit", default="paragraph", choices=("paragraph", "line", "file"))
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--tokens", type=int, default=100_000_000, help="size of the store that batches are read from")
    parser.add_argument("--characters", type=int, default=100_000_000, help="text that prepare is timed on")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-python", help="a Python with torch and transformers; left out, no peer is run")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    say = (lambda message: None) if asked.json else (lambda message: print(message, file=sys.stderr, flush=True))

    config = DataConfig(source=asked.source, vocab_size=asked.vocab_size, text_unit=asked.text_unit)
    tokenizer, (store, *_), _ = open_stores(config, Columns(), progress=say)
    result: dict = {
        "source": asked.source, "vocab_size": tokenizer.vocab_size, "row_length": ROW_LENGTH, "batch_size": BATCH_SIZE,
        "cores": num_cores(), "python": platform.python_version(), "numpy": np.__version__,
    }  # fmt: skip
    result["fill_rate"] = PackingPlan(store.train.offsets, ROW_LENGTH).fill_rate
    result["fill_rate_128"] = PackingPlan(store.train.offsets, 128).fill_rate
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        say(f"drawing {asked.tokens:,} tokens")
        split = grown(store.train, asked.tokens, folder)
        for kind, key in (("token", "packed_masked"), ("whole_word", "whole_word"), ("span", "span")):
            say(f"loading batches, masked by {kind}")
            rates = loading(split, tokenizer, kind, asked.repeats)
            result[f"{key}_tokens_per_second"] = rates["median"]
            result[f"{key}_spread"] = [rates["least"], rates["most"]]
        if asked.peer_python:
            say("the peer's collators")
            result |= peer(asked.peer_python, split, tokenizer, folder, asked.repeats)
        say("preparing text")
        rates = preparing(asked.source, tokenizer, folder, asked.characters, asked.repeats)
        result |= {f"{name}_tokens_per_second": rates[name] for name in ("prepare", "encode_batch_fast")}
        result["prepare_ratio"] = rates["ratio"]
        say("starting on a store of 10 billion tokens")
        sparse_store(store, folder / "large")
        starts = [alone("starting", str(folder / "large"))[1] for _ in range(asked.repeats)]
        result |= {"start_seconds": statistics.median(starts), "start_spread": [min(starts), max(starts)]}
        say(f"planning {PLAN_DOCUMENTS:,} documents")
        many_lengths(store.train, PLAN_DOCUMENTS, folder / "many.npy")
        result |= json.loads(alone("planning", str(folder / "many.npy"))[0])
    if asked.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:36} {value:,.4g}" if isinstance(value, float) else f"{name:36} {value}")


if __name__ == "__main__":
    main()
