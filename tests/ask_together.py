"""Commands one after the other, run by several processes: python -m tests.ask_together '[["predict", ...], ...]'."""

import json
import os
import sys

if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from flax_encoder.commands import main
    from flax_encoder.runs import ask_file, embed

    ask_file._SHARED_AT_ONCE = embed._SHARED_AT_ONCE = 32  # so that few texts are several blocks of each process
    for argv in json.loads(sys.argv[1]):
        main(argv)
