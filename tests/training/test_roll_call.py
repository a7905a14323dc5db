"""Processes that work together hear of it when one of them is gone, and not when it has done its work."""

import threading
import time

import pytest

from flax_encoder.training.roll_call import RollCall


class Store:
    """As JAX's, of one machine."""

    def __init__(self):
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        assert allow_overwrite
        self.values[key] = value

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        return [(name, value) for name, value in self.values.items() if name.startswith(key)]


class Line:
    """The first that is said, if any is within so many seconds."""

    def __init__(self):
        self.text, self._is_said = "", threading.Event()

    def __call__(self, text: str) -> None:
        self.text = self.text or text
        self._is_said.set()

    def within(self, seconds: float) -> str:
        self._is_said.wait(seconds)
        return self.text


def of_three(store, said, *indices):
    return [RollCall(store, i, 3, said, limit_seconds=0.5, seconds_between=0.02) for i in indices]


def test_a_process_that_never_counts_is_named():
    said = Line()
    calls = of_three(Store(), said, 0, 1)
    assert said.within(10).startswith("process 2 of 3 has not been heard of for 0.5 s")
    for call in calls:
        call.leave()


def test_a_process_that_stops_counting_is_named_with_its_machine():
    class CutOff(Store):
        """Of a process whose machine is gone: nothing that it sets arrives."""

        def __init__(self, store):
            self.values, self.is_off = store.values, False

        def key_value_set(self, key, value, allow_overwrite=False):
            if not self.is_off:
                super().key_value_set(key, value, allow_overwrite)

    store, said = Store(), Line()
    lost = CutOff(store)
    calls = [*of_three(store, said, 0, 1), *of_three(lost, lambda line: None, 2)]
    assert said.within(1.0) == ""
    lost.is_off = True
    assert said.within(10).startswith("process 2 of 3 (pid ")
    for call in calls:
        call.leave()


def test_a_process_that_failed_is_named_with_its_error():
    store, said = Store(), Line()
    first, second, third = of_three(store, said, 0, 1, 2)
    third.leave("DataError: no such file")
    assert said.within(10) == "process 2 of 3 failed: DataError: no such file"
    first.leave()
    second.leave()


def test_a_process_that_has_done_its_work_is_not_waited_for():
    store, said = Store(), Line()
    first, second, third = of_three(store, said, 0, 1, 2)
    third.leave()
    assert said.within(1.5) == ""
    first.leave()
    second.leave()


@pytest.mark.parametrize("others", [("failed too",) * 2, (None,) * 2])
def test_the_first_leaves_at_once_when_the_others_know(others):
    """It keeps the store: what it failed by is to be read there."""
    first, *rest = of_three(Store(), lambda line: None, 0, 1, 2)
    began = time.monotonic()
    for call, error in zip(rest, others, strict=True):
        call.leave(error)
    first.leave("the disk is full")
    assert time.monotonic() - began < 0.5
