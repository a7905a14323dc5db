"""A student of half the depth that learns masked words from a teacher, and from its text: DistilBERT's way.

python train.py
python train.py --config configs/distillation.py

The first makes the teacher, runs/quickstart; --distillation.teacher FOLDER takes another, a run or a published folder
with a masked-LM head, whose tokenizer is then the student's. The weights and the temperature are DistilBERT's (Sanh et
al., arXiv 1910.01108, and their training script): soft targets 5, masked words 2, cosine of the last hidden states 1,
temperature 2; the student starts from the teacher's layers, evenly spread.
"""

import dataclasses

from quickstart import config as quickstart

from flax_encoder.config import DistillationConfig

config = dataclasses.replace(
    quickstart,
    run_dir="runs/distillation",
    model=dataclasses.replace(quickstart.model, num_layers=2),
    distillation=DistillationConfig(
        teacher="runs/quickstart", task_weight=2.0, soft_weight=5.0, temperature=2.0, hidden_weight=1.0,
        initial_layers="spread",
    ),
)
