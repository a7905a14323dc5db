"""Work that is done ahead of whoever wants it."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
_LOOK_SECONDS = 0.1  # between looks at whether anyone still wants items
_JOIN_SECONDS = 2.0


def read_ahead(items: Iterable[Item], size: int) -> Iterator[Item]:
    """The same items, made by a thread of their own, at most `size` before they are asked for.

    What `items` raises is raised here, after the items before it. A generator that is closed, or left for good, ends
    the thread, as soon as it does not wait for an item itself.
    """
    made: queue.Queue[tuple[Item | None, BaseException | None, bool]] = queue.Queue(size)
    is_over = threading.Event()

    def put(*entry) -> None:
        while not is_over.is_set():
            try:
                return made.put(entry, timeout=_LOOK_SECONDS)
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put(item, None, False)
                if is_over.is_set():
                    return
            put(None, None, True)
        except BaseException as error:  # it is raised where the items are read
            put(None, error, True)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            item, error, is_last = made.get()
            if error is not None:
                raise error
            if is_last:
                return
            yield item
    finally:
        is_over.set()
        thread.join(_JOIN_SECONDS)  # no longer: it may wait for a pipe
