"""Texts to vectors, one each: of a run, a published encoder, or a sentence-transformers folder.

A stream of texts is tokenized and packed into rows by a thread of its own, while the device works on the rows before;
so a file of any size takes the same memory.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_encoder.config import EncoderConfig
from flax_encoder.config.model import PoolingMode
from flax_encoder.data.rows.ahead import read_ahead
from flax_encoder.data.rows.documents import Frame
from flax_encoder.data.rows.texts import EncodedText, PackedTexts, RowShape, pack_texts
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.texts import check_texts
from flax_encoder.data.tokens.tokenizer import SETTINGS, TextTokenizer, UnknownCount
from flax_encoder.nn.encoder import Encoder
from flax_encoder.nn.feed_forward import ACTIVATIONS
from flax_encoder.nn.partition import abstract_model
from flax_encoder.nn.pooling import pool_segments
from flax_encoder.ops.platform import platform, precision
from flax_encoder.published.load import is_published, load_pretrained
from flax_encoder.published.sentence_transformers import (
    NORMALIZE,
    Layer,
    SentenceSettings,
    is_sentence_folder,
    read_sentence_settings,
)
from flax_encoder.runs.asked import FEW_TOKENS, AskedModel
from flax_encoder.runs.elsewhere import local_folder
from flax_encoder.runs.load import load_run
from flax_encoder.runs.vector_settings import check_layers, most_positions, settings_of_run, with_given

logger = logging.getLogger(__name__)

_LONGEST_ROW = 2**20
# Columns. With it a text has the same bits wherever it lies; without, sums over a row begin with other tokens (LOG.md).
_ALIGNMENT = 8


class _Rows(NamedTuple):
    """Rows of a batch: so many of the shortest length, or their tokens in longer ones, each `step` times as long.

    Each length is a compiled program, and a text goes to the shortest that it fits: padding and attention are least in
    short rows (LOG.md).
    """

    count: int
    shortest: int = 64
    step: int = 4

    def shapes(self, longest: int) -> list[RowShape]:
        lengths = [n for k in range(16) if (n := self.shortest * self.step**k) < longest] + [longest]
        return [RowShape(max(1, self.count * self.shortest // n), n) for n in lengths]


_MANY = {"cpu": _Rows(16), "gpu": _Rows(256), "tpu": _Rows(256)}  # on a CPU more are no faster (LOG.md)
_FEW = {1: _Rows(1, 32, 2), 16: _Rows(4, 32, 2)}  # by how many texts there are at most
_TOKENIZED_AT_ONCE = 1024
_BATCHES_AHEAD = 4


class Vectors(NamedTuple):
    """Of some texts of a stream."""

    numbers: Int[np.ndarray, "N"]
    """The texts' places in the stream, from 0."""
    vectors: Float[np.ndarray, "N E"]
    num_cut: int
    """Texts that were cut so far, of all that were read; the last of a stream's says it of all."""


@dataclasses.dataclass(frozen=True)
class Embedder:
    """A model that makes vectors of texts; `load_embedder` opens one."""

    encoder: Encoder
    tokenizer: TextTokenizer
    settings: SentenceSettings = dataclasses.field(default_factory=SentenceSettings)
    """With max_tokens None there is no limit."""
    normalize_last: bool = False
    """Scale vectors to length 1 after all that the settings do."""

    @property
    def config(self) -> EncoderConfig:
        return self.encoder.config

    @property
    def pooling(self) -> PoolingMode | tuple[PoolingMode, ...]:
        """How the vectors of a text's tokens become one; a tuple concatenates the results of several ways."""
        pooling = self.settings.pooling
        return pooling[0] if len(pooling) == 1 else pooling

    @property
    def normalize(self) -> bool:
        """Whether vectors have length 1."""
        return self.normalize_last or (self.settings.layers[-1:] == (NORMALIZE,) and not self.settings.truncate_dim)

    @property
    def max_tokens(self) -> int | None:
        """Longer texts are cut to so many tokens, special tokens and the prompt included; None is no limit."""
        return self.settings.max_tokens

    @property
    def prompts(self) -> dict[str, str]:
        """The prompts that can be put before texts, by name."""
        return dict(self.settings.prompts)

    @property
    def prompt(self) -> str:
        """The prompt that is put before every text if none is named."""
        return self.settings.prompts.get(self.settings.default_prompt_name, "")

    @functools.cached_property
    def embed_dim(self) -> int:
        """E, the number of features of a vector."""
        dims = [layer.arrays["kernel"].shape[1] for layer in self.settings.layers if layer.kind == "Dense"]
        dim = dims[-1] if dims else self.config.embed_dim * len(self.settings.pooling)
        return min(dim, self.settings.truncate_dim or dim)

    @functools.cached_property
    def _tokenizer(self) -> TextTokenizer:
        """The tokenizer as the settings have it."""
        content = json.loads(self.tokenizer.json)
        if self.settings.do_lower_case:  # after special tokens are found in a text, which keep their case
            own = content.get("normalizer")
            steps = own["normalizers"] if own and own["type"] == "Sequence" else [own] if own else []
            content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *steps]}
        if self.settings.truncation_side:
            content["model"].setdefault(SETTINGS, {})["truncation_side"] = self.settings.truncation_side
        return TextTokenizer(json.dumps(content))

    @functools.cached_property
    def _apply(self) -> Callable[..., Array]:
        settings, has_types = self.settings, bool(self.config.num_token_types)

        def apply(encoder, batch, skipped):
            rows = (batch["tokens"], batch["segment_ids"], batch["positions"])
            hidden = encoder(*rows, batch["token_types"] if has_types else None)
            num_segments = batch["target_positions"].shape[1]
            vectors = pool_segments(
                hidden, batch["segment_ids"], batch["places"], num_segments, settings.pooling, skipped
            )
            for layer in settings.layers:
                vectors = apply_layer(layer, vectors)
            vectors = vectors[..., : settings.truncate_dim]
            return apply_layer(NORMALIZE, vectors) if self.normalize_last else vectors

        unrolled = dataclasses.replace(self.config, scan_layers=False)
        return AskedModel(self.encoder, lambda: _graphdef(unrolled)).function(apply)

    def embed(
        self,
        texts: Iterable[str] | Any,
        batch_size: int | Any | None = None,
        progress: Callable[[int], None] = lambda done: None,
        *,
        prompt_name: str | None = None,
    ) -> tuple[Float[np.ndarray, "N E"], int]:
        """(one float32 vector per text, in the texts' order; the number of texts that were cut).

        Args:
          texts: a text without a token has a vector of zeros.
          batch_size: rows of 64 tokens in a batch; longer rows have as many tokens together. None chooses by the device
            and the number of texts; the vectors of few texts then differ from those of `stream` by rounding.
          progress: called with the number of texts that are done.
          prompt_name: which of `prompts` to put before every text; None is `prompt`.

        Raises:
          DataError: `texts` is no list of texts, batch_size is below 1, or there is no such prompt.
        """
        texts, rows, prompt = check_texts(texts), _rows_of(batch_size), self._prompt_of(prompt_name)
        if batch_size is None:
            rows = next((few for most, few in _FEW.items() if len(texts) <= most), rows)
        out, num_cut, done = np.zeros((len(texts), self.embed_dim), np.float32), 0, 0
        for numbers, vectors, num_cut in self._stream(texts, prompt, rows):  # noqa: B007
            out[numbers] = vectors
            done += len(numbers)
            progress(done)
        return out, num_cut

    def stream(
        self, texts: Iterable[str] | Any, batch_size: int | Any | None = None, *, prompt_name: str | None = None
    ) -> Iterator[Vectors]:
        """The vectors of any number of texts as they are made, in another order, in bounded memory.

        A text's vector does not depend on the others. On a CPU with jax 0.10 it has the same bits whatever they are;
        with jax 0.12 that of a text of more than 64 tokens can differ by rounding. Takes and raises what `embed` does.
        """
        if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
            check_texts(texts)  # which says what is wrong
        return self._stream(texts, self._prompt_of(prompt_name), _rows_of(batch_size))

    def _prompt_of(self, name: str | None) -> str:
        if name is not None and name not in self.prompts:
            known = ", ".join(self.prompts) or "no prompts"
            raise DataError(f"prompt_name must be one of {known}: got {name!r}.")
        return self.prompt if name is None else self.prompts[name]

    def _stream(self, texts: Iterable[Any], prompt: str, rows: _Rows) -> Iterator[Vectors]:
        skipped = 0 if self.settings.include_prompt or not prompt else self._prompt_length(prompt)
        waiting = None  # the device works on one batch while the one before is given away
        packed_rows = self._packed(texts, prompt, rows)
        if rows not in _FEW.values():  # a thread takes longer to begin than a few texts
            packed_rows = read_ahead(packed_rows, _BATCHES_AHEAD)
        with contextlib.closing(packed_rows) as batches:
            for packed, num_cut in batches:
                result = self._apply(packed.batch["tokens"].size <= FEW_TOKENS, packed.batch, skipped)
                if waiting is not None:
                    yield _taken(*waiting)
                waiting = packed, num_cut, result
        if waiting is not None:
            yield _taken(*waiting)

    def _packed(self, texts: Iterable[Any], prompt: str, rows: _Rows) -> Iterator[tuple[PackedTexts, int]]:
        """Batches of rows, each with how many texts were cut until it was packed."""
        num_cut, unknown = 0, UnknownCount(self.tokenizer)
        frame = None  # of a model whose positions skip a padding token that a text spells
        if self.config.position_offset and self.tokenizer.find("pad") is not None:
            frame = Frame.of(self.tokenizer, self.config.position_offset)

        def encoded() -> Iterator[EncodedText]:
            nonlocal num_cut
            for some in _in_groups(texts, _TOKENIZED_AT_ONCE):
                ids, num_more = self._tokenizer.encode_rows([prompt + text for text in some], self.max_tokens)
                num_cut += num_more
                unknown.add(ids)
                yield from map(EncodedText, ids)

        longest = _LONGEST_ROW if self.max_tokens is None else -(-self.max_tokens // _ALIGNMENT) * _ALIGNMENT
        # Padding is seen by nothing, so any token may stand for it; some tokenizers have none of their own.
        for packed in pack_texts(encoded(), rows.shapes(longest), pad_id=0, alignment=_ALIGNMENT):
            places = packed.batch["positions"]
            packed.batch["places"] = places
            if frame is not None:
                packed.batch["positions"] = frame.positions(packed.batch["tokens"], packed.batch["segment_ids"], places)
            yield packed, num_cut
        if unknown.warning:
            logger.warning("%s", unknown.warning)

    def _prompt_length(self, prompt: str) -> int:
        """Tokens that the prompt has of a text, the special ones before it included."""
        (ids,), _ = self._tokenizer.encode_rows([prompt], self.max_tokens)
        return len(ids) - (len(ids) > 0 and ids[-1] in self.tokenizer.special_ids)


def _rows_of(batch_size: int | Any | None) -> _Rows:
    if batch_size is None:
        return _MANY[platform()]
    if not (_is_count(batch_size) and batch_size > 0):
        raise DataError(f"batch_size must be a whole number above 0: got {batch_size!r}.")
    return _Rows(int(batch_size))


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _taken(packed: PackedTexts, num_cut: int, result: Array) -> Vectors:
    vectors = np.asarray(result)[packed.row, packed.segment - 1]
    vectors[packed.length == 0] = 0.0
    return Vectors(packed.text, vectors, num_cut)


def _in_groups(texts: Iterable[Any], size: int) -> Iterator[list[str]]:
    texts, done = iter(texts), 0
    while group := check_texts(itertools.islice(texts, size), done):
        done += len(group)
        yield group


def apply_layer(layer: Layer, x: Float[Array, "*N D"]) -> Float[Array, "*N E"]:
    """What a sentence-transformers folder does to pooled vectors, float32."""
    if layer.kind == "Normalize":
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    arrays = layer.arrays
    if layer.kind == "LayerNorm":
        centred = x - x.mean(-1, keepdims=True)
        rate = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-5)
        return centred * rate * arrays["scale"] + arrays["bias"]
    y = ACTIVATIONS[layer.activation](_product(x, arrays["kernel"]) + arrays.get("bias", 0.0))
    if layer.adds_input:
        y = y + (_product(x, arrays["residual"]) if "residual" in arrays else x)
    return y


def _product(x, kernel):
    return jnp.matmul(x, kernel, precision=precision(x))


def load_embedder(
    folder: str | pathlib.Path,
    *,
    pooling: PoolingMode | Sequence[PoolingMode] | Any = None,
    normalize: bool | None = None,
    max_tokens: int | Any | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    allow_unused: bool = False,
    dimensions: int | None = None,
) -> Embedder:
    """Open a run, a published folder with any head, or a sentence-transformers folder as an Embedder.

    Args:
      pooling, normalize, max_tokens: None takes what a sentence-transformers folder says. Other folders have the mean,
        no normalization, and the longest text that the tokenizer and the model's config, or a run's rows, allow.
      dtype: dtype of the operands of matrix products; None is the model's.
      allow_unused: leave out tensors of a published folder that no part of the model reads. Heads are always left out.
      dimensions: keep this many first features of each vector (Kusupati et al., arXiv 2205.13147), scaled to length 1
        again if whole vectors are; None keeps what the folder says.

    Raises:
      ConfigError: a sentence-transformers folder has a part that is not supported, or layers that do not fit its
        encoder or the pooling; or the pooling is unknown.
      DataError: the folder has no tokenizer, max_tokens is more than the model takes or leaves no room for text, or
        dimensions are more than a vector has.
      And whatever `load_pretrained` and `load_run` raise.

    Example:
      >>> embedder = load_embedder("runs/first", pooling="mean", normalize=True)
      >>> vectors, num_cut = embedder.embed(["a b", "c d e"])
      >>> vectors.shape == (2, embedder.embed_dim), num_cut
      (True, 0)
    """
    folder = pathlib.Path(local_folder(folder))
    settings = read_sentence_settings(folder) if is_sentence_folder(folder) else SentenceSettings()
    if is_published(inner := folder / settings.encoder_path):
        loaded = load_pretrained(inner, task="none", allow_unused=allow_unused)
        encoder, tokenizer = loaded.model.encoder, loaded.tokenizer
        if tokenizer is None:
            raise DataError(f"{inner} has no tokenizer, without which there are no tokens to embed.")
        limits = [tokenizer.max_tokens, most_positions(inner)]
    else:
        run = load_run(folder)
        settings = settings_of_run(run.config) or settings
        encoder, tokenizer, limits = run.model.encoder, run.tokenizer, [run.tokenizer.max_tokens or run.row_length]
    if dtype is not None:
        config = dataclasses.replace(encoder.config, dtype=dtype, product_dtype=None)
        encoder = nnx.merge(_graphdef(config), nnx.split(encoder)[1])
    check_layers(folder, settings, encoder.config.embed_dim)
    most = encoder.config.max_length if encoder.config.position == "learned" else None
    if max_tokens is not None and not (_is_count(max_tokens) and 3 <= max_tokens <= (most or max_tokens)):
        bounds = f"at least 3{f' and at most {most}' if most else ''}"
        raise DataError(f"max_tokens must be {bounds}, a whole number: got {max_tokens!r}.")
    wanted = max_tokens or settings.max_tokens
    limit = min([n for n in ([wanted] if wanted else limits) + [most] if n is not None], default=None)
    settings = with_given(dataclasses.replace(settings, max_tokens=limit), pooling, normalize)
    embedder = Embedder(encoder, tokenizer, settings, bool(normalize and settings.truncate_dim))
    if dimensions is None:
        return embedder
    if not 1 <= dimensions <= embedder.embed_dim:
        raise DataError(f"dimensions must be from 1 to the vectors' {embedder.embed_dim}: got {dimensions}.")
    cut = dataclasses.replace(settings, truncate_dim=dimensions)
    return Embedder(encoder, tokenizer, cut, embedder.normalize)


def _graphdef(config: EncoderConfig) -> Any:
    return abstract_model(lambda: Encoder(config, rngs=nnx.Rngs(0)))[0]
