"""A run's adapters as a folder that PEFT opens beside the published model that they were trained on."""

import json
import pathlib

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from flax_encoder.config import ConfigError
from flax_encoder.families import find_family
from flax_encoder.families.adapters import export_adapters
from flax_encoder.families.configs import write_config
from flax_encoder.nn.partition import flatten
from flax_encoder.published.load import is_published, load_pretrained, read_json
from flax_encoder.runs.best import best_checkpoint
from flax_encoder.runs.exchange import refuse_filled
from flax_encoder.runs.record import read_record
from flax_encoder.tasks import find_task
from flax_encoder.training.checkpoint import read_params
from flax_encoder.training.run_log import write_atomically

# What PEFT calls the tasks of heads; it wraps the model in a class of that task.
TASK_TYPES = {
    "classification": "SEQ_CLS", "token_classification": "TOKEN_CLS", "question_answering": "QUESTION_ANS"
}  # fmt: skip


def export_adapter(
    run_dir: str | pathlib.Path, out: str | pathlib.Path, base: str | pathlib.Path | None = None
) -> int:
    """Write the adapters and the head of a run, or of one of its checkpoints, as a folder that
    `peft.PeftModel.from_pretrained(model, OUT)` opens, `model` being the base. Returns how many linear maps have them.

    Args:
      base: the published folder whose encoder the adapters stand beside; None is what the run started from.

    Raises:
      ConfigError: the run has no adapters; the base is no published folder, or its encoder is another; the head is one
        that PEFT's folders do not hold; `out` has something in it already.
    """
    out, path = pathlib.Path(out), best_checkpoint(run_dir)
    refuse_filled(out)
    record = read_record(path)
    config, head = record.config, find_task(record.config.objective).head
    if not config.lora.rank:
        raise ConfigError(f"--adapter writes the adapters of a run with lora.rank: {run_dir} has none. Leave it out.")
    if head is not None and head not in TASK_TYPES:
        raise ConfigError(
            f"PEFT's folders hold heads of {', '.join(TASK_TYPES)}, and {run_dir} has a {head} head: export it without "
            f"--adapter, which adds the adapters into the model."
        )
    base = pathlib.Path(base or config.init_from or "")
    if not is_published(base):
        raise ConfigError(
            f"adapters stand beside a published model: {run_dir} started from {base}, which is none. Export that first "
            f"(python -m flax_encoder export {base} FOLDER), and give --base FOLDER."
        )
    params = {name: np.asarray(x) for name, x in flatten(read_params(path)).items()}
    family = find_family(read_json(base / "config.json"))
    write_config(family, config.model, head, config.head, config.pooling)  # or its error: what the family cannot say
    _check_base(base, params)
    adapters = {
        name.removeprefix("lora.").removesuffix(".a"): (x, params[f"{name.removesuffix('.a')}.b"])
        for name, x in params.items()
        if name.startswith("lora.") and name.endswith(".a")
    }
    own = {name: x for name, x in params.items() if not name.startswith("lora.")}
    shapes = {name: x.shape for name, x in own.items()}
    written = export_adapters(family, head, adapters, own, shapes, config.lora, config.model.num_heads)
    settings = written.settings | {
        "task_type": TASK_TYPES.get(head or ""), "base_model_name_or_path": str(base.resolve())
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(x, np.float32) for name, x in written.tensors.items()}
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    write_atomically(out / "adapter_config.json", json.dumps(settings, indent=1) + "\n")
    return len(settings["target_modules"])


def _check_base(base: pathlib.Path, params: dict[str, np.ndarray]) -> None:
    loaded = load_pretrained(base, allow_unused=True)
    theirs = flatten(nnx.to_pure_dict(nnx.split(loaded.model)[1]))
    for name, x in params.items():
        if name.startswith("encoder.") and not np.array_equal(x, theirs.get(name, np.nan)):
            raise ConfigError(
                f"adapters stand beside the model that they were trained on: {name} is another in {base}. Give --base."
            )
