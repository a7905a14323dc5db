"""What a run's model is among the published families: its config there, and the head that they would put on it."""

from typing import Any

from flax_encoder.config import ConfigError, HeadConfig, RunConfig
from flax_encoder.families import FAMILIES
from flax_encoder.families.mapping import Family, read_head, write_config
from flax_encoder.tasks import find_task


def published_config(config: RunConfig, model_type: str | None, task: str | None) -> tuple[Family, dict[str, Any]]:
    """(family, config.json) of a run's encoder, and of the head of `task` on it: the first family that can say both.

    Args:
      model_type: the family; None is any.

    Raises:
      ConfigError: no family can, with what keeps the given, or the nearest, from it.
    """
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


def family_head(origin: RunConfig, objective: str) -> HeadConfig:
    """The head of `objective` as the family of another run's model has it, so that the run can be exported; what is
    left open where no family has both."""
    task = find_task(objective).head
    try:
        family, published = published_config(origin, None, find_task(origin.objective).head)
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
