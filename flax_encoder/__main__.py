"""The command line: `python -m flax_encoder`, and the program `flax-encoder` of an installed package."""

import os
import signal


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends imports at once; failing_clearly answers it later
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before JAX is imported; training/runtime.py says why

    from flax_encoder.commands import main

    main()


if __name__ == "__main__":
    main()
