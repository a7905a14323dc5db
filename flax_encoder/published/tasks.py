"""The heads that published folders can have; which a family has, and how, its tables say."""

from typing import Literal, get_args

Task = Literal[
    "masked_lm", "classification", "token_classification", "question_answering", "multiple_choice", "next_sentence",
    "discriminator", "text_to_text", "pretraining",
]  # fmt: skip
TASKS: tuple[str, ...] = get_args(Task)
NO_HEAD = "none"
