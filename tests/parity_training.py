"""torch's side of the comparison of training, and of adapters. It is run by a Python that has torch, and needs no JAX.

    python tests/parity_training.py train FOLDER BATCHES.npz OUT.npz [--float64]
    python tests/parity_training.py adapter FOLDER ADAPTER ROWS.npz OUT.npy

`train` fine-tunes a published classifier on batches [steps, B, T] in their order: AdamW with decay on all but biases
and norms, clipping by global norm, a linear warm-up and a linear fall. OUT has the last model's logits of all batches,
and the loss of each update.
"""

import argparse
import json

import numpy as np
import torch
import transformers


def train(folder: str, batches: str, out: str, float64: bool) -> None:
    data = np.load(batches)
    settings = json.loads(str(data["settings"]))
    torch.set_default_dtype(torch.float64 if float64 else torch.float32)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.get_default_dtype(), attn_implementation="eager"
    )
    model.eval()  # no dropout
    tokens, mask, labels = (torch.from_numpy(data[name]) for name in ("tokens", "mask", "labels"))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings["weight_decay"]}, {"params": rest, "weight_decay": 0.0}]
    betas = (settings["b1"], settings["b2"])
    optimizer = torch.optim.AdamW(groups, lr=settings["learning_rate"], betas=betas, eps=settings["epsilon"])
    steps, warmup = len(tokens), settings["warmup_rate"] * len(tokens)
    share = lambda k: k / warmup if k < warmup else (steps - k) / (steps - warmup)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    losses = []
    for step in range(steps):
        logits = model(input_ids=tokens[step], attention_mask=mask[step]).logits
        loss = torch.nn.functional.cross_entropy(logits, labels[step])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip_norm"])
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    with torch.no_grad():
        logits = [model(input_ids=t, attention_mask=m).logits.numpy() for t, m in zip(tokens, mask, strict=True)]
    np.savez(out, logits=np.stack(logits), losses=np.array(losses))


def adapter(folder: str, adapter: str, rows: str, out: str) -> None:
    import peft

    data = np.load(rows)
    labels = 3
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(data["tokens"]).long(), attention_mask=torch.from_numpy(data["mask"]))
    np.save(out, logits.logits.numpy())


def main() -> None:
    torch.set_num_threads(1)  # of tensors this small, and beside other processes, several only wait for one another
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, arguments in (("train", "folder batches out"), ("adapter", "folder adapter rows out")):
        command = commands.add_parser(name)
        for argument in arguments.split():
            command.add_argument(argument)
        if name == "train":
            command.add_argument("--float64", action="store_true")
    given = vars(parser.parse_args())
    {"train": train, "adapter": adapter}[given.pop("command")](**given)


if __name__ == "__main__":
    main()
