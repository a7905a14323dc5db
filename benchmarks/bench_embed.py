"""Vectors of texts, measured beside sentence-transformers: a folder of its kind, a file of one text a line.

    python benchmarks/bench_embed.py FOLDER TEXTS --dtype float32 bfloat16 \\
        --peer-python PYTHON_WITH_SENTENCE_TRANSFORMERS --peer torch:float32 torch:bfloat16

Sides run by turns, in one process each, and tokenize too; loading and compiling are not counted. A peer is
sentence-transformers' backend (torch, onnx, openvino) and, for torch, the dtype of its weights.
"""

import json
import os
import pathlib
import subprocess
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from harness import Timing, header, parser, say, show

from flax_encoder.runs.embed import load_embedder
from flax_encoder.training.runtime import set_up_runtime


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("folder", help="of sentence-transformers' kind")
    arguments.add_argument("texts", help="one text a line")
    arguments.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    arguments.add_argument("--peer", nargs="*", default=[], help="BACKEND:DTYPE, such as torch:float32")
    arguments.add_argument("--peer-python", help="the Python of the peer's environment")
    arguments.add_argument("--turns", type=int, default=3)
    asked = arguments.parse_args()
    if bool(asked.peer) != bool(asked.peer_python):
        raise SystemExit("a peer runs in its own environment: give --peer and --peer-python together, or neither.")
    set_up_runtime()
    texts = pathlib.Path(asked.texts).read_text("utf-8").splitlines()
    embedders = {f"ours:{dtype}": load_embedder(asked.folder, dtype=dtype) for dtype in asked.dtype}
    for embedder in embedders.values():
        embedder.embed(texts)  # compiles
    peers, versions = {}, {}
    for name in asked.peer:
        backend, _, dtype = name.partition(":")
        program = [asked.peer_python, str(pathlib.Path(__file__).parent / "peer_embed.py"), asked.folder, asked.texts]
        process = subprocess.Popen([*program, backend, dtype or "float32"], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True)  # fmt: skip
        versions = json.loads(process.stdout.readline())["versions"]
        peers[name] = process
    seconds: dict[str, list[float]] = {name: [] for name in (*embedders, *peers)}
    vectors = {}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(asked.turns):
            say(f"turn {turn + 1} of {asked.turns}")
            for name, embedder in embedders.items():
                began = time.perf_counter()
                vectors[name] = embedder.embed(texts)[0][:256]
                seconds[name].append(time.perf_counter() - began)
            for name, process in peers.items():
                print(f"{scratch}/vectors.npy", file=process.stdin, flush=True)
                seconds[name].append(json.loads(process.stdout.readline())["seconds"])
                vectors[name] = np.load(f"{scratch}/vectors.npy").astype(np.float32)
    for process in peers.values():
        process.stdin.close()
        process.wait()
    first = next(iter(vectors.values()))
    rows = []
    for name, times in seconds.items():
        timing, cosine = Timing.of(times), _cosine(vectors[name], first)
        rows.append({
            "side": name, "texts/s": len(texts) / timing.median, "least": len(texts) / timing.most,
            "most": len(texts) / timing.least, "most 1 - cosine with the first": float((1 - cosine).max()),
        })  # fmt: skip
    embedder = next(iter(embedders.values()))
    lengths = [len(ids) for ids in embedder.tokenizer.encode_rows(texts, embedder.max_tokens)[0]]
    about = {"folder": pathlib.Path(asked.folder).name, "texts": len(texts), "mean_tokens": round(np.mean(lengths), 1)}
    show({"header": header(**about, **versions), "rows": rows}, rows, asked.json)


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


if __name__ == "__main__":
    main()
