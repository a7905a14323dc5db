"""A trained model in use on a file of texts, measured beside what people would pick instead.

    python benchmarks/bench_use.py embed FOLDER TEXTS --dtype float32 bfloat16 \\
        --peer torch:float32 torch:bfloat16 onnx:float32 openvino:float32 --peer-python PYTHON
    python benchmarks/bench_use.py classify FOLDER TEXTS --peer torch:float32 compiled:bfloat16 --peer-python PYTHON

FOLDER is published: of sentence-transformers' kind to embed, else one with a head for sequences (`classify`) or tokens
(`tag`), or an encoder-decoder (`write`). TEXTS has one text a line. Each side is a process of its own that tokenizes
and answers too; they go by turns.

A peer is a way to run the model and the dtype of its weights: `torch` as it is, `compiled` by torch.compile, or the
`onnx` and `openvino` backends. To embed it is sentence-transformers, which sorts texts by length; else transformers'
pipeline in batches of 32 in the file's order, as people call it, or, named `sorted-torch`, `sorted-onnx` ..., of texts
sorted by length first.

`write` asks an encoder-decoder for texts of exactly `--new-tokens` tokens, or, of a trained one, of as many as it
likes from `--least-tokens` on, greedy or by `--num-beams`; its peer is transformers' `generate` in batches of 32 of
texts sorted by length.

`first` is the time from the start of the process to the answer for one text; `one` of one text to a warm model, the
median and the 99th percentile of 100. `largest difference` is from our first side: 1 - cosine of vectors, of
probabilities, or the share of texts whose entities or writing differ, over 256 texts.
"""

import pathlib
import sys
import time

BEGAN = time.perf_counter()
HERE = pathlib.Path(__file__).parent
COMPARED = 256
TASKS = ("embed", "classify", "tag", "write")


def ours(task: str, folder: str, dtype: str, num_beams: int, new_tokens: int, least_tokens: int):
    """Texts to vectors, or to answers as `comparable` has them, by the library as a script would use it."""
    from flax_encoder.training.runtime import set_up_runtime

    set_up_runtime()
    if task == "embed":
        from flax_encoder.runs.embed import load_embedder

        embedder = load_embedder(folder, dtype=dtype)
        return lambda texts: embedder.embed(texts)[0]
    from flax_encoder.runs.load import load

    model = load(folder, dtype=dtype)
    if task == "write":
        from flax_encoder.config import GenerationConfig

        settings = GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=least_tokens, num_beams=num_beams)
        model = model.with_settings(settings)
        return lambda texts: [answer["text"] for answer in model.predict(texts)]
    if task == "classify":
        return lambda texts: [answer["probabilities"] for answer in model.predict(texts)]
    return lambda texts: [
        sorted((e["start"], e["end"], e["label"]) for e in answer["entities"]) for answer in model.predict(texts)
    ]


def main() -> None:
    if sys.argv[1] == "--side":
        from sides import serve

        *_, task, folder, texts, num_beams, new_tokens, least_tokens, dtype = sys.argv
        answers = ours(task, folder, dtype, int(num_beams), int(new_tokens), int(least_tokens))
        return serve(answers, pathlib.Path(texts).read_text("utf-8").splitlines(), BEGAN, {})
    from harness import Timing, header, parser, say, show
    from sides import Side

    arguments = parser(__doc__)
    arguments.add_argument("task", choices=TASKS)
    arguments.add_argument("folder", help="a published folder")
    arguments.add_argument("texts", help="one text a line")
    arguments.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    arguments.add_argument("--peer", nargs="*", default=[], help="WAY:DTYPE, such as torch:float32")
    arguments.add_argument("--peer-python", help="the Python of the peers' environment")
    arguments.add_argument("--turns", type=int, default=3)
    arguments.add_argument("--num-beams", type=int, default=1, help="of write")
    arguments.add_argument("--new-tokens", type=int, default=64, help="of write")
    arguments.add_argument("--least-tokens", type=int, help="of write; as many as --new-tokens if not said")
    asked = arguments.parse_args()
    if bool(asked.peer) != bool(asked.peer_python):
        raise SystemExit("a peer runs in its own environment: give --peer and --peer-python together, or neither.")
    texts = pathlib.Path(asked.texts).read_text("utf-8").splitlines()
    least = asked.new_tokens if asked.least_tokens is None else asked.least_tokens
    told = [asked.task, asked.folder, asked.texts, *map(str, (asked.num_beams, asked.new_tokens, least))]
    commands = {f"ours:{d}": [sys.executable, __file__, "--side", *told, d] for d in asked.dtype}
    commands |= {name: [asked.peer_python, str(HERE / "peer_use.py"), *told, name] for name in asked.peer}
    sides = {}
    for name, command in commands.items():
        say(f"starting {name}")
        sides[name] = Side(name, command)
        sides[name].ask("all")  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(asked.turns):
        for name, side in sides.items():
            seconds[name].append(side.ask("all")["seconds"])
            say(f"turn {turn + 1}/{asked.turns}  {name}: {len(texts) / seconds[name][-1]:,.0f} texts/s")
    ones = {name: side.ask("one")["milliseconds"] for name, side in sides.items()}
    answers = {name: side.ask("answers")["answers"] for name, side in sides.items()}
    versions: dict[str, str] = {}
    rows = []
    for name, side in sides.items():
        timing, one = Timing.of(seconds[name]), sorted(ones[name])
        versions |= side.ready["versions"]
        rows.append({
            "side": name, "texts/s": len(texts) / timing.median, "least": len(texts) / timing.most,
            "most": len(texts) / timing.least, "first s": side.ready["seconds"], "one ms": one[len(one) // 2],
            "99th": one[int(0.99 * len(one))],
            "largest difference": difference(asked.task, answers[name], next(iter(answers.values()))),
        })  # fmt: skip
        side.close()
    about = {"task": asked.task, "folder": pathlib.Path(asked.folder).name, "texts": len(texts)}
    show({"header": header(**about, **versions), "rows": rows}, rows, asked.json)


def difference(task: str, some: list, others: list) -> float:
    """How far answers are apart, as the table has it."""
    import numpy as np

    if task == "embed":
        a, b = np.asarray(some), np.asarray(others)
        return float((1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).max())
    if task == "classify":
        return max(abs(a[label] - b[label]) for a, b in zip(some, others, strict=True) for label in a)
    return float(np.mean([a != b for a, b in zip(some, others, strict=True)]))


if __name__ == "__main__":
    main()
