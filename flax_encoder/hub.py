"""Published weight folders: load them, ask them, start runs from them, and write them.

A folder holds config.json, weights and a tokenizer; `families` says what their fields and tensors mean. What is not
understood is an error that names it, and what is left out or made up is named in a log line.
"""

import dataclasses
import json
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
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from flax_encoder.config import (
    ConfigError,
    DataConfig,
    DecoderConfig,
    EncoderConfig,
    HeadConfig,
    RunConfig,
    from_dict,
    to_dict,
)
from flax_encoder.data.records import DataError
from flax_encoder.data.tokenizer import TextTokenizer
from flax_encoder.data.tokenizer_files import SENTENCEPIECE_FILES, read_tokenizer
from flax_encoder.families import FAMILIES, find_family
from flax_encoder.families.mapping import (
    Family,
    export_tensors,
    import_tensors,
    read_config,
    read_head,
    write_config,
)
from flax_encoder.generation import Generation, generate
from flax_encoder.nn.decoder import EncoderDecoder
from flax_encoder.nn.encoder import Encoder
from flax_encoder.nn.heads import ClassificationHead, MaskedLMHead
from flax_encoder.nn.partition import abstract_model
from flax_encoder.objectives import OBJECTIVES
from flax_encoder.objectives.classification import segment_mean
from flax_encoder.run import LoadedRun, load_run, model_factory
from flax_encoder.training.checkpoint import Checkpoints, read_params, read_run
from flax_encoder.training.run_log import write_atomically
from flax_encoder.training.step import TrainState
from flax_encoder.weights import read_weights, write_weights

logger = logging.getLogger(__name__)

Task = Literal[
    "masked_lm", "classification", "token_classification", "question_answering", "discriminator", "text_to_text"
]
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", *SENTENCEPIECE_FILES)
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
    """[B, T, V], [B, C] (classification), [B, T, C], [B, T, 2] (question answering: start, end) or [B, T]
    (discriminator); of an encoder-decoder those of the target."""
    decoder_hidden_states: tuple[Float[np.ndarray, "B S D"], ...] | None = None
    """Of an encoder-decoder's target, likewise."""


class PretrainedModel(nnx.Module):
    """An encoder with what a folder has on it: the head of its task, a pooler. Paths are those of the objectives."""

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
        if task == "masked_lm":
            self.head = MaskedLMHead(config, head, rngs=rngs)
        else:
            self.head = ClassificationHead(config, num_outputs, head, rngs=rngs) if task else None
        self.pooler = ClassificationHead(config, 0, rngs=rngs) if has_pooler else None

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
        if self.task == "masked_lm":
            logits = self.head(hidden, self.encoder.embedding.token[...])
        elif self.task == "classification" and self.pooling == "late":
            logits = segment_mean(self.head(hidden), segment_ids, first)[:, 0]
        elif self.task == "classification":
            mean = segment_mean(hidden, segment_ids, first)
            logits = self.head(mean if self.pooling == "mean" else pooled)[:, 0]
        elif self.task is not None:
            logits = self.head(hidden)
            logits = logits[..., 0] if self.task == "discriminator" else logits
        pooler_output = None if self.pooler is None else self.pooler(pooled)[:, 0]
        return {"last_hidden_state": hidden, "hidden_states": states, "pooler_output": pooler_output, "logits": logits}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    model: PretrainedModel | EncoderDecoder
    config: EncoderConfig
    tokenizer: TextTokenizer | None
    """None where the folder has no file of one."""
    family: Family
    task: Task | None
    head: HeadConfig
    pooling: str
    label_names: list[str] | None
    pad_id: int
    fresh: tuple[str, ...]
    """Paths of the parameters that the folder did not have."""
    decoder: DecoderConfig | None = None
    generation: Generation | None = None
    """The ids that its decoder starts with, ends with and pads with."""

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
          DataError: ids that the embedding has not, rows longer than the model takes, or a target for no decoder.
        """
        if decoder_input_ids is not None and self.decoder is None:
            raise DataError(f"decoder_input_ids are for encoder-decoders: this is a {self.task or 'bare encoder'}.")
        rows = self.rows(input_ids, attention_mask, token_type_ids)
        if self.decoder is not None:
            target = None if decoder_input_ids is None else jnp.asarray(self._ids(decoder_input_ids))
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
        """What `model` takes: tokens, segment_ids, positions as the family counts them, and types if it has any."""
        ids = self._ids(input_ids)
        if self.config.position == "learned" and ids.shape[1] > self.config.max_length:
            raise DataError(f"the model takes rows of {self.config.max_length} tokens: got {ids.shape[1]}.")
        mask = np.ones_like(ids) if attention_mask is None else (np.asarray(attention_mask) > 0).astype(np.int32)
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        if self.family.counts_real_tokens:
            is_real = (ids != self.pad_id).astype(np.int32)
            positions = np.cumsum(is_real, axis=1, dtype=np.int32) * is_real - 1
        types = None
        if token_type_ids is not None and self.config.num_token_types:
            types = jnp.asarray(np.asarray(token_type_ids, np.int32))
        return *map(jnp.asarray, (ids, mask, positions)), types

    def generate(
        self,
        input_ids: Int[np.ndarray, "B T"],
        attention_mask: Int[np.ndarray, "B T"] | Bool[np.ndarray, "B T"] | None = None,
        *,
        do_sample: bool = False,
        seed: int = 0,
        **settings: Any,
    ) -> Int[np.ndarray, "B S"]:
        """Write a target for each row: greedy, or as `settings` say; they are `Generation`'s, such as num_beams.

        Returns ids with the one that starts them, padded to the longest.

        Raises:
          DataError: no decoder. ValueError: settings that contradict each other.
        """
        if self.decoder is None:
            raise DataError(f"only encoder-decoders generate: this model is a {self.task or 'bare encoder'}.")
        ids = self._ids(input_ids)
        mask = np.ones_like(ids) if attention_mask is None else (np.asarray(attention_mask) > 0).astype(np.int32)
        generation = dataclasses.replace(self.generation, is_drawn=do_sample, **settings)
        # A multiple of 32, so that few shapes are compiled.
        ids, mask = (jnp.asarray(np.pad(x, [(0, 0), (0, -x.shape[1] % 32)])) for x in (ids, mask))
        key = jax.random.key(seed) if do_sample else None
        text = np.asarray(generate(self.model, ids, mask, generation, key=key))
        is_over = np.cumsum(text[:, 1:] == generation.end_id, axis=1) > 0
        longest = 1 + min(int((~is_over).sum(1).max()) + 1, generation.max_new_tokens)
        return text[:, :longest]

    def _ids(self, ids: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        ids = np.asarray(ids, np.int32)
        if ids.min(initial=0) < 0 or ids.max(initial=0) >= self.config.vocab_size:
            raise DataError(f"token ids must lie in 0 .. {self.config.vocab_size - 1}: got {ids.min()} .. {ids.max()}.")
        return ids


def _encode_and_decode(model: EncoderDecoder, tokens, segment_ids, positions, target_tokens) -> dict[str, Array | None]:
    """The fields of `Output`, as `PretrainedModel` gives them."""
    hidden, states = model.encoder(tokens, segment_ids, positions, every_layer=True)
    out = {"last_hidden_state": hidden, "hidden_states": states, "pooler_output": None, "logits": None}
    if target_tokens is None:
        return out
    seen = jnp.ones_like(target_tokens)
    decoded, decoder_states = model.decoder(model.embed(target_tokens), hidden, seen, segment_ids, every_layer=True)
    return out | {"logits": model.logits(decoded), "decoder_hidden_states": decoder_states}


def is_published(path: str | pathlib.Path) -> bool:
    """Whether a folder is a published one, rather than a run's."""
    try:
        return "model_type" in json.loads((pathlib.Path(path) / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False


def load_pretrained(
    folder: str | pathlib.Path,
    *,
    task: Task | None = None,
    num_labels: int | None = None,
    allow_unused: bool = False,
    seed: int = 0,
) -> Pretrained:
    """Load a published folder: config.json, safetensors or pickled tensors, and whatever tokenizer it has.

    Args:
      task: the head to load; None is that of config.json's architectures, or else the one that the weights hold.
      num_labels: classes of a head that is not in the folder; None is config.json's.
      allow_unused: leave out tensors that nothing here reads, rather than refuse them.
      seed: for heads that the folder has not.

    Raises:
      ConfigError: an unknown model_type or architecture, a config field or a tensor that is not understood, a tensor
        of the wrong shape.
      WeightsError: weights that are missing, truncated or corrupt.
      DataError: a tokenizer that cannot be read, or has more tokens than the embedding.
    """
    folder = pathlib.Path(folder)
    published = _read_json(folder / "config.json")
    family = find_family(published)
    config = read_config(family, published)
    tensors = {name: w for name, w in read_weights(folder).items() if not BUFFERS.search(name)}
    task = task or _task(family, published, tensors)
    if task is not None and task not in family.heads:
        raise ConfigError(f"{family.model_type} has no {task} head; it has {', '.join(family.heads)}.")
    head, pooling = read_head(family, task, published) if task else (HeadConfig(), "cls")
    decoder = family.decoder(published, tensors) if family.decoder and task == "text_to_text" else None
    label_names = [str(name) for _, name in sorted((published.get("id2label") or {}).items(), key=lambda x: int(x[0]))]
    num_outputs = num_labels or len(label_names) or published.get("num_labels") or 2
    if task and family.heads[task].num_outputs:
        num_outputs = family.heads[task].num_outputs
    plain_names = {name.removeprefix(family.prefix) for name in tensors}
    head_names = {
        n.removeprefix(family.prefix) for row in (family.heads[task].rows if task else ()) for n in row.theirs
    }
    has_pooler = any(row.theirs[0] in plain_names - head_names for row in family.pooler)

    def make_model():
        if decoder is not None:
            return EncoderDecoder(config, decoder, rngs=nnx.Rngs(seed))
        return PretrainedModel(config, task, head, num_outputs, pooling, has_pooler, rngs=nnx.Rngs(seed))

    graphdef, abstract = abstract_model(make_model)
    shapes = {path: leaf.shape for path, leaf in _flat(nnx.to_pure_dict(abstract)).items()}
    imported = import_tensors(family, task, tensors, shapes, config.num_heads)
    fresh = tuple(sorted(set(shapes) - set(imported.params)))
    _check_unused(folder, family, imported.unused, allow_unused)
    if fresh:
        made = _flat(nnx.to_pure_dict(nnx.split(make_model())[1]))
        imported.params.update({path: np.asarray(made[path]) for path in fresh})
        logger.warning("%s has no %s: made anew from seed %d", folder, ", ".join(fresh), seed)
    model = nnx.merge(graphdef, _nested({path: jnp.asarray(value) for path, value in imported.params.items()}))
    tokenizer = None
    if any((folder / name).exists() for name in TOKENIZER_FILES):
        tokenizer = read_tokenizer(folder)
        if tokenizer.vocab_size > config.vocab_size:
            raise DataError(
                f"the embedding must hold every token: the tokenizer in {folder} has {tokenizer.vocab_size} and the "
                f"embedding {config.vocab_size}."
            )
    pad_id = published.get("pad_token_id")
    pad_id = config.position_offset - 1 if family.counts_real_tokens else pad_id or 0
    names = label_names if len(label_names) == num_outputs else [f"LABEL_{i}" for i in range(num_outputs)]
    return Pretrained(
        model,
        config,
        tokenizer,
        family,
        task,
        head,
        pooling,
        names if task == "classification" else None,
        pad_id,
        fresh,
        decoder,
        _generation(published) if decoder else None,
    )


def _generation(published: Mapping[str, Any]) -> Generation:
    pad = published.get("pad_token_id") or 0
    start, end = published.get("decoder_start_token_id"), published.get("eos_token_id", 1)
    if isinstance(end, list):
        raise ConfigError(f"eos_token_id must be one id: got {end}.")
    return Generation(start_id=pad if start is None else start, end_id=end, pad_id=pad)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"no published model in {path.parent}: {path.name}: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must be a JSON object: got {type(value).__name__}.")
    return value


def _task(family: Family, published: Mapping[str, Any], tensors: Mapping[str, Any]) -> Task | None:
    """What a folder is for: what its config says, or else the first head of which it has every tensor's first name."""
    architecture = (published.get("architectures") or [None])[0]
    known = {name: task for task, head in family.heads.items() for name in head.architectures}
    if architecture is not None and architecture not in (*known, family.base):
        raise ConfigError(
            f"architecture {architecture!r} of {family.model_type} is not known; known are "
            f"{', '.join([family.base, *known])}. Give task= to load it as one of them."
        )
    if architecture is not None:
        return known.get(architecture)
    has = {task: any(row.theirs[0] in tensors for row in head.rows) for task, head in family.heads.items()}
    return next((task for task in has if has[task]), None)


def _check_unused(folder: pathlib.Path, family: Family, unused: list[str], allow_unused: bool) -> None:
    known = {name.removeprefix(family.prefix) for h in family.heads.values() for row in h.rows for name in row.theirs}
    known |= {h.tied for h in family.heads.values()} | {n for row in family.pooler for n in row.theirs}
    expected = [
        name for name in unused
        if name.removeprefix(family.prefix) in known or any(re.search(p, name) for p in family.leftovers)
    ]  # fmt: skip
    if expected:
        logger.warning("%s: left out %s, which what is loaded does not read", folder, ", ".join(expected))
    if (unknown := sorted(set(unused) - set(expected))) and not allow_unused:
        raise ConfigError(
            f"{folder} has tensors that nothing here reads: {', '.join(unknown[:8])}"
            f"{' ...' if len(unknown) > 8 else ''}. allow_unused=True leaves them out."
        )


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {".".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def as_run(loaded: Pretrained) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what a checkpoint says of its run, the parameters that the folder had), as `read_run` and `read_params` give.

    A folder whose head is of no objective is a masked_lm run without its head.

    Raises:
      DataError: no tokenizer, without which there is no run.
    """
    if loaded.tokenizer is None:
        raise DataError(f"a run needs a tokenizer, and the folder has none: looked for {', '.join(TOKENIZER_FILES)}.")
    keeps_head = loaded.task in OBJECTIVES
    limit = loaded.config.max_length if loaded.config.position == "learned" else DataConfig.row_length
    config = RunConfig(
        objective=loaded.task if keeps_head else "masked_lm",
        model=loaded.config,
        head=loaded.head if keeps_head else HeadConfig(),
        pooling=loaded.pooling,
        data=DataConfig(row_length=min(DataConfig.row_length, limit)),
    )
    params = _flat(nnx.to_pure_dict(nnx.split(loaded.model)[1]))
    kept = ("encoder.", "head.") if keeps_head else ("encoder.",)
    params = {path: value for path, value in params.items() if path.startswith(kept) and path not in loaded.fresh}
    # Names of classes that a head made anew has are nobody's.
    label_names = loaded.label_names if "head.out.kernel" in params else None
    run = {"config": to_dict(config), "tokenizer": loaded.tokenizer.json, "label_names": label_names, "step": 0}
    return run, _nested(params)


def read_origin(path: str | pathlib.Path, task: Task) -> tuple[dict[str, Any], Any]:
    """(run, parameters) of what `init_from` names: a run folder, a checkpoint or a published folder.

    `task` is the head to load of a published folder, as far as it has one; a run folder has its own.
    """
    path = pathlib.Path(path)
    if not is_published(path):
        return read_run(path), read_params(path)
    family = find_family(_read_json(path / "config.json"))
    return as_run(load_pretrained(path, task=task if task in family.heads else None))


def open_model(path: str | pathlib.Path) -> LoadedRun:
    """A run folder, a checkpoint or a published folder, ready to be asked.

    Raises:
      DataError: a published folder without the head of a run's objective.
    """
    path = pathlib.Path(path)
    if not is_published(path):
        return load_run(path)
    loaded = load_pretrained(path)
    if loaded.task not in OBJECTIVES or loaded.fresh:
        raise DataError(
            f"{path} must have the head of a {' or '.join(OBJECTIVES)} run to be asked: it has {loaded.task or 'none'}"
            f"{', which the weights lack' if loaded.fresh else ''}."
        )
    return _loaded_run(loaded)


def _loaded_run(loaded: Pretrained) -> LoadedRun:
    """What is missing of the head is made anew."""
    run, params = as_run(loaded)
    config = from_dict(RunConfig, run["config"])
    make_model = model_factory(config, run["label_names"])
    graphdef, abstract = abstract_model(make_model)
    own = _flat(params)
    if fresh := [path for path in _flat(nnx.to_pure_dict(abstract)) if path not in own]:
        made = _flat(nnx.to_pure_dict(nnx.split(make_model())[1]))
        params = _nested(own | {path: made[path] for path in fresh})
        logger.warning("a %s run needs %s: made anew", config.objective, ", ".join(fresh))
    return LoadedRun(nnx.merge(graphdef, params), config, loaded.tokenizer, run["label_names"], 0)


def import_folder(folder: str | pathlib.Path, out: str | pathlib.Path) -> None:
    """Make a run folder of a published one: what is trained from, asked or exported like any other.

    A folder without a masked_lm or classification head gets a new masked_lm one, which is named in a log line.

    Raises:
      ConfigError: `out` has something in it already. And whatever `load_pretrained` raises.
    """
    out = pathlib.Path(out)
    _refuse_filled(out)
    model = _loaded_run(load_pretrained(folder))
    config = to_dict(dataclasses.replace(model.config, run_dir=str(out)))
    settings = {"config": config, "tokenizer": model.tokenizer.json, "label_names": model.label_names}
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "tokenizer.json", model.tokenizer.json)
    write_atomically(out / "config.json", json.dumps(config, indent=1) + "\n")
    with Checkpoints(out, keep=1) as checkpoints:
        params = nnx.to_pure_dict(nnx.split(model.model)[1])
        checkpoints.save(TrainState(jnp.zeros((), jnp.int32), params, {}), 0, settings)


def export_run(
    run_dir: str | pathlib.Path,
    out: str | pathlib.Path,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    model_type: str | None = None,
    encoder_only: bool = False,
) -> str:
    """Write a run, a checkpoint or a published folder as one that transformers opens. Returns its architecture there.

    Args:
      dtype: of the weights.
      model_type: the family to write it as; None takes the first that can say it.
      encoder_only: leave out the head.

    Raises:
      ConfigError: no published family can say this model, with what keeps the given, or the nearest, from it; `out`
        has something in it already.
    """
    out = pathlib.Path(out)
    _refuse_filled(out)
    is_bare = encoder_only and is_published(run_dir)
    run = _loaded_run(load_pretrained(run_dir)) if is_bare else open_model(run_dir)
    config, task = run.config, None if encoder_only else run.config.objective
    family, published = _published_config(config, model_type, task)
    pad = run.tokenizer.special("pad")
    if published.setdefault("pad_token_id", pad) != pad:
        raise ConfigError(
            f"{family.model_type} counts positions from its padding's id, {published['pad_token_id']}: the tokenizer's "
            f"is {pad}."
        )
    names = run.label_names or []
    if names and task:
        published |= {
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
        }
    params = _flat(nnx.to_pure_dict(nnx.split(run.model)[1]))
    params = {path: np.asarray(x) for path, x in params.items() if task or path.startswith("encoder.")}
    tensors = export_tensors(family, task, params, config.model.num_heads)
    write_weights(out, tensors, dtype)
    for name, value in {"config.json": published | {"dtype": dtype}, **_tokenizer_files(run.tokenizer, config)}.items():
        write_atomically(out / name, value if isinstance(value, str) else json.dumps(value, indent=1) + "\n")
    return published["architectures"][0]


def _published_config(config: RunConfig, model_type: str | None, task: str | None) -> tuple[Family, dict[str, Any]]:
    candidates = [f for f in FAMILIES if model_type in (None, f.model_type)]
    if not candidates:
        known = ", ".join(sorted({f.model_type for f in FAMILIES}))
        raise ConfigError(f"model_type {model_type!r} is not known; known are {known}.")
    reasons = []
    for family in candidates:
        if model_type is None and task is not None and task not in family.heads:
            continue
        if not family.is_in_transformers:
            reasons.append(f"transformers has no {family.base}: it can read no folder of {family.model_type}.")
            continue
        try:
            return family, write_config(family, config.model, task, config.head, config.pooling)
        except ConfigError as error:
            reasons.append(str(error))
    nearest = min(reasons, key=lambda reason: reason.count("(there ") or len(reasons), default="none")
    raise ConfigError(
        f"no published family can say this model; nearest: {nearest}" if model_type is None else reasons[0]
    )


def _tokenizer_files(tokenizer: TextTokenizer, config: RunConfig) -> dict[str, Any]:
    """tokenizer.json, which puts special tokens around texts as runs do, and what transformers asks beside it."""
    roles = {"pad": "pad", "unk": "unknown", "cls": "first", "sep": "last", "mask": "mask"}
    named = {f"{theirs}_token": tokenizer.token(tokenizer.special(ours)) for theirs, ours in roles.items()}
    text = tokenizer.json
    if json.loads(text).get("post_processor") is None:
        first, last = named["cls_token"], named["sep_token"]
        own = Tokenizer.from_str(text)
        own.post_processor = TemplateProcessing(
            single=f"{first} $A {last}",
            pair=f"{first} $A {last} $B:1 {last}:1",
            special_tokens=[(first, tokenizer.special("first")), (last, tokenizer.special("last"))],
        )
        text = own.to_str(pretty=True)
    limit = {"model_max_length": config.model.max_length} if config.model.position == "learned" else {}
    return {
        "tokenizer.json": text,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **named, **limit},
        "special_tokens_map.json": named,
    }


def _refuse_filled(folder: pathlib.Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} must be empty or new: it has {sorted(folder.iterdir())[0].name}.")
