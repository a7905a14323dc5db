import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before JAX is imported; training/runtime.py says why

from flax_encoder.commands import main

main()
