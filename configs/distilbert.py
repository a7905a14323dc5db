"""DistilBERT, distilled from BERT-base as published (Sanh et al., arXiv 1910.01108, and its training script).

python train.py --config configs/distilbert.py --distillation.teacher FOLDER --mesh.data 8 --num-microbatches 16

FOLDER is a BERT-base, published or a run of yours. Published: three epochs of BERT's text in batches of up to 4000
examples, on 8 V100 of 16 GB in about 90 hours; GLUE 77.0 (average of the development sets; BERT-base 79.5). The student
starts from six of its teacher's twelve layers. The loss is 5 times the divergence from the teacher's softened
predictions, plus 2 times the loss of masked words, plus the cosine distance of hidden states. Not run here;
distillation is a small recipe of this kind that was run.
"""

import dataclasses

from flax_encoder.config import DataConfig, DistillationConfig, MaskingConfig, OptimizerConfig, RunConfig
from flax_encoder.families import preset

config = RunConfig(
    epochs=3.0,
    batch_size=4096,
    log_every=100,
    checkpoint_every=1_000,
    eval_every="epoch",
    model=dataclasses.replace(preset("distilbert_base"), dtype="bfloat16"),
    distillation=DistillationConfig(
        teacher="bert-base-uncased", task_weight=2.0, soft_weight=5.0, temperature=2.0, hidden_weight=1.0,
        initial_layers="spread",
    ),
    data=DataConfig(
        source="hf:wikimedia/wikipedia:20231101.en", vocab_size=30_522, row_length=512, held_out_rate=0.001
    ),
    masking=MaskingConfig(rate=0.15, mask_rate=0.8, random_rate=0.1),
    optimizer=OptimizerConfig(
        name="adamw", learning_rate=5e-4, b1=0.9, b2=0.98, epsilon=1e-6, weight_decay=0.0, clip_norm=5.0,
        schedule="linear", warmup_rate=0.05,
    ),
)
