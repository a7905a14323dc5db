"""What a checkpoint says of its run besides parameters and optimizer state."""

import dataclasses
import pathlib
from dataclasses import dataclass
from typing import Any

from flax_encoder.config import RunConfig, from_dict, to_dict
from flax_encoder.data.tokens.tokenizer import TextTokenizer
from flax_encoder.training.checkpoint import read_run

# Settings that came later, at the value that runs from before had: their data stays the same.
_BEFORE = {"held_out_by_class": False}
# Settings of the learning rate that a schedule does not read, by schedule: runs from before it was refused have them.
_UNREAD = {"wsd": (), "constant": ("decay_rate", "final_rate")}
_WITH_TRANSFORM = ("masked_lm", "classification")  # objectives whose head has a transform where none is said


@dataclass(frozen=True)
class RunRecord:
    """A run as its checkpoint keeps it; `to_json` and `from_json` are inverse."""

    config: RunConfig
    tokenizer: TextTokenizer
    label_names: list[str] | None = None
    """Of classes or tags, in the order of the head's outputs."""
    step: int = 0
    """Updates made."""
    spent_seconds: float = 0.0
    """Training time that counts for the budget."""
    data_hash: str | None = None
    """Of the prepared text (`RunData.hash`); None where there was none."""
    skipped_steps: tuple[int, ...] = ()
    """Whose updates were left out, as their loss or gradient was not finite or exploded."""
    grad_norms: tuple[tuple[int, float], ...] = ()
    """(step, norm) of the last updates, by which is told what has exploded; empty where nothing can have."""

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "config": to_dict(self.config),
            "tokenizer": self.tokenizer.json,
            "label_names": self.label_names,
            "step": self.step,
            "spent_seconds": self.spent_seconds,
            "data": self.data_hash,
            **({"skipped_steps": list(self.skipped_steps)} if self.skipped_steps else {}),
            **({"grad_norms": [list(pair) for pair in self.grad_norms]} if self.grad_norms else {}),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunRecord":
        """Of any version's checkpoint.

        Raises:
          ConfigError: a setting that is not known, or of a wrong type.
        """
        config = dict(values["config"])
        data = _BEFORE | config.get("data", {})
        if "label_names" not in data and data.get("label_column") == "label":
            del data["label_column"]  # the default of before there was a guess, which finds the same column
        config["data"] = data
        if (schedule := config.get("optimizer", {}).get("schedule")) is not None:
            unread = _UNREAD.get(schedule, ("decay_rate",))
            config["optimizer"] = {name: value for name, value in config["optimizer"].items() if name not in unread}
        if config.get("objective") in _WITH_TRANSFORM and config.get("head", {}).get("transform"):
            config["head"] = config["head"] | {"transform": None}  # the same, and the default since heads differ in it
        return cls(
            from_dict(RunConfig, config),
            TextTokenizer(values["tokenizer"]),
            values.get("label_names"),
            values.get("step", 0),
            values.get("spent_seconds", 0.0),
            values.get("data"),
            tuple(values.get("skipped_steps", ())),
            tuple((step, norm) for step, norm in values.get("grad_norms", ())),
        )

    def replace(self, **fields: Any) -> "RunRecord":
        return dataclasses.replace(self, **fields)


def read_record(path: str | pathlib.Path) -> RunRecord:
    """That of a checkpoint, or of a run folder's newest one.

    Raises:
      CheckpointError: there is none, or it cannot be read.
    """
    return RunRecord.from_json(read_run(pathlib.Path(path)))
