"""The settings of distillation."""

from dataclasses import dataclass, fields
from typing import Literal

from flax_encoder.config.rules import ShortRepr, require, require_finite, require_positive

Relation = Literal["attention", "query", "key", "value"]


@dataclass(frozen=True, repr=False)
class DistillationConfig(ShortRepr):
    """masked_lm and classification: the model (the student) also learns from another model, its teacher (Hinton et al.,
    arXiv 1503.02531).

    The loss is a weighted sum of four terms. Layers are counted from 0, as in `encoder.layers.0`. Hidden state 0 is the
    embeddings, and hidden state n is the output of the n-th layer.
    """

    teacher: str | None = None
    """A run, a checkpoint or a published folder with the same vocabulary. It is not trained. Without --data.tokenizer
    and --init-from the run uses its tokenizer."""
    teacher_hash: str | None = None
    """SHA-256 of the teacher's parameters. The run fills it in, and resumes only with that teacher."""
    task_weight: float = 1.0
    """Weight of the objective's own loss, on the data's targets."""
    soft_weight: float = 1.0
    """Weight of the divergence of the two models' predictions; with 0 the teacher needs no head."""
    temperature: float = 2.0
    """Both models' logits are divided by it for the divergence, which is multiplied by its square."""
    hidden_weight: float = 0.0
    """Weight of the distance of the two models' hidden states at every token; both must have the same width."""
    hidden_loss: Literal["cosine", "mse"] = "cosine"
    """Distance of hidden states: one minus the cosine (DistilBERT, arXiv 1910.01108), or the mean squared difference
    (TinyBERT, arXiv 1909.10351)."""
    layer_map: tuple[int, ...] = ()
    """The teacher's hidden state for each layer of the student, such as 4 8 12 for 3 layers; the distances are added
    up. Empty compares only the last hidden states."""
    relation_weight: float = 0.0
    """Weight of the divergence of the two models' relations between tokens, in the student's last layer (MiniLM);
    widths may differ."""
    relations: tuple[Relation, ...] = ("query", "key", "value")
    """Relations to learn: products of queries with queries, keys with keys, values with values (arXiv 2012.15828), or
    attention, of queries with keys (arXiv 2002.10957, whose relations are attention value)."""
    relation_heads: int | None = None
    """Parts into which queries, keys and values are cut for their relations; None is the student's number of heads."""
    relation_layer: int | None = None
    """The teacher's layer, from 0, whose relations are learned; None is its last."""
    initial_layers: Literal["spread"] | tuple[int, ...] | None = None
    """The teacher's layers, from 0, from which the student's layers start; spread takes them evenly, with the first and
    the last (for 6 of 12: 0 2 4 7 9 11, as DistilBERT). The student also takes the teacher's model settings, except
    its number of layers, and its embeddings and head. None starts from scratch, or from init_from."""
    initial_width: int | None = None
    """With initial_layers: the number of the teacher's features that the student keeps, those with the longest columns
    of the token embedding. It keeps heads and feed-forward units in proportion, the first ones."""

    def __post_init__(self):
        require_positive(self, "temperature")
        names = ("task_weight", "soft_weight", "hidden_weight", "relation_weight")
        weights = [getattr(self, name) for name in names]
        require(
            min(weights) >= 0 and max(weights) > 0,
            f"distillation.{', '.join(names)} are at least 0, and one is above: got {weights}.",
        )
        others = [f.name for f in fields(self) if f.name != "teacher" and getattr(self, f.name) != f.default]
        require(
            self.teacher is not None or not others,
            f"distillation.{others[0] if others else ''} needs a teacher: give --distillation.teacher "
            f"FOLDER, or leave it out.",
        )
        require(
            self.teacher is None or max(weights[1:]) > 0,
            "a teacher is there to be learned from: one of distillation.soft_weight, hidden_weight and relation_weight "
            "must be above 0.",
        )
        require(
            self.hidden_weight > 0 or (self.layer_map, self.hidden_loss) == ((), "cosine"),
            f"distillation.layer_map and hidden_loss need a hidden_weight above 0: got {self.layer_map} and "
            f"{self.hidden_loss}. Give --distillation.hidden-weight too.",
        )
        require(len(self.relations) > 0, "distillation.relations must name at least one, such as query key value.")
        for name in ("layer_map", "initial_layers"):
            value = getattr(self, name)
            require(
                not isinstance(value, tuple) or min(value, default=0) >= 0,
                f"distillation.{name} are numbers of layers, at least 0: got {value}.",
            )
        require(
            self.initial_layers != (),
            "distillation.initial_layers are one layer of the teacher for each of the student's, or spread: got none.",
        )
        require(
            self.initial_width is None or self.initial_layers is not None,
            f"distillation.initial_width needs a student that starts from its teacher's layers: got "
            f"{self.initial_width}. Give --distillation.initial-layers spread too.",
        )
        for name, least in (("relation_heads", 1), ("relation_layer", 0), ("initial_width", 1)):
            value = getattr(self, name)
            require(value is None or value >= least, f"distillation.{name} is at least {least}, or None: got {value}.")
        require_finite(self)
