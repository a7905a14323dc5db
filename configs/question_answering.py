"""Answer questions from a passage: SQuAD's files as published, or rows with question, context and answers.

python train.py --config configs/question_answering.py --init-from FOLDER
python train.py --config configs/question_answering.py --init-from FOLDER --data.source train.json --data.test test.json

FOLDER is a published encoder or a run. With SQuAD 2.0, whose questions can have no answer, the run learns to say so.
"""

from flax_encoder.config import DataConfig, OptimizerConfig, RunConfig

config = RunConfig(
    run_dir="runs/question_answering",
    objective="question_answering",
    steps=300,
    batch_size=8,
    checkpoint_every=100,
    data=DataConfig(source="hf:rajpurkar/squad", row_length=256, held_out_rate=0.05),
    optimizer=OptimizerConfig(learning_rate=1e-4, b2=0.999, warmup_rate=0.1),
)
