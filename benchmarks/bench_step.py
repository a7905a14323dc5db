"""The training step, measured beside its peers: AdamW, the same model, dropout, objective and masked share.

    python benchmarks/bench_step.py --model bert_base --batch 16 --length 128 --dtype bfloat16 \\
        --peer torch --peer-python PYTHON_WITH_TORCH_AND_TRANSFORMERS

Each side runs in a process of its own, by turns (ours, peer, ours, peer ...), on batches that are made beforehand.
`--data full` has rows without padding; otherwise both read the same documents, ours packed into rows of --length, the
peer padded to the longest of a batch of as many documents. --texts gives both sides so many documents an update (ours
on average: as many rows as hold them). Tokens a second count real tokens only. --objective classification learns a
label a document (with --data SOURCE, of its column `label`).

--peer torch is transformers' PyTorch model with fused AdamW (bfloat16 by autocast), run as --peer-mode says:
  eager     as most scripts do, documents in random order
  compiled  by torch.compile, documents grouped by length, and only masked positions in the vocabulary head
  unpadded  compiled, on our packed rows, in which each document sees itself alone
--peer flax is its FlaxBert, up to transformers 4.57.6. MFU is model FLOPs (flax_encoder/plan/flops.py) over the matmul
peak that is measured in the same run.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import sys
import tempfile
from typing import Any

import numpy as np
from flax import nnx
from harness import PEER_ADAMW, header, parser, say, serve_training, show
from sides import ratios, take_turns

from flax_encoder.config import DataConfig, EncoderConfig, MaskingConfig, RunConfig
from flax_encoder.data.pipeline import open_data
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.store.tokenizing import num_cores
from flax_encoder.families import FAMILIES, PRESETS, preset
from flax_encoder.families.configs import write_config
from flax_encoder.nn.partition import round_up_vocab
from flax_encoder.plan.flops import step_flops
from flax_encoder.runs.length import settle_length
from flax_encoder.tasks import Classifier, MaskedLM, find_task

HERE = pathlib.Path(__file__).parent


def ours(folder: pathlib.Path) -> None:
    """The worker of our side."""
    spec = json.loads((folder / "spec.json").read_text())
    config, num_classes = EncoderConfig(**spec["config"]), spec["num_classes"]

    def make_model():
        rngs = nnx.Rngs(0)
        return MaskedLM(config, rngs=rngs) if num_classes is None else Classifier(config, num_classes, rngs=rngs)

    serve_training(make_model, folder, spec, spec["dtype"])


def masked_rows(config: EncoderConfig, rows: int, length: int, rate: float, seed: int) -> dict[str, np.ndarray]:
    """A batch of rows without padding: random ids, `rate` of each row predicted."""
    rng = np.random.default_rng(seed)
    shape, slots = (rows, length), round(rate * length)
    positions = np.sort(np.argsort(rng.random(shape), axis=1)[:, :slots], axis=1).astype(np.int32)
    return {
        "tokens": rng.integers(0, config.vocab_size, shape, np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), shape).copy(),
        "target_positions": positions,
        "targets": rng.integers(0, config.vocab_size, positions.shape, np.int32),
        "target_weights": np.ones(positions.shape, np.float32),
    }


def labelled_rows(config: EncoderConfig, rows: int, length: int, num_classes: int, seed: int) -> dict[str, np.ndarray]:
    """A batch of rows without padding, each a document of random ids with a random label at its first token."""
    rng, first = np.random.default_rng(seed), np.zeros((rows, 1), np.int32)
    labels = {
        "target_positions": first,
        "targets": rng.integers(0, num_classes, first.shape, np.int32),
        "target_weights": np.ones(first.shape, np.float32),
    }
    return masked_rows(config, rows, length, 0.0, seed) | labels


def read_rows(asked, config: EncoderConfig, packing: str, batches: int) -> list[dict[str, np.ndarray]]:
    """Batches of text through the library's own input path; one document a row is what the peer gets."""
    source = "tfds:python_docs" if asked.data == "real" else asked.data
    data = DataConfig(source=source, row_length=asked.length, vocab_size=config.vocab_size, packing=packing)  # type: ignore[arg-type]
    masking = MaskingConfig(rate=asked.masked_rate)
    model = dataclasses.replace(config, max_length=max(config.max_length, asked.length))
    run = RunConfig(
        model=model, data=data, masking=masking, batch_size=asked.batch, batch_texts=asked.texts, steps=batches,
        eval_batches=1, objective=asked.objective,
    )  # fmt: skip
    try:
        train = open_data(run, find_task(run.objective).reading, settle=settle_length, progress=say).train
    except DataError as error:
        raise SystemExit(f"--data: {error}") from None
    wanted = {"tokens", "segment_ids", "positions", "target_positions", "targets", "target_weights"}
    iterator = train.iterate()
    found = [{k: v for k, v in next(iterator).items() if k in wanted} for _ in range(batches)]
    iterator.close()
    return found


def grouped_by_length(batches: list[dict[str, np.ndarray]], seed: int = 0) -> list[dict[str, np.ndarray]]:
    """The same rows in batches of like length, which then come in random order: transformers' `group_by_length`, whose
    group is 50 batches."""
    rng = np.random.default_rng(seed)
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    lengths = (rows["segment_ids"] > 0).sum(1)
    size = len(batches[0]["tokens"])
    order = rng.permutation(len(lengths))
    groups = np.split(order, range(50 * size, len(order), 50 * size))
    order = np.concatenate([group[np.argsort(-lengths[group], kind="stable")] for group in groups])
    return [
        {name: x[order[i * size : (i + 1) * size]] for name, x in rows.items()} for i in rng.permutation(len(batches))
    ]


def padded(batch: dict[str, np.ndarray], objective: str) -> dict[str, np.ndarray]:
    """A batch of one document a row as a padding trainer has it, cut to its longest: labels at every token, or one a
    row; and of masked tokens `slots`, their positions, with the labels there."""
    longest = int((batch["segment_ids"] > 0).sum(1).max())
    made = {
        "input_ids": batch["tokens"][:, :longest].astype(np.int64),
        "attention_mask": (batch["segment_ids"][:, :longest] > 0).astype(np.int64),
        "slots": batch["target_positions"].astype(np.int64),
        "slot_labels": np.where(batch["target_weights"] > 0, batch["targets"], -100).astype(np.int64),
        "labels": batch["targets"][:, 0].astype(np.int64),
    }
    if objective == "masked_lm":
        labels = np.full(batch["tokens"].shape, -100, np.int64)
        row, slot = np.nonzero(batch["target_weights"])
        labels[row, batch["target_positions"][row, slot]] = batch["targets"][row, slot]
        made["labels"] = labels[:, :longest]
    return made


def unpadded(batch: dict[str, np.ndarray], objective: str) -> dict[str, np.ndarray]:
    """One of our batches, for a peer that reads packed rows: a token sees those of its own document."""
    made = padded(batch, objective) | {"segment_ids": batch["segment_ids"], "position_ids": batch["positions"]}
    made["input_ids"] = batch["tokens"].astype(np.int64)
    return {name: x.astype(np.int64) for name, x in made.items() if name not in ("attention_mask", "labels")}


def counts(batches: list[dict[str, np.ndarray]]) -> tuple[list[int], list[int]]:
    """(real tokens, documents or pieces of them) of each batch."""
    tokens = [int(np.count_nonzero(batch["segment_ids"])) for batch in batches]
    return tokens, [int(batch["segment_ids"].max(1).sum()) for batch in batches]


def peer_config(name: str, config: EncoderConfig, objective: str = "masked_lm") -> dict[str, Any]:
    """The model as a published config."""
    family = next(f for f in FAMILIES if name in f.presets)
    return write_config(family, config, objective)


def add_model_arguments(arguments, batch: int, length: int) -> None:
    """What says which step it is, with the defaults of two; `configs` reads it."""
    arguments.add_argument("--model", default="bert_base", help=f"one of {', '.join(PRESETS)}")
    arguments.add_argument("--batch", type=int, default=batch, help=f"rows, of each chip (default {batch})")
    arguments.add_argument("--length", type=int, default=length, help=f"tokens in a row (default {length})")
    arguments.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of matrix products")
    arguments.add_argument("--masked-rate", type=float, default=0.15, help="share of tokens predicted (default 0.15)")
    arguments.add_argument("--dropout", type=float, help="of both sides, everywhere (default: the model's own)")
    arguments.add_argument("--layers", type=int, help="fewer layers than the model has")
    arguments.add_argument("--scan", action="store_true", help="run the layers by lax.scan instead of unrolled")
    arguments.add_argument("--remat", choices=("none", "feed_forward", "dots", "full"), default="none")
    arguments.add_argument("--attention", help="implementation (default: the library's choice)")


def configs(asked) -> tuple[EncoderConfig, EncoderConfig]:
    """The model as published, and as we run it."""
    own = preset(asked.model)
    changes: dict[str, Any] = {"num_layers": asked.layers or own.num_layers}
    if asked.dropout is not None:
        changes |= {"dropout_rate": asked.dropout, "attention_dropout_rate": asked.dropout}
    own = dataclasses.replace(own, **changes, max_length=max(own.max_length, asked.length))
    config = dataclasses.replace(
        own, vocab_size=round_up_vocab(own.vocab_size), dtype=asked.dtype, scan_layers=asked.scan, remat=asked.remat,
        attention_implementation=asked.attention,
    )  # fmt: skip
    return own, config


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "ours":
        return ours(pathlib.Path(sys.argv[2]))
    arguments = parser(__doc__)
    add_model_arguments(arguments, batch=16, length=128)
    arguments.add_argument("--objective", choices=("masked_lm", "classification"), default="masked_lm")
    arguments.add_argument("--data", default="full", help="full, real (python_docs), or any text the library reads")
    arguments.add_argument(
        "--microbatches", type=int, default=1, help="parts of a batch whose gradients ours adds up (default 1)"
    )
    arguments.add_argument("--peer", choices=("torch", "flax", "none"), default="none")
    arguments.add_argument(
        "--peer-mode", choices=("eager", "compiled", "unpadded"), default="compiled",
        help="how torch runs (default compiled, what a user in a hurry types)",
    )  # fmt: skip
    arguments.add_argument("--texts", type=int, help="documents an update on both sides, instead of --batch rows")
    arguments.add_argument("--peer-python", help="the Python of the peer's environment")
    arguments.add_argument("--rounds", type=int, default=5, help="turns of each side (default 5)")
    arguments.add_argument("--seconds", type=float, default=15.0, help="of a turn, a step at least (default 15)")
    arguments.add_argument(
        "--apart", action="store_true", help="start a side anew for each turn, for two that do not fit memory together"
    )
    asked = arguments.parse_args()
    if asked.texts is not None and asked.data == "full":
        raise SystemExit("--texts counts documents of a text: give --data real or a file.")
    if (asked.peer == "none") != (asked.peer_python is None):
        raise SystemExit("a peer runs in its own environment: give --peer and --peer-python together, or neither.")

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take a GPU's memory before its peer
    own, config = configs(asked)
    num_classes = None
    if asked.data == "full":
        if asked.objective == "masked_lm":
            rows = [masked_rows(own, asked.batch, asked.length, asked.masked_rate, seed) for seed in range(4)]
        else:
            num_classes = 2
            rows = [labelled_rows(own, asked.batch, asked.length, num_classes, seed) for seed in range(4)]
        singles = rows
    else:
        rows = read_rows(asked, own, "best-fit", 16)
        singles = read_rows(asked, own, "one-per-row", 64)
        if asked.objective == "classification":
            num_classes = 1 + max(int(batch["targets"].max()) for batch in rows + singles)
    if asked.data != "full" and asked.peer_mode != "eager":
        singles = grouped_by_length(singles)
    theirs = [padded(batch, asked.objective) for batch in singles]
    if asked.peer_mode == "unpadded":
        singles, theirs = rows, [unpadded(batch, asked.objective) for batch in rows]
    tokens, texts = counts(rows)
    peer_tokens, peer_texts = counts(singles)
    flops = statistics.mean(
        step_flops(own, b["segment_ids"], int(b["target_weights"].sum()), num_classes) for b in rows
    )

    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for i, batch in enumerate(rows):
            np.savez(folder / f"ours-{i:03}.npz", **batch)
        spec = {
            "config": dataclasses.asdict(config),
            "dtype": asked.dtype,
            "ours_tokens": tokens,
            "ours_texts": texts,
            "microbatches": asked.microbatches,
            "num_classes": num_classes,
        }
        if asked.peer != "none":
            for i, batch in enumerate(theirs):
                np.savez(folder / f"peer-{i:03}.npz", **batch)
            spec |= {
                "peer": asked.peer,
                "peer_mode": asked.peer_mode,
                "objective": asked.objective,
                "peer_config": peer_config(asked.model, own, asked.objective),
                "peer_tokens": peer_tokens,
                "peer_texts": peer_texts,
                **PEER_ADAMW,
                "cores": num_cores(),
            }
        (folder / "spec.json").write_text(json.dumps(spec))
        sides = {"ours": [sys.executable, __file__, "ours", temporary]}
        if asked.peer != "none":
            sides["peer"] = [asked.peer_python, str(HERE / "peer_step.py"), temporary]
        ready, turns = take_turns(sides, asked.rounds, asked.seconds, say, apart=asked.apart)

    peak = ready["ours"]["matmul_peak"]
    result: dict[str, Any] = {"header": header(**{k: v for k, v in vars(asked).items() if k != "json"})}
    for name in sides:
        steps = [ms for turn in turns[name] for ms in turn["milliseconds"]]
        result[name] = {
            "tokens_per_second": statistics.median(turn["rate"] for turn in turns[name]),
            "texts_per_second": statistics.median(
                1000 * turn["texts"] / sum(turn["milliseconds"]) for turn in turns[name]
            ),
            "texts_per_update": sum(turn["texts"] for turn in turns[name]) / len(steps),
            "step_milliseconds": statistics.median(steps),
            "step_spread_milliseconds": [min(steps), max(steps)],
            "compile_seconds": ready[name]["compile_seconds"],
            "peak_memory_bytes": max(turn["memory"] for turn in turns[name]),
        }
    # Model FLOPs a real token, so that the same count serves a side whose batches vary.
    per_token = flops / statistics.mean(tokens)
    for name in sides:
        result[name]["mfu"] = per_token * result[name]["tokens_per_second"] / peak
    result["matmul_peak_flops"] = peak
    result["model_flops"] = flops
    if "peer" in sides:
        result["peer"]["versions"] = ready["peer"]["versions"]
        result["ratio"] = statistics.median(ratios(turns))
    rows_shown = [
        {
            "": name,
            "tokens/s": result[name]["tokens_per_second"],
            "texts/s": result[name]["texts_per_second"],
            "texts an update": result[name]["texts_per_update"],
            "step ms": result[name]["step_milliseconds"],
            "spread": "{:,.0f} to {:,.0f}".format(*result[name]["step_spread_milliseconds"]),
            "compile s": result[name]["compile_seconds"],
            "MFU": result[name]["mfu"],
            "peak memory GB": result[name]["peak_memory_bytes"] / 1e9,
        }
        for name in sides
    ]
    show(result, rows_shown, asked.json)
    if not asked.json:
        print(f"matmul peak {peak / 1e9:,.0f} GFLOP/s; model {flops / 1e9:,.0f} GFLOP a step", end="")
        print(f"; ratio {result['ratio']:.2f}" if "ratio" in result else "")


if __name__ == "__main__":
    main()
