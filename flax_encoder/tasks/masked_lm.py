"""Masked language modelling (Devlin et al., arXiv 1810.04805)."""

import math
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from flax_encoder.config import DistillationConfig, EncoderConfig, HeadConfig, RunConfig
from flax_encoder.config.rules import require
from flax_encoder.data.reading import MASKED_TEXT
from flax_encoder.nn.encoder import Encoder, short_repr
from flax_encoder.nn.heads import MaskedLMHead, gather_rows
from flax_encoder.tasks import distillation
from flax_encoder.tasks.distillation import distillation_loss
from flax_encoder.tasks.loss import LossSum, target_loss
from flax_encoder.tasks.samples import filled_sentences, gapped_sentences
from flax_encoder.tasks.task import Labels, Task

_LIKELIEST = 8  # some may be special tokens, which are no words


class MaskedLM(nnx.Module):
    """Encoder and vocabulary head; reads only the batch's target positions."""

    __repr__ = short_repr

    def __init__(
        self,
        config: EncoderConfig,
        head: HeadConfig | None = None,
        *,
        distillation: DistillationConfig | None = None,
        rngs: nnx.Rngs,
    ):
        self.encoder = Encoder(config, rngs=rngs)
        self.head = MaskedLMHead(config, head, rngs=rngs)
        self.distillation = distillation or DistillationConfig()

    def __call__(self, batch: dict[str, Array], *, key: Array | None = None) -> Float[Array, "B M V"]:
        """Logits at `target_positions` [B, M]; the batch also holds tokens, segment_ids and positions [B, T], and
        token_types if it has any."""
        return self.head(self._target_rows(batch, key), self.encoder.embedding.token[...])

    def loss(self, batch: dict[str, Array], *, key: Array | None = None, teacher: Any = None) -> LossSum:
        """The loss of `self(batch)`, without all of its logits in memory if they are large; with a teacher, which is a
        model like this one, `distillation_loss`."""
        if teacher is not None:
            return distillation_loss(self, teacher, batch, self.distillation, key=key)
        weights, token_embedding = batch["target_weights"], self.encoder.embedding.token[...]
        rows = self._target_rows(batch, key)
        total, correct = self.head.cross_entropy(rows, token_embedding, batch["targets"], weights)
        return LossSum(total, weights.sum(), {"correct": correct})

    def outputs(self, batch: dict[str, Array]) -> dict[str, Array]:
        """The likeliest `tokens` of each target, int32 [B, M, k], and their `probabilities`."""
        logits = self(batch).astype(jnp.float32)
        largest, tokens = jax.lax.top_k(logits, min(_LIKELIEST, logits.shape[-1]))
        return {"tokens": tokens, "probabilities": jnp.exp(largest - jax.nn.logsumexp(logits, -1, keepdims=True))}

    def logits(
        self, hidden: Float[Array, "B T D"], batch: dict[str, Array], *, key: Array | None = None
    ) -> Float[Array, "B M V"]:
        """The logits at `target_positions`, from the encoder's output."""
        return self.head(gather_rows(hidden, batch["target_positions"]), self.encoder.embedding.token[...])

    def loss_of(self, logits: Float[Array, "B M V"], batch: dict[str, Array]) -> LossSum:
        return target_loss(logits, batch["targets"], batch["target_weights"])

    def _target_rows(self, batch, key) -> Float[Array, "B M D"]:
        rows = (batch["tokens"], batch["segment_ids"], batch["positions"], batch.get("token_types"))
        return gather_rows(self.encoder(*rows, key=key), batch["target_positions"])

    @staticmethod
    def report(total: LossSum) -> dict[str, float]:
        """Means for people: loss (nats a target), accuracy, perplexity; with a teacher the terms of the loss too."""
        nats = total._replace(sum=distillation.own_sum(total)).means()["loss"]
        perplexity = {"perplexity": math.exp(min(nats, 700.0))}
        return total.means(accuracy="correct") | perplexity | distillation.term_means(total)


def _make_model(config: RunConfig, labels: Labels) -> Callable[[nnx.Rngs], MaskedLM]:
    return lambda rngs: MaskedLM(config.model, head=config.head, distillation=config.distillation, rngs=rngs)


def check_head(config: RunConfig) -> None:
    """The rule of a head with logits of the vocabulary.

    Raises:
      ConfigError: tied logits of vectors that are not as wide as the embedding.
    """
    width = config.model.embedding_dim or config.model.embed_dim
    require(
        config.head.transform is not False or not config.head.tied or width == config.model.embed_dim,
        f"tied logits need vectors as wide as the embedding: got {config.model.embed_dim} for {width}; set "
        f"head.transform, or head.tied to False.",
    )


def _check(config: RunConfig) -> None:
    check_head(config)
    stages = config.timeline.stages
    rates = [(max(stage.masking_rate.first, stage.masking_rate.last), stage.row_length) for stage in stages]
    for rate, row_length in (*rates, (config.masking.eval_rate, config.row_lengths[-1])):
        needed = math.ceil(rate * row_length)
        require(
            config.masking.budget is None or config.masking.budget >= needed,
            f"masking.budget must hold the masked tokens of a full row: got {config.masking.budget}, and a rate of "
            f"{rate} of {row_length} tokens needs {needed}.",
        )
    distillation.check_settings(config)


def _baselines(run: Any, data: Any) -> dict[str, dict[str, float]]:
    from flax_encoder.data.baselines import NeighbourCounts

    counts = NeighbourCounts([s.train for s in data.stores], data.tokenizer, run.config.data.row_length)
    scores = counts.score(data.evaluation)
    return {"most frequent token": scores["most_frequent"], "guess from two neighbours": scores["neighbours"]}


def _masked_sentences(run: Any, data: Any, count: int) -> Iterator[tuple[str, str]]:
    """(held-out sentence with a mask, the word that it hides)."""
    for sentence in gapped_sentences(data.stores[0].validation, run.tokenizer, count):
        at, ids = sentence.gaps[0], np.array(sentence.tokens)
        truth, ids[at] = run.tokenizer.decode(ids[[at]]).strip(), run.tokenizer.special("mask")
        yield run.tokenizer.decode(ids), truth


def _examples(run: Any, data: Any) -> list[str]:
    lines = []
    for text, truth in _masked_sentences(run, data, 3):
        guesses = "  ".join(f"{g['token']} {g['probability']:.0%}" for g in run.fill_mask(text, 4)[0])
        lines.append(f"\n{text}\n  the model says {guesses}; the text has {truth!r}")
    return lines


def _commands(run: Any, data: Any) -> list[str]:
    mask = run.tokenizer.token(run.tokenizer.special("mask"))
    text, _ = next(_masked_sentences(run, data, 1), (f"Return the {mask} of the list.", ""))
    run_dir = shlex.quote(run.config.run_dir)
    commands = [f"python -m flax_encoder fill-mask {run_dir} {shlex.quote(' '.join(text.split()))}"]
    if run.config.data.source == "tfds:python_docs":
        commands.append(f"python -m flax_encoder train --config quickstart_classify --init-from {run_dir}")
    return commands


TASK = Task(
    reading=MASKED_TEXT,
    make_model=_make_model,
    report=MaskedLM.report,
    reads=("masking.", "head.tied", "data.last_row_length", "data.last_rate", *distillation.READS),
    check=_check,
    baselines=_baselines,
    examples=_examples,
    samples=filled_sentences,
    commands=_commands,
    head="masked_lm",
    answers_for="tokens",
    fills_masks=True,
)
