"""Published weight folders: load them.

A folder holds config.json, weights and a tokenizer; `families` says what their fields and tensors mean. What is not
understood is an error that names it, and what is left out or made up is named in a log line.
"""

import dataclasses
import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from flax_encoder.config import ConfigError, HeadConfig
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.tokenizer_files import read_tokenizer
from flax_encoder.families import find_family
from flax_encoder.families.configs import fields_left_unread, read_config, read_head
from flax_encoder.families.family import Family, Head, understood
from flax_encoder.families.tensors import import_tensors, plain_name, unwrapped, with_table
from flax_encoder.nn.decoder import EncoderDecoder
from flax_encoder.nn.partition import abstract_model, flatten, unflatten
from flax_encoder.published.folder import (  # noqa: F401 - who opens folders has all of it from here
    TOKENIZER_FILES,
    is_published,
    read_json,
    read_published_config,
)
from flax_encoder.published.generation_settings import read_settings
from flax_encoder.published.model import Pretrained, PretrainedModel
from flax_encoder.published.tasks import NO_HEAD, Task
from flax_encoder.published.weights import read_weights

logger = logging.getLogger(__name__)

ALONE = 'task="none" (on the command line --task none)'
# Buffers that older files carry: positions 0, 1, 2 ..., masks and rotations, which follow from the config.
BUFFERS = re.compile(r"(^|\.)(position_ids|token_type_ids|inv_freq|freqs_cis|alibi)$")


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
