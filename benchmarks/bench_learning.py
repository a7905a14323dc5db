"""Quality for minutes: a recipe's masked LM beside transformers on torch, on the same text in the same time.

    python benchmarks/bench_learning.py --source en.jsonl --minutes 4 --peer mlm modernbert-muon --peer-minutes 10 \\
        --peer-rates 5e-4 1e-3 2e-3 --peer-python PYTHON_WITH_TORCH --plot learning.png --json > learning.json

Ours is train.py with --recipe, as a person types it; options that are not named below go to it. A peer has the same
tokenizer, training text, row length, rows an update, layers and width, no dropout, AdamW and torch.compile:
  mlm              BERT, as run_mlm.py trains it: documents end to end in full rows
  modernbert       ModernBERT, likewise
  modernbert-muon  the same with torch.optim.Muon for the layers' matrices
What is compared is the loss of the same held-out masked tokens. Ours sees each document alone, as it was trained, a
peer the whole row, as it was. Minutes are of training: neither side's compilation and evaluation count, our checkpoints
do. Of a peer's rates the one with the least loss on those very tokens is quoted; of several seeds the median. `ours
there, min` is when ours had first come to the peer's last loss, at one of its evaluations.
"""

import concurrent.futures
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
from harness import header, parser, say, show

from flax_encoder.commands.recipe import parse_run_config
from flax_encoder.config import RunConfig
from flax_encoder.data.pipeline import RunData, open_data
from flax_encoder.data.rows.documents import Frame
from flax_encoder.ops.platform import cpu_multiplies_bfloat16
from flax_encoder.runs.length import settle_length
from flax_encoder.tasks import find_task
from flax_encoder.training.run_log import read_metrics

HERE = pathlib.Path(__file__).parent
KINDS = ("mlm", "modernbert", "modernbert-muon")
SPECIAL = ("pad", "first", "last", "mask")
Curve = list[tuple[float, float]]  # (seconds of training, held-out loss)


def write_data(data: RunData, file: pathlib.Path) -> None:
    """What a peer reads: training `rows` [N, T] without padding, and the held-out masked rows, whose `mask` is of what
    is no padding and whose `labels` at `slots` are -100 where nothing is predicted."""
    frame, config = Frame.of(data.tokenizer), data.config
    texts = [frame.around(store.train.document(i)) for store in data.stores for i in range(len(store.train))]
    ids = np.concatenate(texts)
    T = config.data.row_length
    batches = [data.evaluation[i] for i in range(len(data.evaluation))]
    held = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    np.savez(
        file, rows=ids[: len(ids) // T * T].reshape(-1, T), ids=held["tokens"], mask=held["segment_ids"] > 0,
        slots=held["target_positions"], labels=np.where(held["target_weights"] > 0, held["targets"], -100),
    )  # fmt: skip


def peer_spec(config: RunConfig, data: RunData) -> dict[str, Any]:
    """Of peer_learning.py's settings those that follow from the recipe."""
    names = ("num_layers", "embed_dim", "num_heads", "mlp_dim", "gated", "dtype")
    return {name: getattr(config.model, name) for name in names} | {
        "special": {role: data.tokenizer.special(role) for role in SPECIAL}, "vocab_size": data.tokenizer.vocab_size,
        "row_length": config.data.row_length, "batch_size": config.batch_size,
    }  # fmt: skip


def our_curve(run_dir: pathlib.Path) -> dict[str, Any]:
    """A finished run's evaluations, each at the seconds that the training lines around it say."""
    lines = read_metrics(run_dir)
    logged = [(line["step"], line["spent_seconds"]) for line in lines if "spent_seconds" in line]
    evaluated = [(line["step"], line["eval/loss"]) for line in lines if "eval/loss" in line]
    steps, seconds = zip(*logged, strict=True)
    curve = [(float(np.interp(step, steps, seconds)), loss) for step, loss in evaluated]
    return {"curve": curve, "updates": steps[-1], "epochs": [x["epoch"] for x in lines if "epoch" in x][-1]}


def minutes_to(curve: Curve, loss: float) -> float | None:
    """When a run's held-out loss was first no more than `loss`; None if it never was."""
    return next((seconds / 60 for seconds, found in curve if found <= loss), None)


def run(command: list[str], cores: list[int] | None) -> str:
    """What it prints; `cores` are those it may use."""
    pinned = [] if cores is None else ["taskset", "-c", ",".join(map(str, cores))]
    done = subprocess.run([*pinned, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])} failed:\n{(done.stderr or done.stdout)[-3000:]}")
    return done.stdout


def summary(name: str, runs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table: the runs of one side, a seed each."""
    last = [one["curve"][-1][1] for one in runs]
    loss = statistics.median(last)
    there = [minutes_to(one["curve"], loss) for one in ours]
    return {
        "side": name, "held-out loss": f"{loss:.3f}", "spread": f"{min(last):.3f} to {max(last):.3f}",
        "updates": round(statistics.median(one["updates"] for one in runs)),
        "epochs": statistics.median(one["epochs"] for one in runs),
        "ours there, min": None if None in there or runs is ours else statistics.median(there),  # type: ignore[type-var]
    }  # fmt: skip


def best_rates(runs: dict[tuple[str, float], list[dict[str, Any]]]) -> dict[str, tuple[float, list[dict[str, Any]]]]:
    """Of each peer the rate whose runs end with the least median loss, and those runs."""
    best: dict[str, tuple[float, list[dict[str, Any]]]] = {}
    loss = lambda some: statistics.median(one["curve"][-1][1] for one in some)  # noqa: E731
    for (kind, rate), some in runs.items():
        if kind not in best or loss(some) < loss(best[kind][1]):
            best[kind] = rate, some
    return best


def plot(sides: dict[str, list[dict[str, Any]]], title: str, file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for number, (name, runs) in enumerate(sides.items()):
        for one in runs:
            seconds, losses = zip(*one["curve"], strict=True)
            axes.plot(np.divide(seconds, 60), losses, f"C{number}", label=name if one is runs[0] else None)
    axes.set(xlabel="minutes of training", ylabel="held-out loss, nats a masked token", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
    say(f"wrote {file}")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--recipe", default="quickstart", help="of masked LM (default quickstart)")
    arguments.add_argument("--source", help="what train.py reads (default: the recipe's text)")
    arguments.add_argument("--vocab-size", help="of the tokenizer that both sides have (default: the recipe's)")
    arguments.add_argument("--minutes", type=float, default=4.0, help="of training, of each run of ours (default 4)")
    arguments.add_argument("--seeds", type=int, default=1, help="how many, from 0 on")
    arguments.add_argument(
        "--dtype", choices=("bfloat16", "float32"),
        default="bfloat16" if cpu_multiplies_bfloat16() else "float32",
        help="of products on both sides (default: bfloat16 where this CPU has it)",
    )  # fmt: skip
    arguments.add_argument("--eval-every", type=int, default=50, help="updates of ours (default 50)")
    arguments.add_argument("--peer", nargs="*", choices=KINDS, default=[])
    arguments.add_argument("--peer-rates", nargs="+", type=float, default=[1e-3], help="learning rates that it tries")
    arguments.add_argument("--peer-minutes", type=float, help="of each of its runs (default: those of ours)")
    arguments.add_argument("--peer-masked-rate", type=float, default=0.15, help="of its training text (default 0.15)")
    arguments.add_argument("--peer-evaluations", type=int, default=10, help="in its time (default 10)")
    arguments.add_argument("--peer-eager", action="store_true", help="without torch.compile, which needs g++")
    arguments.add_argument("--peer-python", help="the Python of the peers' environment")
    arguments.add_argument(
        "--at-once", action="store_true", help="two runs at a time, half of the cores each, not one after the other"
    )
    arguments.add_argument("--plot", metavar="FILE", help="draw the curves, of each peer's best rate")
    asked, rest = arguments.parse_known_args()
    if bool(asked.peer) != bool(asked.peer_python):
        raise SystemExit("a peer runs in its own environment: give --peer and --peer-python together, or neither.")
    told = [
        "--config", asked.recipe, "--budget-minutes", str(asked.minutes), "--eval-every", str(asked.eval_every),
        "--model.dtype", asked.dtype, *rest,
    ]  # fmt: skip
    told += ["--data.source", asked.source] if asked.source else []
    told += ["--data.vocab-size", asked.vocab_size] if asked.vocab_size else []
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[: len(cores) // 2], cores[len(cores) // 2 :]] if asked.at_once else [None]
    if [] in shares:
        raise SystemExit(f"--at-once gives each of two runs a core: got {len(cores)}. Leave it out.")
    free, commands = list(shares), {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for seed in range(asked.seeds):  # which decides what is masked
            own = [*told, "--seed", str(seed), "--run-dir", str(folder / f"ours-{seed}")]
            config = parse_run_config(own, default=asked.recipe)
            if config.objective != "masked_lm":
                raise SystemExit(f"--recipe must be of masked_lm: {asked.recipe} is of {config.objective}.")
            data = open_data(config, find_task("masked_lm").reading, settle=settle_length, progress=say)
            write_data(data, folder / f"{seed}.npz")
            commands["ours", None, seed] = [sys.executable, str(HERE.parent / "train.py"), *own]
            spec = peer_spec(data.config, data) | {
                "seed": seed, "masked_rate": asked.peer_masked_rate, "evaluations": asked.peer_evaluations,
                "compiled": not asked.peer_eager, "cores": len(shares[0] or cores),
                "minutes": asked.peer_minutes or asked.minutes,
            }  # fmt: skip
            for kind, rate in itertools.product(asked.peer, asked.peer_rates):
                told_peer = [str(folder / f"{seed}.npz"), json.dumps(spec | {"kind": kind, "learning_rate": rate})]
                commands[kind, rate, seed] = [asked.peer_python, str(HERE / "peer_learning.py"), *told_peer]

        def do(side: str, rate: float | None, seed: int) -> dict[str, Any]:
            name, share = f"{side}, rate {rate or 'of the recipe'}, seed {seed}", free.pop()
            say(f"starting {name}")
            printed = run(commands[side, rate, seed], share)
            free.append(share)
            one = our_curve(folder / f"ours-{seed}") if side == "ours" else json.loads(printed.splitlines()[-1])
            say(f"{name}: {one['curve'][-1][1]:.4f}")
            return one

        runs: dict[Any, list[dict[str, Any]]] = {}
        with concurrent.futures.ThreadPoolExecutor(len(shares)) as pool:
            futures = [pool.submit(do, *key) for key in commands]
            try:
                for (side, rate, _), future in zip(commands, futures, strict=True):
                    runs.setdefault((side, rate), []).append(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        with np.load(folder / "0.npz") as arrays:
            about = {"rows": len(arrays["rows"]), "held out": int((arrays["labels"] >= 0).sum())}
    ours = runs.pop(("ours", None))
    best = best_rates(runs)
    sides = {"ours": ours} | {f"{kind}, {rate:g}": some for kind, (rate, some) in best.items()}
    rows = [summary(name, some, ours) for name, some in sides.items()]
    versions = next((some[0]["versions"] for some in runs.values()), {})
    settings = {k: v for k, v in vars(asked).items() if k not in ("json", "peer_python", "plot", "source")}
    load = round(os.getloadavg()[0], 1)
    top = header(**settings, **about, **versions, load=load, CPU_has_bfloat16=cpu_multiplies_bfloat16())
    everything = {"ours": ours} | {f"{kind}, {rate:g}": some for (kind, rate), some in runs.items()}
    show({"header": top, "rows": rows, "runs": everything}, rows, asked.json)
    if asked.plot:
        plot(sides, f"{asked.recipe}, {asked.dtype}\n{top['cores']} cores of {top['device']}", asked.plot)


if __name__ == "__main__":
    main()
