"""Vectors by comparison: texts that belong together come to lie close, others apart.

Pairs are an anchor and what belongs to it; further texts are what does not (hard negatives). A single text is its own
positive, read with another dropout (Gao et al., arXiv 2104.08821). Pairs with numbers are put in the numbers' order.
"""

import shlex
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_encoder.config import ConfigError, ContrastiveConfig, EncoderConfig, RunConfig
from flax_encoder.config.rules import require
from flax_encoder.data.reading import Reading
from flax_encoder.data.rows.documents import Layout
from flax_encoder.data.rows.targets import TargetInputs, Targets, group_targets
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.store.store import Split
from flax_encoder.nn.encoder import Encoder, short_repr
from flax_encoder.nn.partition import param, zeros
from flax_encoder.nn.pooling import pool_segments
from flax_encoder.tasks.contrastive_loss import cosent, cosines, info_nce, margin_mse
from flax_encoder.tasks.document_model import check_whole_documents, columns_said, export_commands
from flax_encoder.tasks.loss import LossSum
from flax_encoder.tasks.metrics import scipy_stats
from flax_encoder.tasks.ranking import collection_of, neighbour_scores, rank_scores, ranks, word_matrix
from flax_encoder.tasks.task import Answer, Labels, Question, Task, VectorSettings


class Contrastive(nnx.Module):
    """Encoder and pooling. The loss couples all rows of a batch: it is made of `represent`, which reads each row by
    itself, and `coupled_loss`, so that a large batch's representations can be made part by part."""

    __repr__ = short_repr

    def __init__(self, config: EncoderConfig, contrastive: ContrastiveConfig, *, rngs: nnx.Rngs):
        self.encoder = Encoder(config, rngs=rngs)
        self.settings = contrastive
        # The logarithm of what the scale is multiplied by. `scale` is a name that no weight decay touches.
        self.scale = param(rngs, zeros, features=1) if contrastive.learn_temperature else None

    def __call__(self, batch: dict[str, Array], *, key: Array | None = None) -> Float[Array, "B M n E"]:
        """The vectors of all texts, float32; those of empty slots are anything."""
        segment_ids, (B, M, n, _) = batch["segment_ids"], batch["text_keys"].shape
        rows = (batch["tokens"], segment_ids, batch["positions"], batch.get("token_types"))
        hidden = self.encoder(*rows, key=key)
        vectors = pool_segments(hidden, segment_ids, _places(segment_ids), M * n, (self.settings.pooling,))
        return vectors.reshape(B, M, n, -1)

    def represent(self, batch: dict[str, Array], *, key: Array | None = None) -> Float[Array, "B M n E"]:
        """What `coupled_loss` takes of each row."""
        return self(batch, key=key)

    def coupled_loss(self, vectors: Float[Array, "B M n E"], batch: dict[str, Array]) -> LossSum:
        """The loss of a whole batch from its vectors: the mean over widths; metrics are of whole vectors."""
        B, M, n, E = vectors.shape
        keys = batch["text_keys"].reshape(B * M, n, 2)
        # Empty slots can hold infinities, whose gradient would be no number.
        weights = batch["target_weights"].reshape(B * M)
        vectors = jnp.where(weights[:, None, None] > 0, vectors.reshape(B * M, n, E), 0.0)
        scale = 1.0 / self.settings.temperature
        scale = scale if self.scale is None else scale * jnp.exp(self.scale[0])

        def at(width: int) -> LossSum:
            cut = cosines(vectors[..., :width])
            if "targets" in batch:
                of = cosent if n == 2 else margin_mse
                return of(cut, batch["targets"].reshape(B * M), weights, scale)
            return info_nce(cut, keys, weights, scale, symmetric=self.settings.symmetric)

        widths = self.settings.widths or (E,)
        losses = [at(width) for width in widths]
        whole = losses[widths.index(E)] if E in widths else at(E)
        mean = sum(loss.sum for loss in losses) / len(losses)
        metrics = whole.metrics | {"scale": scale * whole.count}
        return whole._replace(sum=mean, metrics=metrics)

    def loss(self, batch: dict[str, Array], *, key: Array | None = None) -> LossSum:
        return self.coupled_loss(self.represent(batch, key=key), batch)

    def outputs(self, batch: dict[str, Array]) -> dict[str, Array]:
        """Vectors of length 1 [B, M, n, E], and the hashes of their texts."""
        return {"vectors": cosines(self(batch)), "text_keys": batch["text_keys"]}


_NUMBERED = {"cosent": 2, "margin_mse": 3}
"""Losses of numbers, and how many texts of a row a number is of."""
_TEXTS = {2: "pairs of texts", 3: "an anchor, a positive and one negative"}


def _places(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Each token's place in its segment, from 0; models' own positions can begin and count otherwise."""
    columns = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    is_first = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
    return columns - jax.lax.cummax(jnp.where(is_first, columns, 0), axis=1)


def _report(total: LossSum) -> dict[str, float]:
    count = max(float(total.count), 1.0)
    metrics = {name: float(np.asarray(value)) for name, value in total.metrics.items()}
    return {
        "loss": float(np.asarray(total.sum)) / count,
        "accuracy": metrics["correct"] / max(metrics["compared"], 1.0),
        "temperature": count / metrics["scale"] if metrics["scale"] else 0.0,
    }


def _check(config: RunConfig) -> None:
    check_whole_documents(config)
    width = config.model.embed_dim
    require(
        max(config.contrastive.widths, default=0) <= width,
        f"contrastive.widths are at most those of the model's vectors: got {config.contrastive.widths} for "
        f"model.embed_dim {width}.",
    )


def _settle(config: RunConfig, data: Any) -> RunConfig:
    """Refuses what the settings and the number of texts together leave nothing to learn from."""
    _check(config)  # the model's width may be that of init_from
    split, plan = data.stores[0].train, data.train_plans[0]
    num_texts = split.values["text_keys"].shape[1]
    has_numbers = "number" in split.values and not np.isnan(split.values["number"]).all()
    loss, wanted = config.contrastive.loss, _NUMBERED.get(config.contrastive.loss)
    if wanted is not None and not has_numbers:
        raise ConfigError(
            f"contrastive.loss {loss} learns the numbers of {_TEXTS[wanted]}, and the texts have none. Name their "
            f"column with --data.label-column, or leave the loss out."
        )
    if has_numbers and loss != "infonce" and num_texts not in (_NUMBERED.values() if wanted is None else (wanted,)):
        raise ConfigError(
            f"contrastive.loss {loss} with numbers takes {_TEXTS.get(wanted, ' or '.join(_TEXTS.values()))} a row: got "
            f"{num_texts} texts. Leave out the columns of the others, or give --contrastive.loss infonce."
        )
    if num_texts == 1 and config.model.dropout_rate == 0 and config.model.attention_dropout_rate == 0:
        raise ConfigError(
            "a single text is learned from two readings that differ by their dropout, and model.dropout_rate is 0. "
            "Give --model.dropout-rate 0.1, or a second text that belongs to the first (--data.text-column and "
            "--data.text-pair-column)."
        )
    rows = config.stages[0].batch_size
    per_batch = min(len(split) / plan.rows_per_epoch * rows, config.batch_texts or np.inf)
    if num_texts < 3 and (len(split) < 2 or per_batch < 2):
        raise ConfigError(
            f"texts are told from the others of their batch, which must have at least two documents: there are "
            f"{len(split):,} to train on, and batches of {rows} rows hold {per_batch:.1f}. Give more of them a batch "
            f"({'--batch-size' if config.batch_texts is None else '--batch-texts'} 32), or more text."
        )
    return config


def _make_model(config: RunConfig, labels: Labels) -> Callable[[nnx.Rngs], Contrastive]:
    return lambda rngs: Contrastive(config.model, config.contrastive, rngs=rngs)


def _targets(inputs: TargetInputs) -> Targets:
    return group_targets(inputs, with_numbers=inputs.config.contrastive.loss != "infonce")


def _answer(question: Question) -> Answer:
    """`score`, the cosine of the first two texts' vectors, and as arrays, which files leave out, the `vectors` of all
    texts [n, E] and their `text_keys` [n, 2]."""
    outputs = question.outputs[0]
    vectors, keys = outputs["vectors"][0], outputs["text_keys"][0]
    if question.text_lengths is not None and len(question.text_lengths) == 1:
        vectors, keys = vectors[:1], keys[:1]
        return {"vectors": vectors, "text_keys": keys}
    return {"score": float(vectors[0] @ vectors[1]), "vectors": vectors, "text_keys": keys}


def _gold(split: Split, document: int, labels: Labels) -> float | None:
    numbers = split.values.get("number")
    return None if numbers is None or np.isnan(numbers[document]) else float(numbers[document])


def score(answers: Sequence[Answer], golds: Sequence[float | None], labels: Labels = None) -> dict[str, float]:
    """Of pairs with numbers Pearson's and Spearman's correlation of cosines and numbers (scipy; 0 where either side
    does not vary); of three texts with a number, of the margin between two cosines and the number. Without numbers, how
    well positives are found (`ranking.neighbour_scores`). Of single texts nothing.

    Args:
      golds: the number of each pair, or None.
    """
    scored = [i for i, answer in enumerate(answers) if "score" in answer]
    numbers = np.array([np.nan if golds[i] is None else golds[i] for i in scored], float)
    if not scored:
        return {}
    if np.isnan(numbers).any():
        return neighbour_scores(answers)
    cosine = np.array([_likeness(answers[i]) for i in scored])
    varies = len(scored) > 1 and np.ptp(cosine) > 0 and np.ptp(numbers) > 0
    stats = scipy_stats()
    return {
        "pearson": float(stats.pearsonr(cosine, numbers).statistic) if varies else 0.0,
        "spearman": float(stats.spearmanr(cosine, numbers).statistic) if varies else 0.0,
    }


def _likeness(answer: Answer) -> float:
    """What the number of a document is of: the cosine of two texts, or its lead over the third's."""
    vectors = answer.get("vectors", ())
    return float(vectors[0] @ (vectors[1] - vectors[2])) if len(vectors) == 3 else answer["score"]


def _vectors(config: RunConfig) -> VectorSettings:
    prompts = {"query": config.contrastive.query_prompt, "document": config.contrastive.document_prompt}
    return VectorSettings(config.contrastive.pooling, prompts if any(prompts.values()) else {})


def _baselines(run: Any, data: Any) -> dict[str, dict[str, float]]:
    """The same scores by the words that texts share."""
    split = data.stores[0].validation
    lengths = split.values.get("text_lengths")
    if lengths is None:
        return {}
    documents = [np.split(split.document(i), np.cumsum(lengths[i])[:-1]) for i in range(len(split))]
    texts = [run.tokenizer.decode(tokens) for document in documents for tokens in document]
    n, golds = lengths.shape[1], [_gold(split, i, None) for i in range(len(split))]
    keys = np.ascontiguousarray(split.values["text_keys"]).view(np.int32).reshape(len(split), n, 2)
    rows = {}
    for name, by_rarity in {"shared words": False, "TF-IDF": True}.items():
        words = word_matrix(texts, by_rarity=by_rarity)
        if golds[0] is not None:
            to_each = [np.asarray(words[::n].multiply(words[k::n]).sum(1)).ravel() for k in range(1, n)]
            cosine = to_each[0] if n == 2 else to_each[0] - to_each[1]
            rows[name] = score([{"score": float(c)} for c in cosine], golds)
            continue
        found = collection_of(list(keys))
        queries, candidates = (words[[i * n + k for i, k in some]] for some in (found.queries, found.texts))
        rows[name] = rank_scores(list(ranks(found, lambda some, q=queries, c=candidates: (q[some] @ c.T).toarray())))
    return rows


def _commands(run: Any, data: Any) -> list[str]:
    run_dir = shlex.quote(run.config.run_dir)
    return [
        f"python -m flax_encoder embed {run_dir} --input texts.txt --output vectors.npy",
        f"python -m flax_encoder evaluate {run_dir} --data.source pairs.jsonl{columns_said(run, data)}",
        *export_commands(run, f"{run_dir}/published"),
    ]


TASK = Task(
    reading=Reading(
        Columns("number", 1, 32, is_optional=True, has_keys=True), _targets, lambda config: Layout("apart"),
        prompts=lambda config: config.contrastive.prompts,
    ),
    make_model=_make_model,
    report=_report,
    reads=("contrastive.", "data.label_column", "data.text_pair_column"),
    check=_check,
    settle=_settle,
    answer=_answer,
    gold=_gold,
    score=score,
    baselines=_baselines,
    commands=_commands,
    compares_start=True,
    vectors=_vectors,
)  # fmt: skip
