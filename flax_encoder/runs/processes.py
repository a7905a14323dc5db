"""Questions to a model by several processes that were started together: each works on its share of the stream.

All read the whole stream, which is little work beside the model's, and each works on every N-th block of it. After N
blocks, one each, the results go to all; so none is ahead of the others by more than a block, memory is bounded, results
come in the stream's order, and a stream may be gone on with by another number of processes.
"""

import contextlib
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_encoder.config import ConfigError
from flax_encoder.data.sources.records import DataError
from flax_encoder.training.roll_call import tell_failure
from flax_encoder.training.runtime import join_processes

Item, Result = TypeVar("Item"), TypeVar("Result")


@contextlib.contextmanager
def together(num_processes: int) -> Iterator[bool]:
    """Join the other processes, for a command that they share; gives whether this is the first, which writes.

    Raises:
      ConfigError: they cannot be found, or are not as many.
    """
    if num_processes < 1:
        raise ConfigError(f"--num-processes is how many were started, from 1: got {num_processes}.")
    join_processes(num_processes)
    try:
        yield jax.process_index() == 0
    except BaseException as error:
        tell_failure(error)
        raise


def blocks_of_all(
    items: Iterable[Item], work: Callable[[list[Item]], Result], size: int
) -> Iterator[tuple[int, Result]]:
    """(number of a block's first item, what `work` makes of the block) of all blocks, in order, to every process.

    Args:
      items: the same in every process.
      work: called for this process's blocks. Its results are pickled where there are several processes.
      size: items of a block.

    Raises:
      DataError: the work of another process failed; the message has its error. What `work` raises here.
    """
    items, first = iter(items), 0
    count, index = jax.process_count(), jax.process_index()
    while True:
        starts, own = [], None
        for number in range(count):
            if not (block := list(itertools.islice(items, size))):
                break
            starts.append(first)
            first += len(block)
            own = block if number == index else own
        if not starts:
            return
        results = _of_all(None if own is None else own, work)
        yield from zip(starts, results[: len(starts)], strict=True)


def _of_all(block: Any, work: Callable[[Any], Any]) -> list[Any]:
    """Every process's result of its block, by their indices; a process without a block has None."""
    if jax.process_count() == 1:
        return [work(block)]
    error, result = None, None
    try:
        result = None if block is None else work(block)
    except Exception as raised:
        error = raised
    told = None if error is None else f"{type(error).__name__}: {error}"
    found = [pickle.loads(raw) for raw in gathered(pickle.dumps((told, result)))]  # of this run's own processes
    if error is not None:
        raise error
    for number, (told, _) in enumerate(found):
        if told is not None:
            raise DataError(f"process {number} of {len(found)} failed: {told}")
    return [result for _, result in found]


def gathered(value: bytes) -> list[bytes]:
    """Every process's bytes, by their indices, in every process."""
    lengths = multihost_utils.process_allgather(np.int32(len(value))).tolist()
    room = 1 << max(max(lengths) - 1, 0).bit_length()  # a power of two: few programs are compiled
    rows = multihost_utils.process_allgather(np.frombuffer(value.ljust(room, b"\0"), np.uint8))
    return [rows[i, :length].tobytes() for i, length in enumerate(lengths)]


def as_first_has_it(value: int) -> int:
    """The first process's number, in every process."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(value)))
