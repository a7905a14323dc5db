"""Causal language modelling with an encoder: the same stack, which looks back alone, predicts each next token.

A first part of an encoder's pretraining (Gisserot-Boukhlef et al., arXiv 2507.00994): the model and its head are
masked_lm's, so that a run goes on as masked_lm by `init_from`, with all its parameters.
"""

import functools
import shlex
from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from flax_encoder.config import RunConfig
from flax_encoder.config.rules import require
from flax_encoder.data.reading import CONTINUED_TEXT
from flax_encoder.nn.encoder import looks_ahead
from flax_encoder.tasks.masked_lm import MaskedLM, check_head
from flax_encoder.tasks.samples import filled_sentences
from flax_encoder.tasks.task import Labels, Task


class CausalLM(MaskedLM):
    """Encoder and vocabulary head; every token sees its document up to itself, and predicts the next one."""

    def __call__(self, batch: dict[str, Array], *, key: Array | None = None) -> Float[Array, "B T V"]:
        """Logits of what follows each token; the batch holds tokens, segment_ids and positions [B, T]."""
        return self.head(self._target_rows(batch, key), self.encoder.embedding.token[...])

    def _target_rows(self, batch, key) -> Float[Array, "B T D"]:
        rows = (batch["tokens"], batch["segment_ids"], batch["positions"])
        return self.encoder(*rows, key=key, is_causal=True)


def _make_model(config: RunConfig, labels: Labels) -> Callable[[nnx.Rngs], CausalLM]:
    return lambda rngs: CausalLM(config.model, head=config.head, rngs=rngs)


def _check(config: RunConfig) -> None:
    check_head(config)
    reason = looks_ahead(config.model)
    require(reason is None, f"causal_lm predicts tokens that the model must not see: {reason}")


def _baselines(run: Any, data: Any) -> dict[str, dict[str, float]]:
    from flax_encoder.data.baselines import PreviousCounts

    counts = PreviousCounts.of_texts([s.train for s in data.stores], data.tokenizer, run.config.data.row_length)
    scores = counts.score(data.evaluation)
    return {"most frequent token": scores["most_frequent"], "guess from the token before": scores["previous"]}


def _commands(run: Any, data: Any) -> list[str]:
    run_dir = run.config.run_dir
    source = " ".join(shlex.quote(name) for name in run.config.data.sources)
    return [
        f"python -m flax_encoder train --config quickstart --init-from {shlex.quote(run_dir)} --data.source {source} "
        f"--run-dir {shlex.quote(run_dir + '_masked')}"
    ]


TASK = Task(
    reading=CONTINUED_TEXT,
    make_model=_make_model,
    report=MaskedLM.report,
    reads=("head.tied", "data.last_row_length", "data.last_rate"),
    check=_check,
    baselines=_baselines,
    samples=functools.partial(filled_sentences, looks_back=True),
    commands=_commands,
    head="masked_lm",
    answers_for="tokens",
)
