"""How devices are laid out, and what a model must have for its rows to be cut over them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flax_encoder.config.model import EncoderConfig
from flax_encoder.config.rules import ConfigError, ShortRepr, require

MESH_AXES = ("data", "fsdp", "tensor", "context")


@dataclass(frozen=True, repr=False)
class MeshConfig(ShortRepr):
    """Devices along each axis of the mesh; the product of the axes is the number of devices. One axis may be -1, which
    takes the devices that the others leave."""

    data: int = -1
    """Devices that split the rows of a batch; each has all parameters."""
    fsdp: int = 1
    """Devices that split both rows and parameters."""
    tensor: int = 1
    """Devices that split heads, feed-forward blocks and the vocabulary."""
    context: int = 1
    """Devices that split the tokens of each row, for rows too long for one device's memory; each has all parameters."""
    num_processes: int = 1
    """Processes that train together, usually one per machine; the mesh covers all their devices. They find each other
    through their launcher (Slurm, Kubernetes, Open MPI, Cloud TPU), or through JAX_COORDINATOR_ADDRESS (host:port of
    the first process) and JAX_PROCESS_ID, and share run_dir."""

    def __post_init__(self):
        for name in (*MESH_AXES, "num_processes"):
            size, is_axis = getattr(self, name), name in MESH_AXES
            or_all = ", or -1 for all that are left" * is_axis
            require(size > 0 or (size == -1 and is_axis), f"mesh.{name} is at least 1{or_all}: got {size}.")
            require(size < 2**31, f"mesh.{name} must be below 2147483648, as sizes and counts are: got {size}.")
        open_axes = [name for name in MESH_AXES if getattr(self, name) == -1]
        require(
            len(open_axes) <= 1,
            f"one axis of the mesh may be -1, which takes the devices that the others leave: got -1 for "
            f"{' and '.join(open_axes)}. Give the others, such as --mesh.{open_axes[0] if open_axes else 'data'} 1.",
        )

    def sizes(self, num_devices: int) -> dict[str, int]:
        """The number of devices along each axis, for `num_devices` in all. An axis of -1 is at least 1, so the product
        may exceed `num_devices`."""
        given = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor, "context": self.context}
        left = max(1, num_devices // math.prod(size for size in given.values() if size > 0))
        return {name: left if size == -1 else size for name, size in given.items()}


def check_context(
    parts: int, model: EncoderConfig, row_lengths: Sequence[int], target_length: int | None = None
) -> None:
    """Check that rows can be cut into parts, one on each device.

    Args:
      parts: mesh.context.
      row_lengths, target_length: tokens of the encoder's rows, and of the decoder's, where they are known.

    Raises:
      ConfigError: the model needs all tokens of a row on one device, or `parts` does not divide a length.
    """
    if parts == 1:
        return
    way_out = "give --mesh.context 1, and split rows by --mesh.data or --mesh.fsdp"
    require(
        model.layer == "attention",
        f"mesh.context splits the tokens of a row, but a recurrent layer reads them one after the other: got context "
        f"{parts} with model.layer {model.layer}; {way_out}.",
    )
    require(
        model.relative_position != "disentangled" and not model.conv_width,
        f"mesh.context splits the tokens of a row, but disentangled attention and convolutions need all of them: got "
        f"context {parts} with model.relative_position {model.relative_position} and model.conv_width "
        f"{model.conv_width}; {way_out}.",
    )
    require(
        model.attention_implementation not in ("rows", "splash") or None not in model.windows,
        f"with mesh.context a device has fewer queries than keys, which attention "
        f"{model.attention_implementation} cannot compute in layers without a window: got context {parts}; leave "
        f"model.attention_implementation None.",
    )
    lengths = {f"rows of {length} tokens": length for length in row_lengths}
    lengths |= {} if target_length is None else {f"data.target_length {target_length}": target_length}
    for name, length in lengths.items():
        if length % parts:
            below = length // parts * parts
            ways = f"{below} and {below + parts} do" if below else f"{parts} does"
            raise ConfigError(
                f"mesh.context must divide the number of tokens in a row: got {name} for context {parts}; {ways}."
            )
