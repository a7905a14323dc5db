"""A published model, which computes what transformers computes of the same arrays."""

import dataclasses
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flax_encoder.config import DecoderConfig, EncoderConfig, HeadConfig
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.tokenizer import TextTokenizer
from flax_encoder.families.family import OF_VOCABULARY, POOLED, Family
from flax_encoder.nn.decoder import EncoderDecoder
from flax_encoder.nn.encoder import Encoder, short_repr
from flax_encoder.nn.generation import Generation, generate
from flax_encoder.nn.heads import ClassificationHead, MaskedLMHead, segment_mean
from flax_encoder.published.generation_settings import Settings
from flax_encoder.published.tasks import Task


@dataclasses.dataclass(frozen=True)
class Output:
    """NumPy, float32. At padding, the rows of states and of logits mean nothing."""

    last_hidden_state: Float[np.ndarray, "B T D"]
    hidden_states: tuple[Float[np.ndarray, "B T D"], ...]
    """The embeddings and what each layer leaves; the last is last_hidden_state."""
    pooler_output: Float[np.ndarray, "B D"] | None
    logits: Float[np.ndarray, "..."] | None
    """[B, T, V], [B, C] (classification, next_sentence: 0 is that the second follows), [B] (multiple choice: a row is
    one choice of a question), [B, T, C], [B, T, 2] (question answering: start, end) or [B, T] (discriminator); of an
    encoder-decoder those of the target, [B, S, V]."""
    decoder_hidden_states: tuple[Float[np.ndarray, "B S D"], ...] | None = None
    """Of an encoder-decoder's target, likewise."""
    pair_logits: Float[np.ndarray, "B 2"] | None = None
    """Of a pretraining head: 0 is that a row's second segment follows its first (BERT), or that the two are in order
    (ALBERT)."""


class PretrainedModel(nnx.Module):
    """An encoder with what a folder has on it: the head of its task, a pooler. Paths are those of the objectives."""

    __repr__ = short_repr

    def __init__(
        self,
        config: EncoderConfig,
        task: Task | None = None,
        head: HeadConfig | None = None,
        num_outputs: int = 0,
        pooling: str = "cls",
        has_pooler: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        self.task, self.pooling = task, pooling
        self.encoder = Encoder(config, rngs=rngs)
        if task in OF_VOCABULARY:
            self.head = MaskedLMHead(config, head, rngs=rngs)
        else:
            self.head = ClassificationHead(config, num_outputs, head, rngs=rngs) if task else None
        self.pooler = ClassificationHead(config, 0, rngs=rngs) if has_pooler else None
        self.pair_head = ClassificationHead(config, 2, rngs=rngs) if task == "pretraining" else None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        token_types: Int[Array, "B T"] | None = None,
    ) -> dict[str, Array | None]:
        """One document a row; the fields of `Output`, the states stacked."""
        hidden, states = self.encoder(tokens, segment_ids, positions, token_types, every_layer=True)
        # A document's first token is where BERT's [CLS] is, whichever side is padded.
        first = (segment_ids > 0).argmax(1)[:, None]
        pooled = jnp.take_along_axis(hidden, first[..., None], axis=1)
        logits = None
        if self.task in OF_VOCABULARY:
            logits = self.head(hidden, self.encoder.embedding.token[...])
        elif self.task in POOLED and self.pooling == "late":
            logits = segment_mean(self.head(hidden), segment_ids, first)[:, 0]
        elif self.task in POOLED:
            mean = segment_mean(hidden, segment_ids, first)
            logits = self.head(mean if self.pooling == "mean" else pooled)[:, 0]
        elif self.task is not None:
            logits = self.head(hidden)
        if self.task in ("discriminator", "multiple_choice"):
            logits = logits[..., 0]
        pooler_output = None if self.pooler is None else self.pooler(pooled)[:, 0]
        out = {"last_hidden_state": hidden, "hidden_states": states, "pooler_output": pooler_output, "logits": logits}
        return out if self.pair_head is None else out | {"pair_logits": self.pair_head(pooled)[:, 0]}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A published model that `load_pretrained` opens. Called with NumPy arrays, it computes what transformers computes.
    """

    model: PretrainedModel | EncoderDecoder
    config: EncoderConfig
    tokenizer: TextTokenizer | None
    """None if the folder has no tokenizer."""
    family: Family
    task: Task | None
    head: HeadConfig
    pooling: str
    label_names: list[str] | None
    pad_id: int
    fresh: tuple[str, ...]
    """Paths of the parameters that the folder did not have."""
    num_outputs: int = 0
    """Outputs of the head: its number of classes or tags, or what its kind has."""
    decoder: DecoderConfig | None = None
    settings: Settings | None = None
    """The folder's settings of generation."""
    problem_type: str | None = None
    """Kind of a classification head: None (one of several labels), multi_label_classification or regression."""

    def __repr__(self) -> str:
        model = self.model.encoder if self.decoder is None else self.config
        head = self.task or ("no head" if self.decoder is None else "encoder and decoder")
        return f"Pretrained({head}, {model!r})"

    @property
    def generation(self) -> Generation | None:
        """How the decoder writes if `generate` gets no settings.

        Raises:
          DataError: the folder has a setting that is not supported.
        """
        return None if self.settings is None else self.settings.generation()

    @cached_property
    def _apply(self):
        graphdef, _ = nnx.split(self.model)
        call = (lambda model, *rows: model(*rows)) if self.decoder is None else _encode_and_decode
        return jax.jit(lambda params, *rows: call(nnx.merge(graphdef, params), *rows))

    def __call__(
        self,
        input_ids: Int[np.ndarray, "B T"],
        attention_mask: Int[np.ndarray, "B T"] | Bool[np.ndarray, "B T"] | None = None,
        token_type_ids: Int[np.ndarray, "B T"] | None = None,
        decoder_input_ids: Int[np.ndarray, "B S"] | None = None,
    ) -> Output:
        """What transformers computes of the same arrays. Rows may be padded on either side.

        Args:
          attention_mask: 1 at tokens, 0 at padding; None is all tokens.
          decoder_input_ids: an encoder-decoder's target; None encodes only.

        Raises:
          DataError: the embedding lacks an id or a type, arrays do not fit each other, rows are longer than the model
            takes, or there is a target and no decoder.
        """
        if decoder_input_ids is not None and self.decoder is None:
            raise DataError(f"decoder_input_ids are for encoder-decoders: this is a {self.task or 'bare encoder'}.")
        rows = self.rows(input_ids, attention_mask, token_type_ids)
        if self.decoder is not None:
            target = None
            if decoder_input_ids is not None:
                shape = (rows[0].shape[0], None)
                target = jnp.asarray(_whole_numbers(decoder_input_ids, "token ids", self.config.vocab_size, shape))
            rows = (*rows[:3], target)
        _, params = nnx.split(self.model)
        out = self._apply(params, *rows)
        out = {name: None if value is None else np.asarray(value) for name, value in out.items()}
        states = {name: tuple(x) for name, x in out.items() if name.endswith("hidden_states") and x is not None}
        return Output(**out | states)

    def rows(
        self,
        input_ids: Int[np.ndarray, "B T"],
        attention_mask: Int[np.ndarray, "B T"] | Bool[np.ndarray, "B T"] | None = None,
        token_type_ids: Int[np.ndarray, "B T"] | None = None,
    ) -> tuple[Array | None, ...]:
        """The arguments of `model`: tokens, segment_ids, positions as the family counts them, and types if it has any.

        BERT counts columns. RoBERTa counts the tokens that are not its padding's id, with an attention_mask or
        without one, as transformers 5 does: that id is skipped wherever it stands, also where a text spells `<pad>`.
        """
        ids, mask = self._ids_and_mask(input_ids, attention_mask)
        if self.config.position == "learned" and ids.shape[1] > self.config.max_length:
            raise DataError(f"the model takes rows of {self.config.max_length} tokens: got {ids.shape[1]}.")
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        if self.family.counts_real_tokens:
            is_real = (ids != self.pad_id).astype(np.int32)
            positions = np.cumsum(is_real, axis=1, dtype=np.int32) * is_real - 1
        types = None
        if token_type_ids is not None and self.config.num_token_types:
            types = jnp.asarray(_whole_numbers(token_type_ids, "token types", self.config.num_token_types, ids.shape))
        return *map(jnp.asarray, (ids, mask, positions)), types

    def generate(
        self,
        input_ids: Int[np.ndarray, "B T"],
        attention_mask: Int[np.ndarray, "B T"] | Bool[np.ndarray, "B T"] | None = None,
        *,
        do_sample: bool | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Int[np.ndarray, "B S"]:
        """Write a target for each row, as the folder's generation_config.json and `settings` say.

        Args:
          do_sample: sample tokens, by `seed`; None is what the folder says, or else the likeliest token each time.
          settings: `Generation`'s fields, such as num_beams. They override the folder's.

        Returns the ids of the texts with their start token, padded to the longest.

        Raises:
          DataError: there is no decoder, or the folder has a setting that is not supported.
          ValueError: settings contradict each other.
        """
        if self.decoder is None:
            raise DataError(f"only encoder-decoders generate: this model is a {self.task or 'bare encoder'}.")
        generation = self.settings.generation(do_sample, **settings)
        ids, mask = self._ids_and_mask(input_ids, attention_mask)
        # A multiple of 32, so that few shapes are compiled.
        ids, mask = (jnp.asarray(np.pad(x, [(0, 0), (0, -x.shape[1] % 32)])) for x in (ids, mask))
        key = jax.random.key(seed) if generation.is_drawn else None
        text = np.asarray(generate(self.model, ids, mask, generation, key=key))
        is_over = np.cumsum(np.isin(text[:, 1:], generation.end_ids), axis=1) > 0
        longest = 1 + min(int((~is_over).sum(1).max()) + 1, generation.max_new_tokens)
        return text[:, :longest]

    def _ids_and_mask(self, input_ids, attention_mask) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
        ids = _whole_numbers(input_ids, "token ids", self.config.vocab_size, (None, None))
        if attention_mask is None:
            return ids, np.ones_like(ids)
        mask = np.asarray(attention_mask)
        if mask.shape != ids.shape:
            raise DataError(f"attention_mask must have a number for each token, {ids.shape}: got {mask.shape}.")
        return ids, (mask > 0).astype(np.int32)


def _whole_numbers(values: Any, what: str, count: int, shape: tuple[int | None, ...]) -> Int[np.ndarray, "B T"]:
    """`values` as an array of that shape (None is any size, from 1), if each lies in 0 .. count - 1."""
    try:
        values = np.asarray(values)
    except ValueError:
        raise DataError(f"{what} must be in rows of one length: got {values!r:.80}.") from None
    is_alike = len(values.shape) == len(shape) and all(
        n > 0 if want is None else n == want for n, want in zip(values.shape, shape, strict=True)
    )
    if not is_alike or not np.issubdtype(values.dtype, np.integer):
        wanted = " x ".join("any" if n is None else str(n) for n in shape)
        raise DataError(
            f"{what} must be whole numbers in rows of one length, {wanted}: got {values.dtype} of shape {values.shape}."
        )
    if values.min() < 0 or values.max() >= count:
        raise DataError(f"{what} must lie in 0 .. {count - 1}: got {values.min()} .. {values.max()}.")
    return values.astype(np.int32)


def _encode_and_decode(model: EncoderDecoder, tokens, segment_ids, positions, target_tokens) -> dict[str, Array | None]:
    """The fields of `Output`, as `PretrainedModel` gives them."""
    hidden, states = model.encoder(tokens, segment_ids, positions, every_layer=True)
    out = {"last_hidden_state": hidden, "hidden_states": states, "pooler_output": None, "logits": None}
    if target_tokens is None:
        return out
    seen = jnp.ones_like(target_tokens)
    decoded, decoder_states = model.decoder(model.embed(target_tokens), hidden, seen, segment_ids, every_layer=True)
    return out | {"logits": model.logits(decoded), "decoder_hidden_states": decoder_states}
