"""ONNX Runtime's part of test_onnx.py, for a Python that has it: the logits of rows.

    python tests/peer_onnx.py FOLDER/model.onnx INPUTS.npz OUTPUT.npy
"""

import sys

import numpy as np
import onnxruntime

_, model, inputs, output = sys.argv
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
rows = np.load(inputs)
found = session.run(["logits"], {put.name: rows[put.name].astype(np.int64) for put in session.get_inputs()})
np.save(output, found[0])
