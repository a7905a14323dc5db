"""Replaced token detection: a small masked LM writes words, the encoder finds them (ELECTRA, arXiv 2003.10555)."""

import dataclasses
import functools
import shlex
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flax_encoder.config import ConfigError, EncoderConfig, HeadConfig, Ramp, RunConfig
from flax_encoder.config.rules import require
from flax_encoder.data.reading import MASKED_TEXT
from flax_encoder.data.rows.targets import Rows, TargetInputs, Targets, masking_ramp, masking_rate
from flax_encoder.data.rows.targets import masked_lm as masked_text
from flax_encoder.nn.encoder import Encoder, short_repr
from flax_encoder.nn.heads import ClassificationHead
from flax_encoder.tasks import masked_lm
from flax_encoder.tasks.document_model import export_commands
from flax_encoder.tasks.loss import LossSum
from flax_encoder.tasks.masked_lm import MaskedLM
from flax_encoder.tasks.task import Labels, Task


class ReplacedTokenDetection(nnx.Module):
    """An encoder with a score a token, the discriminator; and a masked LM, the generator, that it is trained against.

    The generator predicts the batch's masked tokens. A draw from its predictions takes each one's place, and the
    encoder tells the tokens that are not what stood there. Draws are not differentiated.
    """

    __repr__ = short_repr

    def __init__(self, config: RunConfig, *, rngs: nnx.Rngs):
        self.rate, self.weight = config.masking.rate, config.generator.detection_weight
        self.temperature = config.generator.temperature
        self.encoder = Encoder(config.model, rngs=rngs)
        self.head = ClassificationHead(config.model, 1, detection_head(config), rngs=rngs)
        self.generator = MaskedLM(generator_config(config), rngs=rngs)
        ours, theirs = self.encoder.embedding, self.generator.encoder.embedding
        if config.generator.sharing == "embedding":
            for name in ("token", "position", "token_type"):
                setattr(theirs, name, getattr(ours, name))
        elif config.generator.sharing == "disentangled":
            ours.base = theirs.token
            ours.token[...] = jnp.zeros_like(ours.token[...])

    def __call__(self, batch: dict[str, Array], *, key: Array | None = None) -> Float[Array, "B T"]:
        """A logit a token, above 0 where the encoder takes it for a replaced one, of the batch's tokens as they are."""
        encoder_key, head_key = (None, None) if key is None else jax.random.split(key)
        rows = (batch["tokens"], batch["segment_ids"], batch["positions"], batch.get("token_types"))
        return self.head(self.encoder(*rows, key=encoder_key), key=head_key)[..., 0]

    def loss(self, batch: dict[str, Array], *, key: Array | None = None) -> LossSum:
        """Equation 3 of the paper: the generator's cross-entropy, a mean over masked tokens, plus `detection_weight`
        times the discriminator's binary cross-entropy, a mean over all tokens but padding.

        Loss is a sum and a count, here of masked tokens; masked tokens are taken to be the masking rate's share of all,
        so that any split of a batch makes the same update. `detection_weight` [B, 1] of the batch is the factor times
        that rate, where the rate changes; without it the rate is masking.rate. Without a key the draws are those of a
        fixed one.
        """
        generator_key, detector_key = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, 1))
        weights, real = batch["target_weights"], batch["segment_ids"] > 0
        logits = self.generator(batch, key=generator_key).astype(jnp.float32)
        log_probabilities = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log_probabilities, batch["targets"][..., None], -1)[..., 0]
        generator_sum = -(picked * weights).sum()

        draw_key = jax.random.key(0) if key is None else jax.random.fold_in(key, 2)
        drawn = jax.random.categorical(draw_key, jax.lax.stop_gradient(logits) / self.temperature)
        tokens, is_replaced = replace(batch, drawn)
        scores = self(batch | {"tokens": tokens}, key=detector_key)
        entropy = jnp.where(real, jax.nn.softplus(jnp.where(is_replaced, -scores, scores)), 0.0).sum()
        found = (scores > 0) & real
        count = lambda x: x.sum(dtype=jnp.float32)  # noqa: E731
        metrics = {
            "generator": generator_sum,
            "generator_correct": ((logits.argmax(-1) == batch["targets"]) * weights).sum(),
            "detector": entropy,
            "tokens": count(real),
            "correct": count(real & (found == is_replaced)),
            "replaced": count(is_replaced),
            "found": count(found),
            "found_replaced": count(found & is_replaced),
        }
        weight = batch["detection_weight"].max() if "detection_weight" in batch else self.weight * self.rate
        return LossSum(generator_sum + weight * entropy, weights.sum(), metrics)

    def outputs(self, batch: dict[str, Array]) -> dict[str, Array]:
        """The generator's, which fills in what is masked."""
        return self.generator.outputs(batch)


def replace(batch: dict[str, Array], drawn: Int[Array, "B M"]) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """(tokens with the drawn ones at the masked places, which of them are not what stood there)."""
    row, length = jnp.arange(len(drawn))[:, None], batch["tokens"].shape[1]
    places = jnp.where(batch["target_weights"] > 0, batch["target_positions"], length)  # slots unused are dropped
    tokens = batch["tokens"].at[row, places].set(drawn, mode="drop")
    originals = batch["tokens"].at[row, places].set(batch["targets"], mode="drop")
    return tokens, tokens != originals


def detection_head(config: RunConfig) -> HeadConfig:
    """The discriminator's head: where the config leaves it open, a dense map with the encoder's activation."""
    return dataclasses.replace(config.head, activation=config.head.activation or config.model.activation)


def generator_config(config: RunConfig) -> EncoderConfig:
    """The generator's architecture: the model's, with fewer heads of the same width, a narrower feed-forward block and
    as many layers as generator.num_layers says; its embeddings are as wide as the model's if they are shared."""
    model, share = config.model, config.generator.width
    heads = max(1, round(share * model.num_heads))
    width = max(2, model.embed_dim * heads // model.num_heads)
    embedding = model.embedding_dim or model.embed_dim
    if config.generator.sharing == "none":
        embedding = min(embedding, width)
    return dataclasses.replace(
        model, num_heads=heads, num_kv_heads=None, embed_dim=width, mlp_dim=max(1, round(share * model.mlp_dim)),
        embedding_dim=None if embedding == width else embedding, num_layer_groups=None,
        num_layers=config.generator.num_layers or model.num_layers,
    )  # fmt: skip


def _targets(inputs: TargetInputs) -> Targets:
    ramp = masking_ramp(inputs)
    return functools.partial(_with_weight, masked_text(inputs), ramp, inputs.config.generator.detection_weight)


def _with_weight(targets: Targets, ramp: Ramp, factor: float, rows: Rows) -> dict[str, np.ndarray]:
    """The targets, and the factor of the detector's loss: it is a mean over tokens, the loss one over masked ones."""
    rate = masking_rate(ramp.first, ramp.last, ramp.end - ramp.start, rows.number - ramp.start)
    batch = targets(rows)
    return batch | {"detection_weight": np.full((len(rows.address), 1), factor * rate, np.float32)}


def _make_model(config: RunConfig, labels: Labels) -> Callable[[nnx.Rngs], ReplacedTokenDetection]:
    return lambda rngs: ReplacedTokenDetection(config, rngs=rngs)


def _report(total: LossSum) -> dict[str, float]:
    """Means for people. `unreplaced` is the accuracy of calling no token replaced; `f1` is of the replaced."""
    sums = {name: float(np.asarray(value)) for name, value in total.metrics.items()}
    masked, tokens = max(float(total.count), 1.0), max(sums["tokens"], 1.0)
    return {
        "loss": float(np.asarray(total.sum)) / masked,
        "generator_loss": sums["generator"] / masked,
        "generator_accuracy": sums["generator_correct"] / masked,
        "detection_loss": sums["detector"] / tokens,
        "accuracy": sums["correct"] / tokens,
        "unreplaced": 1 - sums["replaced"] / tokens,
        "f1": 2 * sums["found_replaced"] / max(sums["found"] + sums["replaced"], 1.0),
    }


def _check(config: RunConfig) -> None:
    require(
        config.model.layer == "attention",
        f"replaced_token_detection has a generator with fewer heads: model.layer must be attention, got "
        f"{config.model.layer}.",
    )
    require(
        config.head.transform is not False,
        "the discriminator's head begins with a dense map: leave head.transform at None or True.",
    )
    require(
        config.generator.sharing != "disentangled" or (config.init_from, config.data.word_vectors) == (None, None),
        "with generator.sharing disentangled the tokens' vectors are the generator's, made anew: init_from and "
        "data.word_vectors take embedding or none.",
    )
    try:
        masked_lm.TASK.check(dataclasses.replace(config, model=generator_config(config), head=HeadConfig()))
    except ConfigError as error:
        raise ConfigError(f"the generator: {error}") from None


def _generator(run: Any) -> tuple[RunConfig, nnx.Module]:
    """The masked LM that the encoder was trained against."""
    model = generator_config(run.config)
    config = dataclasses.replace(run.config, objective="masked_lm", model=model, head=HeadConfig())
    return _settled(config), run.model.generator


class Detector(nnx.Module):
    """An encoder and its head for replaced tokens."""

    def __init__(self, encoder: Encoder, head: ClassificationHead):
        self.encoder, self.head = encoder, head


def _detector(run: Any) -> tuple[RunConfig, nnx.Module]:
    """The encoder, whose token embedding is one table again, with its head."""
    encoder = nnx.clone(run.model.encoder)
    if encoder.embedding.base is not None:
        encoder.embedding.token[...] = encoder.embedding.table
        encoder.embedding.base = None
    config = dataclasses.replace(run.config, head=detection_head(run.config))
    return _settled(config), Detector(encoder, nnx.clone(run.model.head))


def _settled(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, generator=type(config.generator)())


def _commands(run: Any, data: Any) -> list[str]:
    run_dir = shlex.quote(run.config.run_dir)
    return [
        f"python -m flax_encoder train --config classify --init-from {run_dir} --data.source train.csv",
        *export_commands(run, "OUT", "OUT --part generator"),
    ]


TASK = Task(
    reading=dataclasses.replace(MASKED_TEXT, targets=_targets),
    make_model=_make_model,
    report=_report,
    headline="f1",
    reads=("masking.", "generator.", "data.last_row_length", "data.last_rate"),
    check=_check,
    samples=masked_lm.TASK.samples,
    commands=_commands,
    head="discriminator",
    parts={"encoder": _detector, "generator": _generator},
)
