import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends imports at once; failing_clearly answers it afterwards
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before JAX is imported; training/runtime.py says why

from flax_encoder.commands import main

main()
