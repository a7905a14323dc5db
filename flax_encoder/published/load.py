"""Published weight folders: load them and ask them.

A folder holds config.json, weights and a tokenizer; `families` says what their fields and tensors mean. What is not
understood is an error that names it, and what is left out or made up is named in a log line.
"""

import dataclasses
import logging
import pathlib
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flax_encoder.config import ConfigError, DecoderConfig, EncoderConfig, HeadConfig
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.tokenizer import TextTokenizer
from flax_encoder.data.tokens.tokenizer_files import read_tokenizer
from flax_encoder.families import find_family
from flax_encoder.families.configs import fields_left_unread, read_config, read_head
from flax_encoder.families.family import OF_VOCABULARY, POOLED, Family, Head, understood
from flax_encoder.families.tensors import import_tensors, plain_name, unwrapped, with_table
from flax_encoder.nn.decoder import EncoderDecoder
from flax_encoder.nn.encoder import Encoder, short_repr
from flax_encoder.nn.generation import Generation, generate
from flax_encoder.nn.heads import ClassificationHead, MaskedLMHead, segment_mean
from flax_encoder.nn.partition import abstract_model, flatten, unflatten
from flax_encoder.published.folder import (  # noqa: F401 - who opens folders has all of it from here
    TOKENIZER_FILES,
    is_published,
    read_json,
    read_published_config,
)
from flax_encoder.published.generation_settings import Settings, read_settings
from flax_encoder.published.tasks import NO_HEAD, Task
from flax_encoder.published.weights import read_weights

logger = logging.getLogger(__name__)

ALONE = 'task="none" (on the command line --task none)'
# Buffers that older files carry: positions 0, 1, 2 ..., masks and rotations, which follow from the config.
BUFFERS = re.compile(r"(^|\.)(position_ids|token_type_ids|inv_freq|freqs_cis|alibi)$")


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


def load_pretrained(
    folder: str | pathlib.Path,
    *,
    task: Task | Literal["none"] | None = None,
    num_labels: int | None = None,
    allow_unused: bool = False,
    seed: int | None = 0,
) -> Pretrained:
    """Load a published folder: config.json, safetensors or pickled tensors, and whatever tokenizer it has.

    Args:
      task: the head to load; "none" loads only the encoder, whatever head the folder has. None takes the head of
        config.json's architectures, or else the one in the weights. If config.json names another head, its outputs
        are left out, since several heads of a family give their tensors one name.
      num_labels: number of classes of a head that the folder lacks; None is config.json's.
      allow_unused: leave out tensors that no part of the model reads, rather than refuse them.
      seed: initializes heads that the folder lacks. None leaves them at zero without a log line, for callers that
        make their own.

    Raises:
      ConfigError: the folder is no published folder, its model_type or architecture is unknown, a config field or a
        tensor is not understood, or a tensor has the wrong shape.
      WeightsError: weights are missing, truncated or corrupt.
      DataError: the tokenizer cannot be read, or has an id beyond the embedding.

    Example:
      >>> bert = load_pretrained("bert")
      >>> bert(np.array([[2, 5, 6, 3]])).last_hidden_state.shape == (1, 4, bert.config.embed_dim)
      True
    """
    folder = pathlib.Path(folder)
    published = read_published_config(folder)
    family = find_family(published)
    config = read_config(family, published)
    if aside := fields_left_unread(family, published):
        logger.warning("%s: config.json has fields that nothing reads: %s", folder, ", ".join(aside))
    tensors, wrapper = unwrapped(family, {n: w for n, w in read_weights(folder).items() if not BUFFERS.search(n)})
    if wrapper:
        logger.warning("%s: left out the prefix %s of all names of tensors", folder, wrapper)
    tensors = with_table(family, published, tensors)
    is_alone = task == NO_HEAD
    task = None if is_alone else task or _task(family, published, tensors)
    if task is not None and task not in family.heads:
        raise ConfigError(
            f"{family.model_type} has no {task} head; it has {', '.join(family.heads)}. {ALONE} loads the encoder "
            f"without one."
        )
    tensors = family.arranged(tensors, task)
    head, pooling = read_head(family, task, published) if task else (HeadConfig(), "cls")
    decoder = family.decoder(published, tensors) if family.decoder and task == "text_to_text" else None
    names = _label_names(folder, published, num_labels)
    num_outputs = (family.heads[task].num_outputs if task else None) or len(names)
    plain_names = {name.removeprefix(family.prefix) for name in tensors}
    head_names = {
        n.removeprefix(family.prefix) for row in (family.heads[task].rows if task else ()) for n in row.theirs
    }
    has_pooler = any(row.theirs[0] in plain_names - head_names for row in family.pooler)

    def make_model():
        if decoder is not None:
            return EncoderDecoder(config, decoder, rngs=nnx.Rngs(seed or 0))
        return PretrainedModel(config, task, head, num_outputs, pooling, has_pooler, rngs=nnx.Rngs(seed or 0))

    graphdef, abstract = abstract_model(make_model)
    shapes = {path: leaf.shape for path, leaf in flatten(nnx.to_pure_dict(abstract)).items()}
    is_another = task is not None and task not in (named_heads(family, published) or (task,))
    read = _without_outputs(family, task) if is_another else family
    imported = import_tensors(read, task, tensors, shapes, config.num_heads)
    fresh = tuple(sorted(set(shapes) - set(imported.params)))
    _check_unused(folder, family, imported.unused, allow_unused, is_alone)
    if seed is None:
        imported.params.update({path: np.zeros(shapes[path], np.float32) for path in fresh})
    elif fresh:
        made = flatten(nnx.to_pure_dict(nnx.split(make_model())[1]))
        imported.params.update({path: np.asarray(made[path]) for path in fresh})
        logger.warning("%s has no %s: newly initialized from seed %d", folder, ", ".join(fresh), seed)
    # jnp.asarray would compile a program for each shape.
    model = nnx.merge(graphdef, unflatten(jax.device_put(imported.params)))
    tokenizer = None
    if any((folder / name).exists() for name in TOKENIZER_FILES):
        tokenizer = read_tokenizer(folder, num_rows=config.vocab_size)
        if (highest := tokenizer.vocab_size - 1) >= config.vocab_size:
            raise DataError(
                f"the embedding must hold every token: the tokenizer in {folder} gives {tokenizer.token(highest)!r} "
                f"the id {highest}, and the embedding has {config.vocab_size} rows. Take such tokens out of its files, "
                f"or train with weights that have rows for them."
            )
    pad_id = config.position_offset - 1 if family.counts_real_tokens else _whole(published, "pad_token_id", 0)
    return Pretrained(
        model,
        config,
        tokenizer,
        family,
        task,
        head,
        pooling,
        names if task in ("classification", "token_classification") else None,
        pad_id,
        fresh,
        num_outputs,
        decoder,
        read_settings(folder, published) if decoder else None,
        published.get("problem_type") if task == "classification" else None,
    )


def _whole(published: Mapping[str, Any], name: str, default: int) -> int:
    """A field that is a number or an id, or else `default`."""
    value = published.get(name)
    if value is not None and type(value) is not int:
        raise ConfigError(f"config field {name} must be one whole number: got {value!r}.")
    return default if value is None else value


def _label_names(folder: pathlib.Path, published: Mapping[str, Any], num_labels: int | None) -> list[str]:
    """A name for each label. As in transformers num_labels says how many, and then id2label, and else there are two."""
    given = published.get("id2label") or {}
    with understood(f"config field id2label, {given!r},"):
        names = {int(key): str(name) for key, name in given.items()}
    count = num_labels or _whole(published, "num_labels", 0) or len(names) or 2
    if names and len(names) != count:
        logger.warning("%s: id2label names %d of %d labels: they are called LABEL_0, ...", folder, len(names), count)
        names = {}
    return [names.get(i, f"LABEL_{i}") for i in range(count)]


def named_heads(family: Family, published: Mapping[str, Any]) -> tuple[Task, ...]:
    """The heads that a config's architecture is of; none of a bare encoder, of one that is not known or not said."""
    architecture = (published.get("architectures") or [None])[0]
    return tuple(task for task, head in family.heads.items() if architecture in head.architectures)


def _without_outputs(family: Family, task: Task) -> Family:
    head = family.heads[task]
    rows = tuple(row for row in head.rows if not row.ours[0][0].startswith("head.out."))
    return dataclasses.replace(family, heads={**family.heads, task: dataclasses.replace(head, rows=rows)})


def _task(family: Family, published: Mapping[str, Any], tensors: Mapping[str, Any]) -> Task | None:
    """What a folder is for: what its config says, or else the first head of which it has every weight."""
    architecture = (published.get("architectures") or [None])[0]
    known: dict[str, Task] = {}
    for task, head in family.heads.items():
        for name in head.architectures:
            known.setdefault(name, task)
    if architecture is not None and architecture not in (*known, family.base):
        raise ConfigError(
            f"architecture {architecture!r} of {family.model_type} is not known; known are "
            f"{', '.join([family.base, *known])}. {ALONE} loads the encoder without its head, and task= (--task) loads "
            f"it as one of {', '.join(family.heads)}."
        )
    if architecture is not None:
        return known.get(architecture)
    found = {plain_name(family, name) for name in tensors}

    def is_whole(head: Head) -> bool:
        names = [row.theirs for row in head.rows if row.when is None and head.tied not in row.theirs]
        names = [[plain_name(family, name.replace("{i}", "0")) for name in own] for own in names]
        weights = [own for own in names if own[0].endswith(".weight")]
        return bool(weights) and not any(found.isdisjoint(own) for own in weights)

    return next((task for task, head in family.heads.items() if is_whole(head)), None)


def _check_unused(
    folder: pathlib.Path, family: Family, unused: list[str], allow_unused: bool, is_alone: bool
) -> None:
    known = {name.removeprefix(family.prefix) for h in family.heads.values() for row in h.rows for name in row.theirs}
    known |= {h.tied for h in family.heads.values()} | {n for row in family.pooler for n in row.theirs}
    # What the encoder's names begin with: the rest is of heads, which an encoder alone does without.
    of_encoder = {name.partition(".")[0] for row in (*family.rows, *family.pooler) for name in row.theirs}

    def is_expected(name: str) -> bool:
        bare = name.removeprefix(family.prefix)
        is_of_head = is_alone and bare == name and bare.partition(".")[0] not in of_encoder
        return is_of_head or plain_name(family, name) in known or any(re.search(p, name) for p in family.leftovers)

    expected = [name for name in unused if is_expected(name)]
    if expected:
        logger.warning("%s: left out %s, which the loaded parts do not read", folder, ", ".join(expected))
    if unknown := sorted(set(unused) - set(expected)):
        listed = f"{', '.join(unknown[:8])}{' ...' if len(unknown) > 8 else ''}"
        if not allow_unused:
            raise ConfigError(
                f"{folder} has tensors that no part of the model reads: {listed}. allow_unused=True leaves them out; "
                f"on the command line --allow-unused does. To train from it, `import` it so and start from that."
            )
        logger.warning("%s: left out %s, which no part of the model reads", folder, listed)
