"""A run's model as one of the published families: its config and its head there."""

import dataclasses
from typing import Any, NamedTuple

from flax_encoder.config import ConfigError, GenerationConfig, HeadConfig, RunConfig
from flax_encoder.families import FAMILIES
from flax_encoder.families.configs import read_head, write_config
from flax_encoder.families.family import Family
from flax_encoder.tasks import find_task


class AsPublished(NamedTuple):
    family: Family
    config: dict[str, Any]
    """config.json."""
    query_factor: float
    """Of queries, which stands for a scale of attention that the family cannot say."""


def published_config(config: RunConfig, model_type: str | None, task: str | None) -> AsPublished:
    """A run's encoder, and the head of `task` on it, as the first family has them that can say both.

    Args:
      model_type: the family; None is any.

    Raises:
      ConfigError: no family can, with what keeps the given, or the nearest, from it; or the layers are recurrent.
    """
    if config.model.layer != "attention":
        raise ConfigError(
            f"transformers has no encoder of {config.model.layer} layers, and no other library's format is written "
            f"here. `export {config.run_dir} FILE --stablehlo` writes a program that jax runs without this library; "
            f"`embed`, `predict` and `load` take the run as it is."
        )
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
            decoder = config.decoder if has_decoder(task) else None
            model, factor = config.model, 1.0
            if (fixed := family.fixed.get("attention_scale")) is not None and model.layer == "attention":
                own = model.head_dim**-0.5 if model.attention_scale is None else model.attention_scale
                model, factor = dataclasses.replace(model, attention_scale=fixed), own / fixed
            said = write_config(family, model, task, config.head, config.pooling, decoder)
            answers = family.heads[task].objective if task else None
            if answers not in (None, config.objective):
                raise ConfigError(
                    f"the {task} head of {family.model_type} is of another objective: {config.objective} (there "
                    f"{answers}). --pooling mean writes the encoder alone."
                )
            return AsPublished(family, said, factor)
        except ConfigError as error:
            reasons.append(str(error))
    nearest = min(reasons, key=lambda reason: reason.count("(there ") or len(reasons), default="none")
    raise ConfigError(
        f"no published family can say this model; nearest: {nearest}" if model_type is None else reasons[0]
    )


def has_decoder(task: str | None) -> bool:
    return task == "text_to_text"


def generation_said(config: RunConfig) -> GenerationConfig:
    """How a run writes, with the length that follows from its data."""
    length = config.generation.max_new_tokens or config.data.target_length
    return dataclasses.replace(config.generation, max_new_tokens=length)


def family_head(origin: RunConfig, objective: str) -> HeadConfig:
    """The head of `objective` as the family of another run's model has it, so that the run can be exported; what is
    left open where no family has both."""
    task = find_task(objective).head
    if has_decoder(task):
        return HeadConfig()
    try:
        family, published, _ = published_config(origin, None, find_task(origin.objective).head)
    except ConfigError:
        return HeadConfig()
    return read_head(family, task, published)[0] if task in family.heads else HeadConfig()


def export_note(config: RunConfig) -> str | None:
    """Why a run that is about to be trained cannot be exported with its head, where its encoder alone can."""
    task = find_task(config.objective).head
    if task is None:
        return None
    try:
        published_config(config, None, None)
    except ConfigError:
        return None
    try:
        published_config(config, None, task)
    except ConfigError as error:
        return f"this model will be asked and embedded with here, and not exported whole: {error}"
    return None
