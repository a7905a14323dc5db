"""How long a program takes to start: imports, and whole commands on a folder whose programs are in the cache.

    python benchmarks/bench_start.py [--folder RUN_OR_PUBLISHED_FOLDER] [--repeats 5] [--json]

Each is a process of its own, by turns, after one turn that does not count: it fills the caches of files, of bytecode,
which is written whatever the environment says, and of compiled programs. `processor` is its processor time, which a
busy machine changes least. `jax alone` is what nothing here can save. With --folder, which must have a masked-LM head,
`fill-mask` fills a word, from the start of the process to its end.
"""

import os
import pathlib
import resource
import subprocess
import sys
import time

from harness import Timing, header, parser, say, show

ROOT = pathlib.Path(__file__).parents[1]
IMPORTS = {
    "import flax_encoder": "import flax_encoder",
    "import flax_encoder.data": "import flax_encoder.data",
    "data: tokenizer": "from flax_encoder import read_tokenizer",
    "data: open_data": "from flax_encoder.data.pipeline import open_data",
    "with JAX: modules": "from flax_encoder import Encoder",
    "with JAX: load": "from flax_encoder import load",
    "jax alone": "import jax",
}


def start(command: list[str]) -> tuple[float, float]:
    """(seconds, seconds of processor time) of a process from its start to its end."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=settings)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--folder", help="a run, or a published folder, for fill-mask")
    arguments.add_argument("--text", default="The capital of France is [MASK].", help="that fill-mask fills")
    arguments.add_argument("--repeats", type=int, default=5)
    asked = arguments.parse_args()
    commands = {name: [sys.executable, "-c", code] for name, code in IMPORTS.items()}
    if asked.folder:
        folder = os.path.abspath(asked.folder)
        commands["fill-mask"] = [sys.executable, "-m", "flax_encoder", "fill-mask", folder, asked.text]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for turn in range(asked.repeats + 1):
        say(f"turn {turn} of {asked.repeats}")
        for name, command in commands.items():
            times[name].append(start(command))
    rows = []
    for name, found in times.items():
        wall, processor = (Timing.of(column) for column in zip(*found[1:], strict=True))
        rows.append({
            "": name, "s": wall.median, "least": wall.least, "most": wall.most, "processor s": processor.median,
            "processor least": processor.least,
        })  # fmt: skip
    result = {"header": header(repeats=asked.repeats, load=round(os.getloadavg()[0], 1)), "rows": rows}
    show(result, rows, asked.json)


if __name__ == "__main__":
    main()
