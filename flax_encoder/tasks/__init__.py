"""What a model is trained for. An objective is a module that maps a batch to logits at its target positions, and the
report of its summed metrics; the loss is the same for all (loss.py)."""

from flax_encoder.tasks.classification import Classifier
from flax_encoder.tasks.masked_lm import MaskedLM

OBJECTIVES = {"masked_lm": MaskedLM, "classification": Classifier}
