"""How devices are laid out, and what a model must have for its rows to be cut over them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flax_encoder.config.model import EncoderConfig
from flax_encoder.config.rules import ConfigError, ShortRepr, require

MESH_AXES = ("data", "fsdp", "tensor", "context")


@dataclass(frozen=True, repr=False)
class MeshConfig(ShortRepr):
    """Devices along each axis of the mesh; the product is the number of devices used. One axis may be -1, which takes
    the devices that the others leave."""

    data: int = -1
    """Rows are split, parameters copied."""
    fsdp: int = 1
    """Rows and parameters are both split."""
    tensor: int = 1
    """Heads, MLP and vocabulary are split."""
    context: int = 1
    """The tokens of each row are split, parameters copied: for rows too long for one device's memory."""
    num_processes: int = 1
    """That train together, as one on each of several machines; the mesh is over all their devices. They find each other
    by what started them (Slurm, Kubernetes, Open MPI, Cloud TPU), or by JAX_COORDINATOR_ADDRESS (host:port of the
    first) and JAX_PROCESS_ID, and share run_dir."""

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
        """Devices along each axis, of so many in all; with -1 at least 1, though then they may be more than there are.
        """
        given = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor, "context": self.context}
        left = max(1, num_devices // math.prod(size for size in given.values() if size > 0))
        return {name: left if size == -1 else size for name, size in given.items()}


def check_context(
    parts: int, model: EncoderConfig, row_lengths: Sequence[int], target_length: int | None = None
) -> None:
    """The rules of rows that are cut into parts, each on a device of its own.

    Args:
      row_lengths, target_length: tokens of the encoder's rows, and of the decoder's, where they are known.

    Raises:
      ConfigError: a model that must have a row's tokens together, or a length that does not divide.
    """
    if parts == 1:
        return
    way_out = "give --mesh.context 1, and split rows by --mesh.data or --mesh.fsdp"
    require(
        model.layer == "attention",
        f"mesh.context splits the tokens of a row, and a recurrent layer reads them one after the other: got context "
        f"{parts} with model.layer {model.layer}; {way_out}.",
    )
    require(
        model.relative_position != "disentangled" and not model.conv_width,
        f"mesh.context splits the tokens of a row, and disentangled attention and convolutions need them together: got "
        f"context {parts} with model.relative_position {model.relative_position} and model.conv_width "
        f"{model.conv_width}; {way_out}.",
    )
    require(
        model.attention_implementation not in ("rows", "splash") or None not in model.windows,
        f"with mesh.context the queries of a device are fewer than the keys of its rows, which attention "
        f"{model.attention_implementation} does not take outside a window: got context {parts}; leave "
        f"model.attention_implementation None.",
    )
    lengths = {f"rows of {length} tokens": length for length in row_lengths}
    lengths |= {} if target_length is None else {f"data.target_length {target_length}": target_length}
    for name, length in lengths.items():
        if length % parts:
            below = length // parts * parts
            ways = f"{below} and {below + parts} do" if below else f"{parts} does"
            raise ConfigError(
                f"mesh.context must divide the tokens of a row, since each device has as many: got {name} for context "
                f"{parts}; {ways}."
            )
