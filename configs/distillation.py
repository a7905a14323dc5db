"""A student of fewer layers learns masked words from text and from a teacher, as DistilBERT did.

python train.py
python train.py --config configs/distillation.py

The first command makes the teacher, runs/quickstart. --distillation.teacher FOLDER takes another teacher: a run or a
published folder with a masked-LM head, whose tokenizer the student then uses. The weights and the temperature are
DistilBERT's (Sanh et al., arXiv 1910.01108, and their training script): soft targets 5, masked words 2, cosine of the
last hidden states 1, temperature 2. The student starts from evenly spread layers of the teacher.

Measured with --distillation.teacher BERT (2 layers of width 128, 4.4M parameters, published) --model.num-layers 1
--data.source en.jsonl --masking.rate 0.15 --steps 200, on 9,833 Wikipedia leads: 2 CPU cores that other work kept busy,
2 min 25 s and 2 min 0 s with seeds 0 and 1. On 200 held-out leads the student's masked-LM loss is 6.199 and 6.233, its
accuracy 0.156 and 0.150. The same student without a teacher, from scratch, with the same steps (1 min 15 s and 53 s):
loss 7.160 and 7.178, accuracy 0.080 and 0.078. The most frequent token has 7.083 and 0.061, two neighbours' counts an
accuracy of 0.279: 200 steps are not many.

A third seed, later: 6.230 and 0.155. The whole gain comes from the start: the students of seeds 0, 1 and 2 that start
from the teacher's layer, with a weight of 1e-9 on the soft targets and 0 on hidden states, have losses of 5.842, 5.874
and 5.907 and accuracies of 0.155, 0.148 and 0.158 after the same steps (seeds 1 and 2 in float32, on one core). The
teacher's terms made the loss worse, since this teacher has nothing to teach: its own masked-LM loss on these leads is
8.08, its accuracy 0.055, where the most frequent token has 7.08 and 0.061; transformers gives it 8.42 on a hundred
other leads with [MASK] alone. Look at a teacher's own loss first. One that knows the words was not tried.
"""

import dataclasses

from quickstart import config as quickstart

from flax_encoder.config import DistillationConfig, OptimizerConfig

config = dataclasses.replace(
    quickstart,
    run_dir="runs/distillation",
    model=dataclasses.replace(quickstart.model, num_layers=2),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_rate=0.05),
    distillation=DistillationConfig(
        teacher="runs/quickstart", task_weight=2.0, soft_weight=5.0, temperature=2.0, hidden_weight=1.0,
        initial_layers="spread",
    ),
)
