"""Learning from a frozen teacher: soft targets, hidden states and relations between tokens, beside the data's targets.

(Hinton et al., arXiv 1503.02531; DistilBERT, arXiv 1910.01108; TinyBERT, arXiv 1909.10351; MiniLM, arXiv 2002.10957 and
2012.15828.) It is no task of its own: an objective whose `distillation` is set is given the teacher by the training
step, and its loss is then this one. The student has no parameter that it would not have alone.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flax_encoder.config import DistillationConfig, EncoderConfig, RunConfig
from flax_encoder.config.rules import require
from flax_encoder.nn.encoder import Encoder
from flax_encoder.ops.attention import attention_weights
from flax_encoder.tasks.loss import LossSum

TERMS = ("task", "soft", "hidden", "relation")
READS = ("distillation.",)


@runtime_checkable
class Distillable(Protocol):
    """A model with an encoder, whose predictions can be had from the encoder's output."""

    encoder: Encoder

    def logits(self, hidden: Float[Array, "B T D"], batch: dict[str, Array], *, key: Array | None = None) -> Array:
        """Predictions at the batch's targets, [B, M, C], of the encoder's output."""
        ...

    def loss_of(self, logits: Float[Array, "B M C"], batch: dict[str, Array]) -> LossSum:
        """The objective's own loss of such predictions."""
        ...


class View(NamedTuple):
    """What is compared of a model."""

    logits: Float[Array, "B M C"] | None
    """None where nothing reads them."""
    states: Float[Array, "L1 B T D"]
    """The embeddings and what each layer leaves."""
    relations: tuple[Float[Array, "B _ T T"], ...]
    """Of each relation, how every token weighs the tokens of its document; sums are 1."""


def distillation_loss(
    student: Distillable, teacher: Any, batch: dict[str, Array], settings: DistillationConfig, *,
    key: Array | None = None,
) -> LossSum:  # fmt: skip
    """The weighted sum of the objective's own loss and what the student lacks of its teacher.

    A sum over the batch's targets, like the objective's own. Hidden states and relations are compared at every token
    but padding: each row's mean over its tokens counts as often as the row has targets, so that any split of a batch
    into rows makes the same update. Metrics have the sum of each term that has a weight, without it.

    Args:
      teacher: a model as `student`, whose parameters get no gradient; it runs without dropout.
      key: of the student's dropout.
    """
    layers = [model.encoder.config.num_layers - 1 for model in (student, teacher)]
    layers[1] = layers[1] if settings.relation_layer is None else settings.relation_layer
    ours = _view(student, batch, settings, layers[0], key=key)
    theirs = _view(teacher, batch, settings, layers[1], has_logits=settings.soft_weight > 0)
    theirs = jax.lax.stop_gradient(theirs)
    own = student.loss_of(ours.logits, batch)
    weights, segments = batch["target_weights"], batch["segment_ids"]
    sums = {"task": own.sum}
    if settings.soft_weight:
        sums["soft"] = soft_loss(ours.logits, theirs.logits, weights, settings.temperature)
    if settings.hidden_weight:
        distance = hidden_distance(ours.states, theirs.states, settings.layer_map, settings.hidden_loss)
        sums["hidden"] = per_row(distance, segments, weights)
    if settings.relation_weight:
        distance = relation_distance(ours.relations, theirs.relations)
        sums["relation"] = per_row(distance, segments, weights)
    factors = {
        "task": settings.task_weight, "soft": settings.soft_weight, "hidden": settings.hidden_weight,
        "relation": settings.relation_weight,
    }  # fmt: skip
    total = sum(factors[name] * value for name, value in sums.items())
    return LossSum(total, own.count, own.metrics | sums)


def _view(
    model: Any, batch: dict[str, Array], settings: DistillationConfig, layer: int, *, has_logits: bool = True,
    key: Array | None = None,
) -> View:  # fmt: skip
    """Of a model, with the relations of layer `layer`."""
    encoder_key, head_key = (None, None) if key is None else jax.random.split(key)
    encoder = model.encoder
    rows = (batch["tokens"], batch["segment_ids"], batch["positions"])
    types = batch.get("token_types") if encoder.config.num_token_types > 1 else None
    hidden, states = encoder(*rows, types, key=encoder_key, every_layer=True)
    relations = relations_of(encoder, states[layer], layer, batch, settings) if settings.relation_weight else ()
    return View(model.logits(hidden, batch, key=head_key) if has_logits else None, states, relations)


def soft_loss(
    student: Float[Array, "B M C"], teacher: Float[Array, "B M C"], weights: Float[Array, "B M"], temperature: float
) -> Float[Array, ""]:
    """temperature^2 times the divergence KL(teacher || student) of softmax(logits / temperature), summed by weight
    (Hinton et al., section 2)."""
    ours, theirs = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (student, teacher))
    return temperature**2 * ((jnp.exp(theirs) * (theirs - ours)).sum(-1) * weights).sum()


def hidden_distance(
    student: Float[Array, "L1 B T D"], teacher: Float[Array, "L2 B T D"], layer_map: tuple[int, ...], kind: str
) -> Float[Array, "B T"]:
    """Of each token, the distance of the last hidden states, or with a map the sum over the student's layers of their
    distances to the teacher's states that it names."""
    ours, theirs = student[-1:], teacher[-1:]
    if layer_map:
        ours, theirs = student[-len(layer_map) :], teacher[np.array(layer_map)]
    if kind == "mse":
        return jnp.square(ours - theirs).mean(-1).sum(0)
    norms = [jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1), 1e-12)) for x in (ours, theirs)]
    return (1.0 - (ours * theirs).sum(-1) / (norms[0] * norms[1])).sum(0)


def relations_of(
    encoder: Encoder, x: Float[Array, "B T D"], layer: int, batch: dict[str, Array], settings: DistillationConfig
) -> tuple[Float[Array, "B _ T T"], ...]:
    """What `settings.relations` name of a layer that is given x: softmaxes over the tokens of each document, of scaled
    products of queries, keys or values among themselves, cut into A heads; or the layer's attention."""
    segments, found = batch["segment_ids"], []
    projections = dict(zip(("query", "key", "value"), encoder.layer(layer).projections(x), strict=True))
    for name in settings.relations:
        if name == "attention":
            found.append(encoder.layer_weights(layer, x, segments, batch["positions"]))
            continue
        parts = projections[name].astype(jnp.float32)
        parts = parts.reshape(*parts.shape[:2], settings.relation_heads or parts.shape[2], -1)
        found.append(attention_weights(parts, parts, segment_ids=segments))
    return tuple(found)


def relation_distance(
    student: tuple[Float[Array, "B _ T T"], ...], teacher: tuple[Float[Array, "B _ T T"], ...]
) -> Float[Array, "B T"]:
    """Of each token, the sum over relations of KL(teacher || student), a mean over heads."""
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        # Of tokens in other documents both are 0, which counts nothing.
        logs = [jnp.log(jnp.maximum(x, 1e-30)) for x in (theirs, ours)]
        total = total + (theirs * (logs[0] - logs[1])).sum(-1).mean(1)
    return total


def per_row(
    values: Float[Array, "B T"], segment_ids: Int[Array, "B T"], weights: Float[Array, "B M"]
) -> Float[Array, ""]:
    """The sum over rows of the mean over a row's tokens, padding left out, times the row's targets."""
    real = segment_ids > 0
    means = jnp.where(real, values, 0.0).sum(1) / jnp.maximum(real.sum(1), 1)
    return (means * weights.sum(1)).sum()


def term_means(total: LossSum) -> dict[str, float]:
    """Means over targets of the terms that a sum has, for people: `task_loss`, `soft_loss` and so on."""
    means = total.means(**{f"{name}_loss": name for name in TERMS if name in total.metrics})
    return {name: value for name, value in means.items() if name != "loss"}


def own_sum(total: LossSum) -> Any:
    """The sum of the objective's own loss, with a teacher or without."""
    return total.metrics.get("task", total.sum)


def check_settings(config: RunConfig) -> None:
    """The rules of a run with a teacher that can be told without it.

    Raises:
      ConfigError: layers that are not the student's, or a model without attention that is to learn attention's.
    """
    settings, model = config.distillation, config.model
    for name in ("layer_map", "initial_layers"):
        value = getattr(settings, name)
        require(
            not isinstance(value, tuple) or len(value) in (0, model.num_layers),
            f"distillation.{name} names a layer of the teacher for each of the student's: got {value} for "
            f"model.num_layers {model.num_layers}.",
        )
    if settings.relation_weight:
        _check_relations(settings, model, "the student")


def check_pair(config: RunConfig, teacher: EncoderConfig) -> None:
    """The rules that a student's model and its teacher's must keep together.

    Raises:
      ConfigError: widths or layers that cannot be compared, or documents that the teacher's positions do not reach.
    """
    settings, model = config.distillation, config.model
    longest = max(config.row_lengths)
    require(
        teacher.position != "learned" or longest <= teacher.max_length,
        f"a teacher reads the student's rows: its positions reach {teacher.max_length} tokens, and data.row_length is "
        f"{longest}. Give --data.row-length {teacher.max_length}.",
    )
    require(
        not settings.hidden_weight or model.embed_dim == teacher.embed_dim,
        f"hidden states are compared number by number, so the student must be as wide as its teacher: got "
        f"model.embed_dim {model.embed_dim} for {teacher.embed_dim}. Give --model.embed-dim {teacher.embed_dim}, or "
        f"--distillation.hidden-weight 0 and --distillation.relation-weight 1, which compares models of any widths.",
    )
    last = {"layer_map": teacher.num_layers, "initial_layers": teacher.num_layers - 1}
    last["relation_layer"] = teacher.num_layers - 1
    for name, most in last.items():
        value = getattr(settings, name)
        numbers = value if isinstance(value, tuple) else (value,) if isinstance(value, int) else ()
        require(
            max(numbers, default=0) <= most,
            f"distillation.{name} goes up to {most}, the teacher having {teacher.num_layers} layers: got {value}.",
        )
    if settings.relation_weight:
        _check_relations(settings, teacher, "the teacher")
        heads, theirs = ((m.num_heads, m.num_kv_heads or m.num_heads) for m in (model, teacher))
        require(
            "attention" not in settings.relations or heads[0] == theirs[0],
            f"attention is compared head by head: got {heads[0]} heads for the teacher's {theirs[0]}. Give "
            f"--distillation.relations query key value, which are cut into heads anew.",
        )
        require(
            settings.relation_heads is not None or heads == theirs,
            f"relations are compared head by head: the student has {heads[0]} heads, {heads[1]} of keys and values, "
            f"the teacher {theirs[0]} and {theirs[1]}. Give --distillation.relation-heads "
            f"{np.gcd.reduce([*heads, *theirs])}, say.",
        )
    require(
        settings.initial_layers is None or model.num_layers <= teacher.num_layers,
        f"a student that starts from its teacher's layers has at most as many: got model.num_layers {model.num_layers} "
        f"for {teacher.num_layers}.",
    )


def _check_relations(settings: DistillationConfig, model: EncoderConfig, whose: str) -> None:
    require(
        model.layer == "attention",
        f"relations need layers with attention: {whose} has layers of {model.layer}. Give "
        f"--distillation.relation-weight 0.",
    )
    parts = settings.relation_heads or 1
    widths = {"query": model.num_heads * model.head_dim}
    widths["key"] = widths["value"] = (model.num_kv_heads or model.num_heads) * model.head_dim
    for name in settings.relations:
        require(
            widths.get(name, 0) % parts == 0,
            f"distillation.relation_heads must divide the vectors of each {name}: got {parts} for {widths.get(name)} "
            f"numbers of {whose}.",
        )


def spread_layers(count: int, of: int) -> tuple[int, ...]:
    """`count` numbers from 0 to `of` - 1, evenly: the first and the last and those between."""
    return tuple(int(i) for i in np.rint(np.linspace(0, of - 1, count)))
