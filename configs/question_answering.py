"""Learn to answer questions from a passage: SQuAD's files as published, or rows with question, context and answers.

python train.py --config configs/question_answering.py --init-from FOLDER
python train.py --config configs/question_answering.py --init-from FOLDER --data.source train.json --data.test test.json

FOLDER is a published encoder or a run. With SQuAD 2.0, where some questions have no answer, the run learns to say so.

Measured with --model.dtype bfloat16, from MiniLM-L6 (22.7M parameters), on 729 questions of SQuAD 1.1:
2 CPU cores that other work kept busy, 16 min (6 min of processor time). On 271 other questions, each compared with all
of its right answers (`evaluate`), exact match is 0.354 and F1 0.468; the sentence most like the question has 0.004 and
0.199, the first sentence 0.000 and 0.100.
"""

from flax_encoder.config import DataConfig, OptimizerConfig, RunConfig

config = RunConfig(
    run_dir="runs/question_answering",
    objective="question_answering",
    steps=240,
    batch_size=8,
    checkpoint_every=100,
    data=DataConfig(source="hf:rajpurkar/squad", row_length=256, held_out_rate=0.05),
    optimizer=OptimizerConfig(learning_rate=2e-4, b2=0.999, warmup_rate=0.1),
)
