"""TensorFlow Datasets with features of every kind that is read, of a few rows each."""

import numpy as np
import tensorflow_datasets as tfds

NAMES = ["O", "B-X", "I-X"]


class ToyRows(tfds.core.GeneratorBasedBuilder):
    """Three splits with labels, tags, pairs and answers; those of the test split are -1."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return self.dataset_info_from_configs(
            disable_shuffling=True,
            features=tfds.features.FeaturesDict(
                {
                    "sentence1": tfds.features.Text(),
                    "sentence2": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=["no", "yes"]),
                    "score": tfds.features.Scalar(np.float32),
                    "tokens": tfds.features.Sequence(tfds.features.Text()),
                    "ner_tags": tfds.features.Sequence(tfds.features.ClassLabel(names=NAMES)),
                    "question": tfds.features.Text(),
                    "context": tfds.features.Text(),
                    "answers": tfds.features.Sequence(
                        {"text": tfds.features.Text(), "answer_start": tfds.features.Scalar(np.int32)}
                    ),
                }
            )
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in ("train", "validation", "test")}

    def _generate_examples(self, split):
        for i in range(3):
            yield i, {
                "sentence1": f"{split} {i}", "sentence2": "née", "label": -1 if split == "test" else i % 2,
                "score": i / 2, "tokens": ["a", "née"][: i + 1], "ner_tags": [1, 2][: i + 1], "question": "which?",
                "context": "née here", "answers": {"text": ["née"] * (i > 0), "answer_start": [0] * (i > 0)},
            }  # fmt: skip
