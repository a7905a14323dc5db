"""The sides of a comparison: processes that wait for a line, work, and answer with a line of JSON.

It imports nothing but the standard library, so that a peer's environment can import it too.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time

# Of transformers' masked-language models, what stands between hidden states and the logits of the vocabulary.
VOCABULARY_HEADS = {
    "bert": lambda model, x: model.cls(x),
    "electra": lambda model, x: model.generator_lm_head(model.generator_predictions(x)),
    "roberta": lambda model, x: model.lm_head(x),
    "modernbert": lambda model, x: model.decoder(model.head(x)),
}


def decay_groups(model, weight_decay: float) -> list[dict]:
    """A torch model's parameters for its optimizer: vectors do not decay."""
    by_kind = {True: [], False: []}
    for parameter in model.parameters():
        by_kind[parameter.ndim > 1].append(parameter)
    return [{"params": by_kind[True], "weight_decay": weight_decay}, {"params": by_kind[False], "weight_decay": 0.0}]


def torch_step(model, loss_of, batches: list, spec: dict, size: str):
    """A training step of a torch model on batch i, to its end, by fused AdamW; it has been made for three of the shapes
    that `batches` have at `size`, since a shape that is new may be compiled again.

    Args:
      loss_of: the loss of a batch, a dictionary of tensors.
      spec: learning_rate, betas, epsilon, weight_decay and dtype; bfloat16 is by autocast.
    """
    import torch

    tx = torch.optim.AdamW(
        decay_groups(model, spec["weight_decay"]), lr=spec["learning_rate"], betas=spec["betas"], eps=spec["epsilon"],
        fused=True,
    )  # fmt: skip

    def step(i: int) -> None:
        with torch.autocast(batches[i][size].device.type, torch.bfloat16, enabled=spec["dtype"] == "bfloat16"):
            loss = loss_of(batches[i])
        loss.backward()
        tx.step()
        tx.zero_grad(set_to_none=True)
        assert torch.isfinite(loss).item()

    by_size = sorted(range(len(batches)), key=lambda i: batches[i][size].numel())
    for i in (by_size[0], by_size[-1], by_size[len(by_size) // 2]):
        step(i)
    return step


class Side:
    """A process of its own; `ready` is what it said when it could begin."""

    def __init__(self, name: str, command: list[str]):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.ready = self._answer()

    def ask(self, line: str):
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self):
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        raise SystemExit(f"the {self.name} side failed:\n{self._errors.read()[-3000:]}")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()


CLOCKS = {"wall": "milliseconds", "processor": "processor_milliseconds"}


def take_turns(
    commands: dict[str, list[str]], rounds: int, seconds: float, say, clock: str = "wall", apart: bool = False
) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """What each side said when it could begin, and what it did in each of its turns, as `serve_steps` answers, with
    `rate`, tokens a second by the clock. Sides that are apart start anew for each turn."""
    ready: dict[str, dict] = {}
    turns: dict[str, list[dict]] = {name: [] for name in commands}
    workers: dict[str, Side] = {}

    def worker(name: str) -> Side:
        if name not in workers:
            say(f"starting {name}")
            workers[name] = Side(name, commands[name])
            ready.setdefault(name, workers[name].ready)
            workers[name].ask("run 0")  # warms up
        return workers[name]

    try:
        for name in () if apart else commands:
            worker(name)
        for turn in range(1, rounds + 1):
            for name in commands:
                answer = worker(name).ask(f"run {seconds}")
                answer["milliseconds"] = answer[CLOCKS[clock]]
                answer["rate"] = 1000 * answer["tokens"] / sum(answer["milliseconds"])
                say(f"turn {turn}/{rounds}  {name}: {answer['rate']:,.0f} tokens/s")
                turns[name].append(answer)
                if apart:
                    workers.pop(name).close()
    finally:
        for one in workers.values():
            one.close()
    return ready, turns


def ratios(turns: dict[str, list[dict]]) -> list[float]:
    """Of our rate over the peer's, by turns, so that a machine that slows down for a while slows both sides."""
    return [a["rate"] / b["rate"] for a, b in zip(turns["ours"], turns["peer"], strict=True)]


def serve_steps(step, tokens: list[int], texts: list[int], ready: dict, peak_memory_bytes) -> None:
    """The process's side for training steps: a line `run SECONDS` is answered with what was done in the time.

    Args:
      step: makes one step on batch i, to its end.
      tokens, texts: real ones of each batch; batches come again and again.
    """
    print(json.dumps(ready), flush=True)
    made = 0
    for line in sys.stdin:
        until = time.perf_counter() + float(line.split()[1])
        milliseconds, processor, count, documents = [], [], 0, 0
        while not milliseconds or time.perf_counter() < until:
            i = made % len(tokens)
            began, spent = time.perf_counter(), time.process_time()
            step(i)
            milliseconds.append(1000 * (time.perf_counter() - began))
            processor.append(1000 * (time.process_time() - spent))
            count, documents, made = count + tokens[i], documents + texts[i], made + 1
        answer = {
            "milliseconds": milliseconds, "processor_milliseconds": processor, "tokens": count, "texts": documents,
            "memory": peak_memory_bytes(),
        }  # fmt: skip
        print(json.dumps(answer), flush=True)


def resident_peak_bytes() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(answers, texts: list[str], began: float, versions: dict[str, str]) -> None:
    """The process's side for `bench_use.py`: times `answers(texts)`, all of them or one at a time.

    Args:
      began: when the process did, by `time.perf_counter`.
    """
    answers(texts[:1])
    print(json.dumps({"seconds": time.perf_counter() - began, "versions": versions}), flush=True)
    for line in sys.stdin:
        if line.strip() == "all":
            start = time.perf_counter()
            answers(texts)
            answer = {"seconds": time.perf_counter() - start}
        elif line.strip() == "one":
            times = []
            for i in range(120):
                start = time.perf_counter()
                answers([texts[i % len(texts)]])
                times.append(1000 * (time.perf_counter() - start))
            answer = {"milliseconds": times[20:]}
        else:
            some = answers(texts[:256])
            answer = {"answers": some.astype(float).tolist() if hasattr(some, "astype") else some}
        print(json.dumps(answer), flush=True)
