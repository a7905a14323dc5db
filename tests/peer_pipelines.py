"""transformers' part of test_pipelines.py, for a Python that has it: asks a pipeline for each line of the input.

    python tests/peer_pipelines.py < QUESTIONS      # {"kind", "folder", "options", "inputs"} a line
"""

import json
import sys

import transformers
from transformers.pipelines import SUPPORTED_TASKS

for line in sys.stdin:
    asked = json.loads(line)
    if asked["kind"] not in SUPPORTED_TASKS:  # transformers 5 has none for question answering
        print(json.dumps(None), flush=True)
        continue
    ask = transformers.pipeline(asked["kind"], asked["folder"], device="cpu")
    pairs = [x if isinstance(x, dict) else [x] for x in asked["inputs"]]
    found = [ask(**x, **asked["options"]) if asked["kind"] == "question-answering" else
             ask(x if isinstance(x, dict) else x[0], **asked["options"]) for x in pairs]  # fmt: skip
    print(json.dumps(found, default=float), flush=True)
