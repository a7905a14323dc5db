"""Texts to vectors, one each: a run, a published encoder, or a sentence-transformers folder, pooled and normalised.

A sentence-transformers folder is a published encoder with modules.json, which lists what follows it: `1_Pooling`, and
`2_Normalize` or not. (Reimers and Gurevych, arXiv 1908.10084.)
"""

import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_encoder.config import ConfigError, EncoderConfig
from flax_encoder.data.rows.documents import Frame
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.texts import check_texts
from flax_encoder.data.tokens.tokenizer import TextTokenizer, UnknownCount
from flax_encoder.families import find_family
from flax_encoder.families.mapping import read_config
from flax_encoder.nn.encoder import Encoder
from flax_encoder.nn.partition import abstract_model
from flax_encoder.ops.platform import precision
from flax_encoder.published.load import is_published, load_pretrained
from flax_encoder.runs.load import load_run
from flax_encoder.training.checkpoint import read_run

logger = logging.getLogger(__name__)

Pooling = Literal["cls", "mean"]
_MODES = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
_LENGTH_STEP = 32  # rows are padded to a multiple, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Embedder:
    encoder: Encoder
    tokenizer: TextTokenizer
    pooling: Pooling = "mean"
    """The first token's vector, or the mean of all, special tokens too."""
    normalize: bool = False
    """Scale vectors to length 1."""
    max_tokens: int | None = None
    """Longer texts are cut to so many tokens, special ones included; None has no limit."""
    prompt: str = ""
    """What is put before every text. Both together are stripped of blanks at either end, and then lower-cased."""
    do_lower_case: bool = False

    @property
    def config(self) -> EncoderConfig:
        return self.encoder.config

    @functools.cached_property
    def _apply(self) -> Callable[..., Array]:
        graphdef, _ = nnx.split(self.encoder)

        def apply(params, tokens, mask, positions):
            hidden = nnx.merge(graphdef, params)(tokens, mask, positions)
            return pool(hidden, mask, self.pooling, self.normalize)

        return jax.jit(apply)

    def embed(
        self, texts: Sequence[str], batch_size: int = 32, progress: Callable[[int], None] = lambda done: None
    ) -> tuple[Float[np.ndarray, "N D"], int]:
        """(a vector a text, in the texts' order, float32; how many texts were cut).

        Texts of like length share a batch; `progress` hears how many are done.
        """
        texts = check_texts(texts)
        vectors = np.empty((len(texts), self.config.embed_dim), np.float32)
        encoded, num_cut, unknown = [], 0, UnknownCount(self.tokenizer)
        for start in range(0, len(texts), 4096):
            some = [(self.prompt + text).strip() for text in texts[start : start + 4096]]
            some = [text.lower() for text in some] if self.do_lower_case else some
            rows, more = self.tokenizer.encode_rows(some, self.max_tokens)
            unknown.add(rows)
            encoded += rows
            num_cut += more
        if unknown.warning:
            logger.warning("%s", unknown.warning)
        longest_first = sorted(range(len(texts)), key=lambda i: -len(encoded[i]))
        _, params = nnx.split(self.encoder)
        waiting = None  # the device works on one batch while the next is made
        for start in range(0, len(texts), batch_size):
            rows = longest_first[start : start + batch_size]
            result = self._apply(params, *self._batch([encoded[i] for i in rows], batch_size))
            if waiting is not None:
                _take(vectors, *waiting)
                progress(start)
            waiting = rows, result
        if waiting is not None:
            _take(vectors, *waiting)
        progress(len(texts))
        return vectors, num_cut

    def _batch(self, rows: list[np.ndarray], batch_size: int) -> tuple[Int[Array, "B T"], ...]:
        length = max(1, -(-len(rows[0]) // _LENGTH_STEP)) * _LENGTH_STEP
        if self.config.position == "learned":
            length = min(length, self.config.max_length)
        tokens, mask = np.zeros((2, batch_size, length), np.int32)
        for i, ids in enumerate(rows):
            tokens[i, : len(ids)], mask[i, : len(ids)] = ids, 1
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
        if self.config.position_offset and self.tokenizer.find("pad") is not None:
            positions = Frame.of(self.tokenizer, self.config.position_offset).positions(tokens, mask, positions)
        return *map(jnp.asarray, (tokens, mask, positions)),


def _take(vectors: np.ndarray, rows: list[int], result: Array) -> None:
    vectors[rows] = np.asarray(result)[: len(rows)]


def pool(
    hidden: Float[Array, "B T D"], mask: Int[Array, "B T"], pooling: Pooling, normalize: bool
) -> Float[Array, "B D"]:
    """One vector a row of its tokens, float32; padding, mask 0, does not count. A row of padding alone is zeros."""
    weights = mask.astype(jnp.float32)
    if pooling == "cls":
        weights = weights * (jnp.cumsum(mask, axis=1) == 1)
    sums = jnp.einsum("BT,BTD->BD", weights, hidden, precision=precision(hidden))
    vectors = sums / jnp.maximum(weights.sum(1, keepdims=True), 1.0)
    if normalize:
        vectors = vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


def load_embedder(
    folder: str | pathlib.Path,
    *,
    pooling: Pooling | None = None,
    normalize: bool | None = None,
    max_tokens: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    allow_unused: bool = False,
) -> Embedder:
    """An Embedder of a run, a published folder or a sentence-transformers folder.

    Args:
      pooling, normalize, max_tokens: None takes what a sentence-transformers folder says; else the mean, no, and
        what the model takes: its learned positions, or a run's rows.
      dtype: of matrix products; None is the model's.
      allow_unused: leave out tensors of a published folder that nothing here reads. Heads always are.

    Raises:
      ConfigError: modules.json has something that is not done here. DataError: the folder has no tokenizer, or
        max_tokens is more than the model takes. And whatever `load_pretrained` and `load_run` raise.
    """
    folder = pathlib.Path(folder)
    sentence = _read_modules(folder)
    if is_published(folder):
        loaded = load_pretrained(folder, task="none", allow_unused=allow_unused)
        encoder, tokenizer, limit = loaded.model.encoder, loaded.tokenizer, None
        if tokenizer is None:
            raise DataError(f"{folder} has no tokenizer, without which there are no tokens to embed.")
    else:
        run = load_run(folder)
        encoder, tokenizer, limit = run.model.encoder, run.tokenizer, run.config.data.row_length
    if dtype is not None and dtype != encoder.config.dtype:
        config = dataclasses.replace(encoder.config, dtype=dtype)
        graphdef, _ = abstract_model(lambda: Encoder(config, rngs=nnx.Rngs(0)))
        encoder = nnx.merge(graphdef, nnx.split(encoder)[1])
    most = encoder.config.max_length if encoder.config.position == "learned" else None
    if max_tokens is not None and (max_tokens < 3 or (most is not None and max_tokens > most)):
        raise DataError(f"max_tokens must be at least 3{f' and at most {most}' if most else ''}: got {max_tokens}.")
    own = max_tokens or sentence.pop("max_tokens", None) or tokenizer.max_tokens or limit
    limits = [n for n in (own, most) if n is not None]
    given = {"pooling": pooling, "normalize": normalize}
    settings = sentence | {name: value for name, value in given.items() if value is not None}
    settings["max_tokens"] = min(limits, default=None)
    return Embedder(encoder, tokenizer, **settings)


def _read_modules(folder: pathlib.Path) -> dict[str, Any]:
    """What a sentence-transformers folder says of pooling and what follows; nothing of another."""
    if not (folder / "modules.json").is_file():
        return {}
    settings: dict[str, Any] = {"normalize": False}
    modules = _json(folder / "modules.json", list)
    if not all(isinstance(m, dict) and {"type", "path"} <= m.keys() for m in modules):
        raise ConfigError(f"{folder / 'modules.json'} must be a list of modules, each with a type and a path.")
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]) or modules[0]["path"]:
        raise ConfigError(
            f"{folder / 'modules.json'} must list Transformer (at the top), Pooling and Normalize or not: got "
            f"{', '.join(kinds)}."
        )
    settings["normalize"] = len(kinds) == 3
    own = _json(folder / modules[1]["path"] / "config.json")
    modes = [mode for mode in [own.get("pooling_mode")] if mode]
    modes = modes or [_MODES.get(name, name) for name in own if name.startswith("pooling_mode_") and own[name]]
    if modes not in (["cls"], ["mean"]):
        raise ConfigError(f"{folder}: pooling must be cls or mean: got {', '.join(map(str, modes)) or 'none'}.")
    normalizes = _json(folder / modules[2]["path"] / "config.json") if len(kinds) == 3 else {}
    if any(value != "sentence_embedding" for value in normalizes.values()):
        raise ConfigError(f"{folder}: Normalize must be of the pooled vectors: got {normalizes}.")
    settings["pooling"] = modes[0]
    of_text = _json(folder / "sentence_bert_config.json")
    length = of_text.get("max_seq_length")
    if length is not None and not (type(length) is int and length >= 3):
        raise ConfigError(f"{folder}: max_seq_length must be a number of at least 3 tokens: got {length!r}.")
    settings |= {"max_tokens": length, "do_lower_case": bool(of_text.get("do_lower_case"))}
    about = _json(folder / "config_sentence_transformers.json")
    prompts, name = about.get("prompts") or {}, about.get("default_prompt_name")
    if name is not None:
        if not isinstance(prompts, dict) or not isinstance(prompts.get(name), str):
            raise ConfigError(f"{folder}: default_prompt_name must be one of prompts: got {name!r} of {prompts!r}.")
        settings["prompt"] = prompts[name]
    if settings.get("prompt") and own.get("include_prompt", True) is not True:
        raise ConfigError(
            f"{folder}: pooling without the prompt (include_prompt {own['include_prompt']!r}) is not done here."
        )
    return settings


def _json(path: pathlib.Path, kind: type = dict) -> Any:
    try:
        value = json.loads(path.read_text("utf-8")) if path.is_file() else kind()
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}.") from None
    if not isinstance(value, kind):
        raise ConfigError(f"{path} must hold a JSON {kind.__name__}: got {type(value).__name__}.")
    return value


def write_sentence_files(
    source: str | pathlib.Path,
    out: str | pathlib.Path,
    pooling: Pooling | None = None,
    normalize: bool | None = None,
    max_tokens: int | None = None,
) -> None:
    """Make `out`, which has the encoder of `source`, a sentence-transformers folder: with what is given, or else what
    `source` says if it is one, or its length.

    Raises:
      ConfigError: no pooling is given and `source` is no such folder.
    """
    source = pathlib.Path(source)
    if is_published(source):
        published = _json(source / "config.json")
        config = read_config(find_family(published), published)
        embed_dim, limit = config.embed_dim, config.max_length if config.position == "learned" else None
    else:
        run = read_run(source)["config"]
        embed_dim, limit = run["model"]["embed_dim"], run["data"]["row_length"]
    given = {"pooling": pooling, "normalize": normalize, "max_tokens": max_tokens}
    settings = {"max_tokens": limit} | _read_modules(source) | {k: v for k, v in given.items() if v is not None}
    if "pooling" not in settings:
        raise ConfigError(f"{source} does not say how to pool: give cls or mean.")
    kinds = ("Transformer", "Pooling", "Normalize")[: 2 + bool(settings.get("normalize"))]
    paths = ("", "1_Pooling", "2_Normalize")
    modes = {name: mode == settings["pooling"] for name, mode in _MODES.items()}
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{kind}"}
            for i, kind in enumerate(kinds)
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": embed_dim, **modes},
        "sentence_bert_config.json": {
            "max_seq_length": settings["max_tokens"], "do_lower_case": settings.get("do_lower_case", False),
        },
    }  # fmt: skip
    if prompt := settings.get("prompt"):
        files["config_sentence_transformers.json"] = {
            "prompts": {"default": prompt}, "default_prompt_name": "default",
        }  # fmt: skip
    for name, value in files.items():
        path = pathlib.Path(out) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def read_texts(path: pathlib.Path) -> Iterator[str]:
    """One text a line, empty ones too, so that row i of the vectors is line i of the file.

    Raises:
      DataError: no such file, or a line that is not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield line.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}: line {number} must be UTF-8: {error.reason}.") from None
    except OSError as error:
        raise DataError(f"no texts at {path}: {error.strerror}.") from None
