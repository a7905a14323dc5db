"""Train a text encoder: python train.py [--config configs/NAME.py] [--any.setting VALUE ...]

The same command again resumes the run. What a run does, step by step, is flax_encoder/runs/train.py.
"""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends imports at once; failing_clearly answers it afterwards
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before JAX is imported; training/runtime.py says why

from flax_encoder.commands.train import main
from flax_encoder.runs.step_log import Diverged
from flax_encoder.runs.train import train

__all__ = ["Diverged", "main", "train"]

if __name__ == "__main__":
    main()
