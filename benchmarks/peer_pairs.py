"""What bench_pairs.py times as its peer, in that one's environment: sentence-transformers, or transformers' T5.

    PYTHON peer_pairs.py FOLDER

FOLDER holds spec.json and the batches, whose texts are tokenized and padded. A step is that of their trainers.
"""

import json
import pathlib
import sys
import time

import numpy as np
import torch
import transformers
from sides import resident_peak_bytes, serve_steps, torch_step

folder = pathlib.Path(sys.argv[1])
spec = json.loads((folder / "spec.json").read_text())
batches = [{k: torch.from_numpy(v) for k, v in np.load(path).items()} for path in sorted(folder.glob("peer-*.npz"))]
versions = {"torch": torch.__version__, "transformers": transformers.__version__}


def contrastive():
    """(model, loss of a batch)."""
    import sentence_transformers
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    versions["sentence_transformers"] = sentence_transformers.__version__
    hidden, attention = spec["dropout"]
    dropout = {"hidden_dropout_prob": hidden, "attention_probs_dropout_prob": attention}
    model = sentence_transformers.SentenceTransformer(spec["folder"], device="cpu", config_kwargs=dropout)
    if spec["peer_mode"] == "compiled":
        model[0].model = torch.compile(model[0].model, dynamic=True)
    loss = MultipleNegativesRankingLoss(model, scale=spec["scale"])

    def of(batch):
        sides = [{"input_ids": batch[f"ids_{k}"], "attention_mask": batch[f"mask_{k}"]} for k in (0, 1)]
        return loss(sides, None)

    return model, of


def text_to_text():
    config = transformers.T5Config.from_dict(spec["peer_config"])
    model = transformers.T5ForConditionalGeneration(config)
    forward = torch.compile(model, dynamic=True) if spec["peer_mode"] == "compiled" else model

    def of(batch):
        labels = batch["ids_1"].masked_fill(batch["mask_1"] == 0, -100)
        return forward(input_ids=batch["ids_0"], attention_mask=batch["mask_0"], labels=labels, use_cache=False).loss

    return model, of


torch.manual_seed(0)
torch.set_num_threads(spec["cores"])
model, loss_of = {"contrastive": contrastive, "text_to_text": text_to_text}[spec["objective"]]()
model.train()
began = time.perf_counter()
step = torch_step(model, loss_of, batches, spec, "ids_0")
ready = {"compile_seconds": time.perf_counter() - began, "versions": versions}
serve_steps(step, spec["peer_tokens"], spec["peer_texts"], ready, resident_peak_bytes)
