"""What bench_learning.py holds a recipe against: masked LM by transformers on torch, in that one's environment.

    PYTHON peer_learning.py DATA.npz SPEC

DATA.npz has the training text as rows [N, T], each full of documents end to end as run_mlm.py has them, and the
held-out rows with their masked tokens. SPEC is JSON: the kind of model, its sizes and how it learns. AdamW, or Muon for
the layers' matrices beside it, warms up for a twentieth of the time and falls to nothing at its end. Only tokens that
are masked go through the head. Prints JSON: held-out loss after so many seconds of training, and what it took.
"""

import json
import sys
import time

import numpy as np
import torch
import transformers
from sides import VOCABULARY_HEADS, decay_groups

WARMUP = 0.05


def make_model(spec):
    """A model of the recipe's layers and width; a feed-forward block without gates is half as wide again, which makes
    its parameters those of one with gates."""
    sizes = {
        "vocab_size": spec["vocab_size"], "hidden_size": spec["embed_dim"], "num_hidden_layers": spec["num_layers"],
        "num_attention_heads": spec["num_heads"], "max_position_embeddings": spec["row_length"],
        "pad_token_id": spec["special"]["pad"], "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if spec["kind"] == "mlm":
        config = transformers.BertConfig(
            **sizes, intermediate_size=spec["mlp_dim"] * 3 // 2 if spec["gated"] else spec["mlp_dim"],
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
    else:
        ends = {"cls_token_id": spec["special"]["first"], "sep_token_id": spec["special"]["last"]}
        width = spec["mlp_dim"] if spec["gated"] else spec["mlp_dim"] * 2 // 3
        config = transformers.ModernBertConfig(**sizes, **ends, intermediate_size=width)
    return transformers.AutoModelForMaskedLM.from_config(config).train()


def make_optimizers(model, spec):
    options = {"lr": spec["learning_rate"], "betas": (0.9, 0.98), "eps": 1e-6, "fused": True}
    if not spec["kind"].endswith("-muon"):
        return [torch.optim.AdamW(decay_groups(model, 0.01), **options)]
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in matrices}
    rest = torch.optim.AdamW([p for p in model.parameters() if id(p) not in chosen], weight_decay=0.01, **options)
    # Updates of AdamW's size, so that one rate serves both.
    muon = torch.optim.Muon(
        matrices, lr=spec["learning_rate"], weight_decay=0.01, adjust_lr_fn="match_rms_adamw", nesterov=True
    )
    return [muon, rest]


def loss_of(model, batch):
    """The mean loss of the masked tokens of a batch; `slots` are their positions, labels of -100 do not count."""
    told = {"attention_mask": batch["mask"]} if "mask" in batch else {}
    states = getattr(model, model.base_model_prefix)(input_ids=batch["ids"], **told).last_hidden_state
    states = states.gather(1, batch["slots"][..., None].expand(-1, -1, states.shape[-1]))
    logits = VOCABULARY_HEADS[model.config.model_type](model, states).float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)


def masked(rows, spec):
    """Rows [B, T] as run_mlm.py's collator masks them: of the tokens chosen, 80% are masked and 10% are random. As many
    are chosen in each row, so that shapes stay."""
    chances = torch.rand(rows.shape)
    for token in spec["special"].values():
        chances.masked_fill_(rows == token, -1.0)
    slots = chances.topk(round(spec["masked_rate"] * rows.shape[1]), sorted=False).indices
    labels, fate = rows.gather(1, slots), torch.rand(slots.shape)
    told = torch.where(fate < 0.8, spec["special"]["mask"], torch.randint(spec["vocab_size"], slots.shape))
    return {"ids": rows.scatter(1, slots, torch.where(fate < 0.9, told, labels)), "slots": slots, "labels": labels}


@torch.no_grad()
def held_out_loss(model, data, dtype, size=32):
    """The mean loss of the held-out masked tokens; a row is seen whole, as in training."""
    total = count = 0
    for start in range(0, len(data["ids"]), size):
        batch = {name: x[start : start + size] for name, x in data.items()}
        targets = int((batch["labels"] >= 0).sum())
        if targets:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                total += targets * loss_of(model, batch).item()
        count += targets
    return total / count


def main():
    data, spec = np.load(sys.argv[1]), json.loads(sys.argv[2])
    torch.manual_seed(spec["seed"])
    torch.set_num_threads(spec["cores"])
    rows = torch.from_numpy(data["rows"].astype(np.int64))
    held_out = {name: torch.from_numpy(data[name].astype(np.int64)) for name in ("ids", "slots", "labels", "mask")}
    model = make_model(spec)
    optimizers = make_optimizers(model, spec)
    compiled = torch.compile(loss_of) if spec["compiled"] else loss_of

    def gradients(batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=spec["dtype"] == "bfloat16"):
            loss = compiled(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    began = time.perf_counter()
    gradients(masked(rows[: spec["batch_size"]], spec))
    model.zero_grad(set_to_none=True)
    compile_seconds = time.perf_counter() - began
    spent, steps, queue, curve, budget = 0.0, 0, [], [], 60 * spec["minutes"]
    while True:
        if spent >= budget * len(curve) / spec["evaluations"]:
            curve.append([spent, held_out_loss(model.eval(), held_out, spec["dtype"])])
            model.train()
        if spent >= budget:
            break
        began = time.perf_counter()
        share = spent / budget
        rate = spec["learning_rate"] * min((share + 1e-3) / WARMUP, (1 - share) / (1 - WARMUP))
        if len(queue) < spec["batch_size"]:
            queue = torch.randperm(len(rows)).tolist()
        gradients(masked(rows[[queue.pop() for _ in range(spec["batch_size"])]], spec))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        model.zero_grad(set_to_none=True)
        steps, spent = steps + 1, spent + time.perf_counter() - began
    about = {"parameters": sum(p.numel() for p in model.parameters()), "updates": steps, "compile": compile_seconds}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"curve": curve, "epochs": steps * spec["batch_size"] / len(rows), "versions": versions, **about}))


if __name__ == "__main__":
    main()
