"""Recurrent layers, forward and all gradients, measured beside torch's: the layers alone, on rows without padding.

    python benchmarks/bench_recurrent.py --peer-python PYTHON_WITH_TORCH [--layer gru] [--json]

Two-directional layers of --cells cells each way on [rows, length, features] drawn numbers; the peer is torch.nn.LSTM or
the like of the same sizes. The loss is the sum of squares, its gradients those of all parameters and of the input. Each
side runs in a process of its own, by turns.
"""

import json
import statistics
import sys
import time


def ours(spec: dict):
    """(a step, to its end; the seconds that it took to compile)."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from flax_encoder.config import EncoderConfig
    from flax_encoder.nn.recurrent import RecurrentLayer
    from flax_encoder.training.runtime import set_up_runtime

    set_up_runtime()
    jax.config.update("jax_enable_compilation_cache", False)  # what it takes to compile is a result
    B, T, E = spec["shape"]
    config = EncoderConfig(
        layer=spec["layer"], bidirectional=True, position="none", embed_dim=2 * spec["cells"], embedding_dim=E,
        num_layers=spec["layers"], dtype=spec["dtype"],
    )  # fmt: skip
    layers = [RecurrentLayer(config, i == 0, rngs=nnx.Rngs(i)) for i in range(spec["layers"])]
    graphdef, state = nnx.split(layers)
    segments = jnp.ones((B, T), jnp.int32)

    def loss(state, x):
        for layer in nnx.merge(graphdef, state):
            x = layer(x, segments)
        return jnp.square(x).sum()

    x = jax.random.normal(jax.random.key(0), (B, T, E))
    began = time.perf_counter()
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(state, x).compile()
    return lambda i: jax.block_until_ready(compiled(state, x)), time.perf_counter() - began


def torchs(spec: dict):
    import torch

    torch.set_num_threads(spec["cores"])
    kind = getattr(torch.nn, spec["layer"].upper())
    B, T, E = spec["shape"]
    model = kind(E, spec["cells"], spec["layers"], batch_first=True, bidirectional=True)
    x = torch.randn(B, T, E, requires_grad=True)

    def step(i):
        with torch.autocast("cpu", torch.bfloat16, enabled=spec["dtype"] == "bfloat16"):
            out = model(x)[0]
        out.float().square().sum().backward()
        model.zero_grad(set_to_none=True)
        x.grad = None

    return step, 0.0


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in ("ours", "peer"):
        from sides import resident_peak_bytes, serve_steps

        spec = json.loads(sys.argv[2])
        step, seconds = {"ours": ours, "peer": torchs}[sys.argv[1]](spec)
        step(0)
        B, T, _ = spec["shape"]
        return serve_steps(step, [B * T], [B], {"compile_seconds": seconds}, resident_peak_bytes)
    from harness import Timing, header, parser, say, show
    from sides import ratios, take_turns

    from flax_encoder.data.store.tokenizing import num_cores

    arguments = parser(__doc__)
    arguments.add_argument("--layer", choices=("lstm", "gru", "rnn"), default="lstm")
    arguments.add_argument("--shape", type=int, nargs=3, default=[32, 128, 512], metavar=("ROWS", "LENGTH", "FEATURES"))
    arguments.add_argument("--cells", type=int, default=256, help="of each direction (default 256)")
    arguments.add_argument("--layers", type=int, default=2)
    arguments.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="of matrix products")
    arguments.add_argument("--peer-python", help="the Python of torch's environment; without it ours goes alone")
    arguments.add_argument("--rounds", type=int, default=5, help="turns of each side (default 5)")
    arguments.add_argument("--seconds", type=float, default=5.0, help="of a turn, a step at least (default 5)")
    asked = arguments.parse_args()
    spec = json.dumps(vars(asked) | {"cores": num_cores()})
    commands = {"ours": [sys.executable, __file__, "ours", spec]}
    if asked.peer_python:
        commands["peer"] = [asked.peer_python, __file__, "peer", spec]
    ready, turns = take_turns(commands, asked.rounds, asked.seconds, say)
    rows = []
    for name, own in turns.items():
        timing = Timing.of(ms for turn in own for ms in turn["milliseconds"])
        rows.append({
            "": name, "ms": timing.median, "least": timing.least, "most": timing.most,
            "tokens/s": statistics.median(turn["rate"] for turn in own), "compile s": ready[name]["compile_seconds"],
            "peak memory GB": max(turn["memory"] for turn in own) / 1e9,
        })  # fmt: skip
    about = {k: v for k, v in vars(asked).items() if k not in ("json", "peer_python")}
    by_turn = ratios(turns) if asked.peer_python else []
    show({"header": header(**about), "sides": rows, "ratios": by_turn}, rows, asked.json)
    if by_turn and not asked.json:
        print(f"ratio {statistics.median(by_turn):.2f} ({min(by_turn):.2f} to {max(by_turn):.2f})")


if __name__ == "__main__":
    main()
