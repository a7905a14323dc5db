"""transformers on torch, fine-tuned on a file: what the recipes' results are held against. Run it by torch's Python.

python benchmarks/peer_finetune.py FOLDER train.jsonl test.jsonl --epochs 2 --texts 32 --learning-rate 5e-5 --seeds 5

A line of the files is {"tokens": [...], "tags": [...]} or {"text": ..., "label": ...}. AdamW with decay on matrices
alone, linear warm-up and decay and clipped gradients are the library's; the head and dropout are those of the folder. A
batch is so many texts, padded to the longest. Prints a line of JSON for each seed: seqeval's scores, or accuracy.
"""

import argparse
import json
import math
import random
import time

import numpy as np
import torch
import transformers
from sides import decay_groups


def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def encode_tags(tokenizer, rows, names):
    """Batch of texts; a word's tag stands at its first token, -100 elsewhere."""
    batch = tokenizer(
        [r["tokens"] for r in rows], is_split_into_words=True, padding=True, truncation=True, max_length=128,
        return_tensors="pt",
    )  # fmt: skip
    labels = torch.full(batch["input_ids"].shape, -100)
    for i, row in enumerate(rows):
        before = None
        for column, word in enumerate(batch.word_ids(i)):
            if word is not None and word != before:
                labels[i, column] = names.index(row["tags"][word])
            before = word
    return batch, labels


def encode_texts(tokenizer, rows, names):
    texts = [r["text"] for r in rows]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    return batch, torch.tensor([names.index(r["label"]) for r in rows])


def train(asked, tokenizer, rows, names, encode, seed):
    torch.manual_seed(seed)
    kind = "TokenClassification" if encode is encode_tags else "SequenceClassification"
    opened = getattr(transformers, f"AutoModelFor{kind}")
    model = opened.from_pretrained(asked.folder, num_labels=len(names)).train()
    optimizer = torch.optim.AdamW(
        decay_groups(model, 0.01), lr=asked.learning_rate, betas=(0.9, asked.b2), eps=1e-6,
    )  # fmt: skip
    steps = math.ceil(asked.epochs * len(rows) / asked.texts)
    warm = asked.warmup_rate * steps
    share = lambda step: min(step / warm, (steps - step) / (steps - warm))  # noqa: E731 - the library's, and ours
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    rng, queue = random.Random(seed), []
    for _ in range(steps):
        if len(queue) < asked.texts:
            queue += rng.sample(rows, len(rows))
        some, queue = queue[: asked.texts], queue[asked.texts :]
        batch, labels = encode(tokenizer, some, names)
        model(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval(), steps


def score(model, tokenizer, held_out, names, encode):
    golds, guesses = [], []
    for start in range(0, len(held_out), 64):
        batch, labels = encode(tokenizer, held_out[start : start + 64], names)
        with torch.no_grad():
            best = model(**batch).logits.argmax(-1)
        for guess, of_row in zip(best, labels, strict=True):
            keep = of_row >= 0
            golds.append([names[i] for i in of_row[keep].reshape(-1)])
            guesses.append([names[i] for i in guess[keep].reshape(-1)])
    pairs = [(a, b) for x, y in zip(golds, guesses, strict=True) for a, b in zip(x, y, strict=True)]
    scores = {"accuracy": float(np.mean([a == b for a, b in pairs]))}
    if encode is encode_tags:
        from seqeval.metrics import f1_score, precision_score, recall_score

        scores |= {f.__name__[:-6]: float(f(golds, guesses)) for f in (precision_score, recall_score, f1_score)}
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--texts", type=int, default=32, help="in a batch")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--b2", type=float, default=0.999)
    parser.add_argument("--warmup-rate", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 on")
    asked = parser.parse_args()
    rows, held_out = read(asked.train), read(asked.test)
    encode = encode_tags if "tags" in rows[0] else encode_texts
    found = {tag for r in rows + held_out for tag in (r["tags"] if encode is encode_tags else [r["label"]])}
    names = sorted(found, key=lambda name: (name != "O", name))
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked.folder)
    for seed in range(asked.seeds):
        began = time.monotonic()
        model, steps = train(asked, tokenizer, rows, names, encode, seed)
        seconds = time.monotonic() - began
        scores = score(model, tokenizer, held_out, names, encode)
        print(json.dumps(scores | {"seed": seed, "steps": steps, "seconds": round(seconds, 1)}), flush=True)


if __name__ == "__main__":
    main()
