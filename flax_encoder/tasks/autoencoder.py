"""A text through one vector and back: vectors from texts alone (TSDAE; Wang et al., arXiv 2104.06979).

The encoder reads a text with words missing; its tokens' vectors become one; a decoder, whose attention to the encoder
sees that vector alone, writes the whole text. Of recurrent layers it is the autoencoder of Dai and Le (arXiv
1511.01432): with pooling lasttoken the encoder's last state.
"""

import dataclasses
import functools
import shlex
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flax_encoder.config import EncoderConfig, RunConfig
from flax_encoder.config.rules import require
from flax_encoder.data.reading import Reading
from flax_encoder.data.rows.deletion import denoising_targets
from flax_encoder.data.rows.targets import TargetInputs, Targets
from flax_encoder.data.sources.columns import Columns
from flax_encoder.nn.decoder import Decoder
from flax_encoder.nn.encoder import Encoder, short_repr
from flax_encoder.nn.heads import MaskedLMHead
from flax_encoder.nn.pooling import pool_segments
from flax_encoder.nn.recurrent_decoder import RecurrentDecoder, check_recurrent_decoder
from flax_encoder.ops.position import sinusoidal
from flax_encoder.tasks.document_model import check_whole_documents, export_commands
from flax_encoder.tasks.loss import LossSum
from flax_encoder.tasks.masked_lm import MaskedLM, check_head
from flax_encoder.tasks.samples import written_sentences
from flax_encoder.tasks.task import Labels, Task, VectorSettings
from flax_encoder.tasks.text_to_text import settle_ids, with_ids

_TIED = ("attention", "attention_norm", "feed_forward", "feed_forward_norm")


class Autoencoder(nnx.Module):
    """An encoder; a decoder that is given one vector a document, `writer`; and logits of the text's next tokens.

    Tied, a layer of the decoder has the parameters of the encoder's layer beside it, but for its attention to the
    vector. (Its name comes after the encoder's, under which shared parameters are then kept.)
    """

    __repr__ = short_repr

    def __init__(self, config: RunConfig, *, rngs: nnx.Rngs):
        model = config.model
        self.encoder = Encoder(model, rngs=rngs)
        if model.layer == "attention":
            self.writer = Decoder(decoder_config(model), config.decoder, rngs=rngs)
        else:
            self.writer = RecurrentDecoder(model, config.decoder, rngs=rngs)
        if config.autoencoder.is_tied:
            for name in _TIED:
                setattr(self.writer.layers, name, getattr(self.encoder.layers, name))
        self.head = MaskedLMHead(model, config.head, rngs=rngs)
        self.pooling = config.autoencoder.pooling

    def __call__(self, batch: dict[str, Array], *, key: Array | None = None) -> Float[Array, "B S V"]:
        """Logits of each text's next token; `denoising_targets` says what the batch holds."""
        return self.head(self._target_rows(batch, key), self.encoder.embedding.token[...])

    def loss(self, batch: dict[str, Array], *, key: Array | None = None) -> LossSum:
        weights, table = batch["target_weights"], self.encoder.embedding.token[...]
        total, correct = self.head.cross_entropy(self._target_rows(batch, key), table, batch["targets"], weights)
        return LossSum(total, weights.sum(), {"correct": correct})

    def outputs(self, batch: dict[str, Array]) -> dict[str, Array]:
        """What is written of each row's vector, the likeliest token each time: ids `text` [B, 1, S]. A row holds one
        text. All tokens are decoded again for each one, so this is for few short rows."""
        given = batch["decoder_tokens"]
        places = jnp.broadcast_to(jnp.arange(given.shape[1], dtype=jnp.int32), given.shape)
        rows = batch | {"decoder_segment_ids": jnp.ones_like(given), "decoder_positions": places}

        def write(i: Array, given: Array) -> Array:
            logits = self(rows | {"decoder_tokens": given[:, :-1]})[:, i]
            return given.at[:, i + 1].set(logits.argmax(-1).astype(given.dtype))

        given = jax.lax.fori_loop(0, given.shape[1], write, jnp.pad(given, [(0, 0), (0, 1)]))
        return {"text": given[:, None, 1:]}

    def vectors(self, batch: dict[str, Array], *, key: Array | None = None) -> Float[Array, "B P D"]:
        """One vector for each document of the rows."""
        segments, slots = batch["segment_ids"], batch["document_weights"].shape[1]
        hidden = self.encoder(batch["tokens"], segments, batch["positions"], key=key)
        return pool_segments(hidden, segments, batch["positions"], slots, (self.pooling,))

    def _target_rows(self, batch, key) -> Float[Array, "B S D"]:
        encoder_key, embedding_key, decoder_key = (None,) * 3 if key is None else jax.random.split(key, 3)
        has_document = batch["document_weights"] > 0
        # Empty slots can hold infinities, which would be no numbers in the gradient.
        memory = jnp.where(has_document[..., None], self.vectors(batch, key=encoder_key), 0.0)
        slots = jnp.where(has_document, jnp.arange(1, has_document.shape[1] + 1, dtype=jnp.int32), 0)
        positions = batch["decoder_positions"]
        x = self.encoder.embedding(batch["decoder_tokens"], positions, key=embedding_key)
        config = self.encoder.config
        if config.layer == "attention" and config.position in ("rope", "none") and config.relative_position != "t5":
            x = x + sinusoidal(positions, x.shape[-1])  # or else the decoder would not know one place from another
        return self.writer(x, memory, batch["decoder_segment_ids"], slots, key=decoder_key)[0]


def decoder_config(model: EncoderConfig) -> EncoderConfig:
    """The decoder's layers: the encoder's, but that each sees the whole text before it, and has parameters of its
    own."""
    relative = model.relative_position if model.relative_position == "t5" else "none"
    return dataclasses.replace(
        model, position="none", position_offset=0, position_scale=False, local_rope_theta=None, window=None,
        global_every=1, relative_position=relative, num_layer_groups=None, conv_width=0, first_attention_norm=True,
    )  # fmt: skip


def _make_model(config: RunConfig, labels: Labels) -> Callable[[nnx.Rngs], Autoencoder]:
    return lambda rngs: Autoencoder(config, rngs=rngs)


def _targets(inputs: TargetInputs) -> Targets:
    decoder = with_ids(inputs.config.decoder, inputs.tokenizer)
    assert decoder.start_id is not None and decoder.end_id is not None
    return denoising_targets(inputs, decoder.start_id, decoder.end_id)


def _check(config: RunConfig) -> None:
    model, num_layers = config.model, config.decoder.num_layers
    check_whole_documents(config)
    check_head(config)
    if model.layer != "attention":
        check_recurrent_decoder(model)
        require(
            not config.autoencoder.is_tied,
            f"a decoder of {model.layer} layers has parameters of its own, since it reads the vector at every token: "
            f"give --autoencoder.no-is-tied.",
        )
        return
    require(model.embed_dim % 2 == 0, f"a decoder's places need model.embed_dim to be even: got {model.embed_dim}.")
    require(
        not config.autoencoder.is_tied
        or (num_layers in (None, model.num_layers) and not model.first_differs and model.num_layer_groups is None),
        f"a tied decoder has a layer beside each of the encoder's, all alike: got decoder.num_layers {num_layers} for "
        f"{model.num_layers}, model.num_layer_groups {model.num_layer_groups} and a first layer "
        f"{'of its own' if model.first_differs else 'like the rest'}. Give --autoencoder.no-is-tied.",
    )


def _settle(config: RunConfig, data: Any) -> RunConfig:
    _check(config)  # the model's layers may be those of init_from
    return settle_ids(config, data)


def _vectors(config: RunConfig) -> VectorSettings:
    return VectorSettings(config.autoencoder.pooling)


def _baselines(run: Any, data: Any) -> dict[str, dict[str, float]]:
    """What the words before tell of the next one, without the vector."""
    from flax_encoder.data.baselines import PreviousCounts

    counts = PreviousCounts.of_texts([s.train for s in data.stores], data.tokenizer, run.config.data.row_length)
    scores = counts.score(data.evaluation, given="decoder_tokens")
    return {"most frequent token": scores["most_frequent"], "guess from the token before": scores["previous"]}


def _commands(run: Any, data: Any) -> list[str]:
    run_dir = shlex.quote(run.config.run_dir)
    return [
        f"python -m flax_encoder embed {run_dir} --input texts.txt --output vectors.npy",
        *export_commands(run, f"{run_dir}/published"),
    ]


_READING = Reading(Columns(), _targets, streams=lambda config: ("word_starts",))

TASK = Task(
    reading=_READING,
    make_model=_make_model,
    report=MaskedLM.report,
    reads=("autoencoder.", "decoder.num_layers", "decoder.start_id", "decoder.end_id", "head.tied"),
    check=_check,
    settle=_settle,
    baselines=_baselines,
    samples=functools.partial(written_sentences, _READING),
    commands=_commands,
    vectors=_vectors,
)
