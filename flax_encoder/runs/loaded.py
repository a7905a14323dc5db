"""A run folder as an object: the trained model with its config and tokenizer, ready to be asked."""

import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_encoder.config import RunConfig, from_dict
from flax_encoder.data.rows.batches import Frame
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.tokenizer import TextTokenizer
from flax_encoder.nn.partition import abstract_model
from flax_encoder.tasks import OBJECTIVES
from flax_encoder.training.checkpoint import read_params, read_run


def model_factory(config: RunConfig, label_names: list[str] | None) -> Callable[[], nnx.Module]:
    """Makes the run's model, its parameters drawn from the run's seed."""
    objective = OBJECTIVES[config.objective]
    options = {"num_classes": len(label_names), "pooling": config.pooling} if label_names else {}
    return lambda: objective(config.model, head=config.head, **options, rngs=nnx.Rngs(config.seed))


@dataclass(frozen=True)
class LoadedRun:
    model: Any
    """The objective's module (`MaskedLM`, `Classifier`); `model.encoder` is the `Encoder`."""
    config: RunConfig
    tokenizer: TextTokenizer
    label_names: list[str] | None
    step: int

    def batch(self, texts: list[str], *, cut: bool = False) -> dict[str, jax.Array]:
        """Texts as rows, one each, padded to the longest (up to a multiple of 32, so that few shapes are compiled).

        Raises:
          DataError: an empty text, or one longer than the model takes that is not to be cut.
        """
        encoded = self.tokenizer.encode_batch(texts)
        frame = Frame.of(self.tokenizer)
        specials = sum(frame.specials)
        limit = self.config.model.max_length if self.config.model.position == "learned" else None
        if cut and limit is not None:
            encoded = [ids[: limit - specials] for ids in encoded]
        longest = max(map(len, encoded)) + specials
        if min(map(len, encoded)) == 0:
            raise DataError("a text must have at least one token: got an empty one.")
        if limit is not None and longest > limit:
            raise DataError(
                f"the model takes {limit} tokens, {specials} of them special: got a text of {longest - specials}."
            )
        length = -(-longest // 32) * 32
        length = length if limit is None else min(length, limit)
        batch = frame.empty(len(texts), length)
        for row, ids in enumerate(encoded):
            ids = frame.around(ids)
            batch["tokens"][row, : len(ids)] = ids
            batch["segment_ids"][row, : len(ids)] = 1
        batch["positions"][:] = np.arange(length)
        return {name: jnp.asarray(values) for name, values in batch.items()}

    def _probabilities(self, batch: dict[str, jax.Array]) -> np.ndarray:
        return np.asarray(jax.nn.softmax(jax.jit(lambda model, batch: model(batch))(self.model, batch)))

    def fill_mask(self, text: str, top: int = 5) -> list[list[dict[str, Any]]]:
        """The likeliest tokens for each mask of a text, as [{"token", "probability"}, ...] a mask, likeliest first.

        Raises:
          DataError: the text has no mask, or the run no masked-LM head.
        """
        if self.config.objective != "masked_lm":
            raise DataError(f"fill-mask needs a masked_lm run: this one is {self.config.objective}.")
        mask_id = self.tokenizer.special("mask")
        batch = self.batch([text])
        positions = np.flatnonzero(np.asarray(batch["tokens"])[0] == mask_id).astype(np.int32)
        if not len(positions):
            raise DataError(f"the text must have at least one {self.tokenizer.token(mask_id)}: got {text!r}.")
        probabilities = self._probabilities(batch | {"target_positions": jnp.asarray(positions[None])})[0]
        # Ids past the tokenizer's are padding of the embedding table; special tokens are no words.
        probabilities = probabilities[:, : self.tokenizer.vocab_size].copy()
        probabilities[:, self.tokenizer.special_ids] = 0.0
        return [
            [{"token": self.tokenizer.token(i), "probability": float(p[i])} for i in np.argsort(-p)[:top]]
            for p in probabilities
        ]

    def classify(self, text: str) -> list[dict[str, Any]]:
        """Every label's probability, as [{"label", "probability"}, ...], likeliest first. A text that is longer than
        the model takes is cut, as in training.

        Raises:
          DataError: the run has no classification head.
        """
        if self.config.objective != "classification" or self.label_names is None:
            raise DataError(f"classify needs a classification run: this one is {self.config.objective}.")
        batch = self.batch([text], cut=True)
        batch["target_positions"] = jnp.zeros((1, 1), jnp.int32)
        p = self._probabilities(batch)[0, 0]
        return [{"label": self.label_names[i], "probability": float(p[i])} for i in np.argsort(-p)]


def load_run(path: str | pathlib.Path) -> LoadedRun:
    """Load a run folder's newest checkpoint, or one checkpoint, by itself: no other file is needed.

    Raises:
      CheckpointError: there is none, or it cannot be read.
    """
    path = pathlib.Path(path)
    run = read_run(path)
    config = from_dict(RunConfig, run["config"])
    names = run["label_names"]
    make_model = model_factory(config, names)
    graphdef, _ = abstract_model(make_model)
    model = nnx.merge(graphdef, read_params(path))
    return LoadedRun(model, config, TextTokenizer(run["tokenizer"]), names, run["step"])
