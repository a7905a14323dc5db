"""A training step on pairs of texts, measured beside its peer: vectors (contrastive), or a text for a text.

    python benchmarks/bench_pairs.py contrastive pairs.jsonl --init-from FOLDER --peer-python PYTHON_WITH_TORCH
    python benchmarks/bench_pairs.py text_to_text pairs.jsonl --peer-python PYTHON_WITH_TORCH

The peer is sentence-transformers with MultipleNegativesRankingLoss on the same published folder, or transformers'
T5ForConditionalGeneration of the sizes of configs/translate_en_fr.py. Both sides read the same pairs by the same
tokenizer, --texts of them an update (ours on average: as many packed rows as hold them), with AdamW, dropout and dtype
alike. The peer's batches are grouped by length, among 50 at a time, and padded to their longest; tokenization counts on
neither side. Each side runs in a process of its own, by turns, and real tokens a second are what is compared.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
from typing import Any

import numpy as np
from flax import nnx
from harness import PEER_ADAMW, header, parser, say, serve_training, show
from sides import CLOCKS, ratios, take_turns

from flax_encoder.commands.recipe import load_recipe
from flax_encoder.config import ConfigError, RunConfig, from_dict, to_dict
from flax_encoder.data.pipeline import RunData, open_data
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.store.tokenizing import num_cores
from flax_encoder.families.configs import write_config
from flax_encoder.families.t5 import T5
from flax_encoder.nn.partition import round_up_vocab
from flax_encoder.runs.length import settle_length
from flax_encoder.runs.load import read_origin
from flax_encoder.runs.start import like_origin
from flax_encoder.tasks import find_task

HERE = pathlib.Path(__file__).parent
RECIPES = {"contrastive": "contrastive", "text_to_text": "translate_en_fr"}
LONGEST = {"contrastive": 128, "text_to_text": 64}  # the recipes' rows; hardly a text is longer
BATCHES = {"ours": 16, "peer": 50}


def ours(folder: pathlib.Path) -> None:
    """The worker of our side."""
    spec = json.loads((folder / "spec.json").read_text())
    config = from_dict(RunConfig, spec["config"])
    make_model = find_task(config.objective).make_model(config, None)
    serve_training(lambda: make_model(nnx.Rngs(0)), folder, spec, config.model.dtype)


def settings(asked) -> tuple[RunConfig, Any]:
    """(the recipe with what is asked, the tokenizer of the folder that it starts from)."""
    config = load_recipe(HERE.parent / "configs" / f"{RECIPES[asked.objective]}.py")
    config = dataclasses.replace(
        config, epochs=None, steps=BATCHES["ours"], batch_texts=asked.texts, eval_batches=1,
        model=dataclasses.replace(config.model, dtype=asked.dtype),
        data=dataclasses.replace(config.data, source=asked.data, row_length=asked.length or config.data.row_length),
    )  # fmt: skip
    if asked.init_from is None:
        return config, None
    record, _ = read_origin(asked.init_from, config.objective)
    return like_origin(config, record, has_head=False), record.tokenizer


def columns(data: RunData, config: RunConfig) -> list[list[np.ndarray]]:
    """Of each training pair its texts as a model reads them."""
    split, (first, last) = data.stores[0].train, data.tokenizer.frame
    is_written = config.objective == "text_to_text"
    before = [] if first is None or is_written else [first]
    after = [config.decoder.end_id if is_written else last]
    room = LONGEST[config.objective] - len(before) - 1
    lengths = split.values["text_lengths"]
    return [
        [np.array([*before, *text[:room], *after]) for text in np.split(split.document(i), np.cumsum(own)[:-1])]
        for i, own in enumerate(lengths)
    ]


def grouped(pairs: list[list[np.ndarray]], texts: int, pad: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Batches of pairs of like length in random order, each text padded to the longest of its column: `ids_K` and
    `mask_K` [texts, longest] of column K."""
    rng, count = np.random.default_rng(seed), BATCHES["peer"] * texts
    some = rng.permutation(len(pairs))[:count]
    some = some[: len(some) // texts * texts]
    order = sorted(some.tolist(), key=lambda i: [len(text) for text in pairs[i]])
    batches = []
    for start in rng.permutation(len(order) // texts) * texts:
        batch = {}
        for k, column in enumerate(zip(*(pairs[i] for i in order[start : start + texts]), strict=True)):
            ids = np.full((texts, max(map(len, column))), pad, np.int64)
            for row, text in zip(ids, column, strict=True):
                row[: len(text)] = text
            widths = np.array([len(text) for text in column])[:, None]
            batch |= {f"ids_{k}": ids, f"mask_{k}": (np.arange(ids.shape[1]) < widths).astype(np.int64)}
        batches.append(batch)
    return batches


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "ours":
        return ours(pathlib.Path(sys.argv[2]))
    arguments = parser(__doc__)
    arguments.add_argument("objective", choices=RECIPES)
    arguments.add_argument("data", help="a file of pairs; of text_to_text with the columns of the recipe")
    arguments.add_argument("--init-from", metavar="FOLDER", help="a published folder, of contrastive")
    arguments.add_argument("--texts", type=int, default=64, help="pairs an update, of both sides (default 64)")
    arguments.add_argument("--length", type=int, help="tokens in a row of ours (default: the recipe's)")
    arguments.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of matrix products")
    arguments.add_argument("--peer-python", required=True, help="the Python of the peer's environment")
    arguments.add_argument("--peer-mode", choices=("eager", "compiled"), default="eager", help="how torch runs")
    arguments.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="processor counts each side's processor time, on a busy machine"
    )
    arguments.add_argument("--rounds", type=int, default=5, help="turns of each side (default 5)")
    arguments.add_argument("--seconds", type=float, default=10.0, help="of a turn, a step at least (default 10)")
    asked = arguments.parse_args()
    if (asked.objective == "contrastive") != (asked.init_from is not None):
        raise SystemExit("contrastive is of a published folder, --init-from FOLDER; text_to_text is of the recipe.")
    try:
        config, tokenizer = settings(asked)
        task = find_task(config.objective)
        data = open_data(config, task.reading, tokenizer=tokenizer, settle=settle_length, progress=say)
        config = task.settle(data.config, data)
    except (ConfigError, DataError) as error:
        raise SystemExit(str(error)) from None
    vocab = data.tokenizer.vocab_size
    model = dataclasses.replace(config.model, vocab_size=round_up_vocab(max(vocab, config.model.vocab_size)))
    iterator = data.train.iterate()
    rows = [next(iterator) for _ in range(BATCHES["ours"])]
    iterator.close()
    singles = grouped(columns(data, config), asked.texts, data.tokenizer.special("pad"))
    streams = [name for name in ("segment_ids", "decoder_segment_ids") if name in rows[0]]
    texts_a_pair = 1 if asked.objective == "text_to_text" else 2
    spec: dict[str, Any] = {
        "config": to_dict(dataclasses.replace(config, model=model)),
        "ours_tokens": [sum(int(np.count_nonzero(batch[name])) for name in streams) for batch in rows],
        "ours_texts": [int(batch["segment_ids"].max(1).sum()) // texts_a_pair for batch in rows],
        "objective": asked.objective,
        "peer_mode": asked.peer_mode,
        "folder": asked.init_from and str(pathlib.Path(asked.init_from).resolve()),
        "dtype": asked.dtype,
        "dropout": [config.model.dropout_rate, config.model.attention_dropout_rate],
        "scale": 1 / config.contrastive.temperature,
        "peer_tokens": [sum(int(x.sum()) for name, x in batch.items() if name.startswith("mask")) for batch in singles],
        "peer_texts": [len(batch["ids_0"]) for batch in singles],
        "cores": num_cores(), **PEER_ADAMW,
    }  # fmt: skip
    if asked.objective == "text_to_text":
        own = dataclasses.replace(config.model, vocab_size=vocab, attention_scale=1.0)  # as T5 can say it
        ids = {"decoder_start_token_id": config.decoder.start_id, "eos_token_id": config.decoder.end_id}
        ids["pad_token_id"] = data.tokenizer.special("pad")
        spec["peer_config"] = write_config(T5, own, "text_to_text", decoder=config.decoder) | ids
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for name, batches in {"ours": rows, "peer": singles}.items():
            for i, batch in enumerate(batches):
                np.savez(folder / f"{name}-{i:03}.npz", **batch)
        (folder / "spec.json").write_text(json.dumps(spec))
        commands = {
            "ours": [sys.executable, __file__, "ours", temporary],
            "peer": [asked.peer_python, str(HERE / "peer_pairs.py"), temporary],
        }
        ready, turns = take_turns(commands, asked.rounds, asked.seconds, say, asked.clock)
    peak = ready["ours"]["matmul_peak"]
    about = {k: v for k, v in vars(asked).items() if k not in ("json", "peer_python")}
    fill = statistics.mean(np.count_nonzero(batch["segment_ids"]) / batch["segment_ids"].size for batch in rows)
    padded = sum(x.size for batch in singles for name, x in batch.items() if name.startswith("mask"))
    filled = {"ours": fill, "peer": sum(spec["peer_tokens"]) / padded}
    shown = []
    for name, own in turns.items():
        steps = [ms for turn in own for ms in turn["milliseconds"]]
        shown.append({
            "": name, "tokens/s": statistics.median(turn["rate"] for turn in own),
            "pairs/s": 1000 * sum(turn["texts"] for turn in own) / sum(steps),
            "pairs an update": sum(turn["texts"] for turn in own) / len(steps), "filled": filled[name],
            "step ms": statistics.median(steps), "spread": f"{min(steps):,.0f} to {max(steps):,.0f}",
            "start s": ready[name]["compile_seconds"], "peak memory GB": max(t["memory"] for t in own) / 1e9,
        })  # fmt: skip
    by_turn = ratios(turns)
    result = {
        "header": header(**about, **ready["peer"]["versions"]), "sides": shown, "ratios": by_turn,
        "ratio": statistics.median(by_turn), "matmul_peak_flops": peak,
    }  # fmt: skip
    show(result, shown, asked.json)
    if not asked.json:
        print(f"ratio {result['ratio']:.2f} ({min(by_turn):.2f} to {max(by_turn):.2f}); peak {peak / 1e9:,.0f} GFLOP/s")


if __name__ == "__main__":
    main()
