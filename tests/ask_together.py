"""Commands one after the other, run by several processes: python -m tests.ask_together '[["predict", ...], ...]'."""

import json
import os
import sys

if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from flax_encoder.commands import main
    from flax_encoder.runs import ask_together

    ask_together._RECORDS = ask_together._TEXTS = 32  # so that few texts are several blocks of each process
    for argv in json.loads(sys.argv[1]):
        main(argv)
