"""A model as one file of StableHLO, which runs wherever XLA does, without this library."""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from flax_encoder.config import ConfigError
from flax_encoder.ops.platform import platform_for_tracing
from flax_encoder.runs.loaded import LoadedRun

PLATFORMS = ("cpu", "cuda", "tpu")


def as_function(run: LoadedRun) -> Callable[..., dict[str, Array]]:
    """The model as a function of arrays alone, one text or pair a row.

    The function takes `input_ids`, `attention_mask` and, where the model has token types, `token_type_ids`, each int32
    [B, T] as tokenizers make them, padded on the right. It returns `last_hidden_state`, float32 [B, T, D], and `logits`
    of the head: [B, T, C] of heads for tokens, [B, C] of heads for texts; an encoder alone has none.

    Raises:
      ConfigError: a model that writes text, whose steps a program cannot hold, or that reads several choices.
    """
    columns = run.task.reading.columns
    if columns.is_choice or columns.writes:
        raise ConfigError(
            f"a program holds an encoder, and a head for texts or tokens: this model is {run.config.objective}. "
            f"`export` without --stablehlo writes it as a folder."
        )
    settings = {"remat": "none"}
    if run.config.model.layer == "attention":  # by its definition: kernels are for one platform, tiles for one length
        settings["attention_implementation"] = "reference"
    graphdef, params = nnx.split(run.with_model_settings(**settings).model)
    answers_for = None if run.fresh else run.task.answers_for

    def apply(input_ids, attention_mask, token_type_ids=None):
        model = nnx.merge(graphdef, params)
        places = jnp.broadcast_to(jnp.arange(input_ids.shape[1], dtype=jnp.int32), input_ids.shape)
        batch = {
            "tokens": input_ids, "segment_ids": attention_mask, "positions": places,
            "target_positions": places if answers_for == "tokens" else places[:, :1],
        }  # fmt: skip
        if token_type_ids is not None:
            batch["token_types"] = token_type_ids
        rows = (batch["tokens"], batch["segment_ids"], batch["positions"], batch.get("token_types"))
        made = {"last_hidden_state": model.encoder(*rows)}
        if answers_for is not None:
            logits = model(batch)
            made["logits"] = logits if answers_for == "tokens" else logits[:, 0]
        return made

    return apply


def export_stablehlo(
    run: LoadedRun, path: str | pathlib.Path, platforms: Sequence[str] = PLATFORMS
) -> tuple[str, ...]:
    """Write `as_function(run)` with its parameters to a file that `jax.export.deserialize` reads; B and T stay open.

    Returns:
      the names of its arguments.

    Raises:
      ConfigError: as `as_function`; something is at `path` already; or `flatbuffers` is not installed, by which it is
        written.
    """
    path = pathlib.Path(path)
    if path.exists():
        raise ConfigError(f"a program is written to a file that is not there yet: {path} is. Give another name.")
    try:
        import flatbuffers as _  # noqa: F401
    except ImportError:
        raise ConfigError("StableHLO is written by flatbuffers: pip install 'flax-encoder[stablehlo]'.") from None
    rows, length = jax.export.symbolic_shape("rows, length")
    names = ("input_ids", "attention_mask", "token_type_ids")[: 3 if run.config.model.num_token_types else 2]
    shapes: list[Any] = [jax.ShapeDtypeStruct((rows, length), jnp.int32)] * len(names)
    # Traced as for a TPU, whose code has no constraints of layouts, which are for this machine.
    with platform_for_tracing("tpu"):
        program = jax.export.export(jax.jit(as_function(run)), platforms=list(platforms))(*shapes)
    partial = path.with_name(path.name + ".partial")  # so that what has the name is whole
    partial.write_bytes(program.serialize())
    os.replace(partial, path)
    return names
