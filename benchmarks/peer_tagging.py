"""transformers on torch, fine-tuned to tag words: what configs/ner.py is held against. Run it by torch's Python.

python benchmarks/peer_tagging.py FOLDER train.jsonl test.jsonl --steps 240 --texts 64 --learning-rate 3e-4 --seed 0

AdamW with decay on matrices alone, linear warm-up and decay, clipped gradients and dropout as the recipe has them; a
batch is so many texts, padded to the longest. Prints seqeval's scores as JSON.
"""

import argparse
import json
import random
import time

import numpy as np
import torch
import transformers
from seqeval.metrics import f1_score, precision_score, recall_score


def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def encode(tokenizer, rows, names):
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--warmup-rate", type=float, default=0.06)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.manual_seed(asked.seed)
    rng = random.Random(asked.seed)
    rows, held_out = read(asked.train), read(asked.test)
    names = sorted({tag for row in rows + held_out for tag in row["tags"]}, key=lambda tag: (tag != "O", tag))
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked.folder)
    model = transformers.AutoModelForTokenClassification.from_pretrained(asked.folder, num_labels=len(names)).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=asked.learning_rate, betas=(0.9, 0.98), eps=1e-6,
    )  # fmt: skip
    warm = asked.warmup_rate * asked.steps
    share = lambda step: min((step + 1) / warm, max(0.0, (asked.steps - step) / (asked.steps - warm)))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    began, queue = time.monotonic(), []
    for _ in range(asked.steps):
        if len(queue) < asked.texts:
            queue += rng.sample(rows, len(rows))
        some, queue = queue[: asked.texts], queue[asked.texts :]
        batch, labels = encode(tokenizer, some, names)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.monotonic() - began
    model.eval()
    golds, guesses = [], []
    for start in range(0, len(held_out), 64):
        some = held_out[start : start + 64]
        batch, labels = encode(tokenizer, some, names)
        with torch.no_grad():
            best = model(**batch).logits.argmax(-1)
        for tags, of_row in zip(best, labels, strict=True):
            keep = of_row >= 0
            golds.append([names[i] for i in of_row[keep]])
            guesses.append([names[i] for i in tags[keep]])
    scores = {f.__name__[:-6]: float(f(golds, guesses)) for f in (precision_score, recall_score, f1_score)}
    accuracy = float(np.mean([a == b for x, y in zip(golds, guesses, strict=True) for a, b in zip(x, y, strict=True)]))
    print(json.dumps(scores | {"accuracy": accuracy, "seconds": round(seconds, 1), "steps": asked.steps}))


if __name__ == "__main__":
    main()
