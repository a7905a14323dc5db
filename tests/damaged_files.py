"""What the fuzz feeds to readers: files that can be read, the readers of each kind, and ways to damage a file."""

import contextlib
import dataclasses
import gzip
import json
import pathlib
import random
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
from safetensors.numpy import save_file

from flax_encoder.config import ConfigError, DataConfig
from flax_encoder.data.pipeline import open_stores
from flax_encoder.data.rows.documents import Documents, Frame, Layout
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.opening import Source
from flax_encoder.data.sources.records import DataError, Part, Record
from flax_encoder.data.store.prepare import prepare
from flax_encoder.data.store.store import open_store
from flax_encoder.data.store.tokenizing import HeldOut, tokenize_parts
from flax_encoder.data.tokens.tokenizer import TextTokenizer, train_wordpiece
from flax_encoder.data.tokens.tokenizer_files import read_tokenizer
from flax_encoder.data.tokens.word_vectors import read_word_vectors
from flax_encoder.families import find_family
from flax_encoder.families.configs import read_config
from flax_encoder.published.folder import read_published_config
from flax_encoder.published.generation_settings import read_settings
from flax_encoder.published.load import load_pretrained
from flax_encoder.published.sentence_transformers import is_sentence_folder, read_sentence_settings
from flax_encoder.published.weights import WeightsError, read_weights
from flax_encoder.runs.ask_file import AnswerFile
from flax_encoder.runs.best import read_evaluations
from flax_encoder.runs.record import read_record
from flax_encoder.training.checkpoint import CheckpointError, read_params, verify_checkpoints
from flax_encoder.training.run_log import read_metrics
from tests.data.reading import ANSWERS, CLASS, TAGS, TEXT, jsonl, parquet, read
from tests.published.test_weights import TENSORS, state_dict, tensors_as_torch_saves, write_legacy, write_zip
from tests.runs import ROOT, TINY, WORDS
from tests.toy import save_run

NAMED = (ConfigError, DataError, WeightsError, CheckpointError, OSError)
"""What a command turns into one message."""
ROWS = [{"text": " ".join(WORDS[i % 9 : i % 9 + 5]), "label": "ab"[i % 2]} for i in range(12)]


class Reader(NamedTuple):
    make: Callable[[pathlib.Path], Any]
    """Writes whole files into an empty folder."""
    read: Callable[[pathlib.Path], Any]
    files: str = "**/*"
    """Which of them are damaged."""
    cost: int = 1
    """Of so many inputs that others get, it gets one."""


def _csv(folder: pathlib.Path) -> None:
    text = "text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in ROWS)
    (folder / "a.csv").write_text(text)


def _packed(folder: pathlib.Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    (folder / name).write_bytes(pack("".join(json.dumps(row) + "\n" for row in ROWS).encode()))


def _squad(folder: pathlib.Path) -> None:
    asked = [{"id": f"q{i}", "question": "what is it", "answers": [{"text": word, "answer_start": 5 * i}]}
             for i, word in enumerate(("abcd", "efgh"))]  # fmt: skip
    content = {"version": "v2.0", "data": [{"paragraphs": [{"context": "abcd efgh", "qas": asked}]}]}
    (folder / "a.json").write_text(json.dumps(content))


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


def _shards(folder: pathlib.Path) -> None:
    save_file({"a": np.ones((3, 5), np.float32)}, folder / "1.safetensors")
    save_file({"b": np.arange(4)}, folder / "2.safetensors")
    index = {"metadata": {"total_size": 92}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _pickled(folder: pathlib.Path) -> None:
    data = state_dict(tensors_as_torch_saves(TENSORS))
    write_zip(folder / "pytorch_model.bin", data, {key: x.tobytes() for key, x in TENSORS.items()})


def _pickled_as_before(folder: pathlib.Path) -> None:
    write_legacy(folder / "pytorch_model.bin", state_dict(tensors_as_torch_saves(TENSORS, True)), TENSORS)


VALUES = {"class": lambda i: "ab"[i % 2], "number": lambda i: i / 2, "tags": lambda i: ((0, 3, "X"), (4, 6, "Y"))}


def _source(columns: Columns) -> tuple[Source, TextTokenizer]:
    value = VALUES.get(columns.value, lambda i: None)
    records = [Record((row["text"] + f" {i}",), value(i), f"row {i}") for i, row in enumerate(ROWS)]
    parts = [Part(split, 1, lambda: iter(records)) for split in ("train", "validation")]
    return Source(parts, "fuzz"), train_wordpiece([row["text"] for row in ROWS], 120)


def _store(folder: pathlib.Path, columns: Columns = TEXT) -> None:
    source, tokenizer = _source(columns)
    prepare(source, tokenizer, folder / "store", columns, held_out=HeldOut(0.0), workers=1)


def _read_store(folder: pathlib.Path) -> Any:
    store = open_store(folder / "store")
    store.verify()
    return [store.train.document(i) for i in range(len(store.train))]


def _read_store_as_runs_do(folder: pathlib.Path) -> Any:
    store = open_store(folder / "store")
    documents = Documents(store.train, Layout(), Frame(0, None, None), 32)
    documents.plan(32)
    return [store.train.document(i) for i in range(len(store.train))]


def _half_a_store(folder: pathlib.Path) -> None:
    """As a kill leaves it: some parts are done."""
    source, tokenizer = _source(CLASS)
    work = folder / "store.partial"
    work.mkdir()
    tokenize_parts(source, tokenizer, work, CLASS, HeldOut(0.0), lambda message: None, 1, (0, 1))


def _finish_store(folder: pathlib.Path) -> Any:
    _store(folder, CLASS)
    return _read_store(folder)


def _remote_store(folder: pathlib.Path) -> Any:
    """The folder's store, from elsewhere."""
    memory = fsspec.filesystem("memory")
    if memory.exists("/fuzz"):
        memory.rm("/fuzz", recursive=True)
    memory.put(str(folder / "store"), "/fuzz", recursive=True)
    cache = folder / "cache"
    return open_stores(DataConfig(source="memory://fuzz", cache_dir=str(cache)), TEXT)


def _tokenizer_files(folder: pathlib.Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef", "##a"]))
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 64, "mask_token": "[MASK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "[PAD]", "lstrip": False}}))
    (folder / "added_tokens.json").write_text(json.dumps({"new": 12}))


def _byte_pairs(folder: pathlib.Path) -> None:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcde", "ab", "abc"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nab c\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer"}))


def _sentencepiece(folder: pathlib.Path) -> None:
    shutil.copy(ROOT / "tests/golden/sentencepiece-unigram.model", folder / "spiece.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 3}))


def _copy(*paths: str) -> Callable[[pathlib.Path], None]:
    def make(folder: pathlib.Path) -> None:
        for path in paths:
            source = ROOT / path
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, folder / source.name)

    return make


def _read_config(folder: pathlib.Path) -> Any:
    published = read_published_config(folder)
    return read_config(find_family(published), published), read_settings(folder, published)


def _published(folder: pathlib.Path) -> None:
    _copy("tests/golden/bert-masked_lm/config.json", "tests/golden/bert-masked_lm/model.safetensors")(folder)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [
        f"w{i}" for i in range(size - 5)]))  # fmt: skip


def _sentence(folder: pathlib.Path) -> None:
    _copy("tests/golden/bert-masked_lm/config.json")(folder)
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
               for i, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")))]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12, "do_lower_case": False}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "q: "}}))
    for name in ("1_Pooling", "2_Dense"):
        (folder / name).mkdir()
    pooling = {"word_embedding_dimension": 6, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    activation = "torch.nn.modules.activation.Tanh"
    dense = {"in_features": 6, "out_features": 4, "bias": True, "activation_function": activation}
    (folder / "2_Dense/config.json").write_text(json.dumps(dense))
    weights = {"linear.weight": np.ones((4, 6), np.float32), "linear.bias": np.ones(4, np.float32)}
    save_file(weights, folder / "2_Dense/model.safetensors")


def _read_sentence(folder: pathlib.Path) -> Any:
    return is_sentence_folder(folder) and read_sentence_settings(folder)


def _generation(folder: pathlib.Path) -> None:
    settings = {"max_length": 20, "num_beams": 4, "eos_token_id": 1, "do_sample": False, "length_penalty": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(settings))


def _run(folder: pathlib.Path) -> None:
    _, tokenizer = _source(TEXT)
    save_run(dataclasses.replace(TINY, run_dir=str(folder / "run")), tokenizer)


def _answers(folder: pathlib.Path) -> None:
    (folder / "a.jsonl.part").write_text('{"label": "a"}\n' * 3)
    note = {"identity": "x", "answers": 2, "bytes": 30, "columns": None}
    (folder / "a.jsonl.part.json").write_text(json.dumps(note))


def _go_on(folder: pathlib.Path) -> int:
    out = AnswerFile(folder / "a.jsonl", "x")
    return out.write([{"label": "b"}], out.num_done(), lambda n: None)


RUN = "tests/golden/runs/masked_lm"
READERS = {
    "csv": Reader(_csv, lambda folder: read(folder / "a.csv", folder, CLASS)),
    "tsv without values": Reader(
        lambda folder: (folder / "a.tsv").write_text("text\n" + "".join(f"{row['text']}\n" for row in ROWS)),
        lambda folder: read(folder / "a.tsv", folder, TEXT),
    ),
    "jsonl": Reader(lambda folder: jsonl(folder / "a.jsonl", *ROWS),
                    lambda folder: read(folder / "a.jsonl", folder, CLASS)),
    "jsonl.gz": Reader(lambda folder: _packed(folder, "a.jsonl.gz", gzip.compress),
                       lambda folder: read(folder / "a.jsonl.gz", folder, CLASS)),
    "jsonl.zst": Reader(lambda folder: _packed(folder, "a.jsonl.zst", lambda x: pa.compress(x, "zstd", asbytes=True)),
                        lambda folder: read(folder / "a.jsonl.zst", folder, CLASS)),
    "json": Reader(lambda folder: (folder / "a.json").write_text(json.dumps(ROWS)),
                   lambda folder: read(folder / "a.json", folder, CLASS)),
    "SQuAD's json": Reader(_squad, lambda folder: read(folder / "a.json", folder, ANSWERS)),
    "conll": Reader(lambda folder: (folder / "a.conll").write_text("-DOCSTART- O\n\n" + "a X\nb Y\n\nc X\n\n" * 4),
                    lambda folder: read(folder / "a.conll", folder, TAGS)),
    "text of UTF-16": Reader(lambda folder: (folder / "a.txt").write_text("one\n\ntwo\n" * 9, "utf-16"),
                             lambda folder: read(folder / "a.txt", folder, TEXT)),
    "parquet": Reader(lambda folder: parquet(folder / "a.parquet", *ROWS),
                      lambda folder: read(folder / "a.parquet", folder, CLASS)),
    "word vectors": Reader(_vectors, lambda folder: list(read_word_vectors(folder / "vectors"))),
    "binary word vectors": Reader(_binary_vectors, lambda folder: list(read_word_vectors(folder / "vectors"))),
    "safetensors": Reader(_safetensors, read_weights),
    "safetensors in shards": Reader(_shards, read_weights),
    "pickled weights": Reader(_pickled, read_weights),
    "pickled weights of before 1.6": Reader(_pickled_as_before, read_weights),
    "store": Reader(_store, _read_store),
    "store of classes, as runs read it": Reader(lambda folder: _store(folder, CLASS), _read_store_as_runs_do),
    "store of tags, as runs read it": Reader(lambda folder: _store(folder, TAGS), _read_store_as_runs_do),
    "store that is half prepared": Reader(_half_a_store, _finish_store, "store.partial/0*/*", cost=4),
    "store elsewhere": Reader(_store, _remote_store, "store/**/*", cost=4),
    "tokenizer": Reader(_copy(f"{RUN}/tokenizer.json"), read_tokenizer),
    "tokenizer files of BERT": Reader(_tokenizer_files, read_tokenizer),
    "tokenizer files of RoBERTa": Reader(_byte_pairs, read_tokenizer),
    "tokenizer files of T5": Reader(_sentencepiece, read_tokenizer, cost=2),
    "config.json": Reader(_copy("tests/golden/bert-masked_lm/config.json"), _read_config),
    "config.json of ModernBERT": Reader(_copy("tests/golden/modernbert-masked_lm/config.json"), _read_config),
    "generation_config.json": Reader(_generation, lambda folder: read_settings(folder, {})),
    "published folder": Reader(_published, load_pretrained, cost=12),
    "sentence-transformers folder": Reader(_sentence, _read_sentence),
    "metrics.jsonl": Reader(_copy(f"{RUN}/metrics.jsonl"),
                            lambda folder: (read_metrics(folder), read_evaluations(folder))),
    "a run's record": Reader(
        _copy(RUN), lambda folder: read_record(folder / "masked_lm"), "masked_lm/checkpoints/**/run/*", cost=4
    ),
    "checkpoint": Reader(_run, lambda folder: (read_params(folder / "run"), read_record(folder / "run")),
                         "run/checkpoints/**/*", cost=4),
    "checkpoint without checksums": Reader(
        _copy(RUN), lambda folder: read_params(folder / "masked_lm"), "masked_lm/checkpoints/**/params/**/*", cost=12
    ),
    "all checkpoints, verified": Reader(_run, lambda folder: list(verify_checkpoints(folder / "run")),
                                        "run/checkpoints/**/*"),
    "answers of an interrupted predict": Reader(_answers, _go_on, "*.part.json"),
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
