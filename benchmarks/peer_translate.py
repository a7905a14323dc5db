"""transformers on torch, learning to translate from scratch: what configs/translate_en_fr.py is held against. Run it by
torch's Python, where sacrebleu must be too.

python benchmarks/peer_translate.py tokenizer.json train.jsonl test.jsonl --processor-minutes 6 --learning-rate 1e-3

A line of the files is {"en": ..., "fr": ...}; tokenizer.json is that of our run, which reads the same two files by
--data.source train.jsonl --data.validation test.jsonl. The model has two layers of 192 on each side, and about as many
parameters as ours. Batches are grouped by length (of like pairs among 50 batches), each with about the tokens of one of
our updates, and the learning rate rises for a twentieth of the time and falls to nothing at its end. The budget counts
this process's processor time in training alone. Prints a line of JSON: greedy translations of the test file by
sacrebleu.
"""

import argparse
import json
import pathlib
import random
import time

import sacrebleu
import tokenizers
import torch
import transformers
from sides import decay_groups

PAD, END = 0, 1
SHARED = {"vocab_size": 0, "pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD}


def marian(vocab_size, dropout):
    """The Transformer of Vaswani et al., with one table of tokens. A feed-forward block of 576 has the parameters of a
    gated one of 384."""
    config = transformers.MarianConfig(
        **SHARED | {"vocab_size": vocab_size}, d_model=192, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=3, decoder_attention_heads=3, encoder_ffn_dim=576, decoder_ffn_dim=576,
        activation_function="relu", dropout=dropout, attention_dropout=dropout, scale_embedding=True,
        max_position_embeddings=256, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.MarianMTModel(config)


def t5(vocab_size, dropout):
    """T5 v1.1, which is our recipe's architecture."""
    config = transformers.T5Config(
        **SHARED | {"vocab_size": vocab_size}, d_model=192, d_kv=64, d_ff=384, num_layers=2, num_heads=3,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=dropout,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


KINDS = {"marian": marian, "t5": t5}


def read(path, tokenizer, longest):
    """(source ids, target ids) of each line, cut to `longest` and ended."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    sides = []
    for name in ("en", "fr"):
        found = tokenizer.encode_batch([row[name] for row in rows], add_special_tokens=False)
        sides.append([[*one.ids[: longest - 1], END] for one in found])
    return rows, list(zip(*sides, strict=True))


def batches(pairs, tokens, rng):
    """One epoch: lists of pairs of like length, whose sources have about `tokens` tokens."""
    order = rng.sample(pairs, len(pairs))
    mean = sum(len(source) for source, _ in pairs) / len(pairs)
    group, found = int(50 * tokens / mean), []
    for start in range(0, len(order), group):
        batch, count = [], 0
        for pair in sorted(order[start : start + group], key=lambda pair: (len(pair[0]), len(pair[1]))):
            batch.append(pair)
            count += len(pair[0])
            if count >= tokens:
                found.append(batch)
                batch, count = [], 0
        if batch:
            found.append(batch)
    return rng.sample(found, len(found))


def padded(rows, fill=PAD):
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def forward(model, batch, dtype):
    """Logits in float32 and labels: -100 at padding, where nothing is learned."""
    source, labels = padded([pair[0] for pair in batch]), padded([pair[1] for pair in batch], -100)
    before = torch.nn.functional.pad(labels[:, :-1].clamp(min=PAD), (1, 0), value=PAD)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        mask = (source != PAD).long()
        logits = model(input_ids=source, attention_mask=mask, decoder_input_ids=before, use_cache=False).logits
    return logits.float(), labels


def train(model, pairs, asked):
    optimizer = torch.optim.AdamW(
        decay_groups(model, 0.01), lr=asked.learning_rate, betas=(0.9, 0.98), eps=1e-9, fused=True,
    )  # fmt: skip
    rng, queue, steps, texts, spent = random.Random(asked.seed), [], 0, 0, 0.0
    began, budget = time.process_time(), 60 * asked.processor_minutes
    while spent < budget:
        share = spent / budget
        for group in optimizer.param_groups:
            warm, rest = (share + 1e-3) / asked.warmup_rate, (1 - share) / (1 - asked.warmup_rate)
            group["lr"] = asked.learning_rate * min(warm, rest)
        queue = queue or batches(pairs, asked.tokens, rng)
        batch = queue.pop()
        logits, labels = forward(model, batch, asked.dtype)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, label_smoothing=0.1
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps, texts, spent = steps + 1, texts + len(batch), time.process_time() - began
        if steps % 50 == 0:
            print(f"{spent:.0f} s of processor time, step {steps}, loss {loss.item():.3f}", flush=True)
    return steps, texts / len(pairs)


@torch.no_grad()
def translate(model, tokenizer, pairs, longest):
    texts, order = [""] * len(pairs), sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    for start in range(0, len(order), 64):
        some = order[start : start + 64]
        source = padded([pairs[i][0] for i in some])
        ids = model.generate(
            input_ids=source, attention_mask=(source != PAD).long(), max_new_tokens=longest, num_beams=1,
            do_sample=False,
        )  # fmt: skip
        for i, text in zip(some, tokenizer.decode_batch(ids.tolist(), skip_special_tokens=True), strict=True):
            texts[i] = text.strip()
    return texts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--kind", choices=KINDS, default="marian")
    parser.add_argument("--processor-minutes", type=float, default=6)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup-rate", type=float, default=0.05)
    parser.add_argument("--tokens", type=int, default=2000, help="of sources in an update")
    parser.add_argument("--longest", type=int, default=64, help="tokens of a source and of a target")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="bfloat16 is by autocast")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="write the translations there, a line each")
    asked = parser.parse_args()
    torch.manual_seed(asked.seed)
    torch.set_num_threads(asked.threads)
    tokenizer = tokenizers.Tokenizer.from_file(asked.tokenizer)
    _, pairs = read(asked.train, tokenizer, asked.longest)
    rows, held_out = read(asked.test, tokenizer, asked.longest)
    model = KINDS[asked.kind](tokenizer.get_vocab_size(), asked.dropout).train()
    began = time.monotonic()
    steps, epochs = train(model, pairs, asked)
    seconds = time.monotonic() - began
    texts = translate(model.eval(), tokenizer, held_out, asked.longest)
    golds = [row["fr"].strip() for row in rows]
    if asked.output:
        pathlib.Path(asked.output).write_text("".join(text.replace("\n", " ") + "\n" for text in texts), "utf-8")
    result = {
        "bleu": round(sacrebleu.corpus_bleu(texts, [golds]).score, 2),
        "chrf": round(sacrebleu.corpus_chrf(texts, [golds]).score, 2),
        "parameters": sum(p.numel() for p in model.parameters()), "steps": steps, "epochs": round(epochs, 2),
        "seconds": round(seconds), **{k: v for k, v in vars(asked).items() if k not in ("train", "test", "tokenizer")},
    }  # fmt: skip
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
