"""What torch.nn.RNN, LSTM and GRU make of small inputs, forward and backward.

    pip install torch==2.13.0
    python tests/golden/make_recurrent.py      # writes recurrent.npz: weights, inputs, results, gradients
"""

import pathlib

import numpy as np
import torch

KINDS = {
    "rnn tanh": lambda *a, **k: torch.nn.RNN(*a, nonlinearity="tanh", **k),
    "rnn relu": lambda *a, **k: torch.nn.RNN(*a, nonlinearity="relu", **k),
    "lstm": torch.nn.LSTM,
    "gru": torch.nn.GRU,
}
BATCH, LENGTH, CELLS, LAYERS = 2, 5, 3, 2


def main() -> None:
    arrays = {}
    for kind, make in KINDS.items():
        for directions in (1, 2):
            torch.manual_seed(directions)
            width = CELLS * directions
            model = make(width, CELLS, num_layers=LAYERS, bidirectional=directions == 2, batch_first=True)
            x = torch.randn(BATCH, LENGTH, width, requires_grad=True)
            weights = torch.randn(BATCH, LENGTH, width)
            out, _ = model(x)
            (out * weights).sum().backward()
            case = {"x": x, "weights": weights, "out": out, "grad x": x.grad}
            for name, value in model.named_parameters():
                case |= {f"param {name}": value, f"grad {name}": value.grad}
            arrays |= {f"{kind}/{directions}/{name}": value.detach().numpy() for name, value in case.items()}
    np.savez_compressed(pathlib.Path(__file__).parent / "recurrent.npz", **arrays)


if __name__ == "__main__":
    main()
