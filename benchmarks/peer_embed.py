"""What bench_embed.py times as its peer, in that one's environment: sentence-transformers' `encode`.

    PYTHON peer_embed.py FOLDER TEXTS BACKEND DTYPE

A line on the input is answered by a line of JSON: the seconds that all texts took. The vectors of the first texts are
written to the file that the line names.
"""

import json
import pathlib
import sys
import time

import numpy as np
import sentence_transformers
import torch

folder, texts, backend, dtype = sys.argv[1:]
texts = pathlib.Path(texts).read_text("utf-8").splitlines()
options = {"model_kwargs": {"torch_dtype": dtype}} if backend == "torch" else {"backend": backend}
model = sentence_transformers.SentenceTransformer(folder, device="cpu", **options)
model.encode(texts[:64])
versions = {"sentence_transformers": sentence_transformers.__version__, "torch": torch.__version__}
print(json.dumps({"versions": versions, "threads": torch.get_num_threads()}), flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    vectors = model.encode(texts, show_progress_bar=False)
    seconds = time.perf_counter() - began
    np.save(line.strip(), vectors[:256])
    print(json.dumps({"seconds": seconds}), flush=True)
